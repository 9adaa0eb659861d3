"""How evenly tokens are spread over the experts of a mixture, over all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from paratrain.callbacks import Callback
from paratrain.compat import in_backward
from paratrain.errors import UserError
from paratrain.parallel import experts

if TYPE_CHECKING:
    from paratrain.trainer import Trainer


class ExpertLoad(Callback):
    """Logs the load of the busiest and of the idlest expert of all mixtures since the last log, each over the mean load of its mixture.

    `moe/load_max` and `moe/load_min` are 1 where the load is even. Loads are summed over micro-batches and ranks, so no layout changes
    them (but for filler samples, where a batch has fewer samples than there are ranks). Experts in lists are not counted.
    """

    def on_fit_start(self, trainer: Trainer) -> None:
        self.loads: list[torch.Tensor] = []
        for module, form in experts.fused(trainer.engine.model):
            self._watch(module, form, trainer.engine.device)
        if not self.loads and trainer.engine.mesh.root["pp"].size() == 1:
            raise UserError("callbacks: ExpertLoad: the model has no module with the weights of all its experts; leave it out")

    def _watch(self, module: nn.Module, form: experts.Form, device: torch.device) -> None:
        load = torch.zeros(form.experts, device=device, dtype=torch.int64)
        self.loads.append(load)

        def count(module: nn.Module, args: Any, kwargs: Any) -> None:
            if module.training and torch.is_grad_enabled() and not in_backward():  # there, blocks are computed again
                index = {**dict(zip(form.parameters, args, strict=False)), **kwargs}[form.names[1]]
                load.add_(torch.bincount(index.flatten(), minlength=form.experts)[: form.experts])

        module.register_forward_pre_hook(count, with_kwargs=True)

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        mesh = trainer.engine.mesh
        extremes = torch.full((2,), -float("inf"), dtype=torch.float64, device=trainer.engine.device)
        for load in self.loads:
            dist.all_reduce(load, group=mesh.weights.get_group())
            relative = load / load.double().mean().clamp(min=1e-9)
            extremes = torch.maximum(extremes, torch.stack([relative.max(), -relative.min()]))
            load.zero_()
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=mesh.root["pp"].get_group())
        metrics["moe/load_max"], metrics["moe/load_min"] = float(extremes[0]), -float(extremes[1])
