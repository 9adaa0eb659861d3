"""What a program does with an engine's gradients, optimizers and weights by itself, between the engine's own steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from paratrain import gradients
from paratrain.agreement import agreed
from paratrain.build import locate
from paratrain.errors import UserError
from paratrain.totals import or_one

if TYPE_CHECKING:
    from paratrain.engine import Engine


def clear(engine: Engine) -> list[torch.Tensor]:
    """Drop the gradients that something else has left, as `zero_grad` in front of a step does; returns whose they were."""
    left = [param for param in engine._params if param.grad is not None]
    for param in left:
        param.grad = None
    left += engine._layout.drop_gradients()
    if left and engine._layout.used is not None:
        engine._layout.used.clear()
    return left


def begin_backward(engine: Engine) -> None:
    """What comes before a backward in a loop of the program's own; raises `UserError` as `Engine.backward`."""
    engine._changes.follow_once()
    if engine._reduced is not None:
        raise UserError("backward() after clip_grad_norm_() in one step: the gradients are clipped already; call engine.step() first")
    if engine._true is not None:
        if all(param.grad is None for param in engine._params):  # zero_grad() by hand
            engine._window = None
            engine._losses.begin()
        elif engine._changes.hooks:
            raise UserError(
                "backward() a second time in a step, and the hooks on gradients have run: put with engine.no_sync(): around every micro-batch but the last"
            )
        else:
            grads = [param.grad for param in engine._params if param.grad is not None]
            gradients.scale(grads, 1 / engine._true[1])
            if engine._layout.used is not None:
                engine._layout.used.update(param for param in engine._params if param.grad is not None)
        engine._true = None
    if engine._window is None and not engine._foreign:
        left = clear(engine)
        if left and not engine._strays:
            name = engine._names().get(left[0], "a parameter")
            raise UserError(
                f"engine.backward(): {name} has a gradient already, from a backward that is not the engine's, whose scale and share of the batch the engine "
                "does not know; add that loss to the one of engine.backward(), or call engine.model.zero_grad() first"
            )
        engine._strays = False


def bring_to_scale(engine: Engine) -> None:
    """Make the gradients those of the mean so far: reduced, divided, and through the hooks that the program put on them."""
    assert engine._window is not None
    assert engine._unit is not None
    engine._layout.reduce(engine._params)
    totals = engine._losses.weighed(engine._totals.of_step((*engine._window, *engine._losses.sums, *engine._votes)))
    factor = engine._unit / engine.scaler.scale / or_one(totals[1])
    gradients.scale([param.grad for param in engine._params if param.grad is not None], factor)
    if engine._changes.hooks:
        engine._changes.run_hooks()
    engine._true = totals, factor


def explain_derivatives(engine: Engine, error: RuntimeError) -> None:
    """Raise `UserError` for torch's complaint that a program differentiates by a tensor for which the layout has put another."""
    if "appears to not have been used in the graph" not in str(error) or dist.get_world_size() == 1:
        return
    axes = [axis for axis in ("pp", "cp", "tp") if getattr(engine.cfg.parallel, axis) > 1]
    what = f"parallel.{axes[0]}={getattr(engine.cfg.parallel, axes[0])}" if axes else f"strategy={engine.cfg.strategy.name}"
    advice = f"parallel.{axes[0]}=1" if axes else "strategy=zero1"
    raise UserError(
        f"{what}: forward, or the loss, differentiates (torch.autograd.grad) by a tensor in whose place this layout has another, as it has copies of a model's "
        f"outputs for the loss; take the derivative inside of forward, by a tensor that forward made, and return it; or write {advice}"
    ) from error


