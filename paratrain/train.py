"""`torchrun --nproc_per_node=2 -m paratrain.train [group=choice ...] [key=value ...]`: train what the configuration describes."""

from __future__ import annotations

from paratrain._hydra import main
from paratrain.config import Config


@main()
def train(cfg: Config) -> float | None:
    """Train, and return what a sweep minimises: the last evaluation loss, or the last training loss where nothing is held out."""
    from paratrain import build, data
    from paratrain.trainer import Trainer

    train_data, eval_data = data.build(cfg.data, cfg.seed)
    trainer = Trainer(cfg, build.model_fn(cfg), build.loss_fn(cfg), train_data, eval_data, callbacks=build.callbacks(cfg))
    metrics = trainer.fit()
    return metrics.get("eval/loss", metrics.get("train/loss"))


if __name__ == "__main__":
    train()
