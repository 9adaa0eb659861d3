"""What a program changes between steps: who is trained, hooks on gradients, modules, rates. Noticed before a step, then followed or refused."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from paratrain import optim, own_loop
from paratrain.compat import has_gradient_hooks, hooks_made, take_hooks
from paratrain.config import Foreign
from paratrain.errors import UserError
from paratrain.optim.state import numbers
from paratrain.parallel.whole_view import Views
from paratrain.totals import Totals

if TYPE_CHECKING:
    from paratrain.engine import Engine

_trained, _dtype = attrgetter("requires_grad"), attrgetter("dtype")


class Changes:
    """Compares the model and the optimizers of an engine with what they were before the last step; some microseconds where nothing changed.

    Attributes:
        hooks: parameter -> the tables of hooks that the program registered on it, which `run_hooks` calls, see `compat.take_hooks`.
    """

    def __init__(self, engine: Engine, views: Views):
        self._engine, self._views = engine, views
        self.hooks: dict[torch.Tensor, list[tuple[dict[int, Any], bool]]] = {}
        self._fixed = isinstance(engine.cfg.strategy, Foreign)  # another package holds what is trained
        self._followed = -1  # the step that `follow_once` was for
        self._look()

    def _look(self) -> None:
        model = self._engine.model
        modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]  # whose tables are no dicts
        tables: list[dict[str, Any]] = [table for module in modules for table in (module._parameters, module._modules)]
        self._tables = [table for table in tables if table]
        self._empty = [table for table in tables if not table]
        self._held = [dict(table) for table in self._tables]
        held = [(table, name, value) for table in self._tables for name, value in table.items() if isinstance(value, torch.Tensor)]
        self._single = [(table, name, value) for table, name, value in held if value.numel() == 1]
        self._named = dict(model.named_parameters(remove_duplicate=False))
        self._modules = set(model.modules())
        self._params = list(dict.fromkeys(self._named.values()))
        self._marks, self._dtypes = self._marked(), list(map(_dtype, self._params))
        self._groups = self._grouped()
        self._hooks_made = -1

    def _rebuilt(self) -> bool:
        """Whether a module or parameter was added, removed or replaced; every step pays for it, so all of it is compared at once."""
        try:  # what is the same object is equal at once; two tensors of several elements are neither equal nor not
            if self._tables != self._held or any(self._empty):
                return True
        except Exception:
            return True
        return any(table[name] is not param for table, name, param in self._single)

    def _marked(self) -> list[bool]:
        return list(map(_trained, self._params))

    def _grouped(self) -> list[int]:
        return [len(group["params"]) for optimizer in self._engine.optimizers for group in optimizer.param_groups]

    def follow_once(self) -> None:
        """`follow`, before the first forward or backward of a step in a loop of the program's own."""
        if self._engine._window is None and self._followed != self._engine.global_step:
            self.follow()
            self._followed = self._engine.global_step

    def follow(self) -> None:
        """Take in what changed since the last call. Every rank must call it, between steps.

        Raises:
            UserError: a change that this layout cannot follow; names it, and says what to write.
        """
        if self._rebuilt():
            self._engine._layout.settle()  # a forward without a backward may have left gathered weights
            if self._rebuilt():
                self._follow_modules()
        if self._marked() != self._marks or list(map(_dtype, self._params)) != self._dtypes:
            self._follow_marks()
        if self._grouped() != self._groups:
            self._follow_groups()
        if (made := hooks_made()) != self._hooks_made:
            self._hooks_made = made
            for param in self._params if not self._fixed else ():  # another package may have hooks of its own
                if has_gradient_hooks(param):
                    self._follow_hooks(param)
        self._follow_rates()

    # ------------------------------------------------------------------ modules and their parameters

    def _follow_modules(self) -> None:
        engine = self._engine
        asked = _asked(engine)
        old, now = self._named, dict(engine.model.named_parameters(remove_duplicate=False))
        gone = [name for name, param in old.items() if now.get(name) is not param]
        known = set(self._params)
        added = {param: name for name, param in now.items() if param not in known}
        fresh = [module for module in engine.model.modules() if module not in self._modules]
        laid_out = engine.cfg.parallel.pp > 1 or self._fixed or any(isinstance(param, DTensor) for param in known)
        if gone and laid_out:
            what = "replaced" if gone[0] in now else "removed"
            raise UserError(
                f"{asked}: the parameter {gone[0]} was {what} after set-up, where the layout holds it in parts; write the new values into it under "
                "torch.no_grad() (engine.model.get_parameter(name).copy_(values)), or change the model in model_fn, before paratrain.setup"
            )
        if engine.cfg.parallel.pp > 1 or self._fixed or engine.cfg.parallel.sp or engine.cfg.parallel.ep > 1:
            raise UserError(
                f"{asked}: modules of the model were added, removed or replaced after set-up, which this layout cannot follow"
                f"{_first(added.values())}; change the model in model_fn, before paratrain.setup, or write strategy=ddp"
            )
        norms = [module for module in fresh if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if norms and engine.mesh.weights.size() > 1:
            raise UserError(
                f"{asked}: a {type(norms[0]).__name__} was added after set-up, whose statistics would be those of each rank's samples; build the model "
                "with it in model_fn, before paratrain.setup"
            )
        held = {param for optimizer in engine.optimizers for group in optimizer.param_groups for param in group["params"]}
        for param, name in added.items():
            if param.requires_grad and param not in held:
                raise UserError(
                    f"model: the parameter {name} was added after set-up, and no optimizer updates it; write "
                    'engine.optimizers[0].add_param_group({"params": [...]}) after adding it, or add it in model_fn, before paratrain.setup'
                )
        if dist.get_world_size() > 1:
            for tensor in chain(added, *(module.buffers(recurse=False) for module in fresh)):
                dist.broadcast(tensor.data, src=0)  # as at set-up: the values of rank 0
        left = set(now.values())
        for optimizer in engine.optimizers:
            for group in optimizer.param_groups:
                for param in [param for param in group["params"] if param not in left and param in known]:
                    _take_out(group, param)
                    optimizer.state.pop(param, None)
        self._look()
        adopt(engine)

    # ------------------------------------------------------------------ who is trained

    def _follow_marks(self) -> None:
        engine = self._engine
        names = {param: name for name, param in reversed(self._named.items())}
        for param, dtype in zip(self._params, self._dtypes, strict=True):
            if param.dtype is not dtype:
                raise UserError(
                    f"model: {names[param]} is {str(param.dtype).removeprefix('torch.')} since the last step and was "
                    f"{str(dtype).removeprefix('torch.')}: optimizers, loss scale and reduction were set up for that; write precision=..., which "
                    "says what everything is kept and computed in, and leave model.half(), .bfloat16() and .to() out"
                )
        held = {param for optimizer in engine.optimizers for group in optimizer.param_groups for param in group["params"]}
        thawed = [names[param] for param in self._params if param.requires_grad and param not in held]
        if self._fixed or engine.cfg.trainer.update_in_backward:
            changed = next(p for p, was in zip(self._params, self._marks, strict=True) if p.requires_grad is not was)
            what = f"strategy={engine.cfg.strategy.name}" if self._fixed else "trainer.update_in_backward=true"
            raise UserError(
                f"{what}: requires_grad of {names[changed]} changed after set-up, which cannot be followed there; freeze by the key freeze, or set "
                "requires_grad in model_fn, and start again from a checkpoint where it is to change"
            )
        if thawed:
            optim.add(engine.optimizers, engine.cfg.optimizer, engine.model, thawed)
        if engine._layout.pipeline is not None:
            engine._layout.pipeline.forget()
        self._marks, self._groups = self._marked(), self._grouped()
        adopt(engine)

    def _follow_groups(self) -> None:
        engine = self._engine
        if self._fixed or engine.cfg.trainer.update_in_backward:
            what = f"strategy={engine.cfg.strategy.name}" if self._fixed else "trainer.update_in_backward=true"
            raise UserError(f"{what}: a group was added to an optimizer after set-up; write optimizer.groups")
        known = set(self._params)
        for optimizer in engine.optimizers:
            for number, group in enumerate(optimizer.param_groups):
                for param in group["params"]:
                    if param not in known:
                        raise UserError(
                            f"engine.optimizers: group {number} holds a parameter of shape {tuple(param.shape)} that is none of the model's, so its gradient would "
                            "not be reduced or counted; make it a parameter of the model (a loss with weights of its own: a submodule that forward calls)"
                        )
        self._groups = self._grouped()
        adopt(engine)

    # ------------------------------------------------------------------ rates

    def _follow_rates(self) -> None:
        for optimizer, written, base in zip(self._engine.optimizers, self._engine._written_lrs, self._engine._base_lrs, strict=True):
            now = [group["lr"] for group in optimizer.param_groups]
            if now != written:
                self._follow_rate(now, written, base)

    def _follow_rate(self, now: list[float], written: list[float], base: list[float]) -> None:
        engine, scheduler = self._engine, self._engine.cfg.scheduler
        changed = next(number for number, rate in enumerate(now) if rate != written[number])
        if scheduler.name != "constant" or engine.updates < scheduler.warmup_steps:
            raise UserError(
                f"scheduler={scheduler.name}: the learning rate of group {changed} was set to {float(now[changed]):g} by hand (or by a scheduler of torch), and the "
                "schedule of the configuration would overwrite it; write scheduler=constant scheduler.warmup_steps=0"
            )
        if not engine.cfg.optimizer.groups and len(now) == 2 and written[0] == written[1] and now[0] != now[1]:
            raise UserError(
                f"engine.optimizers: the learning rate of group {changed} was set to {float(now[changed]):g}, and that of the other group was left as it was: norms and "
                'biases are a group of their own, without decay; write for group in engine.optimizers[0].param_groups: group["lr"] = ..., or '
                "optimizer.no_decay=none for one group"
            )
        base[:], written[:] = now, now
        engine._rates_by_hand = True

    # ------------------------------------------------------------------ hooks

    def _follow_hooks(self, param: torch.Tensor) -> None:
        taken = take_hooks(param)
        if not taken:
            return
        if self._engine.cfg.trainer.update_in_backward:
            name = next(name for name, each in self._named.items() if each is param)
            raise UserError(
                f"trainer.update_in_backward=true: {name} has a hook on its gradient, which is gone when it is whole; change gradients in the forward "
                "(a torch.autograd.Function), or write trainer.update_in_backward=false"
            )
        self.hooks.setdefault(param, []).extend(taken)

    def run_hooks(self) -> None:
        """Call the program's hooks, each once, with the whole gradient of the step at its true scale. Every rank must call it."""
        with self._views.shown():
            for param, tables in self.hooks.items():
                for table, after in tables:
                    for hook in list(table.values()):
                        if param.grad is None:
                            continue
                        changed = hook(param if after else param.grad)
                        if changed is not None and not after:
                            param.grad = changed


def adopt(engine: Engine) -> None:
    """Take in parameters and groups that came into the optimizers after set-up, or went."""
    engine._params = [p for optimizer in engine.optimizers for group in optimizer.param_groups for p in group["params"]]
    engine._totals = Totals(engine.mesh, engine._layout, engine._params, engine._names(), engine.device)
    own_loop.watch_optimizers(engine, engine.optimizers[len(engine._base_lrs) :])
    now = numbers(engine.optimizers)
    engine._base_numbers += now[len(engine._base_numbers) :]
    engine._base_lrs += [[] for _ in engine.optimizers[len(engine._base_lrs) :]]
    for known, new, rates, optimizer in zip(engine._base_numbers, now, engine._base_lrs, engine.optimizers, strict=True):
        known += new[len(known) :]
        rates += [group["lr"] for group in optimizer.param_groups[len(rates) :]]
    if engine.ema is not None:
        engine.ema.follow({param: name for param, name in engine._names().items() if param in set(engine._params)})
    engine._set_lr()


def _take_out(group: dict[str, Any], param: torch.Tensor) -> None:
    index = next(i for i, each in enumerate(group["params"]) if each is param)
    del group["params"][index]
    if group.get("param_names"):
        del group["param_names"][index]


def _asked(engine: Engine) -> str:
    axes = [axis for axis in ("pp", "ep", "cp", "tp") if getattr(engine.cfg.parallel, axis) > 1]
    return f"parallel.{axes[0]}={getattr(engine.cfg.parallel, axes[0])}" if axes else f"strategy={engine.cfg.strategy.name}"


def _first(names: Any) -> str:
    first: Iterator[str] = iter(names)
    name = next(first, None)
    return "" if name is None else f" (the first new parameter is {name})"
