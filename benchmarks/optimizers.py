"""Every optimizer of `conf/optimizer`: what its states weigh, and whether it takes the same steps under every layout as in one process.

python -m benchmarks.optimizers
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

import paratrain as pt
from benchmarks import report
from paratrain import config, optim
from paratrain.config import Config, Optimizer, Parallel, Precision
from paratrain.errors import UserError
from paratrain.models.gpt import GPT
from paratrain.schema import from_dict
from paratrain.spawn import run

ROOT = Path(__file__).parents[1]
STEPS, BATCH, VOCAB, LENGTH = 4, 8, 32, 16
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> (ranks, sections of the configuration)
    "ddp": (2, {"strategy": config.DDP()}),
    "zero1": (2, {"strategy": config.Zero1()}),
    "fsdp": (2, {"strategy": config.FSDP()}),
    "tp": (2, {"strategy": config.DDP(), "parallel": Parallel(tp=2)}),
    "pp": (2, {"strategy": config.DDP(), "parallel": Parallel(pp=2)}),
    "hsdp": (4, {"strategy": config.HSDP(), "parallel": Parallel(dp_replicate=2, dp_shard=2)}),
    "fsdp + tp": (4, {"strategy": config.FSDP(), "parallel": Parallel(tp=2)}),
    "fairscale_oss": (2, {"strategy": config.FairScaleOSS()}),
    "deepspeed_zero2": (2, {"strategy": config.DeepSpeedZero2()}),
}
NEEDS = {"fairscale_oss": "fairscale", "deepspeed_zero2": "deepspeed"}


def options(name: str) -> Optimizer:
    return from_dict(Optimizer, yaml.safe_load((ROOT / "conf/optimizer" / f"{name}.yaml").read_text()))


def bytes_of_state(name: str) -> float | str:
    """Bytes of state per parameter of a GPT in float32, or why it cannot run here."""
    torch.manual_seed(0)
    model = GPT(vocab_size=512, seq_len=128, layers=4, dim=256, heads=4)
    try:
        optimizers = optim.build(options(name), model)
    except UserError as error:
        return _short(error)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    for optimizer in optimizers:
        optimizer.step()
    states = [v for optimizer in optimizers for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(v.numel() * v.element_size() for v in states if v.numel() > 1) / sum(param.numel() for param in model.parameters())


def precision_of(name: str, layout: str) -> Precision:
    """float64, where equality is seen to the last digits; float32 where states are quantised only then, or masters are float32."""
    return Precision("32-true" if name in ("adamw_8bit", "adamw_4bit") or layout.startswith("deepspeed") else "64-true")


def model() -> GPT:
    torch.manual_seed(3)
    return GPT(VOCAB, LENGTH, layers=2, dim=64, heads=4)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(STEPS):
        tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[torch.arange(LENGTH) >= torch.randint(1, LENGTH + 1, (BATCH, 1), generator=generator)] = -100
        made.append((tokens[:, :-1].contiguous(), targets))
    return made


def train(cfg: Config) -> tuple[list[float], dict[str, torch.Tensor]] | str:
    """Losses and weights, or why the configuration is refused."""
    try:
        engine = pt.setup(model, pt.cross_entropy, config.check(cfg))
    except UserError as error:
        return _short(error)
    return [engine.train_step(engine.local(batch)).loss for batch in batches()], engine.full_state_dict()


def configuration(name: str, layout: str, **sections: Any) -> Config:
    chosen = replace(options(name), lr=1e-2 if name not in ("lion", "muon") else 1e-3)
    trainer = config.Trainer(clip_norm=1.0, device="cpu")
    return Config(optimizer=chosen, precision=precision_of(name, layout), trainer=trainer, **sections)


def differences(names: list[str]) -> dict[str, dict[str, float | str]]:
    """optimizer -> layout -> largest difference of a weight from one process, or why it is refused."""
    alone = {
        (name, kind): train(replace(configuration(name, "", strategy=config.Single()), precision=Precision(kind)))
        for name in names
        for kind in {precision_of(name, layout).name for layout in LAYOUTS}
    }
    found: dict[str, dict[str, float | str]] = {name: {} for name in names}
    for layout, (ranks, sections) in LAYOUTS.items():
        if layout in NEEDS and importlib.util.find_spec(NEEDS[layout]) is None:
            continue
        results = run(lambda: {name: train(configuration(name, layout, **sections)) for name in names}, ranks, timeout=2400)[0]  # noqa: B023 - called at once
        for name, result in results.items():
            expected = alone[name, precision_of(name, layout).name]
            if isinstance(expected, str) or isinstance(result, str):
                found[name][layout] = expected if isinstance(expected, str) else str(result)
            else:
                found[name][layout] = max(float((result[1][key] - value).abs().max()) for key, value in expected[1].items())
            print(f"{name:18} {layout:16} {found[name][layout]}", flush=True)
    return found


def _short(error: Exception) -> str:
    return " ".join(str(error).split())


def main() -> None:
    names = sorted(path.stem for path in (ROOT / "conf/optimizer").glob("*.yaml"))
    compared = differences(names)
    rows = {name: {"class": options(name).target, "state": bytes_of_state(name), "differences": compared[name]} for name in names}
    report.write("optimizers", rows, f"{STEPS} steps of a GPT with masked tokens and clipping, each against the same steps of one process")


if __name__ == "__main__":
    main()
