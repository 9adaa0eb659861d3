"""First weights that do not depend on the layout, put where they belong without any rank but one holding the whole model.

`plan` builds the module, on meta where its values come from elsewhere; the layout is applied to it; `fill` brings the values:

    constructor   rank 0 builds the module for real, exactly as one process would, and sends each tensor piece by piece
    meta          nobody builds it: each module draws its values in reset_parameters or _init_weights under a seed of its own name,
                  on every rank, and each rank keeps its part
    pretrained    on top of either: each rank reads its part of each tensor from safetensors files
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from paratrain import reach, rng
from paratrain.compat import has_gradient_hooks, local_box
from paratrain.config import Config
from paratrain.distributed import rank, seed_for, world_size
from paratrain.errors import UserError
from paratrain.parallel import same_model, shared_memory, uncompile
from paratrain.precision import convert_module, fp8
from paratrain.suggest import did_you_mean

log = logging.getLogger(__name__)
_PIECE = 64 << 20  # bytes that rank 0 sends at once


@dataclass(frozen=True)
class Plan:
    """A module to lay out, and where its values come from.

    Attributes:
        model: the module; on meta unless `source` is "own".
        source: "own": the module has its values; "rank0": rank 0 has them in `values`; "seeded": they are drawn.
        values: every parameter and buffer by name, whole, on rank 0; empty elsewhere.
        forms: every parameter and buffer of the whole model on meta, by name; a rank may come to hold only some of them.
        state: names of the whole model's state_dict.
        renamed: name -> the user's, where torch.compile had put its own into it.
    """

    model: nn.Module
    source: str
    values: dict[str, torch.Tensor]
    forms: dict[str, torch.Tensor]
    state: frozenset[str]
    renamed: Mapping[str, str]


def plan(model_fn: Any, cfg: Config, device: torch.device, sharded: bool) -> Plan:
    """Build the module of `model_fn` as far as this rank needs it.

    Args:
        model_fn: a module, or a callable that returns one; the callable runs under `cfg.seed`.
        sharded: whether ranks hold parts of the weights, so that only rank 0 may hold them all.

    Raises:
        UserError: `model_fn` gives no module, or one whose parameters were left without values.
    """
    if cfg.memory.init == "meta" and isinstance(model_fn, nn.Module):
        raise UserError("memory.init=meta: model_fn is a module, which has its values; pass a callable that builds it")
    model = _agreed(model_fn, cfg, device, light=sharded and rank() != 0)
    if cfg.memory.init == "meta" and (place := same_model.on_meta(model)):
        raise UserError(
            f"memory.init=meta: {place} is a tensor that is neither a parameter nor a buffer, so nothing would give it values; "
            "register it with register_buffer, or write memory.init=constructor"
        )
    model, renamed = uncompile.unwrapped(model, cfg)
    if not model.training:
        model.train()  # a pretrained model often arrives in evaluation mode
    _refuse_lazy(model)
    model = convert_module(model, cfg.precision.name)
    fp8.convert(model, cfg.precision.fp8, device)
    forms = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in _tensors(model)}
    whole = forms, frozenset(model.state_dict()), renamed
    if cfg.memory.init == "meta":
        _refuse_what_new_parameters_lose(model)
        return Plan(model, "seeded", {}, *whole)
    if not sharded:
        return Plan(model, "own", {}, *whole)
    _refuse_what_new_parameters_lose(model)
    values = {name: tensor.detach() for name, tensor in _tensors(model)} if rank() == 0 else {}
    _replace(model, lambda old: torch.empty(old.shape, dtype=old.dtype, device="meta"))
    return Plan(model, "rank0", values, *whole)


def fill(planned: Plan, cfg: Config, device: torch.device) -> None:
    """Give every parameter and buffer its memory and its values, in place. Every rank must call it.

    Shards of weights go to the host under `memory.offload=params`, all else to `device`.

    Raises:
        UserError: names what has no values, or what does not fit a pretrained file.
    """
    model = planned.model
    offload = cfg.memory.offload == "params"
    if planned.source == "own":
        model.to(device)
    else:
        _replace(model, lambda old: torch.empty_like(old, device="cpu" if offload and isinstance(old, DTensor) else device))
    with torch.no_grad():
        if planned.source == "rank0":
            held = dict(_tensors(model))
            for name, form in planned.forms.items():
                _receive(held.get(name), form, planned.values.pop(name, None), device)
        elif planned.source == "seeded":
            with rng.preserved(device):
                _draw(model, cfg.seed, device)
        if cfg.memory.pretrained is not None:
            _load_pretrained(model, Path(cfg.memory.pretrained), planned.state)


def hollow(model: nn.Module, device: torch.device) -> None:
    """Give every parameter and buffer on meta its shape, dtype and device, and one element of memory; `stream` brings the values."""
    _replace(model, lambda old: torch.empty((), dtype=old.dtype, device=device).expand(old.shape))


@torch.no_grad()
def stream(planned: Plan, device: torch.device) -> Iterator[nn.Module]:
    """Every module of a hollow model, innermost first, each with the values of its own parameters and buffers, whole, from rank 0."""
    names = {id(tensor): name for name, tensor in _tensors(planned.model)}
    for module in reversed(list(planned.model.modules())):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if (name := names.pop(id(tensor), None)) is not None:
                tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                _receive(tensor, tensor, planned.values.pop(name, None), device)
        yield module


def _build(model_fn: Callable, seed: int, device: torch.device) -> nn.Module:
    with rng.preserved(device), rng.all_preserved():
        rng.seed_all(seed)
        torch.manual_seed(seed)  # those of every device
        model = model_fn()
    if not isinstance(model, nn.Module):
        raise UserError(f"model_fn must be an nn.Module or a callable that returns one, got {type(model).__name__}")
    return model


def _agreed(model_fn: Any, cfg: Config, device: torch.device, light: bool) -> nn.Module:
    """The module, the same on every rank in all but the values of its parameters and buffers. Every rank must call it.

    Args:
        light: build on meta, because the values come from rank 0; for real where the constructor needs values, or draws on meta what is
            not what it draws for real.

    Raises:
        UserError: on every rank: ranks built different modules, or some rank none.
    """
    model, error, reason = None, None, ""
    try:
        if isinstance(model_fn, nn.Module):
            model = model_fn
        elif cfg.memory.init == "meta":
            with torch.device("meta"):
                model = _build(model_fn, cfg.seed, device)
        elif light:
            model, reason = on_meta_if_possible(model_fn, cfg.seed, device)
        else:
            model = _for_real(model_fn, cfg.seed, device)
    except Exception as caught:
        error = caught
    if world_size() == 1:
        if error is not None:
            raise error
        assert model is not None
        return model
    found = same_model.differences(model, error, cfg)
    assert model is not None
    if any(found) and not isinstance(model_fn, nn.Module) and cfg.memory.init != "meta":
        if light and found[rank()]:
            reason = reason or f"it makes something else there: {found[rank()]}"
            model, error = None, None
            try:
                model = _for_real(model_fn, cfg.seed, device)
            except Exception as caught:
                error = caught
        found = same_model.differences(model, error, cfg)
        assert model is not None
    same_model.refuse(found)
    if reason and rank() == 1:
        log.warning("model_fn cannot build on meta (%s), so each rank builds the whole model in host memory", reason)
    return model


def _for_real(model_fn: Callable, seed: int, device: torch.device) -> nn.Module:
    with _uninitialised_is_nan():
        model = _build(model_fn, seed, device)
    _refuse_lazy(model)
    _refuse_nan(model)
    return model


def on_meta_if_possible(model_fn: Callable, seed: int, device: torch.device) -> tuple[nn.Module, str]:
    """The module without its values, and ""; built for real where its constructor needs them, and why."""
    try:
        with torch.device("meta"):
            model = _build(model_fn, seed, device)
        place = same_model.on_meta(model)
        reason = f"{place} is a tensor, but neither a parameter nor a buffer" if place else ""
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    return (_for_real(model_fn, seed, device), reason) if reason else (model, "")


@contextmanager
def _uninitialised_is_nan() -> Iterator[None]:
    """Memory that a constructor allocates and does not write holds NaN, by a debugging aid of torch's deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _refuse_nan(model: nn.Module) -> None:
    left = [name for name, param in model.named_parameters() if not param.is_meta and _has_nan(param)]
    if left:
        raise UserError(
            f"model: {len(left)} parameters are NaN or were never given values: {', '.join(left[:5])}; initialise them in the constructor "
            "(torch.empty only allocates)"
        )


