"""What a model and a loss are made from, kept before a layout changes them, so that they can be made again in another process."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """`model_fn` and `loss_fn` as bytes of cloudpickle, on rank 0.

    Attributes:
        data: None where there are none.
        reason: why.
    """

    data: bytes | None
    reason: str = ""


class TooMuch(ValueError):
    """What was to be kept takes more bytes than it may."""


def dumps(value: Any, most: int = 256 << 20) -> bytes:
    """`value` pickled by cloudpickle, tensors by their bytes alone: the same bytes for the same values, so that they can be hashed.

    Raises:
        TooMuch: it takes more than `most` bytes; or whatever the user's objects raise.
    """
    import cloudpickle

    class Pickler(cloudpickle.CloudPickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, torch.storage.TypedStorage) and obj._untyped_storage.device.type == "cpu":
                data = torch.empty(0, dtype=torch.uint8).set_(obj._untyped_storage).numpy().tobytes()  # type: ignore[call-overload]
                return _storage, (data, obj.dtype)
            return super().reducer_override(obj)

    class Limited(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > most:
                raise TooMuch(f"more than {most >> 20} MiB")
            return super().write(data)

    buffer = Limited()
    Pickler(buffer).dump(value)
    return buffer.getvalue()


def _storage(data: bytes, dtype: torch.dtype) -> Any:
    untyped = torch.tensor(bytearray(data), dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage(0)
    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


def recipe(model_fn: Callable[[], nn.Module] | nn.Module, loss_fn: Any) -> Recipe:
    """Keep what `setup` is given; on ranks other than 0 there is nothing to keep."""
    if os.environ.get("RANK", "0") != "0":
        return Recipe(None, "it is kept on rank 0")
    try:
        if isinstance(model_fn, nn.Module) and any(tensor.device.type != "cpu" for tensor in model_fn.parameters()):
            model_fn = copy.deepcopy(model_fn).cpu()
        return Recipe(dumps((model_fn, loss_fn)))
    except TooMuch:
        return Recipe(None, "the model is given with its values, more than 256 MiB of them; pass a callable that builds it")
    except Exception as error:  # whatever the user's objects raise when they are pickled
        return Recipe(None, f"the model or the loss cannot be sent to another process ({type(error).__name__}: {error})")
