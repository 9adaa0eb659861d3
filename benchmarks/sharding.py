"""Memory a rank holds under each strategy, against theory, and step time against loops written by hand with DDP and `fully_shard`.

python -m benchmarks.sharding: on CPU processes over gloo.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks import report
from paratrain import spawn
from paratrain.api import setup
from paratrain.config import DDP, FSDP, HSDP, Config, Parallel, SyntheticData, Trainer, Zero1, Zero2, Zero3
from paratrain.loss import cross_entropy
from paratrain.models.gpt import GPT

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": DDP()},
    "zero1": {"strategy": Zero1()},
    "zero2": {"strategy": Zero2()},
    "zero3": {"strategy": Zero3()},
    "fsdp": {"strategy": FSDP()},
    "hsdp": {"strategy": HSDP(), "parallel": Parallel(dp_replicate=2)},
}
VOCAB, LENGTH, BATCH = 256, 64, 4
ROUNDS, STEPS = 60, 2


def model() -> nn.Module:
    torch.manual_seed(0)
    return GPT(VOCAB, LENGTH, layers=4, dim=256, heads=4, tied=False)


def config(**sections: Any) -> Config:
    return replace(Config(data=SyntheticData(), trainer=Trainer(clip_norm=1.0, device="cpu")), **sections)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def theory(name: str, shards: int) -> tuple[float, float]:
    """Bytes a parameter takes on a rank in float32 with AdamW: between steps, and between two micro-batches.

    Weights and gradients have 4 each, states 8. ZeRO-1 and ZeRO-2 keep whole weights while a step runs, ZeRO-1 whole gradients too
    (Rajbhandari et al., 2020, figure 1, without the float16 copies). DistributedDataParallel keeps its buckets of gradients for good.
    """
    if name == "ddp":
        return 16, 16
    between = 12 / shards
    return between, between + {"zero1": 4 + 4, "zero2": 4 + 4 / shards}.get(name, 4 / shards)


def live_bytes() -> int:
    """Bytes of every tensor that Python can reach, each storage once."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def memory(names: list[str]) -> dict[str, tuple[float, float]]:
    """Bytes a parameter on this rank, between steps and between two micro-batches."""
    inputs, targets = batch()
    count = sum(param.numel() for param in model().parameters())
    rows = {}
    for name in names:
        before = live_bytes()
        engine = setup(model, cross_entropy, config(**STRATEGIES[name]))
        engine.blueprint = None
        engine.train_step((inputs, targets))
        between = live_bytes() - before
        with engine.no_sync():
            engine.backward(cross_entropy(engine(inputs), targets))
        inside = live_bytes() - before
        engine.backward(cross_entropy(engine(inputs), targets))
        engine.step()
        rows[name] = between / count, inside / count
        del engine
    return rows


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    decayed = [param for param in module.parameters() if param.ndim > 1]
    others = [param for param in module.parameters() if param.ndim < 2]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=1e-3, fused=True)


def by_hand(run: Callable[[torch.Tensor], torch.Tensor], module: nn.Module) -> Callable[[], None]:
    inputs, targets = batch()
    update = optimizer(module)

    def step() -> None:
        loss = nn.functional.cross_entropy(run(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        update.step()
        update.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)  # a loop that reports the loss of the global batch
        float(total)

    return step


def hand_ddp() -> Callable[[], None]:
    module = model()
    return by_hand(DistributedDataParallel(module, gradient_as_bucket_view=True), module)


def hand_fully_shard() -> Callable[[], None]:
    module = model()
    for block in module.get_submodule("blocks").children():
        fully_shard(block)
    return by_hand(fully_shard(module), module)


def ours(name: str, **options: Any) -> Callable[[], None]:
    sections = STRATEGIES[name]
    engine = setup(model, cross_entropy, config(**{**sections, "strategy": replace(sections["strategy"], **options)}))
    share = batch()

    def step() -> None:
        float(engine.train_step(share).loss)

    return step


def times() -> dict[str, list[float]]:
    """Milliseconds a step of each candidate, in turn."""
    steps = {
        "hand-written DDP": hand_ddp(),
        "strategy=ddp": ours("ddp"),
        "strategy=ddp, find_unused_parameters=false": ours("ddp", find_unused_parameters=False),
        "hand-written fully_shard": hand_fully_shard(),
        "strategy=fsdp": ours("fsdp"),
    }

    def measure(step: Callable[[], None]) -> float:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        return 1e3 * (time.perf_counter() - began) / STEPS

    for step in steps.values():
        measure(step)
    return report.interleaved({name: lambda step=step: measure(step) for name, step in steps.items()}, ROUNDS)


def main() -> None:
    rows: dict[str, Any] = {}
    for ranks in (2, 4):
        names = [name for name in STRATEGIES if ranks == 4 or name != "hsdp"]
        measured = spawn.run(memory, ranks, names, timeout=600)
        for name in names:
            expected = theory(name, 2 if name == "hsdp" else ranks)
            found = [max(rank[name][moment] for rank in measured) for moment in (0, 1)]
            print(f"{ranks} ranks, {name:6} between steps {found[0]:6.2f} (theory {expected[0]:5.2f})   "
                  f"between micro-batches {found[1]:6.2f} (theory {expected[1]:5.2f}) bytes a parameter")  # fmt: skip
            rows[f"memory, {ranks} ranks, {name}"] = {
                "bytes a parameter between steps": round(found[0], 3),
                "theory": expected[0],
                "bytes a parameter between micro-batches": round(found[1], 3),
                "theory between micro-batches": expected[1],
            }
    taken = spawn.run(times, 2, timeout=1200)[0]
    for name, values in taken.items():
        rival = "hand-written fully_shard" if "fsdp" in name or "fully_shard" in name else "hand-written DDP"
        ratios = [mine / other for mine, other in zip(values, taken[rival], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:44} {report.spread(values)} ms   {middle:.3f} ({low:.3f} to {high:.3f}) of {rival}")
        rows[f"time, 2 ranks, {name}"] = {
            "ms": report.spread(values),
            "ratio": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
        }
    report.write(
        "sharding",
        rows,
        f"float32 AdamW on a GPT of {sum(p.numel() for p in model().parameters())} parameters; gloo; bytes are those of all live tensors, the rank "
        f"with most; times are medians (middle half) of {ROUNDS} rounds in turn, ratios are of the same round",
    )


if __name__ == "__main__":
    main()
