"""Optimizers from a config (`build`), and learning-rate schedules as pure functions of the step (`schedules`)."""

from paratrain.optim.build import add, build
from paratrain.optim.low_bit import LowBitAdamW
from paratrain.optim.matrix import SOAP, Muon, Shampoo
from paratrain.optim.offload import OffloadedAdamW, stream_states

__all__ = ["SOAP", "LowBitAdamW", "Muon", "OffloadedAdamW", "Shampoo", "add", "build", "stream_states"]
