"""Classify handwritten digits (8 x 8 pixels, shipped with scikit-learn) with a small vision transformer.

python examples/vision.py
torchrun --nproc_per_node=2 examples/vision.py precision=bf16 trainer.max_epochs=5
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import paratrain as pt


class ViT(nn.Module):
    """Images [batch, size, size] -> logits [batch, classes]: a plain module with nothing of paratrain in it."""

    def __init__(self, size=8, patch=2, dim=64, layers=3, heads=4, classes=10, dropout=0.1):
        super().__init__()
        self.patches = nn.Conv2d(1, dim, patch, stride=patch)
        self.positions = nn.Parameter(0.5 * torch.randn((size // patch) ** 2, dim))
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout, "gelu", batch_first=True, norm_first=True) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images.unsqueeze(1)).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class Accuracy(pt.Callback):
    """Adds `eval/accuracy` to every evaluation. The data is small, so every rank looks at all of it."""

    def __init__(self, images: Tensor, digits: Tensor):
        self.images, self.digits = images, digits

    @torch.no_grad()
    def on_eval_end(self, trainer, metrics):
        model, device = trainer.engine.model, trainer.engine.device
        dtype = next(model.parameters()).dtype
        model.eval()
        guesses = model(self.images.to(device, dtype)).argmax(dim=1).cpu()
        model.train()
        metrics["eval/accuracy"] = (guesses == self.digits).double().mean().item()


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 images [1797, 8, 8] with values from 0 to 1, and their classes [1797], in a fixed random order."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.images, dtype=torch.float32)[order] / 16, torch.tensor(found.target)[order]


def main(overrides: list[str]) -> None:
    length = ["data.global_batch=64", "trainer.max_epochs=20", "trainer.eval_every=5ep"]
    rate = ["optimizer.lr=2e-3", "scheduler=cosine", "scheduler.warmup_steps=50"]
    cfg = pt.load_config([*length, *rate, "checkpoint.at_end=false", *overrides])
    images, classes = digits()
    train = torch.utils.data.TensorDataset(images[:1400], classes[:1400])
    held_out = torch.utils.data.TensorDataset(images[1400:], classes[1400:])
    trainer = pt.Trainer(cfg, ViT, pt.cross_entropy, train, held_out, [Accuracy(*held_out.tensors)])
    metrics = trainer.fit()
    if trainer.engine.is_main_process:
        print(f"accuracy on held-out digits: {metrics['eval/accuracy']:.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
