"""An application of your own over paratrain: your conf directory, your model and data, your function.

python examples/own_conf/train.py
torchrun --nproc_per_node=2 examples/own_conf/train.py model.hidden=128 precision=bf16 app.grid=30
python examples/own_conf/train.py --help
"""

import torch

import paratrain as pt
from paratrain import build, data


@pt.main(config_path="conf", config_name="mine")
def main(cfg: pt.Config) -> None:
    train, held_out = data.build(cfg.data, cfg.seed)
    trainer = pt.Trainer(cfg, build.model_fn(cfg), build.loss_fn(cfg), train, held_out, build.callbacks(cfg))
    trainer.fit()
    if trainer.engine.is_main_process:
        draw(trainer.engine.model, cfg.app["grid"])


@torch.no_grad()
def draw(model: torch.nn.Module, size: int) -> None:
    """Print which class the model gives each point of the plane."""
    axis = torch.linspace(-1, 1, size)
    points = torch.cartesian_prod(-axis, axis).to(next(model.parameters()))
    for row in model(points).argmax(dim=1).view(size, size).tolist():
        print(" ".join(".#"[label] for label in row))


if __name__ == "__main__":
    main()
