"""Half precision that returns to a wider one where it fails, and tries half again when it can.

The monitor names the modules whose float16 fails; each then computes in float32 or bfloat16, weights and the rest of the model stay as
they are. All decisions are functions of readings that all ranks share and of the state below, so they are the same everywhere and
after a resume.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from types import MethodType
from typing import Any

import torch
from torch import nn

from paratrain.batch import map_tensors
from paratrain.config import Fallback as FallbackOptions
from paratrain.precision.loss_scale import LossScaler
from paratrain.precision.monitor import LARGEST, Monitor, Reading

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WHOLE = ""  # the name of the model itself


class Fallback:
    """Watches a model under 16-mixed and moves modules out of float16 and back.

    Args:
        compiled: names of modules with compiled forwards. Each is watched and moved as a whole, from outside of its code, which is
            compiled once for half and once for the wider dtype.

    Attributes:
        moved: module -> the step at which it left half.
        events: what happened: {"step", "event", "module", "why"}, newest last.
        readings: the last reading.
    """

    def __init__(
        self, options: FallbackOptions, model: nn.Module, scaler: LossScaler, device: torch.device, compiled: Collection[str] = ()
    ):
        self.options, self.scaler = options, scaler
        self.moved: dict[str, int] = {}
        self.events: list[dict[str, Any]] = []
        self.readings: dict[str, Reading] = {}
        self._calm: dict[str, int] = {}  # steps that a module must stay out; doubles with each relapse
        self._streak: dict[str, int] = {}  # readings in a row in which a module's gradients underflow
        self._waited = -options.every  # step of the last overflow that nobody had looked at
        watched = {
            name: module
            for name, module in model.named_modules()
            if not any(name != outer and _holds(outer, name) for outer in compiled)  # what is inside is one with the compiled code
        }
        self._monitor = Monitor(watched, device)
        self._weighted = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
        self._compiled = set(compiled)
        self._switches: dict[str, _Switch] = {}
        if options.policy in ("module", "global"):
            self._switches = {name: _Switch(module, DTYPES[options.to], device.type) for name, module in watched.items()}

    def after_step(self, step: int, skipped: bool) -> bool:
        """Judge the step `step` (counted from 1). Every rank must call it.

        Returns:
            Whether the overflow is taken care of, so that the loss scale need not shrink.
        """
        relieved = False
        if self._monitor.reading:
            self.readings = self._monitor.read()
            if self._switches:
                relieved = self._overflowed(step) if skipped else self._settled(step)
        elif skipped and self._switches and step > self._waited + self.options.every:
            relieved, self._waited = True, step  # nobody looked: the next step is read, and judged by what is seen then
        self._monitor.reading = skipped or step % self.options.every == 0
        return relieved

    def metrics(self) -> dict[str, float]:
        """Of the last reading; `half_modules` is the fraction of the modules with weights that compute in float16."""
        half = [reading for reading in self.readings.values() if reading.half]
        metrics = {"precision/half_modules": self.half_fraction, "precision/scale_floor": self.scaler.floor}
        if half:
            ratios = [reading.snr for reading in half if not math.isnan(reading.snr)]
            metrics["precision/range_used"] = max(reading.range_used for reading in half)
            metrics["precision/underflow"] = max(reading.underflow for reading in half)
            if ratios:
                metrics["precision/grad_snr_db"] = min(ratios)
        return metrics

    @property
    def half_fraction(self) -> float:
        out = sum(self._is_out(name) for name in self._weighted)
        return 1 - out / max(len(self._weighted), 1)

    # ------------------------------------------------------------------ decisions

    def _overflowed(self, step: int) -> bool:
        at_floor = self.scaler.at_floor
        culprits = self._innermost(lambda r: math.isfinite(r.inputs) and not math.isfinite(r.outputs))
        why = "its outputs overflow"
        if not culprits and at_floor:
            culprits = self._innermost(lambda r: math.isfinite(r.grad_outputs) and not math.isfinite(r.grad_inputs))
            why = "its gradients overflow at the floor of the loss scale"
        if not culprits and at_floor:  # handed on by a wide module, lost where the half output of another takes them
            culprits = [
                name for name, r in self.readings.items() if r.half and not math.isfinite(r.grad_outputs) and not self._is_out(name)
            ][-1:]
            why = "the gradients of its outputs overflow at the floor of the loss scale"
        if not culprits and at_floor:  # the gradients of weights are sums of products of inputs and gradients
            products = {
                name: r.inputs * r.grad_outputs
                for name, r in self.readings.items()
                if (name in self._weighted or name in self._compiled) and not self._is_out(name)
            }
            finite = {name: value for name, value in products.items() if 0 < value < math.inf}
            culprits = [max(finite, key=finite.__getitem__)] if finite else [WHOLE]
            why = "it has the largest gradients when some overflow at the floor of the loss scale"
        culprits = [name for name in culprits if not self._is_out(name)]
        self._move(step, culprits, why)
        return bool(culprits)

    def _settled(self, step: int) -> bool:
        self._move(step, self._innermost(lambda r: r.half and r.range_used > self.options.high), "its activations near the largest number")
        for name, since in list(self.moved.items()):
            inside = any(outer != name and _holds(outer, name) for outer in self.moved)
            small = name == WHOLE or self.readings[name].largest < self.options.low * LARGEST
            if step - since >= self._calm[name] and small and not inside:
                del self.moved[name]
                self._switches[name].wide = False
                self._note(step, "half", name, f"calm for {step - since} steps")
        self._watch_underflow(step)
        return False

    def _watch_underflow(self, step: int) -> None:
        starved = set(self._innermost(lambda r: r.half and r.underflow > self.options.max_underflow))
        self._streak = {name: self._streak.get(name, 0) + 1 for name in self.readings if name in starved}
        lasting = [name for name, readings in self._streak.items() if readings >= self.options.patience]
        if not lasting:
            return
        self._streak = {}
        if self.scaler.raise_floor():
            self._note(step, "floor", lasting[0], f"its gradients underflow; the loss scale stays at or above {self.scaler.floor:g}")
        else:
            self._move(step, lasting, "its gradients underflow at the largest loss scale")

    def _innermost(self, faulty: Callable[[Reading], bool]) -> list[str]:
        """The faulty modules in half that hold no faulty module."""
        found = [name for name, reading in self.readings.items() if not self._is_out(name) and faulty(reading)]
        return [name for name in found if not any(other != name and _holds(name, other) for other in found)]

    def _is_out(self, name: str) -> bool:
        return any(_holds(outer, name) for outer in self.moved)

    def _move(self, step: int, names: list[str], why: str) -> None:
        if names and self.options.policy == "global":
            names, why = [WHOLE], f"{names[0] or 'the model'}: {why}"
        for name in names:
            self._out(step, name, why)
        if names and WHOLE not in self.moved and 1 - self.half_fraction > self.options.max_moved:
            self._out(step, WHOLE, f"more than {self.options.max_moved:.0%} of the modules have left half")

    def _out(self, step: int, name: str, why: str) -> None:
        self._calm[name] = min(2 * self._calm[name], 64 * self.options.calm) if name in self._calm else self.options.calm
        self.moved[name] = step
        self._switches[name].wide = True
        self._note(step, self.options.to, name, why)

    def _note(self, step: int, event: str, name: str, why: str) -> None:
        self.events.append({"step": step, "event": event, "module": name, "why": why})
        log.info("step %d: %s -> %s: %s", step, name or "the whole model", event, why)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        return {
            "moved": dict(self.moved),
            "calm": dict(self._calm),
            "streak": dict(self._streak),
            "events": list(self.events),
            "reading": self._monitor.reading,
            "waited": self._waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self._switches:
            return
        self.moved, self._calm, self._streak = (dict(state[key]) for key in ("moved", "calm", "streak"))
        self.events, self._monitor.reading, self._waited = list(state["events"]), bool(state["reading"]), int(state["waited"])
        for name, switch in self._switches.items():
            switch.wide = name in self.moved


class _Switch:
    """Lets one module compute in another dtype than the autocast around it; survives a copy of the module."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device_type: str):
        self.wide, self.dtype, self.device_type = False, dtype, device_type
        self.inner: Callable | None = module.__dict__.get("forward")
        module.precision_switch = self  # type: ignore[assignment]
        module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    switch = self.precision_switch
    run = switch.inner or type(self).forward.__get__(self)
    if not switch.wide:
        return run(*args, **kwargs)
    args, kwargs = map_tensors(lambda x: x.to(switch.dtype) if x.dtype is torch.float16 else x, (args, kwargs))
    with torch.autocast(switch.device_type, dtype=torch.bfloat16, enabled=switch.dtype is torch.bfloat16):
        return run(*args, **kwargs)


def _holds(outer: str, name: str) -> bool:
    """Whether the module `outer` is `name`, or around it."""
    return outer in (WHOLE, name) or name.startswith(f"{outer}.")
