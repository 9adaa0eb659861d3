"""Watch an engine train: what goes in, what every module returns, gradients, norms, weights and states, in the order of execution."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from paratrain import batch as batches
from paratrain.batch import LocalBatch
from paratrain.checkpoint.state import PREFIX, optimizer_tensors
from paratrain.config import Foreign
from paratrain.engine import Engine
from paratrain.result import StepResult
from paratrain.verify.sketch import SAMPLE_WIDTH, sketch, whole


class Key(NamedTuple):
    """What was recorded, and when.

    Attributes:
        step: -1 before the first one.
        kind: data, activation, loss, count, gradient, gradient norm, clipped gradient, weight, buffer, optimizer state, ...
        name: of the module, parameter or buffer, as the user calls it.
    """

    step: int
    kind: str
    name: str


@dataclass
class Event:
    """A sketch of one tensor, or, for an activation, of every sample of it that counts.

    Attributes:
        value: [1, w], or [samples, w] where `per_sample`.
        shape: of the tensor; without dim 0 where `per_sample`.
        dtype: of the tensor.
        numel: elements.
        nonfinite: elements that are not finite.
        per_sample: elements of dim 0 that one sample has, 0 where dim 0 does not count samples.
    """

    value: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    numel: int
    nonfinite: int = 0
    per_sample: int = 0


@dataclass
class Trace:
    """What one rank recorded.

    Attributes:
        events: in the order of execution.
        samples: step -> a hash of each sample that this rank was given and that counts.
        place: (its rank among those that hold different samples, the lowest rank of those).
        full: whole tensors of the keys that were asked for.
        draws: where random numbers were drawn: (step, micro-batch, module, call) -> digest of the generator before.
        replays: likewise, for what was computed again in backward: (step, module, digest).
        depth: operations in a row, counted in modules.
        loss_dtype: in which the loss was summed.
        extra: what else was found out.
    """

    events: dict[Key, Event] = field(default_factory=dict)
    samples: dict[int, list[str]] = field(default_factory=dict)
    place: tuple[int, int] = (0, 0)
    full: dict[Key, Tensor] = field(default_factory=dict)
    draws: dict[tuple[int, int, str, int], str] = field(default_factory=dict)
    replays: list[tuple[int, str, str]] = field(default_factory=list)
    depth: int = 0
    loss_dtype: torch.dtype = torch.float64
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


_GRADIENTS = ("gradient", "clipped gradient")


class Recorder:
    """Records every step of `engine` into `trace`.

    Args:
        zoom: keys of which the whole tensors are kept.
        randomness: record only where random numbers are drawn, and no tensors.
    """

    def __init__(self, engine: Engine, zoom: frozenset[Key] = frozenset(), randomness: bool = False):
        self.engine, self.zoom, self.randomness = engine, zoom, randomness
        self.trace = Trace(place=_place(engine))
        foreign = _GRADIENTS if isinstance(engine.cfg.strategy, Foreign) else ()  # a rank has some of them, or none
        self.trace.extra |= {"hidden": foreign, "partial": foreign}
        if is_split(engine):  # a stage has the gradients of its weights, rank 0 the weights of all
            cut = ("optimizer state", "buffer", "initial buffer", *(["activation"] * cuts_activations(engine)))
            self.trace.extra |= {"hidden": (*foreign, *cut), "partial": ("weight", "initial weight", *_GRADIENTS), "split": True}
        self.micro = -1
        self.sizes: list[tuple[int, int]] = []  # (samples, those that count) of each micro-batch
        self.calls: Counter[str] = Counter()
        self.in_backward = False
        self.gradient_order: dict[str, None] = {}
        if not cuts_activations(engine):
            self._root_hooks()
            for name, module in engine.model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                    continue
                if randomness:
                    self._watch_randomness(name, module)
                else:
                    module.register_forward_hook(self._on_output(name))
        if not randomness:
            self._wrap_clipping()
            self._watch_backward_order()
            self.state(-1, initial=True)
        self._wrap_backward()

    # ------------------------------------------------------------------ a step

    def step(self, share: LocalBatch) -> StepResult:
        """`engine.train_step`, watched."""
        number = self.engine.global_step
        self.micro, self.number = -1, number
        size = self.engine.cfg.data.micro_batch_size
        assert size != "auto", "what fits here says nothing: `verify` takes whole shares instead"
        parts = batches.split(share, size)
        self.sizes = [(max(real, 1), real) for _, _, real in parts]
        self.trace.samples[number] = _sample_hashes(share)
        result = self.engine.train_step(share)
        if not self.randomness:
            self._numbers(number, result)
            self.state(number)
            self.trace.depth = max(self.trace.depth, sum(1 for key in self.trace.events if key.step == number and key.kind == "activation"))
        return result

    def _numbers(self, step: int, result: StepResult) -> None:
        """Loss and norm go before the clipped gradients that `_wrap_clipping` has recorded already."""
        late = {key: self.trace.events.pop(key) for key in list(self.trace.events) if key.step == step and key.kind != "activation"}
        self.add(Key(step, "count", ""), _number(result.count))
        self.add(Key(step, "loss", ""), _number(result.loss))
        self.trace.events |= {key: event for key, event in late.items() if key.kind == "gradient"}
        self.add(Key(step, "gradient norm", ""), _number(result.grad_norm))
        self.add(Key(step, "loss scale", ""), _number(result.loss_scale))
        self.add(Key(step, "learning rate", ""), _number(result.lr))
        self.trace.events |= {key: event for key, event in late.items() if key.kind != "gradient"}

    def state(self, step: int, initial: bool = False) -> None:
        """Weights, buffers and optimizer state as they are now."""
        model = self.engine.model
        for name, param in weights(self.engine).items():
            self.add(Key(step, "initial weight" if initial else "weight", name), param)
        if is_split(self.engine):
            return
        for name, buffer in model.named_buffers():
            self.add(Key(step, "initial buffer" if initial else "buffer", name), buffer)
        for name, value in optimizer_states(self.engine).items():
            self.add(Key(step, "optimizer state", name), value)

    def add(self, key: Key, tensor: Tensor) -> None:
        full = whole(tensor)
        self.trace.events[key] = _event(full)
        if key in self.zoom:
            self.trace.full[key] = full.clone()

    # ------------------------------------------------------------------ hooks

    def _root_hooks(self) -> None:
        def entered(module: nn.Module, args: Any) -> None:
            if not self.in_backward:
                self.micro += 1
                self.calls.clear()
                self.digest = generator_digest()

        def left(module: nn.Module, args: Any, output: Any) -> None:
            if not self.in_backward and not self.randomness and generator_digest() != self.digest:
                self.trace.extra["random"] = True

        self.engine.model.register_forward_pre_hook(entered)
        self.engine.model.register_forward_hook(left)

    def _on_output(self, path: str):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.in_backward or not 0 <= self.micro < len(self.sizes):
                return
            self.calls[path] += 1
            call = f" (call {self.calls[path]})" if self.calls[path] > 1 else ""
            leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            for index, leaf in enumerate(leaves):
                part = f"[{index}]" if len(leaves) > 1 else ""
                self._activation(f"{path or '(the model)'}{part}{call}", leaf)

        return hook

    def _activation(self, name: str, output: Tensor) -> None:
        key, output = Key(self.number, "activation", name), whole(output)
        samples, real = self.sizes[self.micro]
        batched = output.ndim > 0 and output.shape[0] > 0 and output.shape[0] % samples == 0
        per_sample = output.shape[0] // samples if batched else 0
        shape = tuple(output.shape[1:] if batched else output.shape)
        if batched:
            output = output[: real * per_sample]
        value = sketch(output, real, SAMPLE_WIDTH) if batched and real and output.numel() else sketch(output)[: 1 - batched]
        nonfinite = _nonfinite(output)
        before = self.trace.events.get(key)
        if before is not None and self.micro > 0:
            if not (batched and before.per_sample == per_sample and before.shape == shape):
                before.per_sample = 0
                return
            if value.numel() and before.value.numel():
                value = torch.cat([before.value, value])
            elif before.value.numel():
                value = before.value
            nonfinite += before.nonfinite
        self.trace.events[key] = Event(value, shape, output.dtype, value.numel(), nonfinite, per_sample)
        if key in self.zoom:
            kept = [self.trace.full[key]] if key in self.trace.full else []
            self.trace.full[key] = torch.cat([*kept, output]) if batched else output.clone()

    def _wrap_backward(self) -> None:
        backward = self.engine._backward

        def watched(total: Tensor, count: Any) -> None:
            self.in_backward, self.trace.loss_dtype = True, total.dtype
            try:
                backward(total, count)
            finally:
                self.in_backward = False

        self.engine._backward = watched  # type: ignore[method-assign]

    def _watch_backward_order(self) -> None:
        for name, param in self.engine.model.named_parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(lambda _, name=name: self.gradient_order.setdefault(name))

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


def is_split(engine: Engine) -> bool:
    """Whether ranks hold parts of one model or of one sequence: under tp, pp or cp, and where ep deals out whole modules."""
    root = engine.mesh.root
    return any(root[axis].size() > 1 for axis in ("tp", "pp", "cp")) or bool(engine._layout.experts.owners)


def cuts_activations(engine: Engine) -> bool:
    """Whether ranks compute parts of activations that nothing here puts together: all of those that are split but under tp."""
    root = engine.mesh.root
    return is_split(engine) and (root["tp"].size() == 1 or any(root[axis].size() > 1 for axis in ("pp", "cp")))


def generator_digest() -> str:
    """Digest of the state of torch's CPU generator."""
    return hashlib.blake2b(torch.default_generator.get_state().numpy().tobytes(), digest_size=8).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Digest of every bit of a tensor."""
    import xxhash

    data = whole(tensor).contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_hexdigest(data.numpy().data) if data.numel() else ""


def weights(engine: Engine) -> dict[str, Tensor]:
    """Every parameter by name; what an engine of another package keeps in pieces of its own is gathered. Collective."""
    if is_split(engine):
        assert engine.blueprint is not None, "a model that is split was copied before"
        names = [name for name, _ in engine.blueprint.named_parameters(remove_duplicate=False)]
        state = engine.full_state_dict()
        return {name: state[name] for name in names if name in state}
    names = [name for name, _ in engine.model.named_parameters(remove_duplicate=False)]
    if isinstance(engine.cfg.strategy, Foreign):
        kept = engine.tensors()
        return {name: kept[f"model/{name}"] for name in names}
    return dict(engine.model.named_parameters(remove_duplicate=False))


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
    return {key: _event(whole(value)) for key, value in state_of(engine).items()}


def _event(full: Tensor) -> Event:
    return Event(sketch(full), tuple(full.shape), full.dtype, full.numel(), _nonfinite(full))


def _nonfinite(tensor: Tensor) -> int:
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=torch.float64))):  # one pass where all is well
        return 0
    return int((~torch.isfinite(tensor)).sum())


class _NoDropout(TorchFunctionMode):
    """Dropout functions that a model holds under names of its own pass their input on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _WITHOUT_DROPOUT.get(func, func)(*args, **(kwargs or {}))


