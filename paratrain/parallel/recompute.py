"""Activation recomputation: forget a block's activations after its forward, compute them again in backward.

Randomness is replayed and buffers are left alone the second time, so the step is the same function with and without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from paratrain import reach
from paratrain.config import Config
from paratrain.errors import UserError
from paratrain.parallel.activations import Budget, measure
from paratrain.parallel.arguments import can_change, copied

log = logging.getLogger(__name__)
_ATEN = torch.ops.aten
_LOOKED_AT = 6  # forwards of a block in which everything that it keeps is looked at
_EXPENSIVE = {  # compute grows faster than the result: keep these, recompute the rest (Korthikanti et al., 2022, section 5)
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN.convolution.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}


def apply(blocks: Sequence[tuple[str, nn.Module]], model: nn.Module, cfg: Config) -> None:
    """Make every `memory.recompute_every`-th block recompute, in place; names of parameters stay.

    Raises:
        UserError: when buffers would be updated twice, since compiled code cannot exchange them.
    """
    if cfg.memory.recompute == "none":
        return
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    for config in {id(config): config for config in configs}.values():
        if getattr(config, "use_cache", False):  # of Hugging Face models: their cache is for generation
            log.info(
                "memory.recompute: %s.use_cache is switched off: the second forward would add to the cache again", type(config).__name__
            )
            config.use_cache = False
    if cfg.memory.recompute == "auto":
        _refuse_nested(blocks)
    budget = Budget(cfg.memory.budget_gib, [name for name, _ in blocks]) if cfg.memory.budget_gib is not None else None
    made: dict[tuple[type, bool], type] = {}  # blocks of one class stay so, and share what is compiled
    for name, block in blocks[:: cfg.memory.recompute_every]:
        updated = [f"{name}.{buffer}" for buffer in block.state_dict() if buffer in dict(block.named_buffers())]
        if updated and cfg.compile is not False:
            raise UserError(
                f"memory.recompute={cfg.memory.recompute} with compile: block {name!r} has state other than parameters ({updated[0]}), which the "
                "second forward would update again; write compile=false or memory.recompute=none"
            )
        kind = type(block), bool(updated)
        if kind not in made:
            options = {
                "_selective": cfg.memory.recompute == "selective",
                "_updates_buffers": bool(updated),
                "_follows": cfg.compile is False,
                "_budget": budget,
            }
            made[kind] = type(f"Recomputed{kind[0].__name__}", (_Recomputed, kind[0]), options)
        block.__class__ = made[kind]
        block.__dict__["_block_name"] = name


def _refuse_nested(blocks: Sequence[tuple[str, nn.Module]]) -> None:
    """Ranks may decide differently, so no block may gather the weights of another."""
    for name, _ in blocks:
        if around := next((other for other, _ in blocks if name.startswith(f"{other}.")), None):
            raise UserError(
                f"memory.recompute=auto: block {name!r} is inside block {around!r}; name one kind in memory.blocks, or write "
                "memory.recompute=full"
            )


class _Recomputed(nn.Module):
    _selective: bool
    _updates_buffers: bool
    _follows: bool  # what else forward moves, which compiled code does not let us do
    _budget: Budget | None
    _block_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        run: Callable[..., Any] = partial(super().forward, **kwargs)
        if self._budget is not None:
            if not self._budget.knows(self._block_name, (args, kwargs)):
                with scratch_buffers(self, nullcontext()):
                    self._budget.note(self._block_name, (args, kwargs), measure(self, run, args))
            elif not self._budget.recomputes(self._block_name):
                return run(*args)
        if any(map(can_change, (*args, *kwargs.values()))):
            run, args = _with_own_containers(super().forward, args, kwargs), ()
        if self._follows:
            run = _with_same_weights(self, run)
        contexts = partial(create_selective_checkpoint_contexts, _policy) if self._selective else partial(noop_context_fn)
        if self._selective and self._follows:
            contexts = partial(_selective_contexts)
        if self._updates_buffers:
            contexts = partial(_with_scratch_buffers, self, contexts)
        if self._follows and (state := self.__dict__.setdefault("_block_state", BlockState(self))).looks():
            contexts = partial(state.contexts, contexts)
        elif not (self._selective or self._updates_buffers):
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=True)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)


def _selective_contexts() -> tuple[Any, Any]:
    forward, again = create_selective_checkpoint_contexts(_policy)
    left = [again]

    def once() -> Any:  # what torch has kept of the first forward is used up
        if not left:
            raise UserError(
                "memory.recompute=selective: the model's forward, or its loss, differentiates through blocks and is differentiated again, which needs their "
                "activations twice; write memory.recompute=full or none"
            )
        return left.pop()

    return forward, _Again(once)


def _with_same_weights(block: nn.Module, run: Callable) -> Callable:
    """A forward that runs again with the weights it had: `torch.func.functional_call` lends a block others for the time of one forward."""
    had = [(module._parameters, name, param) for module in block.modules() for name, param in module._parameters.items()]

    def forward(*args: Any) -> Any:
        own = [(store, name, store[name], param) for store, name, param in had if name in store and _lent(param, store[name])]
        for store, name, _, lent in own:
            store[name] = lent
        try:
            return run(*args)
        finally:
            for store, name, param, _ in own:
                store[name] = param

    return forward


def _lent(param: Any, now: Any) -> bool:
    """Whether a weight that a forward had is another than the module has now, and not the same one that sharding gathers or parts."""
    sharding = (
        isinstance(param, nn.Parameter) and isinstance(now, nn.Parameter) and (isinstance(param, DTensor) or isinstance(now, DTensor))
    )
    return param is not now and not sharding


def _with_own_containers(forward: Callable, args: Any, kwargs: Any) -> Callable[[], Any]:
    """A forward that writes into the lists and dicts it was given once; when it runs again, it finds them as they were, and writes into copies."""
    before: Any = copied((list(args), kwargs))
    given = [(args, kwargs)]

    def run() -> Any:
        args, kwargs = given.pop() if given else copied(before)
        return forward(*args, **kwargs)

    return run


def _with_scratch_buffers(block: nn.Module, contexts: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    forward, again = contexts()
    return forward, _Again(partial(scratch_buffers, block, again))


class _Again:
    """The context of a second forward, which runs a third time where the model's own forward differentiates and its backward comes later."""

    def __init__(self, make: Callable[[], AbstractContextManager]):
        self._make = make
        self._entered: list[AbstractContextManager] = []

    def __enter__(self) -> None:
        context = self._make()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)


