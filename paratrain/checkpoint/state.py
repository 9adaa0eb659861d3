"""Optimizer state by the parameter's name, and the state of random number generators, in forms that a checkpoint keeps."""

from __future__ import annotations

import inspect
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from paratrain.checkpoint.manifest import CheckpointError

PREFIX = "optimizer/"
_NUMBERS: dict[str, tuple[type, torch.dtype]] = {
    "bool": (bool, torch.bool),
    "int": (int, torch.int64),
    "float": (float, torch.float64),
    "NoneType": (type(None), torch.bool),
}
_SMALL = 1 << 20
"""Elements that a state may have whatever the size of its parameter."""

Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a saved tensor."""


def optimizer_tensors(optimizers: Iterable[torch.optim.Optimizer], names: Mapping[torch.Tensor, str]) -> dict[str, torch.Tensor]:
    """Every state as `optimizer/<parameter>/<key>`, whichever optimizer and group holds the parameter.

    A Python number becomes a 0-dim tensor under `<key>#<type>`. Options of groups (lr, betas, ...) come from the configuration; numbers
    that an optimizer changes there itself are kept by the engine.

    Args:
        names: the parameters' names; every parameter of the optimizers has one.

    Raises:
        CheckpointError: for a state that is neither a tensor nor a number, as those of LBFGS.
    """
    found = {}
    for optimizer, _, param, name in _owned(optimizers, names):
        for key, value in optimizer.state.get(param, {}).items():
            kind = type(value).__name__
            if isinstance(value, torch.Tensor):
                found[f"{PREFIX}{name}/{key}"] = value
            elif kind in _NUMBERS:
                found[f"{PREFIX}{name}/{key}#{kind}"] = torch.tensor(value or 0, dtype=_NUMBERS[kind][1])
            else:
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps {key!r} of parameter {name!r} as {kind}: only tensors and numbers can be saved"
                )
    return found


def prepare_optimizer(
    optimizers: Iterable[torch.optim.Optimizer], names: Mapping[torch.Tensor, str], saved: Mapping[str, Kind]
) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
    """Give every parameter the states that a checkpoint has for it, for `load` to fill; no step is taken.

    A state of its parameter's shape is laid out as the parameter, any other as the optimizer would. States that the checkpoint does
    not have are dropped.

    Args:
        names: as in `optimizer_tensors`.
        saved: name -> (shape, dtype) of all tensors in the checkpoint; see `tensors`.

    Returns:
        The tensors to pass to `load`, and a function to call once they are filled: it turns numbers back into Python's.

    Raises:
        CheckpointError: when an optimizer needs states that the checkpoint does not have: another class or option wrote them.
    """
    by_parameter: dict[str, dict[str, Kind]] = defaultdict(dict)
    for full, kind in saved.items():
        name, _, key = full.removeprefix(PREFIX).rpartition("/")
        if full.startswith(PREFIX):
            by_parameter[name][key] = kind
    tensors: dict[str, torch.Tensor] = {}
    numbers: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    probes: dict[Any, dict[str, Any] | None] = {}
    for optimizer, group, param, name in _owned(optimizers, names):
        states = by_parameter.get(name)
        if not states:
            optimizer.state.pop(param, None)
            continue
        like = (id(group), param.ndim, param.dtype, param.device)
        if like not in probes:
            probes[like] = _probe(optimizer, group, param)
        _check_keys(optimizer, name, probes[like], {key.partition("#")[0] for key in states})
        current = optimizer.state[param]
        for key in current.keys() - states.keys():
            del current[key]
        for key, kind in states.items():
            full = f"{PREFIX}{name}/{key}"
            number = key.partition("#")[2]
            if number in _NUMBERS:
                tensors[full] = torch.zeros((), dtype=_NUMBERS[number][1])
                numbers.append((current, key, tensors[full]))
                continue
            if not isinstance(current.get(key), torch.Tensor) or tuple(current[key].shape) != kind[0]:
                current[key] = _allocate(param, group, (probes[like] or {}).get(key), full, *kind)
            tensors[full] = current[key]

    def finish() -> None:
        for current, key, value in numbers:
            plain, _, number = key.partition("#")
            current[plain] = None if number == "NoneType" else _NUMBERS[number][0](value.item())

    return tensors, finish


def _owned(
    optimizers: Iterable[torch.optim.Optimizer], names: Mapping[torch.Tensor, str]
) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any], torch.Tensor, str]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for param in group["params"]:
                yield optimizer, group, param, names[param]


def _probe(optimizer: torch.optim.Optimizer, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any] | None:
    """The states that such an optimizer keeps of a parameter with two elements a dim, after a step of its own.

    So the optimizer itself says which states there are, and their dtypes and devices. None for a class that cannot be built from
    the options of a group.
    """
    known = inspect.signature(type(optimizer)).parameters
    tiny = torch.nn.Parameter(torch.zeros((2,) * max(param.ndim, 1), dtype=param.dtype, device=param.device))
    tiny.grad = torch.zeros_like(tiny)
    try:
        twin = type(optimizer)([tiny], **{key: value for key, value in group.items() if key in known and key != "params"})
        twin.step()
    except Exception:  # whatever a class of somebody else's objects to: then the checkpoint alone says which states there are
        return None
    return dict(twin.state.get(tiny, {}))


def _check_keys(optimizer: torch.optim.Optimizer, name: str, probe: dict[str, Any] | None, saved: set[str]) -> None:
    if probe is not None and (not probe or probe.keys() - saved):
        raise CheckpointError(
            f"{type(optimizer).__name__} keeps {', '.join(sorted(probe)) or 'no state'} of parameter {name!r}, and the checkpoint has "
            f"{', '.join(sorted(saved))}: another optimizer wrote it; use the same class and options, or load the weights alone"
        )


def _allocate(param: torch.Tensor, group: dict[str, Any], like: Any, full: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    probed = isinstance(like, torch.Tensor)
    if probed and like.is_floating_point() and dtype.is_floating_point:
        dtype = like.dtype
    if shape == tuple(param.shape) and (not probed or like.ndim == max(param.ndim, 1)):
        return torch.zeros_like(param, dtype=dtype, requires_grad=False)
    if math.prod(shape) > max(param.numel(), _SMALL):
        raise CheckpointError(f"{full!r} has shape {shape}: far larger than its parameter, {tuple(param.shape)}")
    on_host = not shape and not group.get("capturable") and not group.get("fused")
    device = like.device if probed else torch.device("cpu") if on_host else param.device
    local = torch.zeros(shape, dtype=dtype, device=device)
    if shape and isinstance(param, DTensor):
        return DTensor.from_local(local, param.device_mesh, [Replicate()] * param.device_mesh.ndim, run_check=False)
    return local


def rng_state() -> dict[str, Any]:
    """States of the global generators as JSON values: Python's `random`, numpy's, torch's for the CPU and the current CUDA device."""
    import numpy as np

    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert name == "MT19937", name
    state = {
        "python": [version, list(words), gauss and gauss.hex()],
        "numpy": [np.asarray(keys, "<u4").tobytes().hex(), int(position), int(has_gauss), float(cached).hex()],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned. A state of CUDA is left out where there is no CUDA.

    Raises:
        CheckpointError: when `state` is not such a value. Generators set before the fault was met stay set.
    """
    import numpy as np

    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss and float.fromhex(gauss)))
        keys, position, has_gauss, cached = state["numpy"]
        if not 0 <= position <= 624:
            raise ValueError(f"position {position} of MT19937")
        np.random.set_state(("MT19937", np.frombuffer(bytes.fromhex(keys), "<u4"), int(position), int(has_gauss), float.fromhex(cached)))
        torch.set_rng_state(_bytes(state["torch"]))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(_bytes(state["cuda"]))
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"the saved state of the random number generators is not valid: {error}") from error


def _bytes(digits: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)
