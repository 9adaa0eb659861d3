"""Runs the actions of a schedule on one rank: forwards and backwards of its stages, and the transfers between them.

Each micro-batch may have shapes of its own. The first time that a kind of micro-batch crosses a boundary, a header with the shapes
goes before it; both sides know from the inputs, which every stage has, whether it is the first time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_flatten

from paratrain import batch as batches
from paratrain.distributed import seed_for
from paratrain.errors import UserError
from paratrain.parallel.pipeline_deferred import Deferred
from paratrain.parallel.pipeline_ghost import Ghost, NeedsValues
from paratrain.parallel.pipeline_schedule import Action
from paratrain.parallel.pipeline_split import Stages
from paratrain.parallel.pipeline_trace import Route

Call = Callable[[nn.Module], Any]  # calls a module with the inputs of a micro-batch


class Form(NamedTuple):
    """What a tensor in a message is like."""

    shape: tuple[int, ...]
    dtype: str
    differentiable: bool


class _Open(NamedTuple):
    """A forward whose backward is to come."""

    received: list[torch.Tensor]
    outputs: list[torch.Tensor]


class Wire:
    """Messages between the pipeline ranks of one column, in the order of the schedule."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.forms: dict[Any, list[Form]] = {}
        self._sent: list[tuple[dist.Work, torch.Tensor]] = []

    def send(self, tensors: Sequence[torch.Tensor], peer: int) -> None:
        for tensor in tensors:
            part = tensor.detach().contiguous()
            if part.numel():
                self._post(as_bytes(part), peer)

    def receive(self, forms: Sequence[Form], peer: int) -> tuple[list[torch.Tensor], list[dist.Work]]:
        tensors, works = [], []
        for form in forms:
            tensor = torch.empty(form.shape, dtype=getattr(torch, form.dtype), device=self.device)
            if tensor.numel():
                works += dist.batch_isend_irecv([dist.P2POp(dist.irecv, as_bytes(tensor), group=self.group, group_peer=peer)])
            tensors.append(tensor)
        return tensors, works

    def send_forms(self, key: Any, tensors: Sequence[torch.Tensor], peer: int) -> None:
        """Tell the shapes, once for each `key`, and each time which of the tensors told to be constants are so still.

        Raises:
            UserError: they are not those told before.
        """
        forms = [Form(tuple(t.shape), str(t.dtype).removeprefix("torch."), t.requires_grad) for t in tensors]
        if key not in self.forms:
            self.forms[key] = forms
            text = torch.frombuffer(bytearray(json.dumps(forms).encode()), dtype=torch.uint8).to(self.device)
            self._post(torch.tensor([text.numel()], device=self.device), peer)
            self._post(text, peer)
            return
        told = self.forms[key]
        if [form[:2] for form in told] != [form[:2] for form in forms]:
            raise UserError(
                "parallel.pp: the shapes of what a stage hands on depend on the values in the batch "
                f"({told} before, {forms} now for inputs of the same shapes); train with parallel.pp=1"
            )
        if constant := _may_change(told):  # requires_grad may be switched on while training goes on; off, gradients come back for nothing
            now = torch.tensor([forms[number].differentiable for number in constant], dtype=torch.uint8, device=self.device)
            self._post(now, peer)
            self._thaw(key, constant, now)

    def receive_forms(self, key: Any, peer: int) -> list[Form]:
        if key not in self.forms:
            size = torch.zeros(1, dtype=torch.int64, device=self.device)
            dist.recv(size, group=self.group, group_src=peer)
            text = torch.empty(int(size), dtype=torch.uint8, device=self.device)
            dist.recv(text, group=self.group, group_src=peer)
            self.forms[key] = [Form(tuple(shape), dtype, grad) for shape, dtype, grad in json.loads(bytes(text.tolist()))]
        elif constant := _may_change(self.forms[key]):
            now = torch.zeros(len(constant), dtype=torch.uint8, device=self.device)
            dist.recv(now, group=self.group, group_src=peer)
            self._thaw(key, constant, now)
        return self.forms[key]

    def _thaw(self, key: Any, constant: Sequence[int], now: torch.Tensor) -> None:
        for number, differentiable in zip(constant, now.tolist(), strict=True):
            if differentiable:
                self.forms[key][number] = self.forms[key][number]._replace(differentiable=True)

    def flush(self) -> None:
        """Wait until everything sent has left."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _post(self, tensor: torch.Tensor, peer: int) -> None:
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer)])
        self._sent += [(work, tensor) for work in works]


class Pass:
    """One pass of micro-batches through the stages.

    Args:
        calls: for each micro-batch, what calls the model with its inputs; the same on every stage.
        kinds: for each micro-batch, what its shapes depend on.
        routes: for each micro-batch, how it passes through the stages.
        around: context for the forward of (stage, micro-batch).
        finish: (micro-batch, outputs) -> what its backward starts from; called on the last stage.
        seeds: what random numbers that all stages draw alike depend on, beside the micro-batch.
        deferred: holds back gradients of weights, for schedules that compute these apart.
    """

    def __init__(
        self,
        split: Stages,
        wire: Wire,
        rank_of: Sequence[int],
        calls: Sequence[Call],
        kinds: Sequence[Any],
        routes: Sequence[Route],
        around: Callable[[int, int], AbstractContextManager],
        finish: Callable[[int, Any], torch.Tensor | None],
        deferred: Deferred | None,
        seeds: Sequence[int],
    ):
        self.split, self.wire, self.rank_of = split, wire, rank_of
        self.calls, self.kinds, self.routes, self.around, self.finish, self.deferred = calls, kinds, routes, around, finish, deferred
        self.seeds = seeds
        self.rank = wire.group.rank()
        self.arrived: dict[tuple[str, int, int], tuple[list[torch.Tensor], list[dist.Work]]] = {}
        self.open: dict[tuple[int, int], _Open] = {}
        self.put_off: dict[tuple[int, int], tuple[list, _Open | None, Any]] = {}

    def run(self, actions: Sequence[Action]) -> None:
        steps = {"F": self.forward, "B": self.backward, "I": self.backward_inputs, "W": self.backward_weights}
        transfers = {
            "SEND_F": self.send_forward,
            "RECV_F": self.receive_forward,
            "SEND_B": self.send_backward,
            "RECV_B": self.receive_backward,
        }
        for kind, stage, micro in actions:
            (steps | transfers)[kind](stage, micro)
        self.split.clear()
        self.wire.flush()

    def forward(self, stage: int, micro: int) -> None:
        received: list[torch.Tensor] = []
        if stage:
            received = self._take("F", stage, micro)
            for tensor, form in zip(received, self.wire.forms[self._key(stage, micro)], strict=True):
                tensor.requires_grad_(form.differentiable)
        self.split.clear()
        with self.around(stage, micro):
            outputs = self.split.run(self.calls[micro], stage, self.routes[micro], received, seed_for(*self.seeds, micro))
        if stage + 1 == self.split.stages:
            loss = self._finished(stage, micro, outputs)
            outputs = [] if loss is None else [loss]
        self.open[stage, micro] = _Open(received, list(outputs))
        if stage + 1 < self.split.stages and self._peer(stage + 1) == self.rank:
            key = self._key(stage + 1, micro)
            self.wire.forms[key] = [Form(tuple(t.shape), str(t.dtype), t.requires_grad) for t in outputs]
            self.arrived["F", stage + 1, micro] = [tensor.detach() for tensor in outputs], []

    def _finished(self, stage: int, micro: int, outputs: Any) -> torch.Tensor | None:
        try:
            loss = self.finish(micro, outputs)
        except NeedsValues as error:
            raise self._read_by_loss(stage, error.origin) from error
        if isinstance(loss, Ghost):
            raise self._read_by_loss(stage, loss.origin)
        return loss

    def _read_by_loss(self, stage: int, origin: str) -> UserError:
        return UserError(
            f"parallel.pp: the loss function reads {origin!r}, or what hangs on it, which its stage does not hold; return what it needs from forward, or name "
            f"the stages that use the weight: pipeline.place={{{origin}: {[0, stage]}}} (-1 the last), or write parallel.pp=1"
        )

    def send_forward(self, stage: int, micro: int) -> None:
        outputs, peer = self.open[stage, micro].outputs, self._peer(stage + 1)
        self.wire.send_forms(self._key(stage + 1, micro), outputs, peer)
        self.wire.send(outputs, peer)

    def receive_forward(self, stage: int, micro: int) -> None:
        peer = self._peer(stage - 1)
        self.arrived["F", stage, micro] = self.wire.receive(self.wire.receive_forms(self._key(stage, micro), peer), peer)

    def backward(self, stage: int, micro: int) -> None:
        """Gradients of the weights of a stage and of what it received."""
        here = self.open.pop((stage, micro))
        self._start(here, self._grads(stage, micro, here))
        self._return(stage, micro, here.received)

    def backward_inputs(self, stage: int, micro: int) -> None:
        """Gradients of what a stage received, with those of weights put off where they can be."""
        here = self.open.pop((stage, micro))
        grads = self._grads(stage, micro, here)
        if not any(tensor.requires_grad for tensor in here.received):
            self.put_off[stage, micro] = [], here, grads
        else:
            assert self.deferred is not None
            queue = self.deferred.queue = []
            try:
                self._start(here, grads)
            finally:
                self.deferred.queue = None
            self.put_off[stage, micro] = queue, None, None
        self._return(stage, micro, here.received)

    def backward_weights(self, stage: int, micro: int) -> None:
        """What `backward_inputs` put off: all of the backward, on a stage that received nothing to differentiate."""
        queue, here, grads = self.put_off.pop((stage, micro))
        Deferred.compute(queue)
        if here is not None:
            self._start(here, grads)

    def send_backward(self, stage: int, micro: int) -> None:
        self.wire.send(self.arrived.pop(("out", stage, micro))[0], self._peer(stage - 1))

    def receive_backward(self, stage: int, micro: int) -> None:
        forms = [form for form in self.wire.forms[self._key(stage + 1, micro)] if form.differentiable]
        self.arrived["B", stage, micro] = self.wire.receive(forms, self._peer(stage + 1))

    def _grads(self, stage: int, micro: int, here: _Open) -> list[torch.Tensor | None] | None:
        """The gradient of each output of a stage; None on the last stage, whose output is the loss."""
        if stage + 1 == self.split.stages:
            return None
        arrived = iter(self._take("B", stage, micro))
        return [next(arrived) if form.differentiable else None for form in self.wire.forms[self._key(stage + 1, micro)]]

    def _start(self, here: _Open, grads: list[torch.Tensor | None] | None) -> None:
        pairs = [
            (output, grad) for output, grad in zip(here.outputs, grads or [None] * len(here.outputs), strict=True) if output.requires_grad
        ]
        if pairs:
            torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])

    def _return(self, stage: int, micro: int, received: Sequence[torch.Tensor]) -> None:
        if not stage:
            return
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in received if t.requires_grad]
        local = self._peer(stage - 1) == self.rank
        self.arrived[("B", stage - 1, micro) if local else ("out", stage, micro)] = grads, []

    def _take(self, kind: str, stage: int, micro: int) -> list[torch.Tensor]:
        tensors, works = self.arrived.pop((kind, stage, micro))
        for work in works:
            work.wait()
        return tensors

    def _key(self, stage: int, micro: int) -> Any:
        return stage, torch.is_grad_enabled(), self.kinds[micro]

    def _peer(self, stage: int) -> int:
        return self.rank_of[stage]


def _may_change(forms: Sequence[Form]) -> list[int]:
    """Which tensors hang on frozen weights alone, as far as was told, and may hang on trained ones later."""
    if not torch.is_grad_enabled():
        return []
    return [number for number, form in enumerate(forms) if not form.differentiable and getattr(torch, form.dtype).is_floating_point]


def kind_of(inputs: Any, training: bool) -> tuple[Any, Any]:
    """(what decides which tensors cross boundaries, what decides their shapes) under these inputs."""
    leaves, spec = tree_flatten(inputs)
    tensors = list(batches.tensors(inputs))
    rest = tuple(leaf for leaf in leaves if isinstance(leaf, int | float | str | bool | None))
    structure = str(spec), rest, training, tuple((tensor.ndim, tensor.dtype) for tensor in tensors)
    return structure, (structure, tuple(tuple(tensor.shape) for tensor in tensors))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor, flat."""
    return tensor.view(-1).view(torch.uint8)  # gloo does not know every dtype
