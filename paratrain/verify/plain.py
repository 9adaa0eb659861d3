"""What a layout is compared with: the training loop anyone would write for one process, on whole batches as the data gave them.

It shares nothing with the engine: no slicing of batches, no handling of losses, no reduction, no wrapper. Only what the configuration names
is read from it: the optimizer with its groups, the schedule and the limits on gradients.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from paratrain.config import Config
from paratrain.deal import Shared, takes_items
from paratrain.errors import UserError
from paratrain.optim import schedules
from paratrain.parallel import freeze, materialise
from paratrain.verify.attributes import Attributes, apart
from paratrain.verify.draws import Draws
from paratrain.verify.trace import Key, Trace, Watch, generator_digest, number, sample_hashes

DTYPES = {  # of a precision: that of weights and inputs, and of autocast
    "64-true": (torch.float64, None),
    "32-true": (torch.float32, None),
    "bf16-true": (torch.bfloat16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
}


def train(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Any],
    batches: Iterable[tuple[Any, Any]],
    optimizers: Sequence[torch.optim.Optimizer],
    cfg: Config,
    total: int | None,
    watch: Observer,
) -> None:
    """Train on each of `batches` in turn.

    Args:
        total: updates in training, for the schedule.
    """
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    params = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
    for step, batch in enumerate(batches):
        for optimizer, peaks in zip(optimizers, rates, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * schedules.factor(cfg.scheduler, step, total)
        for param in model.parameters():
            param.grad = None
        watch.begin(step, *batch)
        inputs, targets = in_precision(batch, cfg)
        with autocast(cfg):
            loss, count = mean(loss_fn(call(model, inputs), targets), cfg.trainer.loss_weights)
        watch.forward_done(loss)
        loss.backward()
        grads = [param.grad for param in params if param.grad is not None]
        norm = torch.stack([grad.norm().double() for grad in grads]).norm() if grads else torch.zeros(())
        watch.backward_done(loss, count, norm, optimizers[0].param_groups[0]["lr"])
        if cfg.trainer.clip_norm is not None:
            for grad in grads:
                grad.mul_(min(1.0, cfg.trainer.clip_norm / (float(norm) + 1e-6)))
        limit(params, cfg.trainer.clip_adaptive, cfg.trainer.clip_value)
        watch.clipped()
        for optimizer in optimizers:
            optimizer.step()
        watch.end(optimizers)


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict) or takes_items(model, inputs):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def mean(loss: Any, weights: Mapping[str, float] | None) -> tuple[Tensor, Any]:
    """The loss of a batch as a mean, and its count; None where loss_fn returned a mean alone."""
    if weights:
        parts = {name: mean(loss[name], None) for name in weights}
        return sum((weights[name] * part for name, (part, _) in parts.items()), torch.zeros(())), next(iter(parts.values()))[1]
    if isinstance(loss, tuple | list):
        total, count = loss
        nothing = not float(count.detach() if isinstance(count, Tensor) else count)
        return (total if nothing else total / count).reshape(()), count
    return loss.reshape(()), None


@torch.no_grad()
def limit(params: Sequence[Tensor], adaptive: float | None, value: float | None) -> None:
    """Limits on gradients beside the norm: of each row by the norm of its weights (Brock et al. 2021), then of each element."""
    for param in (param for param in params if param.grad is not None):
        assert param.grad is not None
        if adaptive is not None:
            weight, grad = ((t.flatten(1) if t.ndim > 1 else t.reshape(1, -1)) for t in (param, param.grad))
            allowed = adaptive * weight.norm(dim=1, keepdim=True).clamp(min=1e-3)
            grad.mul_((allowed / grad.norm(dim=1, keepdim=True).clamp(min=1e-6)).clamp(max=1.0))
        if value is not None:
            param.grad.clamp_(-value, value)


def build(model_fn: Callable[[], nn.Module] | nn.Module, cfg: Config) -> nn.Module:
    """The model of one process: its first values, what is frozen, its dtype.

    Raises:
        UserError: `model_fn` gives no module.
    """
    if cfg.memory.init == "meta":  # which values these are is for `materialise` to say
        planned = materialise.plan(model_fn, cfg, torch.device("cpu"), sharded=False)
        materialise.fill(planned, cfg, torch.device("cpu"))
        model = planned.model
    else:
        random.seed(cfg.seed)
        np.random.seed(cfg.seed % 2**32)
        torch.manual_seed(cfg.seed)
        model = model_fn if isinstance(model_fn, nn.Module) else model_fn()
    if not isinstance(model, nn.Module):
        raise UserError(f"model_fn must be an nn.Module or a callable that returns one, got {type(model).__name__}")
    freeze.apply(model, cfg.freeze)
    to_dtype(model, DTYPES[cfg.precision.name][0])
    if cfg.memory.pretrained is not None and cfg.memory.init != "meta":
        _pretrained(model, Path(cfg.memory.pretrained))
    return model.train()


def to_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Floating parameters and buffers in `dtype`, complex ones of that width."""
    for owner in model.modules():
        for store in (owner._parameters, owner._buffers):
            for tensor in store.values():
                if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
                    wide = dtype if tensor.is_floating_point() else (torch.complex128 if dtype is torch.float64 else torch.complex64)
                    tensor.data = tensor.data.to(wide)


