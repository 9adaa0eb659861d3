"""Watch an engine train: what goes in, what every module returns, gradients, norms, weights and states, in the order of execution."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from paratrain import batch as batches
from paratrain.batch import LocalBatch
from paratrain.checkpoint.state import PREFIX, optimizer_tensors
from paratrain.config import Foreign
from paratrain.engine import Engine
from paratrain.result import StepResult
from paratrain.verify.attributes import Attributes
from paratrain.verify.sketch import whole
from paratrain.verify.trace import Event, Key, Trace, Watch, event, generator_digest, number, sample_hashes, tensor_digest, whole_digest

_GRADIENTS = ("gradient", "clipped gradient")


class Recorder(Watch):
    """Records every step of `engine` into `trace`.

    Args:
        zoom: keys of which the whole tensors are kept.
        randomness: record only where random numbers are drawn, and no tensors.
        activations: record what modules return.
        loss_fn: whose attributes are recorded with those of the model.
    """

    def __init__(
        self, engine: Engine, zoom: frozenset[Key] = frozenset(), randomness: bool = False, activations: bool = True, loss_fn: Any = None
    ):
        super().__init__(Trace(place=_place(engine)), zoom)
        self.engine, self.randomness = engine, randomness
        foreign = isinstance(engine.cfg.strategy, Foreign)  # a rank has some of the gradients, or none
        hidden = _GRADIENTS if foreign or engine.cfg.trainer.update_in_backward else ()
        self.trace.extra |= {"hidden": hidden, "partial": hidden}
        if is_split(engine):  # a stage has the gradients of its weights, rank 0 the weights of all
            cut = ("optimizer state", "buffer", "initial buffer", *(["activation"] * cuts_activations(engine)))
            partial = ("weight", "initial weight", "buffer", "initial buffer", *_GRADIENTS)
            self.trace.extra |= {"hidden": (*hidden, *cut), "partial": partial, "split": True}
        if not activations:
            self.trace.extra["hidden"] = (*self.trace.extra["hidden"], "activation")
        if not cuts_activations(engine):
            self.watch_model(engine.model, activations and not randomness)
            if randomness:
                for name, module in engine.model.named_modules():
                    if not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                        self._watch_randomness(name, module)
        if not randomness:
            self._wrap_clipping()
            self.watch_backward_order(engine.model)
            self.attributes = Attributes(engine.model, loss_fn)
            self.trace.extra["attributes"] = self.attributes.found
            self.state(-1, initial=True)
        self._wrap_backward()

    # ------------------------------------------------------------------ a step

    def step(self, share: LocalBatch) -> StepResult:
        """`engine.train_step`, watched."""
        self.micro, self.number = -1, self.engine.global_step
        size = self.engine.cfg.data.micro_batch_size
        assert size != "auto", "what fits here says nothing: `verify` takes whole shares instead"
        parts = batches.split(share, size)
        self.sizes = [(max(real, 1), real) for _, _, real in parts]
        self.trace.samples[self.number] = hashes = sample_hashes(share.inputs, share.targets, share.real)
        piped = self.engine.mesh.root["pp"].size() > 1  # which takes micro-batches of its own
        self.trace.parts[self.number] = list(hashes) if piped else _parts_of(hashes, parts)
        result = self.engine.train_step(share)
        if not self.randomness:
            self._numbers(self.number, result)
            self.state(self.number)
            self.attributes.note(self.number)
            self.trace.end_step(self.number)
        return result

    def _numbers(self, step: int, result: StepResult) -> None:
        """Loss and norm go before the clipped gradients that `_wrap_clipping` has recorded already."""
        late = {key: self.trace.events.pop(key) for key in list(self.trace.events) if key.step == step and key.kind != "activation"}
        self.add(Key(step, "count", ""), number(result.count))
        self.add(Key(step, "loss", ""), number(result.loss))
        self.trace.events |= {key: found for key, found in late.items() if key.kind == "gradient"}
        self.add(Key(step, "gradient norm", ""), number(result.grad_norm))
        self.add(Key(step, "learning rate", ""), number(result.lr))
        self.trace.events |= {key: found for key, found in late.items() if key.kind != "gradient"}
        self.trace.extra["loss scale"] = float(result.loss_scale)

    def state(self, step: int, initial: bool = False) -> None:
        """Weights, buffers and optimizer state as they are now. Collective."""
        before = "initial " * initial
        for name, param in weights(self.engine).items():
            self.add(Key(step, f"{before}weight", name), param)
        for name, buffer in buffers(self.engine).items():
            self.add(Key(step, f"{before}buffer", name), buffer)
        if not is_split(self.engine):
            for name, value in optimizer_states(self.engine).items():
                self.add(Key(step, "optimizer state", name), value)

    # ------------------------------------------------------------------ hooks

    def _wrap_backward(self) -> None:
        backward = self.engine._backward

        def watched(total: Tensor, count: Any) -> None:
            self.in_backward, self.trace.loss_dtype = True, total.dtype
            try:
                backward(total, count)
            finally:
                self.in_backward = False

        self.engine._backward = watched  # type: ignore[method-assign]

    def _wrap_clipping(self) -> None:
        """Gradients at their true scale as the reduction left them, and again as the optimizer gets them."""
        engine = self.engine
        clip, reduce = engine.clip_grad_norm_, engine._layout.reduce

        def reduced(params: Any) -> None:
            reduce(params)
            assert engine._window is not None
            assert engine._unit is not None
            count = float(engine._totals.over_ranks(engine._window)[1])
            self._gradients(engine.global_step, "gradient", engine._unit / engine.scaler.scale / max(count, 1e-300))

        def clipped(max_norm: float | None) -> Any:
            norm = clip(max_norm)
            self._gradients(engine.global_step, "clipped gradient")
            return norm

        engine._layout = replace(engine._layout, reduce=reduced)
        engine.clip_grad_norm_ = clipped  # type: ignore[method-assign]

    def _gradients(self, step: int, kind: str, factor: float = 1.0) -> None:
        params = dict(self.engine.model.named_parameters(remove_duplicate=False))
        order = list(dict.fromkeys([*self.gradient_order, *reversed(params)]))
        for name in order:
            grad = params[name].grad
            if grad is not None:
                grad = whole(self.engine._layout.placed.natural(name, grad))
                self.add(Key(step, kind, name), grad.double() * factor if factor != 1.0 else grad)

    def _watch_randomness(self, path: str, module: nn.Module) -> None:
        """Digest the generator before and after every module, to see which draw, and what they drew from when computed again."""
        stack: list[tuple[str, int]] = []

        def entered(module: nn.Module, args: Any) -> None:
            digest = generator_digest()
            if self.in_backward:
                self.trace.replays.append((self.number, path, digest))
            else:
                self.calls[path] += 1
                stack.append((digest, self.calls[path]))

        def left(module: nn.Module, args: Any, output: Any) -> None:
            if not self.in_backward and stack:
                before, call = stack.pop()
                if generator_digest() != before:
                    self.trace.draws[self.number, self.micro, path, call] = before

        module.register_forward_pre_hook(entered)
        module.register_forward_hook(left)


def _parts_of(hashes: list[str], parts: Sequence[tuple[Any, Any, int]]) -> list[str]:
    """What tells apart what micro-batches are given, whatever the order of their samples."""
    if not hashes:
        return [whole_digest((inputs, targets)) if real else "" for inputs, targets, real in parts]
    ends = list(itertools.accumulate(real for _, _, real in parts))
    return [" ".join(sorted(hashes[start:end])) for start, end in zip([0, *ends], ends, strict=False)]


def is_split(engine: Engine) -> bool:
    """Whether ranks hold parts of one model or of one sequence: under tp, pp or cp, and where ep deals out whole modules."""
    root = engine.mesh.root
    return any(root[axis].size() > 1 for axis in ("tp", "pp", "cp")) or bool(engine._layout.experts.owners)


def cuts_activations(engine: Engine) -> bool:
    """Whether ranks compute parts of activations that nothing here puts together: all of those that are split but under tp alone."""
    root = engine.mesh.root
    alone = root["tp"].size() > 1 and not any(root[axis].size() > 1 for axis in ("pp", "cp")) and not engine._layout.experts.owners
    return is_split(engine) and not alone


def weights(engine: Engine) -> dict[str, Tensor]:
    """Every parameter by name; where ranks hold parts of the model, on rank 0 alone. Collective."""
    if is_split(engine):
        state, known = engine.full_state_dict(), engine.blueprint or engine.model
        names = [name for name, _ in known.named_parameters(remove_duplicate=False)]
        return {name: state[name] for name in names if name in state}
    names = [name for name, _ in engine.model.named_parameters(remove_duplicate=False)]
    if isinstance(engine.cfg.strategy, Foreign):
        kept = engine.tensors()
        return {name: kept[f"model/{name}"] for name in names}
    return dict(engine.model.named_parameters(remove_duplicate=False))


def buffers(engine: Engine) -> dict[str, Tensor]:
    """Every buffer by name; where ranks hold parts of the model, those that are saved, on rank 0 alone. Collective."""
    if not is_split(engine):
        return dict(engine.model.named_buffers())
    state, known = engine.full_state_dict(), engine.blueprint or engine.model
    return {name: state[name] for name, _ in known.named_buffers() if name in state}


def optimizer_states(engine: Engine) -> dict[str, Tensor]:
    """Every state of every optimizer as <parameter>/<key>. Collective."""
    if isinstance(engine.cfg.strategy, Foreign):
        return {name.removeprefix(PREFIX): value for name, value in engine.tensors().items() if name.startswith(PREFIX)}
    names: dict[Tensor, str] = {param: name for name, param in engine.model.named_parameters()}
    return {name.removeprefix(PREFIX): value for name, value in optimizer_tensors(engine.optimizers, names).items()}


def state_of(engine: Engine) -> dict[Key, Tensor]:
    """Every weight, buffer and optimizer state as it is now; the step is that which comes next."""
    step = engine.global_step
    found: dict[Key, Tensor] = {Key(step, "weight", name): value for name, value in weights(engine).items()}
    found |= {Key(step, "buffer", name): value for name, value in engine.model.named_buffers()}
    return found | {Key(step, "optimizer state", name): value for name, value in optimizer_states(engine).items()}


def state_digests(engine: Engine) -> dict[Key, str]:
    """Digests of every bit of `state_of`."""
    return {key: tensor_digest(value) for key, value in state_of(engine).items()}


def state_events(engine: Engine) -> dict[Key, Event]:
    """Sketches of `state_of`."""
    return {key: event(whole(value)) for key, value in state_of(engine).items()}


def _place(engine: Engine) -> tuple[int, int]:
    data = engine.mesh.data
    return data.get_local_rank(), min(data.mesh.flatten().tolist())
