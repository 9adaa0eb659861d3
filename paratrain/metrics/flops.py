"""Floating-point operations of a model, counted by running it without data.

A copy of the model on the meta device runs forward and backward under `torch.utils.flop_counter.FlopCounterMode`, so the count
holds for any module and costs no memory. Matrix products and convolutions count, a multiply-add as two operations; element-wise
work does not, as in the papers that define model FLOPs (Kaplan et al., 2020; Chowdhery et al., 2022, appendix B). For a decoder
this gives exactly 6N + 12·L·d·T a token, where N excludes the embedding.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paratrain.copies import copied

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Flops:
    """Operations a sample needs, by two conventions.

    Attributes:
        forward: of the forward pass, attention counted over all pairs of positions.
        backward: of the backward pass; recomputation is in it only where the model itself checkpoints activations.
        causal_forward: as `forward`, with half the pairs where `scaled_dot_product_attention` is told `is_causal=True`. A causal
            mask given as a tensor is not recognised and counts in full.
        causal_backward: likewise.
        tokens: positions in a sample the count was made for, where the inputs are token ids [B, T]; None otherwise.
        source: "counted", or "6N" where the model could not run on the meta device: 2N forward and 4N backward a token (a sample
            without tokens), N the parameters outside embeddings. An estimate: no attention, and far too low for convolutions.
        reason: why it was not counted.
    """

    forward: float
    backward: float
    causal_forward: float
    causal_backward: float
    tokens: int | None
    source: Literal["counted", "6N"] = "counted"
    reason: str = ""

    @property
    def full(self) -> float:
        return self.forward + self.backward

    @property
    def causal(self) -> float:
        return self.causal_forward + self.causal_backward

    def hardware(self, recomputed: float) -> float:
        """Operations executed, full attention, when the fraction `recomputed` of the forward pass runs again in the backward."""
        return self.full + recomputed * self.forward


def count(model: nn.Module, inputs: Any) -> Flops:
    """Count the operations of one sample, forward and backward.

    Call it on the whole model, before a layout is applied: tensor parallel ranks would each count the global operation, and
    attention kernels on real devices hide theirs. `model` is not touched and not copied: the copy shares its structure and has
    meta tensors for parameters. It runs in training mode and keeps `requires_grad`, so frozen parts count as frozen.

    Args:
        model: the module, on any device, meta included.
        inputs: a tensor, tuple, list or dict of tensors, samples in dim 0; called as `model(inputs)`, `model(*inputs)` or
            `model(**inputs)`. Only shapes, dtypes and structure matter.

    Returns:
        Operations divided by the number of samples. Where the copy cannot run without data, an estimate that says so.
    """
    first = next(iter(_tensors(inputs)))
    tokens = first.shape[1] if first.ndim == 2 and not first.is_floating_point() else None
    try:
        forward, backward, saved_forward, saved_backward = _run(on_meta(model).train(), _map(inputs, _meta))
    except Exception as error:  # whatever a user's forward raises when it has no data
        flops = _estimate(model, tokens, f"{type(error).__name__}: {error}".splitlines()[0])
        log.warning("FLOPs are estimated as 6N, not counted: the model does not run on the meta device (%s)", flops.reason)
        return flops
    samples = first.shape[0]
    return Flops(
        forward=forward / samples,
        backward=backward / samples,
        causal_forward=(forward - saved_forward) / samples,
        causal_backward=(backward - saved_backward) / samples,
        tokens=tokens,
    )


def _run(model: nn.Module, inputs: Any) -> tuple[int, int, float, float]:
    from torch.utils.flop_counter import FlopCounterMode

    counter, causal = FlopCounterMode(display=False), _CausalAttention()
    with torch.enable_grad(), torch.device("meta"), counter:
        with causal:
            outputs = _call(model, inputs)
        forward = counter.get_total_flops()
        if any(p.requires_grad for p in model.parameters()):
            roots = [t.sum() for t in _tensors(outputs) if t.requires_grad]
            if not roots:
                raise ValueError(f"its output, a {type(outputs).__name__}, holds no tensor with a gradient to start the backward from")
            torch.autograd.backward(roots)
    return forward, counter.get_total_flops() - forward, causal.forward / 2, causal.backward / 2


def _estimate(model: nn.Module, tokens: int | None, reason: str) -> Flops:
    used = {id(p): p for m in model.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    units = tokens or 1
    forward = 2.0 * units * sum(p.numel() for p in used.values())
    backward = 2 * forward if any(p.requires_grad for p in used.values()) else 0.0
    return Flops(forward, backward, forward, backward, tokens, "6N", reason)


class _CausalAttention(TorchFunctionMode):
    """Adds up the operations of attention calls that are told to be causal: on meta they decompose into full matrix products.

    `F.multi_head_attention_forward` is read from outside, because a function mode does not see the calls made within.
    """

    forward = 0.0
    backward = 0.0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            call = _bind(args, kwargs, ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"))
            if call.get("is_causal"):
                q, k, v = call["query"], call["key"], call["value"]
                pairs = q.shape[:-1].numel() * k.shape[-2]
                self._add(pairs, q.shape[-1], v.shape[-1], q.requires_grad, k.requires_grad, v.requires_grad)
        elif func is F.multi_head_attention_forward:
            call = inspect.signature(func).bind(*args, **kwargs).arguments
            if call.get("is_causal") and not call.get("need_weights", True) and call.get("key_padding_mask") is None:
                q, k = call["query"], call["key"]
                grad = any(t.requires_grad for t in _tensors(list(call.values())))
                self._add(q.shape[:-1].numel() * k.shape[0], q.shape[-1], q.shape[-1], grad, grad, grad)
        return func(*args, **kwargs)

    def _add(self, pairs: int, width: int, value_width: int, q_grad: bool, k_grad: bool, v_grad: bool) -> None:
        self.forward += 2 * pairs * (width + value_width)
        self.backward += 2 * pairs * (width * (q_grad + k_grad) + value_width * (v_grad + (q_grad or k_grad)))


def _bind(args: tuple, kwargs: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of the structure of `model`, with meta tensors for its parameters and buffers."""
    return copied(model, _meta)


def _meta(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
    return torch.empty_like(tensor, device="meta")


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _map(tree: Any, f: Any) -> Any:
    if isinstance(tree, Tensor):
        return f(tree)
    if isinstance(tree, Mapping):
        return {k: _map(v, f) for k, v in tree.items()}
    if isinstance(tree, tuple | list):
        return [_map(v, f) for v in tree]
    return tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _tensors(value)
