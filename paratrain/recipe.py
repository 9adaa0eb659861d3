"""What a model and a loss are made from, kept before a layout changes them, so that they can be made again in another process."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

_MOST = 256 << 20


@dataclass(frozen=True)
class Recipe:
    """`model_fn` and `loss_fn` as bytes of cloudpickle, on rank 0.

    Attributes:
        data: None where there are none.
        reason: why.
    """

    data: bytes | None
    reason: str = ""


class _TooMuch(Exception):
    pass


class _Limited(io.BytesIO):
    def write(self, data: Any) -> int:
        if self.tell() + len(data) > _MOST:
            raise _TooMuch
        return super().write(data)


def recipe(model_fn: Callable[[], nn.Module] | nn.Module, loss_fn: Any) -> Recipe:
    """Keep what `setup` is given; on ranks other than 0 there is nothing to keep."""
    if os.environ.get("RANK", "0") != "0":
        return Recipe(None, "it is kept on rank 0")
    import cloudpickle

    buffer = _Limited()
    try:
        if isinstance(model_fn, nn.Module) and any(tensor.device.type != "cpu" for tensor in model_fn.parameters()):
            model_fn = copy.deepcopy(model_fn).cpu()
        cloudpickle.CloudPickler(buffer).dump((model_fn, loss_fn))
    except _TooMuch:
        return Recipe(None, "the model is given with its values, more than 256 MiB of them; pass a callable that builds it")
    except Exception as error:  # whatever the user's objects raise when they are pickled
        return Recipe(None, f"the model or the loss cannot be sent to another process ({type(error).__name__}: {error})")
    return Recipe(buffer.getvalue())
