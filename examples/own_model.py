"""Train a module of your own in ten lines.

python examples/own_model.py
torchrun --nproc_per_node=2 examples/own_model.py precision=bf16 optimizer.lr=3e-3     # the same training over two processes
"""

import sys

import torch
from torch import nn

import paratrain as pt

cfg = pt.load_config(["data.global_batch=64", "optimizer.lr=1e-2", "trainer.max_steps=200", *sys.argv[1:]])
engine = pt.setup(lambda: nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1)), nn.functional.mse_loss, cfg)
generator = torch.Generator().manual_seed(cfg.seed)
for _ in range(cfg.trainer.max_steps):
    x = torch.randn(cfg.data.global_batch, 8, generator=generator)  # every rank draws the same global batch and trains on its part
    step = engine.train_step(engine.local((x, x.square().mean(dim=1, keepdim=True))))
    if engine.is_main_process and engine.global_step % 20 == 0:
        print(f"step {engine.global_step}  loss {step.loss:.4f}  grad norm {step.grad_norm:.3f}")
