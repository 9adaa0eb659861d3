"""What each torch function does to tensors that are split over ranks.

A rule runs the function on this rank's parts and says how the result is split, or returns None; then the function gets whole tensors,
gathered, and returns one: right for every function, and paid for in communication. Changes of shape are in `tp_shapes.py`, products
and losses in `tp_products.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from paratrain.compat import is_view_of, plain_functions
from paratrain.errors import UserError
from paratrain.parallel.tp_split import Parts, Peers, Split, enter, gather, node_of, own_randomness, part_of, plain, reduce, scatter, take

Rule = Callable[[Any, tuple, dict], Any]
RULES: dict[str, Rule] = {}
_MOST_VIEWS = 1000  # that are held until the forward is over
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
    if name in ABOUT or name == "__set__":
        with plain_functions():
            return func(*args, **kwargs)
    if kwargs.get("out") is not None:
        return whole(func, args, kwargs)
    found = RULES.get(name) or (pointwise if is_pointwise(name) else None)
    result = found(func, args, kwargs) if found else None
    return whole(func, args, kwargs) if result is None else result


def whole(func: Any, args: tuple, kwargs: dict, reason: str = _UNKNOWN) -> Any:
    """`func` of whole tensors."""
    name = func.__name__
    splits = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Split)]
    splits[0].peers.gathered(name, splits, reason)
    if kwargs.get("out") is not None or (_writes(name) and isinstance(args[0], Split)):
        sources = ", ".join(sorted(splits[0].sources))
        keep = f"write replicate for the weights it comes from in parallel.tp_plan ({sources})" if sources else "write parallel.sp=false"
        raise UserError(f"parallel.tp: {name} writes into a tensor that is split over ranks; write its result into a new tensor, or {keep}")
    args, kwargs = tree_map_only(Split, gather, (args, kwargs))
    result = func(*args, **kwargs)
    peers = splits[0].peers
    if peers.group is not None and len(peers.views) < _MOST_VIEWS:
        for leaf in tree_leaves(args):
            if isinstance(leaf, Tensor) and any(is_view_of(part, leaf) for part in tree_leaves(result) if isinstance(part, Tensor)):
                peers.views.append((leaf, leaf._version, name, splits[0].sources))
    return result


def refuse_writes_into_copies(peers: Peers) -> None:
    """After a forward: what it wrote into a view of a gathered tensor is not in the tensor that ranks share."""
    for tensor, version, name, sources in peers.views:
        if tensor._version != version:
            keep = f"write replicate for {', '.join(sorted(sources))} in parallel.tp_plan" if sources else "write parallel.sp=false"
            raise UserError(
                f"parallel.tp: forward writes into what {name} gives of a tensor that is split over ranks, which is a copy; write the result into "
                f"a new tensor, or {keep}"
            )
    peers.views.clear()


def _writes(name: str) -> bool:
    return (
        name == "__setitem__"
        or (name.endswith("_") and not name.endswith("__"))
        or (name.startswith("__i") and name not in ("__invert__",))
    )


# ------------------------------------------------------------------ about the whole, known without communication

ABOUT = set(
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
        return split.transpose(-2, -1) if split.ndim > 1 else split
    if name == "data":
        return split.like(part_of(split).data)
    if name == "grad_fn":
        node = node_of(split)
        return split.local.grad_fn if node is None or "_Show" in node.name() else node
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
def is_pointwise(name: str) -> bool:
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


def pointwise(func: Any, args: tuple, kwargs: dict) -> Any:
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


@rule("zeros_like", "ones_like", "empty_like", "full_like")
def _filled(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    if not isinstance(split, Split) or split.sources:
        return pointwise(func, args, kwargs)
    return func(part_of(split).detach().new_empty(split.shape), *args[1:], **kwargs)  # of a sequence, which models go on to fill by index


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
    if dim == -1 and not isinstance(tensor, torch.nn.Parameter) and (not tensor.is_leaf or tensor.numel() > tensor.shape[-1]):
        like.peers.gathered("scatter", [like], "its result meets a whole activation")
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
RULES["flip"] = _along(1, name="dims")
RULES["roll"] = _along(2, name="dims")


@rule("normalize")
def _normalize(func: Any, args: tuple, kwargs: dict) -> Any:
    split, p, dim = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "p", 2.0), argument(args, kwargs, 2, "dim", 1)
    if not isinstance(split, Split) or not isinstance(dim, int) or p != 2 or dim % split.ndim != split.split_dim:
        return _along(2, 1)(func, args, kwargs)
    length = split.square().sum(dim, keepdim=True).sqrt()
    return split / length.clamp_min(argument(args, kwargs, 3, "eps", 1e-12))


@rule("glu")
def _glu(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0]
    dim = argument(args, kwargs, 1, "dim", -1) % split.ndim
    if dim != split.split_dim:
        return _along(1, -1)(func, args, kwargs)
    first, second = split.chunk(2, dim)
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
    if split.shape[1] % split.peers.size:
        return None
    weight, bias = argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias")
    weight, bias = (None if t is None else scatter(plain(t), 0, split.parts, split.peers) for t in (weight, bias))
    eps = argument(args, kwargs, 4, "eps", 1e-5)
    return split.like(func(part_of(split), groups // split.peers.size, weight, bias, eps))


@rule("instance_norm")
def _instance_norm(func: Any, args: tuple, kwargs: dict) -> Any:
    names = ("input", "running_mean", "running_var", "weight", "bias")
    split, mean, var, weight, bias = (argument(args, kwargs, i, name) for i, name in enumerate(names))
    if not isinstance(split, Split) or split.split_dim != 1 or mean is not None or var is not None:
        return None
    weight, bias = (None if t is None else scatter(plain(t), 0, split.parts, split.peers) for t in (weight, bias))
    rest = {name: value for name, value in kwargs.items() if name not in names}
    return split.like(func(part_of(split), None, None, weight, bias, *args[5:], **rest))


def _of_each_channel(spatial: int) -> Rule:
    """A function over the last `spatial` dims of a tensor."""

    def apply_rule(func: Any, args: tuple, kwargs: dict) -> Any:
        split = args[0] if args else kwargs.get("input")
        if not isinstance(split, Split) or split.split_dim >= split.ndim - spatial:
            return None
        args, kwargs = tree_map_only(Split, part_of, (args, kwargs))
        return tree_map_only(Tensor, split.like, func(*args, **kwargs))

    return apply_rule


for _dims in (1, 2, 3):
    for _name in ("max_pool{}d", "max_pool{}d_with_indices", "avg_pool{}d", "lp_pool{}d", "adaptive_avg_pool{}d", "adaptive_max_pool{}d"):
        RULES[_name.format(_dims)] = _of_each_channel(_dims)


@rule("interpolate", "upsample")
def _interpolate(func: Any, args: tuple, kwargs: dict) -> Any:
    split = args[0] if args else kwargs.get("input")
    return _of_each_channel(split.ndim - 2)(func, args, kwargs) if isinstance(split, Split) else None


@rule("batch_norm")
def _batch_norm(func: Any, args: tuple, kwargs: dict) -> Any:
    if func is not F.batch_norm:
        return None
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    split, mean, var, weight, bias, training, momentum, eps = (
        argument(args, kwargs, i, name, default)
        for i, (name, default) in enumerate(zip(names, (None,) * 5 + (False, 0.1, 1e-5), strict=True))
    )
    if not isinstance(split, Split) or split.split_dim != 1:
        return None
    with of_channels(split, weight, bias, (mean, var) if training else ()) as (weight, bias, *parts):
        mean, var = parts or (None if t is None else take(t, 0, split.parts, split.peers) for t in (mean, var))
        return split.like(func(part_of(split), mean, var, weight, bias, training, momentum, eps))


@contextmanager
def of_channels(split: Split, weight: Any, bias: Any, averages: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """This rank's part of what there is one of for each channel (dim 1) of `split`; what is written to those of averages comes into the whole."""
    affine = [None if t is None else scatter(plain(t), 0, split.parts, split.peers) for t in (weight, bias)]
    parts = [None if t is None else take(t, 0, split.parts, split.peers).clone() for t in averages]
    yield (*affine, *parts)
    for average, part in zip(averages, parts, strict=True):
        if part is not None:
            average.copy_(gather(Split(part, 0, split.parts, split.peers)))


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
        return pointwise(func, args, kwargs)
    return _reduction(func, args, kwargs)
