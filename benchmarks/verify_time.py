"""How long verify takes for a 4-layer GPT of 10 million parameters on 4 ranks: `python -m benchmarks.verify_time`."""

from __future__ import annotations

import os
import time

import torch

import paratrain
from paratrain.config import Config, SyntheticData
from paratrain.models.gpt import GPT


def model() -> GPT:
    return GPT(4096, 64, layers=4, dim=384, heads=6, dropout=0.1)


def main() -> None:
    tokens = torch.randint(0, 4096, (8, 65), generator=torch.Generator().manual_seed(0))
    batch = (tokens[:, :-1].clone(), tokens[:, 1:].clone())
    cfg = Config(data=SyntheticData(global_batch=8, micro_batch_size=1))
    began = time.monotonic()
    report = paratrain.verify(model, paratrain.cross_entropy, batch, cfg, ranks=4)
    seconds = time.monotonic() - began
    print(report.text())
    size = sum(param.numel() for param in model().parameters()) / 1e6
    print(
        f"\ntorch {torch.__version__.partition('+')[0]}, {size:.1f}M parameters, 8 x 64 tokens, 4 ranks, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}: {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
