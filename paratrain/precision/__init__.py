"""What is computed in which dtype: `policy` (weights, compute, inputs, outputs), `loss_scale` (float16's range),
`fallback` (what leaves it), and `accumulate` (in what gradients are summed)."""

from paratrain.precision.fallback import Fallback
from paratrain.precision.loss_scale import LossScaler
from paratrain.precision.policy import POLICIES, Policy, convert_module

__all__ = ["POLICIES", "Fallback", "LossScaler", "Policy", "convert_module"]
