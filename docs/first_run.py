"""Draw the loss and the throughput of a run from its metrics.jsonl, as the README shows them.

python docs/first_run.py runs/2026-01-31/12-00-00/metrics.jsonl picture.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GREY, BLUE, ORANGE = "#52514e", "#2a78d6", "#d9622b"


def main(log: str, picture: str) -> None:
    rows = [json.loads(line) for line in Path(log).read_text().splitlines()]
    train = [row for row in rows if "train/loss" in row]
    held_out = [row for row in rows if "eval/loss" in row]
    plt.rcParams.update({"font.size": 9, "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY})
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6), constrained_layout=True)
    left.plot([row["step"] for row in train], [row["train/loss"] for row in train], color=BLUE, label="training")
    left.plot([row["step"] for row in held_out], [row["eval/loss"] for row in held_out], "o", color=ORANGE, label="held out")
    left.set(title="loss (nats a byte)", ylim=(0, None))
    left.legend(frameon=False)
    rates = [row["throughput/tokens_per_sec"] / 1e3 for row in train]
    right.plot([row["step"] for row in train], rates, color=BLUE)
    right.set(title="throughput (thousand tokens a second)", ylim=(0, None))
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.title.set_size(10)
        axes.grid(axis="y", color="#e4e3df", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.savefig(picture, dpi=160, metadata={"Software": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
