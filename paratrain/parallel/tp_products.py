"""Rules for matrix products, attention, embeddings and losses over split tensors: where ranks' parts meet."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paratrain.parallel import tp_rules
from paratrain.parallel.tp_rules import aligned, argument, join, plain, rule
from paratrain.parallel.tp_split import (
    Split,
    all_reduce,
    enter,
    gather_and_enter,
    own_randomness,
    part_of,
    reduce,
    reduce_activation,
    scatter,
)

# ------------------------------------------------------------------ products


@rule("linear")
def _linear(func: Any, args: tuple, kwargs: dict) -> Any:
    x, weight, bias = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight"), argument(args, kwargs, 2, "bias")
    if not isinstance(weight, Split):
        if x.split_dim == x.ndim - 1:
            return tp_rules.whole(func, args, kwargs, "the next matrix is not split")
        rest = [None if t is None else enter(plain(t), x.peers) for t in (weight, bias)]
        return x.like(func(part_of(x), *rest))
    peers = weight.peers
    if weight.split_dim == 0:
        bias = None if bias is None else aligned(bias, weight_rows(weight), -1)
        return join(weight, func(entered(x, weight), part_of(weight), bias), [x, weight], x.ndim - 1)
    total = reduce_activation(func(contracted(x, weight, -1), part_of(weight)), peers)
    return total if bias is None else total + bias


def weight_rows(weight: Split) -> Split:
    """A vector that is split as the rows of `weight` are."""
    return Split(part_of(weight).detach()[:, 0], 0, weight.parts, weight.peers)


def entered(x: Tensor, other: Split) -> Tensor:
    """All of x, as an argument of a product with one part of `other`."""
    if not isinstance(x, Split):
        return enter(x, other.peers)
    if x.split_dim == x.ndim - 1:
        x.peers.gathered("linear", [x], "its features are split, and so are those of the result")
    return gather_and_enter(x)


def contracted(x: Tensor, other: Split, dim: int) -> Tensor:
    """The part of x along `dim` that multiplies this rank's part of `other`."""
    dim %= x.ndim
    if isinstance(x, Split) and (x.split_dim, x.parts) == (dim, other.parts):
        return part_of(x)
    if isinstance(x, Split):
        x.peers.gathered("linear", [x], "it is split in another way than the matrix that it meets")
    return scatter(plain(x), dim, other.parts, other.peers)


@rule("matmul", "__matmul__", "__rmatmul__", "bmm", "mm")
def _matmul(func: Any, args: tuple, kwargs: dict) -> Any:
    a, b = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "mat2", kwargs.get("other"))
    if func.__name__ == "__rmatmul__":
        a, b = b, a
    return _product(a, b)


@rule("addmm")
def _addmm(func: Any, args: tuple, kwargs: dict) -> Any:
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1 or len(args) != 3:
        return None
    product = _product(args[1], args[2])
    return None if product is None else product + args[0]


@rule("baddbmm")
def _baddbmm(func: Any, args: tuple, kwargs: dict) -> Any:
    added, a, b = (argument(args, kwargs, i, name) for i, name in enumerate(("input", "batch1", "batch2")))
    options = {name: kwargs[name] for name in ("beta", "alpha") if name in kwargs}
    first = next((t for t in (a, b) if isinstance(t, Split)), None)
    if first is None or first.split_dim != 0 or added.ndim != 3:
        return None
    return join(first, torch.baddbmm(*(aligned(t, first, -3) for t in (added, a, b)), **options), [added, a, b], 0)


def _product(a: Any, b: Any) -> Any:
    """a @ b. A sum over split dims is reduced; of two split dims that cannot stay split, that of `a` (the activation) is gathered."""
    if a.ndim < 2 or b.ndim < 2:
        return None
    kind_a = None if not isinstance(a, Split) else {a.ndim - 1: "k", a.ndim - 2: "m"}.get(a.split_dim, "batch")
    kind_b = None if not isinstance(b, Split) else {b.ndim - 1: "n", b.ndim - 2: "k"}.get(b.split_dim, "batch")
    if b.ndim == 2 and kind_a == "batch":
        kind_a = "m"
    ndim = max(a.ndim, b.ndim)
    if kind_b == "k":
        return reduce_activation(contracted(a, b, -1) @ part_of(b), b.peers)
    if kind_b == "n":
        return join(b, entered(a, b) @ part_of(b), [a, b], ndim - 1)
    if kind_a == "k" and kind_b is None:
        return None if b.ndim == 2 else reduce(part_of(a) @ scatter(b, -2, a.parts, a.peers), a.peers)
    if kind_a == "m" and kind_b is None:
        return join(a, part_of(a) @ enter(b, a.peers), [a], a.split_dim - a.ndim + ndim)
    if "batch" in (kind_a, kind_b) and {kind_a, kind_b} <= {"batch", None}:
        first = a if kind_a == "batch" else b
        dim = first.split_dim - first.ndim
        return join(first, aligned(a, first, dim) @ aligned(b, first, dim), [a, b], ndim + dim)
    return None