def _identity(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, *args: Any, **kwargs: Any
):
    return _sdpa(query, key, value, attn_mask, 0.0, *args, **kwargs)


_sdpa = nn.functional.scaled_dot_product_attention
_NAMES = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout")
_FOUND = [(owner, name) for owner in (nn.functional, torch) for name in _NAMES if hasattr(owner, name)]
_WITHOUT_DROPOUT: dict[Any, Any] = {getattr(owner, name): _identity for owner, name in _FOUND} | {_sdpa: _attention}


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch every dropout of `model` off: modules for good, functions inside the context.

    torch leaves function modes while backward runs, so for what is computed again there the functions themselves are replaced;
    nobody else uses this process.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0
    places = [*_FOUND, (nn.functional, "scaled_dot_product_attention")]
    originals = [getattr(owner, name) for owner, name in places]
    try:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, _WITHOUT_DROPOUT[original])
        with _NoDropout():
            yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def _number(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def _place(engine: Engine) -> tuple[int, int]:
    data = engine.mesh.data
    return data.get_local_rank(), min(data.mesh.flatten().tolist())


def _sample_hashes(share: LocalBatch) -> list[str]:
    leaves = [leaf for leaf in tree_leaves((share.inputs, share.targets)) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    return ["".join(tensor_digest(leaf[i])[:8] for leaf in leaves) for i in range(share.real)]
