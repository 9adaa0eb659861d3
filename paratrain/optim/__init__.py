"""Optimizers from a config (`build`) and learning-rate schedules as pure functions of the step (`schedules`)."""

from paratrain.optim.build import build

__all__ = ["build"]