def watch_optimizers(engine: Engine, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse a step of theirs that is not the engine's, and let groups be added without names, in place."""
    if engine._foreign:
        return

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not engine._updating and engine._in_backward is None:
            raise UserError(
                "engine.optimizers: an optimizer's step() by hand leaves out the engine's clipping, schedule, moving average and counters; write "
                "engine.step() in its place"
            )

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(before)
        add = optimizer.add_param_group
        optimizer.add_param_group = partial(_add_group, engine, optimizer, add)  # type: ignore[method-assign]


def _add_group(engine: Engine, optimizer: torch.optim.Optimizer, add: Callable[[dict[str, Any]], None], group: dict[str, Any]) -> None:
    params = group["params"]
    params = [params] if isinstance(params, torch.Tensor) else list(params)
    asked = engine.cfg.optimizer
    if type(optimizer) is locate(
        asked.target
    ):  # torch keeps what the constructor was given for all groups; here it is in the configuration
        configured = {"lr": asked.lr, "weight_decay": asked.weight_decay, **asked.args}
        configured = {key: tuple(value) if isinstance(value, list) else value for key, value in configured.items()}
    else:
        configured = optimizer.param_groups[0]
    group = {**{key: value for key, value in configured.items() if key in optimizer.defaults}, **group}
    if optimizer.param_groups and "param_names" in optimizer.param_groups[0] and not any(isinstance(param, tuple) for param in params):
        names = {param: name for name, param in engine.model.named_parameters()}
        group = {"param_names": [names.get(param, f"shape {tuple(param.shape)}") for param in params], **group, "params": params}
    add(group)


def keep_states_whole(engine: Engine) -> None:
    """Where this rank holds some stages only, let `state_dict` of `engine.model` and of its modules give the whole state, on every rank,
    and `load_state_dict` take it; in place."""
    pipeline = engine._layout.pipeline
    if pipeline is None or engine._foreign:
        return

    def drop(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        with engine._views:
            held = module.state_dict().keys()
        for name in pipeline.state:
            if name not in held:
                state_dict.pop(f"{prefix}{name}", None)

    def complete(path: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if not engine._views.at_work and (module is engine.model or not prefix):  # or it is a part of what a module around it gives
            _fill(engine, path, state_dict, prefix)

    engine.model.register_load_state_dict_pre_hook(drop)
    for name, module in engine.model.named_modules():
        path = f"{name}." if name else ""
        if any(entry.startswith(path) for entry in pipeline.state):
            module.register_state_dict_post_hook(partial(complete, path))


@agreed("state_dict() of the engine's model", together=lambda engine: engine.needs_all)
def _fill(engine: Engine, path: str, state_dict: dict[str, Any], prefix: str) -> None:
    """Add the entries that other stages hold to the state of the module at `path`, in the order of the whole model."""
    pipeline = engine._layout.pipeline
    assert pipeline is not None
    held = {name.removeprefix(prefix): value for name, value in state_dict.items()}
    names = {name: name.removeprefix(path) for name in pipeline.state if name.startswith(path)}
    whole = dict(pipeline.spread({name: held[short] for name, short in names.items() if short in held}, names))
    others = {name: value for name, value in held.items() if f"{path}{name}" not in whole}
    state_dict.clear()
    state_dict.update({f"{prefix}{short}": held.get(short, whole[name]) for name, short in names.items()})
    state_dict.update({f"{prefix}{name}": value for name, value in others.items()})


@torch.no_grad()
def load_whole(engine: Engine, state: Mapping[str, torch.Tensor]) -> None:
    """See `Engine.load_full_state_dict`."""
    pipeline = engine._layout.pipeline
    with engine._views:
        held = {name: value for name, value in engine.model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    known = held.keys() if pipeline is None else pipeline.state.keys()
    forms = [[(name, value.shape, value.dtype) for name, value in state.items()]]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(forms, src=0)
    given = {name: (shape, dtype) for name, shape, dtype in forms[0]}
    missing, unknown = [name for name in known if name not in given], [name for name in given if name not in known]
    if missing or unknown:
        raise UserError(
            f"load_full_state_dict: the state of rank 0 and the model differ: {len(missing)} of the model's tensors are missing ({', '.join(missing[:3]) or 'none'}), "
            f"{len(unknown)} are not of the model ({', '.join(unknown[:3]) or 'none'})"
        )
    for name, (shape, dtype) in given.items():
        value = (
            state[name].to(engine.device).contiguous() if dist.get_rank() == 0 else torch.empty(shape, dtype=dtype, device=engine.device)
        )
        if dist.get_world_size() > 1:
            dist.broadcast(value.view(-1).view(torch.uint8) if value.ndim else value.view(1).view(torch.uint8), src=0)
        if name in held:
            if held[name].shape != shape:
                raise UserError(f"load_full_state_dict: {name} has shape {tuple(shape)}, the model wants {tuple(held[name].shape)}")
            held[name].copy_(value)


def let_copy(engine: Engine) -> None:
    """Let `copy.deepcopy(engine.model)` give a module of the user's own classes with whole weights, where a copy of the laid-out one could not run."""
    parts = any(isinstance(param, DTensor) for param in engine.model.parameters())
    if parts or engine._layout.pipeline is not None:
        engine.model.__dict__["__deepcopy__"] = partial(_whole_copy, engine)


def _whole_copy(engine: Engine, memo: dict[int, Any]) -> nn.Module:
    if engine._layout.pipeline is not None or engine._layout.experts.owners or engine.blueprint is None:
        why = (
            "the model as it was before the layout cannot be copied"
            if engine.blueprint is None
            else "this rank holds some stages of the model only"
            if engine._layout.pipeline is not None
            else "this rank holds some experts only"
        )
        raise UserError(
            f"deepcopy(engine.model): {why}; for a moving average write ema={{decay: 0.999}}, for the whole weights engine.full_state_dict()"
        )
    with engine._views:
        engine._layout.settle()
    twin = copy.deepcopy(engine.blueprint)
    memo[id(engine.model)] = twin
    live, made = dict(engine.model.named_modules(remove_duplicate=False)), {}
    for path, module in twin.named_modules(remove_duplicate=False):
        own = live[path]
        module.training = own.training
        for table, source in ((module._parameters, own._parameters), (module._buffers, own._buffers)):
            for name, value in source.items():
                if value is not None and id(value) not in made:
                    made[id(value)] = _copied(value)
                table[name] = None if value is None else made[id(value)]
        for name, value in vars(own).items():
            if name in vars(module) and not name.startswith("_") and _is_data(value):
                module.__dict__[name] = copy.deepcopy(value)
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    return twin


def _copied(value: torch.Tensor) -> Any:
    whole = value.detach()
    whole = (whole.full_tensor() if isinstance(whole, DTensor) else whole).clone()
    return nn.Parameter(whole, value.requires_grad) if isinstance(value, nn.Parameter) else whole


def _is_data(value: Any) -> bool:
    leaves = tree_leaves(value)
    return all(
        isinstance(leaf, torch.Tensor | int | float | str | None) and not isinstance(leaf, nn.Parameter | DTensor) for leaf in leaves
    )
