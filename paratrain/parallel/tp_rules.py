"""What each torch function does to tensors that are split over ranks.

A rule runs the function on this rank's parts and says how the result is split, or returns None; then the function gets whole tensors,
gathered, and returns one: right for every function, and paid for in communication. Products and losses are in `tp_products.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from paratrain.compat import plain_functions
from paratrain.errors import UserError
from paratrain.parallel.tp_split import Parts, Peers, Split, enter, gather, own_randomness, part_of, reduce, scatter

Rule = Callable[[Any, tuple, dict], Any]
RULES: dict[str, Rule] = {}
_UNKNOWN = "it has no rule for split tensors"


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def apply(func: Any, args: tuple, kwargs: dict) -> Any:
    """`func` of arguments some of which are `Split`."""
    name = func.__name__
    if name == "__get__":
        return _attribute(func, args[0])
    if name in _ABOUT or name == "__set__":
        with plain_functions():
            return func(*args, **kwargs)
    found = RULES.get(name) or (_pointwise if _is_pointwise(name) else None)
    result = found(func, args, kwargs) if found else None
    return whole(func, args, kwargs) if result is None else result


def whole(func: Any, args: tuple, kwargs: dict, reason: str = _UNKNOWN) -> Any:
    """`func` of whole tensors."""
    name = func.__name__
    splits = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Split)]
    if kwargs.get("out") is not None or (_writes(name) and isinstance(args[0], Split)):
        raise UserError(
            f"parallel.tp: {name} writes into a tensor that is split over ranks; write its result into a new tensor, or write replicate for the "
            f"weights it comes from in parallel.tp_plan ({', '.join(sorted(splits[0].sources)) or 'unknown'})"
        )
    splits[0].peers.gathered(name, splits, reason)
    args, kwargs = tree_map_only(Split, gather, (args, kwargs))
    return func(*args, **kwargs)


def _writes(name: str) -> bool:
    return (
        name == "__setitem__"
        or (name.endswith("_") and not name.endswith("__"))
        or (name.startswith("__i") and name not in ("__invert__",))
    )


# ------------------------------------------------------------------ about the whole, known without communication

_ABOUT = set(
    [
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "is_floating_point",
        "is_complex",
        "stride",
        "is_contiguous",
        "element_size",
        "get_device",
        "__len__",
        "is_same_size",
        "storage_offset",
        "__hash__",
        "is_signed",
        "__repr__",
        "is_tensor",
        "is_storage",
        "result_type",
    ]
)


def _attribute(func: Any, split: Split) -> Any:
    name = func.__self__.__name__
    if name in ("T", "mT", "H", "mH"):
        return _transpose(Tensor.transpose, (split, -2, -1), {}) if split.ndim > 1 else split
    if name == "data":
        return split.like(part_of(split).data)
    if name == "grad_fn":
        return split.local.grad_fn
    with plain_functions():
        return func(split)


@rule("register_hook")
def _hook(func: Any, args: tuple, kwargs: dict) -> Any:
    return part_of(args[0]).register_hook(args[1])


# ------------------------------------------------------------------ element by element

_LIKE_POINTWISE = set(
    [
        "to",
        "float",
        "double",
        "half",
        "bfloat16",
        "int",
        "long",
        "bool",
        "contiguous",
        "type",
        "type_as",
        "detach",
        "requires_grad_",
        "masked_fill_",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "fill_",
        "zero_",
        "copy_",
        "isclose",
        "softsign",
        "logsigmoid",
        "hardswish",
        "tanhshrink",
    ]
)
_OPERATORS = {"truediv": "div", "rtruediv": "div", "itruediv": "div", "floordiv": "div", "rfloordiv": "div", "invert": "bitwise_not"}
_OPERATORS |= {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "mod": "remainder", "subtract": "sub", "multiply": "mul"}
_OPERATORS |= {"divide": "div", "negative": "neg", "absolute": "abs", "not_equal": "ne"}


@cache
def _is_pointwise(name: str) -> bool:
    if name in _LIKE_POINTWISE:
        return True
    if name in ("max", "min"):  # tagged because of their two-tensor forms
        return False
    bare = name.strip("_")
    candidates = {name, bare, _OPERATORS.get(bare, bare)}
    if name.startswith("__"):
        candidates |= {_OPERATORS.get(bare[1:], bare[1:])} if bare[0] in "ri" else set()
    return any(
        torch.Tag.pointwise in getattr(packet, overload).tags
        for packet in (getattr(torch.ops.aten, candidate, None) for candidate in candidates)
        if packet is not None
        for overload in packet.overloads()
    )


def _pointwise(func: Any, args: tuple, kwargs: dict) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    first = next(tensor for tensor in tensors if isinstance(tensor, Split))
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    dim = first.split_dim - first.ndim  # from the right, as shapes are aligned
    if shape[dim] != sum(first.parts):
        return None
    if _writes(func.__name__) and not (isinstance(args[0], Split) and args[0].shape == shape and same_split(args[0], first, dim)):
        return None

    def local(tensor: Tensor) -> Tensor:
        return aligned(tensor, first, dim)

    args_, kwargs_ = tree_map_only(Tensor, local, (args, kwargs))
    result = func(*args_, **kwargs_)
    if _writes(func.__name__):
        return args[0]
    return join(first, result, tensors, result.ndim + dim)


def same_split(split: Tensor, other: Split, dim: int) -> bool:
    return isinstance(split, Split) and split.split_dim - split.ndim == dim and split.parts == other.parts


def aligned(tensor: Tensor, like: Split, dim: int) -> Tensor:
    """This rank's part of `tensor`, whose dim `dim` (counted from the right) corresponds to the split dim of `like`."""
    if isinstance(tensor, Split):
        if same_split(tensor, like, dim):
            return part_of(tensor)
        tensor.peers.gathered("pointwise", [tensor], "its arguments are split in different ways")
        tensor = gather(tensor)
    if tensor.ndim < -dim or tensor.shape[dim] == 1:
        return enter(tensor, like.peers)
    return scatter(tensor, dim, like.parts, like.peers)


