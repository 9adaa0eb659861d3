"""`torchrun --nproc_per_node=2 -m paratrain.train [group=choice ...] [key=value ...]`: train what the configuration describes."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace

from paratrain._hydra import main
from paratrain.config import Config

log = logging.getLogger(__name__)

FIRST_LOOK = 200  # steps of the plain command: about a minute on two CPU cores


@main()
def train(cfg: Config) -> float | None:
    """Train, and return what a sweep minimises: the last evaluation loss, or the last training loss where nothing is held out.

    Exits with code 75 when a signal ended training with a checkpoint.
    """
    from paratrain import build, data
    from paratrain.faults import INTERRUPTED, signals
    from paratrain.trainer import Trainer

    if not cfg.trainer.ends:
        log.warning("nothing says when to stop: training ends after trainer.max_steps=%d", FIRST_LOOK)
        cfg = replace(cfg, trainer=replace(cfg.trainer, max_steps=FIRST_LOOK))
    train_data, eval_data = data.build(cfg.data, cfg.seed)
    trainer = Trainer(cfg, build.model_fn(cfg), build.loss_fn(cfg), train_data, eval_data, callbacks=build.callbacks(cfg))
    metrics = trainer.fit()
    if trainer.interrupted:
        if trainer.engine.is_main_process:
            log.warning("interrupted after step %d; %s", trainer.engine.global_step, signals.how_to_go_on(cfg.resume))
        sys.exit(INTERRUPTED)
    return metrics.get("eval/loss", metrics.get("train/loss"))


if __name__ == "__main__":
    train()