class BlockState:
    """What the forward of a block moves beside the statistics of its norms: the second forward begins from what the first began from, and
    moves nothing.

    Looked for in the first forwards, and in those whose number is a power of two.
    """

    def __init__(self, block: nn.Module):
        self._block = block
        self._forwards = 0
        self._moves = False

    def looks(self) -> bool:
        """Whether the forward to come is to be followed."""
        self._forwards += 1
        return self._moves or self._forwards <= _LOOKED_AT or not self._forwards & (self._forwards - 1)

    def contexts(self, inner: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Contexts of the first and of the second forward."""
        forward, again = inner()
        kept: dict[str, tuple[reach.Slot, reach.Frozen]] = {}
        return self._first(forward, kept), _Again(partial(self._second, again, kept))

    def _slots(self) -> list[reach.Slot]:
        return [slot for slot in reach.slots([("", self._block)]) if slot.kind != "parameter"]  # sharding exchanges those

    @contextmanager
    def _first(self, inner: Any, kept: dict[str, tuple[reach.Slot, reach.Frozen]]) -> Iterator[None]:
        kept.update(reach.frozen(self._slots()))
        with inner:
            yield
        moved = {slot.path for slot in self._slots() if slot.path not in kept or not kept[slot.path][1].same(slot.get())}
        self._moves = self._moves or bool(moved)
        if not moved:
            kept.clear()

    @contextmanager
    def _second(self, inner: Any, kept: dict[str, tuple[reach.Slot, reach.Frozen]]) -> Iterator[None]:
        if not kept:
            with inner:
                yield
            return
        found = self._slots()
        left = reach.frozen(found)
        reach.put_back(kept, found, fresh=True)
        try:
            with inner:
                yield
        finally:
            reach.put_back(left, self._slots())


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def scratch_buffers(block: nn.Module, again: Any) -> Iterator[None]:
    """Let the second forward update copies of the buffers: running statistics have seen this batch already."""
    kept = [(module, name, buffer) for module in block.modules() for name, buffer in module._buffers.items() if buffer is not None]
    for module, name, buffer in kept:
        module._buffers[name] = buffer.clone()
    try:
        with again:
            yield
    finally:
        for module, name, buffer in kept:
            module._buffers[name] = buffer