def _pretrained(model: nn.Module, path: Path) -> None:
    from safetensors.torch import load_file

    adapters = list(getattr(model, "peft_config", ()))
    own = {materialise.without_adapters(name, adapters): value for name, value in model.state_dict(keep_vars=True).items()}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        for name, value in load_file(file).items():
            with torch.no_grad():
                own[name].copy_(value)


def copied(batch: Any, dtype: torch.dtype | None) -> Any:
    """A copy of `batch` with its floating tensors in `dtype` (None: as they are): in containers, and in fields of dataclasses."""
    leaves, spec = tree_flatten(batch)
    return tree_unflatten([_copied(leaf, dtype) for leaf in leaves], spec)


def _copied(leaf: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(leaf, Tensor):
        leaf = leaf.detach().clone()
        return leaf.to(dtype) if dtype is not None and leaf.is_floating_point() else leaf
    if isinstance(leaf, Shared):
        return copied(leaf.value, dtype)
    if isinstance(leaf, UserDict):
        return type(leaf)({name: copied(part, dtype) for name, part in leaf.items()})
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        leaf = copy.copy(leaf)
        for part in dataclasses.fields(leaf):
            object.__setattr__(leaf, part.name, copied(getattr(leaf, part.name), dtype))
    return leaf


def alone() -> None:
    """A process group of this process alone, for models and losses that call collectives."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


class Observer(Watch):
    """Writes down what `train` does.

    Args:
        activations: what modules return, too.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Any, cfg: Config, draws: Draws, zoom: frozenset[Key] = frozenset(), activations: bool = True
    ):
        super().__init__(Trace(), zoom)
        self.model, self.loss_fn, self.cfg, self.draws = model, loss_fn, cfg, draws
        self.watch_model(model, activations)
        self.watch_backward_order(model)
        self.attributes = Attributes(model, loss_fn)
        modules = 0 if activations else sum(1 for _ in model.modules())
        self.trace.extra |= {
            "attributes": self.attributes.found,
            "narrow": set(),
            "modules": modules,
            "positions": 1,
            "moved generator": False,
        }
        for name, param in model.named_parameters(remove_duplicate=False):
            self.add(Key(-1, "initial weight", name), param)
        self.trace.extra["trained"] = {
            name: param.numel() for name, param in model.named_parameters() if param.requires_grad and param.numel()
        }
        self._buffers("initial buffer")
        self.first_buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self.narrow = Narrow(self.trace.extra["narrow"])

    def begin(self, step: int, inputs: Any, targets: Any) -> None:
        self.number, self.micro, self.draws.step = step, -1, step
        sizes = [len(leaf) for leaf in tree_leaves((inputs, targets)) if isinstance(leaf, Tensor) and leaf.ndim > 0]
        samples = max(set(sizes), key=sizes.count) if sizes else 1
        self.trace.extra["samples"] = samples
        self.trace.extra["positions"] = max([1, *(leaf.numel() for leaf in tree_leaves((inputs, targets)) if isinstance(leaf, Tensor))])
        self.sizes = [(max(samples, 1), samples)]
        self.trace.samples[step] = sample_hashes(inputs, targets, samples)
        self.last = inputs, targets
        self.digest = generator_digest()
        self.narrow.__enter__()

    def forward_done(self, loss: Tensor) -> None:
        self.narrow.__exit__(None, None, None)
        if not loss.requires_grad:
            raise UserError("the loss does not depend on any trainable parameter: check that loss_fn uses the outputs")
        self.in_backward, self.trace.loss_dtype = True, loss.dtype

    def backward_done(self, loss: Tensor, count: Any, norm: Tensor, lr: float) -> None:
        self.in_backward = False
        if count is not None:
            self.add(Key(self.number, "count", ""), number(float(count.detach() if isinstance(count, Tensor) else count)))
            if isinstance(count, Tensor) and count.is_floating_point():
                self.trace.extra["count dtype"] = count.dtype
        self.add(Key(self.number, "loss", ""), number(float(loss.detach())))
        self._gradients("gradient")
        self.add(Key(self.number, "gradient norm", ""), number(float(norm)))
        self.add(Key(self.number, "learning rate", ""), number(lr))

    def clipped(self) -> None:
        self._gradients("clipped gradient")

    def end(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        from paratrain.checkpoint.state import PREFIX, optimizer_tensors

        for name, param in self.model.named_parameters(remove_duplicate=False):
            self.add(Key(self.number, "weight", name), param)
        self._buffers("buffer")
        names: dict[Tensor, str] = {param: name for name, param in self.model.named_parameters()}
        for name, value in optimizer_tensors(optimizers, names).items():
            self.add(Key(self.number, "optimizer state", name.removeprefix(PREFIX)), value)
        self.attributes.note(self.number)
        self.trace.extra["moved generator"] |= generator_digest() != self.digest
        self.trace.end_step(self.number)

    def find_memoryless(self) -> None:
        """Which attributes and buffers only say what the last forward was given: they are the same whatever they were before it."""
        found, watch = self.attributes.found, self.sizes
        self.sizes = []  # nothing more is written down
        try:
            again, afresh = self._forward(), {}
            self.attributes.put_back()
            for name, buffer in self.model.named_buffers():
                if name in self.first_buffers and buffer.shape == self.first_buffers[name].shape:
                    buffer.data.copy_(self.first_buffers[name])
            afresh = self._forward()
        except Exception:  # what cannot be told apart is compared
            return
        finally:
            self.sizes = watch
        found.memoryless |= {
            name for name in again.keys() & afresh.keys() if (off := apart(again[name], afresh[name])) is not None and off < 1e-9
        }

    def _forward(self) -> dict[str, Any]:
        inputs, targets = in_precision(self.last, self.cfg)
        self.loss_fn(call(self.model, inputs), targets)
        return self.attributes.values() | {f"buffer {name}": buffer.detach().clone() for name, buffer in self.model.named_buffers()}

    def _buffers(self, kind: str) -> None:
        for name, buffer in self.model.named_buffers():
            self.add(Key(self.number if kind == "buffer" else -1, kind, name), buffer)

    def _gradients(self, kind: str) -> None:
        params = dict(self.model.named_parameters(remove_duplicate=False))
        for name in dict.fromkeys([*self.gradient_order, *reversed(params)]):
            grad = params[name].grad
            if grad is not None:
                self.add(Key(self.number, kind, name), grad)


class Narrow(TorchFunctionMode):
    """Collects the dtypes, narrower than float64, of results that gradients flow through: what is rounded inside of modules."""

    def __init__(self, seen: set[torch.dtype]):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and result.dtype is not torch.float64 and result.requires_grad:
            self.seen.add(result.dtype)
        return result


def measured(loss_fn: Callable[[Any, Any], Any], cfg: Config) -> Callable[[Any, Any], Any]:
    """`loss_fn`, which outputs of 16-bit weights reach in float32."""
    if DTYPES[cfg.precision.name][0] is not torch.bfloat16:
        return loss_fn
    return lambda outputs, targets: loss_fn(tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, outputs), targets)


def in_precision(batch: tuple[Any, Any], cfg: Config) -> tuple[Any, Any]:
    """A copy of `batch`: inputs in the dtype of the weights where no autocast sees to that, targets too in float64."""
    dtype, mixed = DTYPES[cfg.precision.name]
    inputs, targets = batch
    return copied(inputs, None if mixed else dtype), copied(targets, dtype if dtype is torch.float64 else None)


def autocast(cfg: Config) -> Any:
    """The context of forward and loss under the configured precision."""
    dtype = DTYPES[cfg.precision.name][1]
    return torch.autocast("cpu", dtype=dtype) if dtype is not None else nullcontext()
