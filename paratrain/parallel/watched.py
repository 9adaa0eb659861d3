"""Weights that are DTensors, and whose use by a program is answered with what the program means: whole tensors, or this rank's parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch.distributed.tensor import DTensor

_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag"}  # attributes of a tensor that are more than what it is made of
_FACTS = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "is_floating_point", "is_complex"),
    *("is_contiguous", "is_inference", "get_device", "data_ptr", "untyped_storage", "requires_grad_", "register_hook", "retain_grad"),
    *("register_post_accumulate_grad_hook", "is_same_size", "result_type", "is_pinned", "is_signed", "dim_order", "has_names"),
    *("__len__", "__repr__", "__format__", "__hash__", "__deepcopy__", "__reduce_ex__", "_is_view", "is_shared", "__set__"),
}


class _Watched(DTensor):
    answer: ClassVar[Callable[[Callable, Any, Any], Any]]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.answer(func, args, kwargs or {})


def watched(name: str, answer: Callable[[Callable, Any, Any], Any]) -> type[DTensor]:
    """A class for weights to have while `answer(func, args, kwargs)` computes what is done with them.

    A weight stays the same object when its class changes, so that optimizers and hooks know it.
    """
    return type(name, (_Watched,), {"answer": staticmethod(answer)})


def as_is(params: Iterable[Any], func: Callable, args: Any, kwargs: Any) -> Any:
    """An operation as DTensor defines it."""
    kinds = [(param, type(param)) for param in params]
    for param, _ in kinds:
        param.__class__ = DTensor
    try:
        return func(*args, **kwargs)
    finally:
        for param, kind in kinds:
            param.__class__ = kind


def asks_for_facts(func: Any) -> bool:
    """Whether an operation does not look at the values of a tensor."""
    name = getattr(func, "__name__", "")
    return func.__self__.__name__ not in _VALUES if name == "__get__" else name in _FACTS


def writes(func: Any, kwargs: Any) -> bool:
    """Whether an operation changes a tensor in place."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name.startswith(("_foreach_", "_fused_", "__i")) or name == "__setitem__" or "out" in kwargs