@rule("einsum")
def _einsum(func: Any, args: tuple, kwargs: dict) -> Any:
    equation, operands = args[0], list(args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:])
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    labels = inputs.split(",")
    first = next(operand for operand in operands if isinstance(operand, Split))
    label = labels[next(i for i, operand in enumerate(operands) if operand is first)][first.split_dim]
    if any(own.count(label) > 1 for own in labels):
        return None
    pieces = []
    for own, operand in zip(labels, operands, strict=True):
        if label in own:
            pieces.append(aligned(operand, first, own.index(label) - len(own)))
        else:
            pieces.append(enter(plain(operand), first.peers))
    result = func(equation, *pieces)
    if label in output:
        return join(first, result, operands, output.index(label))
    return reduce(result, first.peers)


_DIRECT = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
CONVOLUTIONS = (*_DIRECT, *_TRANSPOSED)


def grouped_parts(x: Split, groups: int, made: int) -> tuple[int, ...] | None:
    """The parts of the `made` channels that a convolution in groups makes of x; None where a rank would not hold whole groups."""
    each = x.shape[1] // groups
    if any(part % (each * x.peers.size) for part in x.parts):
        return None
    return tuple(part // each * (made // groups) for part in x.parts)


@rule(*_DIRECT)
def _convolution(func: Any, args: tuple, kwargs: dict) -> Any:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = (
        argument(args, kwargs, i, name, default)
        for i, (name, default) in enumerate(zip(names, (None, None, None, 1, 0, 1, 1), strict=True))
    )
    if x.ndim != int(func.__name__[4]) + 2:
        return None
    if groups != 1:
        parts = grouped_parts(x, groups, weight.shape[0]) if isinstance(x, Split) and x.split_dim == 1 else None
        if parts is None:
            return None
        here = groups * part_of(x).shape[1] // x.shape[1]
        own = [None if t is None else _channels(t, parts, x) for t in (weight, bias)]
        return join(x, func(part_of(x), *own, stride, padding, dilation, here), [x, weight], 1, parts)
    return _channel_product(func, x, weight, bias, (0, 1), (stride, padding, dilation))


@rule(*_TRANSPOSED)
def _transposed(func: Any, args: tuple, kwargs: dict) -> Any:
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    x, weight, bias, stride, padding, more, groups, dilation = (
        argument(args, kwargs, i, name, default)
        for i, (name, default) in enumerate(zip(names, (None, None, None, 1, 0, 0, 1, 1), strict=True))
    )
    if groups != 1 or x.ndim != int(func.__name__[14]) + 2:
        return None
    return _channel_product(func, x, weight, bias, (1, 0), (stride, padding, more, 1, dilation))


def _channel_product(func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dims: tuple[int, int], rest: tuple) -> Any:
    """A convolution of which the kernel is split by the channels that it makes, or by those that it takes (its `dims`, in this order)."""
    makes, takes = dims
    if isinstance(weight, Split) and weight.split_dim == makes:
        bias = None if bias is None else _channels(bias, weight.parts, weight)
        return join(weight, func(_all_channels(x, weight), part_of(weight), bias, *rest), [x, weight], 1)
    if isinstance(weight, Split) and weight.split_dim == takes:
        total = reduce(func(contracted(x, weight, 1), part_of(weight), None, *rest), weight.peers)
        return total if bias is None else total + plain(bias).view(-1, *[1] * (x.ndim - 2))
    return None


def _all_channels(x: Tensor, weight: Split) -> Tensor:
    if isinstance(x, Split):
        x.peers.gathered("convolution", [x], "its channels are split, and so are those of the result")
        return gather_and_enter(x)
    return enter(x, weight.peers)


def _channels(t: Tensor, parts: Any, like: Split) -> Tensor:
    """This rank's part of a vector or kernel whose dim 0 counts channels."""
    if isinstance(t, Split) and (t.split_dim, t.parts) == (0, parts):
        return part_of(t)
    return scatter(plain(t), 0, parts, like.peers)


@rule("_weight_norm")
def _weight_norm(func: Any, args: tuple, kwargs: dict) -> Any:
    direction, size, dim = argument(args, kwargs, 0, "v"), argument(args, kwargs, 1, "g"), argument(args, kwargs, 2, "dim", 0)
    if not isinstance(direction, Split):
        return None
    over = tuple(other for other in range(direction.ndim) if dim == -1 or other != dim)
    return direction * (size / direction.square().sum(over, keepdim=True).sqrt())


# ------------------------------------------------------------------ attention


@rule("scaled_dot_product_attention")
def _attention(func: Any, args: tuple, kwargs: dict) -> Any:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    q, k, v, mask, dropout, causal = (
        argument(args, kwargs, i, name, d) for i, (name, d) in enumerate(zip(names, (None,) * 4 + (0.0, False), strict=True))
    )
    grouped = kwargs.get("enable_gqa", False)
    first = next((t for t in (q, k, v) if isinstance(t, Split)), None)
    if first is None or first.split_dim >= first.ndim - 2:
        return None
    dim = first.split_dim - first.ndim
    heads = grouped and dim == -3 and q.shape[dim] != k.shape[dim]
    if heads and not isinstance(q, Split):
        number = (q.shape[dim],)
        q = Split(scatter(q, dim, number, first.peers), dim, number, first.peers)
    if heads:
        parts = [_shared_heads(t, q) for t in (k, v)]
        if parts[0] is None or parts[1] is None:
            return None
        local = [part_of(q), *parts]
    else:
        local = [aligned(t, first, dim) for t in (q, k, v)]
    if mask is not None:
        mask = aligned(mask, q if heads else first, dim)
    options = {"scale": kwargs.get("scale"), "enable_gqa": grouped, "is_causal": causal, "dropout_p": dropout, "attn_mask": mask}
    if dropout:
        with own_randomness(first):
            result = func(*local, **options)
    else:
        result = func(*local, **options)
    return join(q if heads else first, result, [q, k, v], result.ndim + dim)


def _shared_heads(t: Tensor, q: Split) -> Tensor | None:
    """The key or value heads that this rank's query heads attend to."""
    ranks, heads, shared = q.peers.size, q.shape[-3], t.shape[-3]
    if len(q.parts) > 1 or heads % ranks:
        return None
    if isinstance(t, Split):
        return part_of(t) if t.split_dim == t.ndim - 3 and len(t.parts) == 1 and shared % ranks == 0 else None
    here, each = heads // ranks, heads // shared
    if here % each and each % here:
        return None
    start = q.peers.rank * here // each
    return enter(t, q.peers).narrow(-3, start, max(1, here // each))


# ------------------------------------------------------------------ embedding


@rule("embedding")
def _embedding(func: Any, args: tuple, kwargs: dict) -> Any:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    index, weight, padding, max_norm, _, by_frequency, sparse = (argument(args, kwargs, i, name) for i, name in enumerate(names))
    if not isinstance(weight, Split) or isinstance(index, Split) or max_norm is not None or by_frequency or sparse or len(weight.parts) > 1:
        return None
    table = part_of(weight)
    if weight.split_dim == 1:
        return join(weight, func(index, table, padding), [weight], index.ndim)
    here, inside = _local_index(index, weight)
    if padding is not None:
        start, length = weight.peers.runs(weight.parts)[0]
        padding = padding % sum(weight.parts) - start
        padding = padding if 0 <= padding < length else None
    if table.shape[0] == 0:
        rows = table.new_zeros((*index.shape, table.shape[1])) + table.sum()
    else:
        rows = func(here, table, padding).masked_fill(~inside.unsqueeze(-1), 0)
    return reduce_activation(rows, weight.peers)


def _local_index(index: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """Indices along the split dim as this rank counts them (0 where it does not hold them), and whether it holds them."""
    start, length = split.peers.runs(split.parts)[0]
    inside = (index >= start) & (index < start + length)
    return (index - start).masked_fill(~inside, 0), inside


# ------------------------------------------------------------------ over split classes


def _over_classes(split: Any, dim: Any) -> bool:
    return isinstance(split, Split) and isinstance(dim, int) and dim % split.ndim == split.split_dim


def _logsumexp(split: Split) -> Tensor:
    """Over the split dim, which stays with size 1; plain. float32 under autocast, as torch's own losses."""
    local = _wide(split)
    empty = local.shape[split.split_dim] == 0
    shape = list(local.shape)
    shape[split.split_dim] = 1
    highest = local.new_full(shape, -math.inf) if empty else local.detach().amax(split.split_dim, keepdim=True)
    highest = all_reduce(highest, split.peers, dist.ReduceOp.MAX)
    highest = highest.masked_fill(highest == -math.inf, 0)
    total = (local - highest).exp().sum(split.split_dim, keepdim=True)
    return reduce(total, split.peers).log() + highest


def _wide(split: Split) -> Tensor:
    local = part_of(split)
    autocast = local.device.type != "meta" and torch.is_autocast_enabled(local.device.type)  # it refuses to tell for meta
    return local.float() if autocast and local.dtype.itemsize < 4 else local


def _pick(split: Split, index: Tensor) -> Tensor:
    """torch.gather along the split dim; plain."""
    here, inside = _local_index(index, split)
    local = _wide(split)
    if local.shape[split.split_dim] == 0:
        picked = local.new_zeros(index.shape) + local.sum()
    else:
        picked = local.gather(split.split_dim, here).masked_fill(~inside, 0)
    return reduce(picked, split.peers)


@rule("log_softmax", "softmax", "logsumexp")
def _softmax(func: Any, args: tuple, kwargs: dict) -> Any:
    split, dim = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "dim")
    if isinstance(dim, tuple | list) and len(dim) == 1:
        dim = dim[0]
    if not _over_classes(split, dim):
        return (tp_rules._reduction if func.__name__ == "logsumexp" else tp_rules._along(1))(func, args, kwargs)
    if kwargs.get("dtype") is not None:
        split = split.to(kwargs["dtype"])
    over = _logsumexp(split)
    if func.__name__ == "logsumexp":
        return over if argument(args, kwargs, 2, "keepdim", False) else over.squeeze(split.split_dim)
    logs = split.like(_wide(split) - enter(over, split.peers))
    return logs.exp() if func.__name__ == "softmax" else logs


@rule("gather", "take_along_dim")
def _gather_rule(func: Any, args: tuple, kwargs: dict) -> Any:
    split, dim, index = args[0], argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "index")
    if isinstance(dim, Tensor):
        dim, index = index, dim
    if not _over_classes(split, dim) or isinstance(index, Split) or len(split.parts) > 1:
        return None
    return _pick(split, index)


@rule("cross_entropy")
def _cross_entropy(func: Any, args: tuple, kwargs: dict) -> Any:
    logits, target = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "target")
    options = {k: v for k, v in kwargs.items() if k not in ("input", "target")}
    weight, ignored = argument(args, options, 2, "weight"), argument(args, options, 4, "ignore_index", -100)
    reduction, smoothing = argument(args, options, 6, "reduction", "mean"), options.get("label_smoothing", 0.0)
    classes = min(1, logits.ndim - 1)
    if not _classes_only(logits, target, classes, weight, args[3:4] + args[5:6], options):
        return None
    over = _logsumexp(logits).squeeze(classes)
    kept = target != ignored
    losses = over - _pick(logits, target.masked_fill(~kept, 0).unsqueeze(classes)).squeeze(classes)
    if smoothing:
        mean = reduce(_wide(logits).sum(classes), logits.peers) / sum(logits.parts)
        losses = (1 - smoothing) * losses + smoothing * (over - mean)
    return _reduced(losses.masked_fill(~kept, 0), kept, reduction)


@rule("nll_loss")
def _nll_loss(func: Any, args: tuple, kwargs: dict) -> Any:
    logs, target = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "target")
    weight, ignored = argument(args, kwargs, 2, "weight"), argument(args, kwargs, 4, "ignore_index", -100)
    classes = min(1, logs.ndim - 1)
    if not _classes_only(logs, target, classes, weight, args[3:4] + args[5:6], kwargs):
        return None
    kept = target != ignored
    losses = -_pick(logs, target.masked_fill(~kept, 0).unsqueeze(classes)).squeeze(classes)
    return _reduced(losses.masked_fill(~kept, 0), kept, argument(args, kwargs, 6, "reduction", "mean"))


def _classes_only(logits: Any, target: Any, classes: int, weight: Any, legacy: tuple, options: dict) -> bool:
    if not isinstance(logits, Split) or isinstance(target, Split) or logits.split_dim != classes or len(logits.parts) > 1:
        return False
    legacy_given = any(value is not None for value in (*legacy, options.get("size_average"), options.get("reduce")))
    return weight is None and not legacy_given and not target.is_floating_point()


def _reduced(losses: Tensor, kept: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / kept.sum()
