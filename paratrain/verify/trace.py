"""What is written down of a training: events in the order of execution, and the hooks on a model that make them."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

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
        parts: step -> what tells apart what each of its micro-batches was given.
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
    parts: dict[int, list[str]] = field(default_factory=dict)
    place: tuple[int, int] = (0, 0)
    full: dict[Key, Tensor] = field(default_factory=dict)
    draws: dict[tuple[int, int, str, int], str] = field(default_factory=dict)
    replays: list[tuple[int, str, str]] = field(default_factory=list)
    depth: int = 0
    loss_dtype: torch.dtype = torch.float64
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def end_step(self, step: int) -> None:
        self.depth = max(self.depth, sum(1 for key in self.events if key.step == step and key.kind == "activation"))


class Watch:
    """Writes down what the modules of a model return, and tensors it is handed.

    Args:
        zoom: keys of which the whole tensors are kept.
    """

    def __init__(self, trace: Trace, zoom: frozenset[Key] = frozenset()):
        self.trace, self.zoom = trace, zoom
        self.number = 0
        self.micro = -1
        self.sizes: list[tuple[int, int]] = []  # (samples, those that count) of each micro-batch
        self.calls: Counter[str] = Counter()
        self.in_backward = False
        self.gradient_order: dict[str, None] = {}

    def add(self, key: Key, tensor: Tensor) -> None:
        full = whole(tensor)
        self.trace.events[key] = event(full)
        if key in self.zoom:
            self.trace.full[key] = full.clone()

    def watch_model(self, model: nn.Module, activations: bool) -> None:
        """Count its calls, and write down what each of its modules returns if `activations`."""

        def entered(module: nn.Module, args: Any) -> None:
            if not self.in_backward:
                self.micro += 1
                self.calls.clear()

        model.register_forward_pre_hook(entered)
        for name, module in model.named_modules():
            if activations and not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                module.register_forward_hook(self._on_output(name))

    def watch_backward_order(self, model: nn.Module) -> None:
        """Note in which order gradients come."""
        for name, param in model.named_parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(lambda _, name=name: self.gradient_order.setdefault(name))

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
        bad = nonfinite(output)
        before = self.trace.events.get(key)
        if before is not None and self.micro > 0:
            if not (batched and before.per_sample == per_sample and before.shape == shape):
                before.per_sample = 0
                return
            if value.numel() and before.value.numel():
                value = torch.cat([before.value, value])
            elif before.value.numel():
                value = before.value
            bad += before.nonfinite
        self.trace.events[key] = Event(value, shape, output.dtype, value.numel(), bad, per_sample)
        if key in self.zoom:
            kept = [self.trace.full[key]] if key in self.trace.full else []
            self.trace.full[key] = torch.cat([*kept, output]) if batched else output.clone()


def generator_digest() -> str:
    """Digest of the state of torch's CPU generator."""
    return hashlib.blake2b(torch.default_generator.get_state().numpy().tobytes(), digest_size=8).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Digest of every bit of a tensor."""
    import xxhash

    data = whole(tensor).contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_hexdigest(data.numpy().data) if data.numel() else ""


def sample_hashes(inputs: Any, targets: Any, samples: int) -> list[str]:
    """A hash of each of the first `samples` samples; none where the tensors disagree about which dim counts samples."""
    leaves = [leaf for leaf in tree_leaves((inputs, targets)) if isinstance(leaf, Tensor) and leaf.ndim > 0 and not leaf.is_nested]
    if any(leaf.layout is not torch.strided for leaf in leaves) or len({len(leaf) for leaf in leaves}) != 1:
        return []
    return ["".join(tensor_digest(leaf[i])[:8] for leaf in leaves) for i in range(min(samples, len(leaves[0])))]


def whole_digest(batch: Any) -> str:
    """A digest of a batch whose samples cannot be told apart: of its tensors, and of all else as it is printed."""
    leaves = [tensor_digest(leaf) if _dense(leaf) else repr(leaf) for leaf in tree_leaves(batch)]
    return hashlib.blake2b("\n".join(leaves).encode(errors="replace"), digest_size=8).hexdigest()


def _dense(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_nested and leaf.layout is torch.strided


def event(full: Tensor) -> Event:
    return Event(sketch(full), tuple(full.shape), full.dtype, full.numel(), nonfinite(full))


def nonfinite(tensor: Tensor) -> int:
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=torch.float64))):  # one pass where all is well
        return 0
    return int((~torch.isfinite(tensor)).sum())


def number(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)
