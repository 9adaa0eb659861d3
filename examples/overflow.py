"""Half precision that looks after itself: a deep model without norms whose activations grow beyond float16.

python examples/overflow.py                                    # float32, plain float16, float16 with fallback: losses and a plot
torchrun --nproc_per_node=2 examples/overflow.py               # the same over two processes
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import paratrain as pt

VOCAB, WIDTH, BLOCKS = 32, 64, 16


class Block(nn.Module):
    """Residual block without a norm: about doubles the size of the activations."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        nn.init.normal_(self.up.weight, std=2.0 / WIDTH**0.5)
        nn.init.normal_(self.down.weight, std=0.8 / WIDTH**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Grows(nn.Module):
    """The last three of 16 blocks work on numbers beyond 65504; a norm before the output layer brings them back."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


class Chain(torch.utils.data.Dataset):
    """Walks of a random Markov chain, whose next token the model learns."""

    def __init__(self, samples: int = 2048, length: int = 17):
        generator = torch.Generator().manual_seed(0)
        table = torch.softmax(3 * torch.randn(VOCAB, VOCAB, generator=generator), 1)
        walk = [torch.randint(0, VOCAB, (samples,), generator=generator)]
        for _ in range(length - 1):
            walk.append(torch.multinomial(table[walk[-1]], 1, generator=generator).squeeze(1))
        self.walks = torch.stack(walk, 1)

    def __len__(self) -> int:
        return len(self.walks)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.walks[i, :-1], self.walks[i, 1:]


def train(cfg: pt.Config, name: str) -> list[dict]:
    """The logged lines of a run; those before the error where it fails."""
    trainer = pt.Trainer(
        replace(cfg, output_dir=f"{cfg.output_dir or 'runs/overflow'}/{name}", resume="auto"), Grows, pt.cross_entropy, Chain()
    )
    try:
        trainer.fit()
    except pt.UserError as error:
        if trainer.engine.is_main_process:
            print(f"{name}: failed at step {trainer.engine.global_step}: {str(error).splitlines()[0]}")
    if trainer.engine.fallback is not None and trainer.engine.is_main_process:
        for event in trainer.engine.fallback.events:
            print(f"  step {event['step']}: {event['module'] or 'the whole model'} -> {event['event']}: {event['why']}")
    return logged(trainer.output_dir)


def logged(directory: Path) -> list[dict]:
    """The lines of metrics.jsonl; a loss that is not finite is None."""
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plot(runs: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(7, 7), sharex=True, constrained_layout=True)
    panels = (("train/loss", "loss"), ("train/loss_scale", "loss scale"), ("precision/half_modules", "fraction of modules in half"))
    for axis, (key, label) in zip(axes, panels, strict=True):
        for number, (name, lines) in enumerate(runs.items()):
            points = [line for line in lines if line.get(key) is not None]
            curve = name if points or key != "train/loss" else f"{name}: no step has a finite loss"
            axis.plot([line["step"] for line in points], [line[key] for line in points], label=curve, color=f"C{number}")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[1].set_yscale("log", base=2)
    axes[2].set_ylim(0, 1.05)
    axes[2].set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def jobs(overrides: list[str]) -> dict[str, list[str]]:
    """Name -> overrides of each run."""
    common = ["data.global_batch=64", "optimizer.lr=3e-4", "trainer.max_steps=200", "trainer.log_every=1", "trainer.clip_norm=1.0"]
    common += ["logger.sinks=[jsonl]", "checkpoint.at_end=false", *overrides]
    fp16 = ["precision=fp16", "precision.loss_scale.growth_interval=100", "precision.fallback.every=5", "precision.fallback.calm=100"]
    return {
        "fp32": ["precision=fp32", *common],
        "fp16": ["precision=fp16", *common],
        "fp16, fallback=module": [*fp16, "precision.fallback.policy=module", *common],
    }


def main(overrides: list[str]) -> None:
    runs = {
        name: train(pt.load_config(options), name.partition(",")[0] + "-module" * ("," in name))
        for name, options in jobs(overrides).items()
    }
    if int(torch.distributed.get_rank()) == 0:
        for name, lines in runs.items():
            losses = [line["train/loss"] for line in lines if line.get("train/loss") is not None]
            tail = losses[-20:]
            half = [line["precision/half_modules"] for line in lines if "precision/half_modules" in line]
            print(
                f"{name}: {len(losses)} steps, mean loss of the last 20: {sum(tail) / max(len(tail), 1):.4f}"
                + (f", least fraction in half: {min(half):.2f}" if half else "")
            )
        plot(runs, Path("overflow.png"))


if __name__ == "__main__":
    main(sys.argv[1:])
