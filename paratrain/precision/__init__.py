"""What is computed in which dtype: `policy` (weights, compute, inputs, outputs) and `loss_scale` (float16's range)."""

from paratrain.precision.loss_scale import LossScaler
from paratrain.precision.policy import POLICIES, Policy, convert_module

__all__ = ["POLICIES", "LossScaler", "Policy", "convert_module"]