def _has_nan(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.detach().sum().isnan()) and bool(tensor.detach().isnan().any())


def _refuse_lazy(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        if isinstance(param, UninitializedParameter):
            raise UserError(
                f"model: {name} has no shape yet (a Lazy module): run one batch through the model in model_fn before returning it"
            )


def _refuse_what_new_parameters_lose(model: nn.Module) -> None:
    """Refuse hooks on parameters, and parameters held a second time: those that get the values are others, and know nothing of them."""
    shared_memory.refuse([*model.named_parameters(), *model.named_buffers()])
    names = {param: name for name, param in model.named_parameters()}
    for param, name in names.items():
        if has_gradient_hooks(param):
            raise UserError(
                f"model: {name} has a hook on its gradient, which would not run where parameters are split or made anew; change gradients in "
                "the forward (a torch.autograd.Function), scale steps with a group of optimizer.groups, or write strategy=ddp"
            )
    for slot in same_model.hidden(model):
        for _, leaf in reach.leaves(slot.path, slot.get()):
            if isinstance(leaf, nn.Parameter) and leaf in names:
                raise UserError(
                    f"model: {slot.path} holds the parameter {names[leaf]} past the module's own parameters, so it would "
                    "stay as it is where parameters are split or made anew; share it as a parameter (self.weight = other.weight), or write strategy=ddp"
                )


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _replace(model: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put make(tensor) in the place of every parameter and buffer; what was shared stays shared, which `Module.to` does not ensure."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def new(old: torch.Tensor) -> torch.Tensor:
        if id(old) not in made:
            tensor = make(old.detach())
            if isinstance(old, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
                tensor.__dict__.update(old.__dict__)
            made[id(old)] = old, tensor
        return made[id(old)][1]

    for module in model.modules():
        for name, param in list(module._parameters.items()):
            if param is not None:
                setattr(module, name, new(param))  # recurrent modules keep a list of their own up to date in __setattr__
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = new(buffer)


def _receive(target: torch.Tensor | None, form: torch.Tensor, value: torch.Tensor | None, device: torch.device) -> None:
    """This rank's part of `target`, if it holds any, from the whole `value` that rank 0 has."""
    if form.numel() == 0:
        return
    rows = form.shape[0] if form.ndim else 1
    step = max(1, _PIECE * rows // (form.numel() * form.element_size()))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        piece = torch.empty((stop - start, *form.shape[1:]), dtype=form.dtype, device=device)
        if value is not None:
            piece.copy_(value[start:stop] if form.ndim else value)
        dist.broadcast(piece.view(-1).view(torch.uint8), src=0)  # bytes: gloo does not know every dtype
        if target is not None:
            _keep(target, piece if form.ndim else piece[0], start)


def _keep(target: torch.Tensor, piece: torch.Tensor, start: int = 0) -> None:
    """Copy into this rank's part of `target` what `piece`, the rows of the whole tensor from `start` on, has of it."""
    if not isinstance(target, DTensor):
        (target[start : start + piece.shape[0]] if target.ndim else target).copy_(piece)
        return
    sizes, offsets = local_box(target.shape, target.device_mesh, target.placements)
    first, last = max(start, offsets[0]), min(start + piece.shape[0], offsets[0] + sizes[0])
    if first < last and all(sizes):
        columns = tuple(slice(offset, offset + size) for size, offset in zip(sizes[1:], offsets[1:], strict=True))
        target.to_local()[first - offsets[0] : last - offsets[0]].copy_(piece[(slice(first - start, last - start), *columns)])


def _draw(model: nn.Module, seed: int, device: torch.device) -> None:
    """Values of each module by its own reset_parameters, then by the _init_weights of the nearest module around it that has one."""
    paths = dict(model.named_modules())
    done: set[int] = set()
    for path, module in paths.items():
        stores = [(module._parameters, name) for name in module._parameters] + [(module._buffers, name) for name in module._buffers]
        stores = [(store, name) for store, name in stores if store[name] is not None]
        if not stores:
            continue
        targets = [store[name] for store, name in stores]
        for store, name in stores:
            store[name] = _blank(store[name], device)
        torch.manual_seed(seed_for(seed, int.from_bytes(hashlib.blake2b(path.encode(), digest_size=7).digest())))
        for initialise in _initialisers(paths, path):
            initialise()
        for (store, name), target in zip(stores, targets, strict=True):
            value, store[name] = store[name], target
            if id(target) in done:
                continue
            done.add(id(target))
            if value.is_floating_point() and bool(value.isnan().any()):
                raise UserError(
                    f"memory.init=meta: {path + '.' if path else ''}{name} has no values: {type(module).__name__} has no reset_parameters() that "
                    "sets it, and no module around it an _init_weights(module) that does; add one, or write memory.init=constructor"
                )
            _keep(target, value.detach())


def _blank(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    whole = torch.empty(like.shape, dtype=like.dtype, device=device)
    whole.fill_(float("nan") if like.is_floating_point() else 0)
    return nn.Parameter(whole, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else whole


def _initialisers(paths: dict[str, nn.Module], path: str) -> Iterator[Callable[[], Any]]:
    module = paths[path]
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(method := getattr(module, name, None)):
            yield method
            break
    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        around = paths[".".join(parts[:length])]
        if callable(init := getattr(around, "_init_weights", None)):
            yield lambda: init(module)
            return


def _load_pretrained(model: nn.Module, path: Path, known: frozenset[str]) -> None:
    """Read this rank's part of every tensor of the model's state from safetensors files; adapters that are not in them stay as they are."""
    from safetensors import safe_open

    files = _pretrained_files(path)
    adapters = list(getattr(model, "peft_config", ()))
    names = {name: without_adapters(name, adapters) for name in {*model.state_dict(keep_vars=True), *known}}
    where = {name: files[found] for name, found in names.items() if found in files}
    kept: dict[int, str] = {}
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, torch.Tensor)}
    for name, tensor in state.items():
        if name in where:
            kept.setdefault(id(tensor), name)
    missing = [
        name for name, tensor in state.items() if id(tensor) not in kept and not any(adapter in name.split(".") for adapter in adapters)
    ]
    read = {names[name] for name in known}
    unknown = [name for name in files if name not in read]
    if missing or unknown:
        hint = did_you_mean(missing[0], unknown) if missing and unknown else ""
        raise UserError(
            f"memory.pretrained={path}: the file and the model differ: {len(missing)} of the model's tensors are not in it "
            f"({', '.join(missing[:3]) or 'none'}{hint}), {len(unknown)} of its tensors are not in the model ({', '.join(unknown[:3]) or 'none'})"
        )
    opened: dict[Path, Any] = {}
    for name in kept.values():  # of what this rank holds
        tensor, file = state[name], where[name]
        if file not in opened:
            opened[file] = safe_open(file, framework="pt")
        part = opened[file].get_slice(names[name])
        if tuple(part.get_shape()) != tuple(tensor.shape):
            raise UserError(f"memory.pretrained={path}: {name} has shape {tuple(part.get_shape())}, the model wants {tuple(tensor.shape)}")
        if not isinstance(tensor, DTensor):
            tensor.copy_(opened[file].get_tensor(names[name]))
            continue
        sizes, offsets = local_box(tensor.shape, tensor.device_mesh, tensor.placements)
        if all(sizes):
            tensor.to_local().copy_(part[tuple(slice(offset, offset + size) for size, offset in zip(sizes, offsets, strict=True))])


def without_adapters(name: str, adapters: list[str]) -> str:
    """The name that a tensor had before `peft` put adapters around its module."""
    if not adapters:
        return name
    name = name.removeprefix("base_model.model.")
    for around in ("base_layer", "original_module", *(f"modules_to_save.{adapter}" for adapter in adapters)):
        name = name.replace(f".{around}.", ".")
    return name


def _pretrained_files(path: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    from safetensors import safe_open

    if path.is_dir():
        index = next(iter(sorted(path.glob("*.safetensors.index.json"))), None)
        if index is not None:
            names = json.loads(index.read_text())["weight_map"]
            outside = [file for file in names.values() if Path(file).name != file]
            if outside:
                raise UserError(f"memory.pretrained={path}: {index.name} points outside its directory: {outside[0]}")
            return {name: path / file for name, file in names.items()}
        files = sorted(path.glob("*.safetensors"))
    else:
        files = [path] if path.suffix == ".safetensors" and path.exists() else []
    if len(files) != 1:
        raise UserError(
            f"memory.pretrained={path}: expected a .safetensors file, or a directory with one or with a *.safetensors.index.json"
        )
    with safe_open(files[0], framework="pt") as opened:
        return dict.fromkeys(opened.keys(), files[0])
