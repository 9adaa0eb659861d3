"""What each data rank alone would have contributed to a step, computed on one process: evidence for an explanation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from paratrain import batch as batches
from paratrain import rng

if TYPE_CHECKING:
    from paratrain.verify.trace import Key


@dataclass
class Part:
    """One micro-batch of one rank: the sum and count of its loss, and its gradient of the sum."""

    total: float
    count: float
    grad: Tensor | None = None


@dataclass
class Solo:
    """A step taken apart.

    Attributes:
        parts: micro-batches by rank.
        norms: norm of each rank's own gradient of its sum, over all parameters.
        outputs: what the module in question returns for a rank's samples alone.
        buffers: what the buffer in question becomes after a rank's samples alone.
        uses: where one parameter has several names: the gradient of the sum through each of them.
    """

    parts: list[list[Part]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    uses: dict[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> float:
        return sum(part.count for rank in self.parts for part in rank)


Measure = Callable[[Any, Any, int], tuple[Tensor, Any]]  # (inputs, targets, real samples) -> (sum, count) of the loss


def solo(model: nn.Module, measure: Measure, batch: tuple[Any, Any], ranks: int, micro_batch_size: int | None, key: Key) -> Solo:
    """Take the step that `model` is about to take on `batch` apart into what `ranks` data ranks would contribute; changes nothing."""
    found = Solo()
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    aliases = _aliases(model, key.name)
    target = next((name for name in aliases if name in params), key.name)
    with rng.preserved(torch.device("cpu")), _buffers_restored(model):
        start = {name: buffer.clone() for name, buffer in model.named_buffers()}
        for rank in range(ranks):
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(start[name])
            parts: list[Part] = []
            outputs: list[Tensor] = []
            grads = {name: torch.zeros_like(param) for name, param in params.items()}
            local = batches.local(batch, rank, ranks)
            for inputs, targets, real in batches.split(local, micro_batch_size):
                with _captured(model, key, outputs):
                    total, count = measure(inputs, targets, real)
                found_grads = torch.autograd.grad(total, list(params.values()), allow_unused=True)
                own = dict(zip(params, found_grads, strict=True))
                for name, grad in own.items():
                    if grad is not None:
                        grads[name] += grad
                parts.append(Part(float(total.detach()), float(count), _double(own.get(target))))
            found.parts.append(parts)
            found.norms.append(math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values())))
            if outputs:
                found.outputs.append(torch.cat(outputs))
            buffers = dict(model.named_buffers())
            if key.name in buffers:
                found.buffers.append(buffers[key.name].clone())
        if len(aliases) > 1:
            found.uses = _by_use(model, measure, batch, aliases)
    return found


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double()


def _aliases(model: nn.Module, name: str) -> list[str]:
    """Every name of the parameter called `name`."""
    params = dict(model.named_parameters(remove_duplicate=False))
    return [other for other, param in params.items() if name in params and param is params[name]]


def _by_use(model: nn.Module, measure: Measure, batch: tuple[Any, Any], aliases: list[str]) -> dict[str, Tensor]:
    """The gradient of a shared parameter through each of the modules that hold it."""
    owners = [(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in aliases]
    original = getattr(*owners[0])
    copies = [nn.Parameter(original.detach().clone()) for _ in owners]
    try:
        for (owner, attribute), copy in zip(owners, copies, strict=True):
            setattr(owner, attribute, copy)
        total, _ = measure(*batch, batches.samples(batch))
        grads = torch.autograd.grad(total, copies, allow_unused=True)
    finally:
        for owner, attribute in owners:
            setattr(owner, attribute, original)
    return {name: grad.detach().double() for name, grad in zip(aliases, grads, strict=True) if grad is not None}


@contextlib.contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])


@contextlib.contextmanager
def _captured(model: nn.Module, key: Key, into: list[Tensor]) -> Iterator[None]:
    """Collect what the module that `key` names returns."""
    path = key.name.partition(" (call")[0].partition("[")[0]
    modules = dict(model.named_modules())
    module = model if key.name.startswith("(the model)") else modules.get(path)
    if key.kind != "activation" or module is None:
        yield
        return

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        into.extend([leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()][:1])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
