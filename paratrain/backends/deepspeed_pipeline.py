"""DeepSpeed's pipeline engine over the stages that `parallel.pipeline` cuts.

To DeepSpeed each stage is one layer of a `PipelineModule`; it orders forwards and backwards, moves what crosses a boundary, and reduces. What
an update divides by, and when it happens, stays with our engine: DeepSpeed's own step would average the means of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from paratrain.config import Config
from paratrain.distributed import seed_for
from paratrain.errors import UserError
from paratrain.mesh import Mesh
from paratrain.parallel.pipeline import Around, Calls, Cut, Pipeline


class DeepSpeedPipeline(Pipeline):
    """A `Pipeline` whose training steps DeepSpeed's `PipelineEngine` runs. Evaluation and sampling run as in ours.

    Attributes:
        engine: the `PipelineEngine` around `module()`; set once it is made.
    """

    def __init__(self, made: Cut, mesh: Mesh, cfg: Config, device: torch.device):
        super().__init__(made, mesh, cfg, device, sharded=False)
        self.engine: Any = None
        self._stage = _Stage(self.model, self._forward)
        self._step: _Step | None = None

    def module(self, optimizer: torch.optim.Optimizer) -> nn.Module:
        """The model as DeepSpeed wants it. Collective.

        DeepSpeed sums the norms of each group of parameters over the stages: `optimizer` gets as many groups on all of them as one has, and
        each a parameter at least.
        """
        from deepspeed.pipe import PipelineModule

        groups = optimizer.param_groups
        options = {key: value for key, value in groups[0].items() if key not in ("params", "param_names")}
        for _ in range(max(self.everywhere(len(groups))) - len(groups)):
            optimizer.add_param_group({"params": [], "param_names": [], **options})
        for number, group in enumerate(groups):
            if not group["params"]:
                self._stage.fillers.append(nn.Parameter(torch.zeros(1, device=self._wire.device)))
                group["params"].append(self._stage.fillers[-1])
                group["param_names"].append(f"filler {number}")
        ranks = self.group.size()
        made = PipelineModule([self._stage] * ranks, num_stages=ranks, loss_fn=self._loss, partition_method="uniform", dynamic_shape=True)
        for param in made.parameters():
            param.ds_pipe_replicated = param in self._lent  # counted once in the norm
        return made

    def drive(self, engine: Any) -> None:
        """Let `engine` run the steps."""
        from deepspeed.runtime.pipe import schedule

        self.engine = engine
        ours = (schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep)  # see `reduce` and `update`
        engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | dict.fromkeys(ours, lambda engine: None)
        # its own would hand out one buffer for tensors of different dtypes
        engine._allocate_or_extend_buffers = lambda index, shape, dtype: torch.empty(shape, dtype=dtype, device=self._wire.device)

    def train(self, calls: Calls, around: Around, finish: Callable[[int, Any], torch.Tensor], seeds: Sequence[int] = ()) -> None:
        from deepspeed.runtime.pipe import p2p

        _, routes, ready = self._ready(calls)
        self._step = _Step(ready, routes, around, finish, seeds)
        p2p.init_process_groups(self.engine.grid)  # a variable of its module: another engine of this process may have set it
        self.engine.micro_batches = len(calls)
        self.engine.set_dataiterator(iter([(torch.zeros(()), torch.zeros(()))] * len(calls)))  # every stage has the inputs already
        self.engine.total_loss = None
        self.engine._compute_loss = True
        self.engine._exec_schedule(self.engine._train_schedule())
        self._step = None

    def reduce(self, params: Sequence[torch.Tensor]) -> None:
        """Sum gradients of shared weights over their stages, and all of them over the data ranks, where ZeRO-1 keeps its part."""
        for param in self._stage.parameters():
            if param.grad is None and param.requires_grad:  # DeepSpeed knows no parameter without one
                param.grad = torch.zeros_like(param)
        self._sum_shared()
        self.engine._exec_reduce_grads()

    def update(self) -> None:
        """Clip and update."""
        self.engine._exec_optimizer_step()

    def _forward(self, received: Any) -> Any:
        assert self._step is not None
        step, number = self._step, self._step.number
        arrived = list(received) if self.rank else []
        with step.around(self.rank, number):
            outputs = self.split.run(step.calls[number], self.rank, step.routes[number], arrived, seed_for(*step.seeds, number))
        step.number += 1
        if self.is_last:
            step.arrived = arrived
            return outputs
        for output in outputs:
            if output.dtype not in self.engine.DTYPE_TO_ID or output.is_complex():  # it returns gradients of floats alone
                raise UserError(
                    f"parallel.pp: a tensor of {output.dtype} crosses from stage {self.rank} to the next, which DeepSpeed's pipeline cannot carry; "
                    f"write strategy=fsdp parallel.pp={self.group.size()}"
                )
        return _joined([output.contiguous() for output in outputs], arrived)

    def _loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        assert self._step is not None
        loss = self._step.finish(self._step.number - 1, outputs) * self.engine.gradient_accumulation_steps()
        return _joined([spoiling_gradients(loss)], self._step.arrived)[0]


def spoiling_gradients(loss: torch.Tensor) -> torch.Tensor:
    """A loss that, where it is not finite, makes every gradient so: DeepSpeed looks at these alone before it lets the weights be."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class _Stage(nn.Module):
    """What of a model one stage runs, as a layer, and parameters for groups that have none here."""

    def __init__(self, model: nn.Module, run: Callable):
        super().__init__()
        self.model = model
        self.fillers = nn.ParameterList()
        self._run = run

    def forward(self, received: Any) -> Any:
        return self._run(received)


class _Step:
    """One step: its micro-batches, and which comes next."""

    def __init__(self, calls: Sequence[Callable[[nn.Module], Any]], routes: list, around: Around, finish: Callable, seeds: Sequence[int]):
        self.calls, self.routes, self.around, self.finish, self.seeds = calls, routes, around, finish, seeds
        self.number = 0
        self.arrived: list[torch.Tensor] = []


def _joined(outputs: list[torch.Tensor], arrived: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """`outputs` with a gradient each, and a gradient for all that `arrived`: DeepSpeed sends one for every tensor of floats, used or not."""
    anchor = torch.zeros((), requires_grad=True)
    return _Join.apply(len(outputs), anchor, *outputs, *arrived)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, anchor: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.arrived = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors[count:]]
        outputs = tuple(tensor.view_as(tensor) for tensor in tensors[:count])
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        zeros = [
            torch.zeros(shape, dtype=dtype, device=device) if dtype.is_floating_point else None for shape, dtype, device in ctx.arrived
        ]
        return None, None, *grads, *zeros