def join(like: Split, local: Tensor, tensors: Sequence[Any], dim: int, parts: Parts | None = None) -> Split:
    """The result of an operation on `tensors`."""
    sources = frozenset().union(*(tensor.sources for tensor in tensors if isinstance(tensor, Split)))
    return Split(local, dim, like.parts if parts is None else parts, like.peers, sources)


@rule("dropout", "alpha_dropout")
def _dropout(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    p = argument(args, kwargs, 1, "p", 0.5)
    active = argument(args, kwargs, 2, "training" if "train" not in kwargs else "train", True)
    if p == 0 or not active:
        return split
    with own_randomness(split):
        return split.like(func(part_of(split), *args[1:], **kwargs))


@rule("rand_like", "randn_like", "bernoulli")
def _random(func: Any, args: tuple, kwargs: dict) -> Any:
    with own_randomness(args[0]):
        return args[0].like(func(part_of(args[0]), *args[1:], **kwargs))


@rule("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
def _new(func: Any, args: tuple, kwargs: dict) -> Any:
    return func(part_of(args[0]), *args[1:], **kwargs) if isinstance(args[0], Split) else None


def argument(args: tuple, kwargs: dict, position: int, name: str, default: Any = None) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


# ------------------------------------------------------------------ the same along one dim, whatever happens along another


def _along(position: int, default: Any = None, name: str = "dim") -> Rule:
    """A function of the values along one dim (or several), for each index of the other dims."""

    def apply_rule(func: Any, args: tuple, kwargs: dict) -> Any:
        split = args[0] if args else kwargs.get("input")
        dims = argument(args, kwargs, position, name, default)
        dims = kwargs.get("axis", dims)
        if not isinstance(split, Split) or dims is None:
            return None
        dims = [dims] if isinstance(dims, int) else dims
        if any(isinstance(leaf, Split) for leaf in tree_leaves((args[1:], {k: v for k, v in kwargs.items() if k != "input"}))):
            return None
        if split.split_dim in {dim % split.ndim for dim in dims}:
            return None
        args, kwargs = tree_map_only(Split, part_of, (args, kwargs))
        return tree_map_only(Tensor, split.like, func(*args, **kwargs))

    return apply_rule


for _name, _position, _default in (
    *(("softmin", 1, None), ("cumsum", 1, None), ("cumprod", 1, None), ("logcumsumexp", 1, None), ("sort", 1, -1), ("argsort", 1, -1)),
    *(("topk", 2, -1), ("diff", 2, -1)),
):
    RULES[_name] = _along(_position, _default)
RULES["normalize"] = _along(2, 1)
RULES["flip"] = _along(1, name="dims")
RULES["roll"] = _along(2, name="dims")


@rule("glu")
def _glu(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    dim = argument(args, kwargs, 1, "dim", -1) % split.ndim
    if dim != split.split_dim:
        return _along(1, -1)(func, args, kwargs)
    first, second = _chunk(Tensor.chunk, (split, 2, dim), {})
    return first * second.sigmoid() if isinstance(first, Split) else F.glu(torch.cat([first, second], dim), dim)


@rule("layer_norm", "rms_norm")
def _norm(func: Any, args: tuple, kwargs: dict) -> Any:
    split, over = args[0], argument(args, kwargs, 1, "normalized_shape")
    if not isinstance(split, Split):
        return None
    if split.split_dim >= split.ndim - len(over):
        return whole(func, args, kwargs, "it is over the dim that is split")
    args, kwargs = tree_map_only(Tensor, lambda t: part_of(t) if t is split else enter(plain(t), split.peers), (args, kwargs))
    return split.like(func(*args, **kwargs))


@rule("group_norm")
def _group_norm(func: Any, args: tuple, kwargs: dict) -> Any:
    split, groups = args[0], argument(args, kwargs, 1, "num_groups")
    if not isinstance(split, Split) or split.split_dim != 1 or groups % split.peers.size or len(split.parts) > 1:
        return None
    weight, bias = argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias")
    weight, bias = (None if t is None else scatter(plain(t), 0, split.parts, split.peers) for t in (weight, bias))
    eps = argument(args, kwargs, 4, "eps", 1e-5)
    return split.like(func(part_of(split), groups // split.peers.size, weight, bias, eps))


def plain(tensor: Tensor) -> Tensor:
    return gather(tensor) if isinstance(tensor, Split) else tensor


# ------------------------------------------------------------------ reductions


def _reduction(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0] if args else kwargs.get("input")
    dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
    if isinstance(dims, Tensor) or not isinstance(split, Split):
        return None
    over = range(split.ndim) if dims is None or dims == () else [dims] if isinstance(dims, int) else dims
    over = {dim % split.ndim for dim in over}
    name = func.__name__
    if split.split_dim in over:
        if name == "sum" or (name == "nansum"):
            return reduce(func(part_of(split), *args[1:], **kwargs), split.peers)
        if name == "mean":
            scale = split.local.shape[split.split_dim] / split.shape[split.split_dim]
            return reduce(func(part_of(split), *args[1:], **kwargs).mul(scale), split.peers) if scale else None
        return None
    keep = kwargs.get("keepdim", args[2] if len(args) > 2 and isinstance(args[2], bool) else False)
    dim = split.split_dim if keep else split.split_dim - sum(other < split.split_dim for other in over)
    args, kwargs = tree_map_only(Split, part_of, (args, kwargs))
    return tree_map_only(Tensor, lambda t: split.like(t, dim), func(*args, **kwargs))


for _name in ("sum", "nansum", "mean", "amax", "amin", "prod", "all", "any", "argmax", "argmin", "median"):
    RULES[_name] = _reduction


@rule("var", "std")
def _var(func: Any, args: tuple, kwargs: dict) -> Any:
    if len(args) > 2:  # (input, dim, unbiased, keepdim)
        kwargs = {**kwargs, "unbiased": args[2], **({"keepdim": args[3]} if len(args) > 3 else {})}
    return _reduction(func, args[:2], kwargs)


@rule("max", "min")
def _extreme(func: Any, args: tuple, kwargs: dict) -> Any:
    if len(args) > 1 and isinstance(args[1], Tensor):
        return _pointwise(func, args, kwargs)
    return _reduction(func, args, kwargs)


# ------------------------------------------------------------------ shapes


@rule("transpose", "swapaxes", "swapdims", "t", "adjoint")
def _transpose(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    first = argument(args, kwargs, 1, "dim0", kwargs.get("axis0", -2)) % split.ndim
    second = argument(args, kwargs, 2, "dim1", kwargs.get("axis1", -1)) % split.ndim
    dim = {first: second, second: first}.get(split.split_dim, split.split_dim)
    return split.like(part_of(split).transpose(first, second), dim)


@rule("permute")
def _permute(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    dims = [dim % split.ndim for dim in _sizes(args[1:], kwargs, "dims")]
    return split.like(part_of(split).permute(dims), dims.index(split.split_dim))


@rule("movedim", "moveaxis")
def _movedim(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    source, target = argument(args, kwargs, 1, "source"), argument(args, kwargs, 2, "destination")
    moved = torch.empty(tuple(range(1, split.ndim + 1)), device="meta").movedim(source, target)
    return split.like(part_of(split).movedim(source, target), list(moved.shape).index(split.split_dim + 1))


@rule("unsqueeze")
def _unsqueeze(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    dim = argument(args, kwargs, 1, "dim") % (split.ndim + 1)
    return split.like(part_of(split).unsqueeze(dim), split.split_dim + (dim <= split.split_dim))


@rule("squeeze")
def _squeeze(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    dims = argument(args, kwargs, 1, "dim")
    dims = range(split.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % split.ndim for dim in dims if split.shape[dim] == 1}
    if split.split_dim in gone:
        return None
    return split.like(part_of(split).squeeze(tuple(gone)), split.split_dim - sum(dim < split.split_dim for dim in gone))


def _sizes(rest: tuple, kwargs: dict, name: str) -> list[Any]:
    sizes = kwargs.get(name, rest)
    while len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = sizes[0]
    return list(sizes)


@rule("view", "reshape")
def _view(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    if isinstance(kwargs.get("dtype", args[1] if len(args) > 1 else None), torch.dtype):
        return None
    return _reshape(func, split, _sizes(args[1:], kwargs, "shape" if "shape" in kwargs else "size"))


@rule("view_as", "reshape_as")
def _view_as(func: Any, args: tuple, kwargs: dict) -> Any:
    if not isinstance(args[0], Split):
        return args[0].reshape(args[1].shape)
    return _reshape(func, args[0], list(args[1].shape))


@rule("flatten", "ravel")
def _flatten(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    start = argument(args, kwargs, 1, "start_dim", 0) % split.ndim
    end = argument(args, kwargs, 2, "end_dim", -1) % split.ndim
    shape = list(split.shape)
    return _reshape(func, split, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]])


@rule("unflatten")
def _unflatten(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    dim = argument(args, kwargs, 1, "dim") % split.ndim
    sizes = list(argument(args, kwargs, 2, "sizes"))
    known = math.prod(size for size in sizes if size != -1)
    sizes = [split.shape[dim] // known if size == -1 else size for size in sizes]
    shape = list(split.shape)
    return _reshape(func, split, [*shape[:dim], *sizes, *shape[dim + 1 :]])


def _reshape(func: Any, split: Split, target: list[int]) -> Any:
    """Follow the split dim through a change of shape: it must be the runs of one dim of the result that ranks share."""
    shape = list(split.shape)
    if -1 in target:
        target[target.index(-1)] = split.numel() // max(1, -math.prod(target))
    before, after = _group(shape, target, split.split_dim)
    sizes = [target[dim] for dim in after]
    outer = math.prod(shape[before.start : split.split_dim])
    inner = math.prod(shape[split.split_dim + 1 : before.stop])
    runs = tuple(part * inner for part in split.parts) * outer
    found = fit(runs, sizes, split.peers)
    if found is None:
        wanted = suggest(runs, sizes, split.peers)
        reason = f"{shape[split.split_dim]} features become {tuple(sizes)}, of which no dim can be split over {split.peers.size} ranks"
        if wanted is not None and outer == inner == 1:
            split.peers.gathered("fused", [split], repr(wanted))
        return whole(Tensor.reshape, (split, target), {}, reason)
    dim, parts = found
    target[after.start + dim] = split.peers.length(parts)
    return split.like(part_of(split).reshape(target), after.start + dim, parts)


def _group(shape: list[int], target: list[int], dim: int) -> tuple[range, range]:
    """The least runs of dims around `dim` of `shape`, and of `target`, that hold the same elements."""
    i = j = 0
    while True:
        first, second = i, j
        left, right = shape[i], target[j] if j < len(target) else 1
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * shape[i], i + 1
            else:
                right, j = right * target[j], j + 1
        if i > dim:
            while j < len(target) and target[j] == 1 and i == len(shape):
                j += 1
            return range(first, i), range(second, min(j, len(target)))


def fit(runs: Parts, sizes: Sequence[int], peers: Peers) -> tuple[int, Parts] | None:
    """The dim of `sizes` that is split, and its parts, where `runs` of the same elements in one dim are."""
    if len(runs) == 1 and not peers.divides(runs):
        whole_dim = [dim for dim, size in enumerate(sizes) if size == runs[0]]
        return (whole_dim[0], runs) if whole_dim else None
    for dim in range(len(sizes)):
        below = math.prod(sizes[dim + 1 :])
        period = _period(runs, sizes[dim] * below)
        if period is not None and all(run % (peers.size * below) == 0 for run in period):
            return dim, tuple(run // below for run in period)
    return None


def _period(runs: Parts, length: int) -> Parts | None:
    """The runs that, repeated, are `runs`, and fill `length`."""
    total = 0
    for count, run in enumerate(runs, 1):
        total += run
        if total == length:
            period = runs[:count]
            return period if len(runs) % count == 0 and runs == period * (len(runs) // count) else None
    return None


def suggest(runs: Parts, sizes: Sequence[int], peers: Peers) -> Parts | None:
    """Parts under which one run of elements could take the shape `sizes`: a fused layout, such as (3, heads, head_dim)."""
    if len(runs) > 1:
        return None
    for dim in range(1, len(sizes)):
        below = math.prod(sizes[dim + 1 :])
        if sizes[dim] % peers.size == 0 and sizes[dim] > 1 and dim < len(sizes) - 1:
            return (sizes[dim] * below,) * math.prod(sizes[:dim])
    return None


@rule("expand", "expand_as", "broadcast_to")
def _expand(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    if not isinstance(split, Split):
        return split.expand(args[1].shape)
    sizes = list(args[1].shape) if func.__name__ == "expand_as" else _sizes(args[1:], kwargs, "size")
    dim = len(sizes) - split.ndim + split.split_dim
    if sizes[dim] not in (-1, sum(split.parts)):
        return None
    sizes[dim] = -1
    return split.like(part_of(split).expand(sizes), dim)


@rule("repeat", "tile")
def _repeat(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    times = _sizes(args[1:], kwargs, "repeats")
    dim = len(times) - split.ndim + split.split_dim
    if len(times) < split.ndim or (times[dim] != 1 and not split.peers.divides(split.parts)):
        return None
    return split.like(part_of(split).repeat(times), dim, split.parts * times[dim])


@rule("repeat_interleave")
def _repeat_interleave(func: Any, args: tuple, kwargs: dict) -> Any:
    split, times, dim = args[0], argument(args, kwargs, 1, "repeats"), argument(args, kwargs, 2, "dim")
    if not isinstance(times, int) or dim is None:
        return None
    here = dim % split.ndim == split.split_dim
    if here and not split.peers.divides(split.parts):
        return None
    parts = tuple(part * times for part in split.parts) if here else split.parts
    return split.like(part_of(split).repeat_interleave(times, dim), parts=parts)


# ------------------------------------------------------------------ pieces


@rule("split", "split_with_sizes", "tensor_split", "chunk")
def _chunk(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    by = (
        args[1]
        if len(args) > 1
        else next(kwargs[key] for key in ("split_size_or_sections", "split_size", "split_sizes", "chunks") if key in kwargs)
    )
    dim = argument(args, kwargs, 2, "dim", 0) % split.ndim
    if dim != split.split_dim:
        return tuple(split.like(piece) for piece in func(part_of(split), *args[1:], **kwargs))
    probe = torch.empty(split.shape[dim], device="meta")
    plain_func = {"split": torch.split, "split_with_sizes": torch.split, "chunk": torch.chunk, "tensor_split": torch.tensor_split}[
        func.__name__
    ]
    sizes = [piece.numel() for piece in plain_func(probe, by)]
    groups = _cut(split, sizes)
    if groups is None:
        return None
    lengths = [split.peers.length(group) for group in groups]
    return tuple(split.like(piece, parts=group) for piece, group in zip(part_of(split).split(lengths, dim), groups, strict=True))


def _cut(split: Split, sizes: Sequence[int]) -> list[Parts] | None:
    """The parts of each of consecutive pieces; None where pieces end inside of a part."""
    groups: list[Parts] = []
    rest = list(split.parts)
    for size in sizes:
        group: list[int] = []
        while rest and sum(group) < size:
            group.append(rest.pop(0))
        if sum(group) != size:
            if len(split.parts) == 1:
                split.peers.gathered("fused", [split], repr(tuple(sizes)))
            return None
        groups.append(tuple(group))
    return groups if split.peers.divides(split.parts) or len(sizes) == 1 else None


@rule("unbind")
def _unbind(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    dim = argument(args, kwargs, 1, "dim", 0) % split.ndim
    if dim == split.split_dim:
        return None
    return tuple(split.like(piece, split.split_dim - (dim < split.split_dim)) for piece in part_of(split).unbind(dim))


@rule("__iter__")
def _iter(func: Any, args: tuple, kwargs: dict) -> Any:
    return iter(args[0].unbind(0))


@rule("select")
def _select(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    dim = argument(args, kwargs, 1, "dim") % split.ndim
    if dim == split.split_dim:
        return None
    return split.like(part_of(split).select(dim, argument(args, kwargs, 2, "index")), split.split_dim - (dim < split.split_dim))


@rule("narrow")
def _narrow(func: Any, args: tuple, kwargs: dict) -> Any:
    split, dim, start, length = args[0], *(argument(args, kwargs, i, name) for i, name in enumerate(("dim", "start", "length"), 1))
    return split[(slice(None),) * (dim % split.ndim) + (slice(start, start + length),)]


@rule("__getitem__")
def _getitem(func: Any, args: tuple, kwargs: dict) -> Any:
    split, index = args
    if not isinstance(split, Split):
        return None
    index = list(index) if isinstance(index, tuple) else [index]
    if not all(item is None or item is Ellipsis or (isinstance(item, int | slice) and not isinstance(item, bool)) for item in index):
        return None
    used = sum(item is not None and item is not Ellipsis for item in index)
    if Ellipsis not in index:
        index.append(Ellipsis)
    at = index.index(Ellipsis)
    index[at : at + 1] = [slice(None)] * (split.ndim - used)
    dim, position, result = 0, None, 0
    parts = split.parts
    for where, item in enumerate(index):
        if item is None:
            result += 1
            continue
        if dim == split.split_dim:
            if not isinstance(item, slice):
                return None
            chosen = _slice(split, item)
            if chosen is None:
                return None
            index[where], parts = chosen
            position = result
        dim += 1
        result += isinstance(item, slice)
    assert position is not None
    return split.like(part_of(split)[tuple(index)], position, parts)


def _slice(split: Split, item: slice) -> tuple[slice, Parts] | None:
    """A slice along the split dim, in this rank's part, and what is left of the parts."""
    size = sum(split.parts)
    start, stop, step = item.indices(size)
    if (start, stop, step) == (0, size, 1):
        return slice(None), split.parts
    if step != 1 or not 0 <= start < stop:
        return None
    groups = _cut(split, [length for length in (start, stop - start, size - stop) if length])
    if groups is None:
        return None
    chosen = groups[1 if start else 0]
    first = start // split.peers.size
    return slice(first, first + split.peers.length(chosen)), chosen


@rule("cat", "concat", "concatenate")
def _cat(func: Any, args: tuple, kwargs: dict) -> Any:
    tensors = [tensor for tensor in argument(args, kwargs, 0, "tensors") if tensor.shape != (0,)]  # as torch does: an empty cache
    first = next(tensor for tensor in tensors if isinstance(tensor, Split))
    dim = argument(args, kwargs, 1, "dim", kwargs.get("axis", 0)) % first.ndim
    if any(tensor.ndim != first.ndim for tensor in tensors):
        return None
    if dim == first.split_dim:
        if not all(isinstance(t, Split) and t.split_dim == dim and t.peers.divides(t.parts) for t in tensors):
            return None
        parts = tuple(part for tensor in tensors for part in tensor.parts)
        return join(first, torch.cat([part_of(tensor) for tensor in tensors], dim), tensors, dim, parts)
    pieces = [aligned(tensor, first, first.split_dim - first.ndim) for tensor in tensors]
    return join(first, torch.cat(pieces, dim), tensors, first.split_dim)


@rule("stack")
def _stack(func: Any, args: tuple, kwargs: dict) -> Any:
    tensors = list(argument(args, kwargs, 0, "tensors"))
    dim = argument(args, kwargs, 1, "dim", 0)
    dim = dim % (tensors[0].ndim + 1)
    return torch.cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


@rule("pad")
def _pad(func: Any, args: tuple, kwargs: dict) -> Any:
    split, amounts = args[0], argument(args, kwargs, 1, "pad")
    if not isinstance(split, Split) or any(amounts[2 * (split.ndim - 1 - split.split_dim) :][:2]):
        return None
    return split.like(func(part_of(split), *args[1:], **kwargs))
