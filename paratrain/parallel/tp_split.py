"""One tensor of which each tensor-parallel rank holds a part, and the collectives between it and whole tensors.

Two kinds of value exist in a forward under tensor parallelism: a plain tensor is the same on every rank, and so is its gradient; a
`Split` shows the shape of the whole tensor and holds this rank's part of it, whose gradient is that part of the gradient. Every
function here keeps both true, so what is computed does not depend on which tensors are split (Shoeybi et al., 2019; Korthikanti et
al., 2022, for the sequence; Xu et al., 2021, for propagation). The collectives of a backward are those of a forward, so that derivatives
of derivatives are right, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paratrain import rng
from paratrain.compat import plain_functions
from paratrain.errors import UserError

Parts = tuple[int, ...]
"""Sizes of consecutive runs along a dim, each of which is divided among the ranks: (q, k, v) of a fused projection. One run alone
need not divide evenly; then the first ranks hold more, as `torch.chunk` would cut it."""


@dataclass(frozen=True, eq=False)
class Peers:
    """The ranks that share one matrix.

    Attributes:
        group: None in a dry run on meta tensors, where collectives only have shapes.
        sequence: whether sums over ranks leave activations split along dim 1 (sequence parallelism).
        gathered: told (operation, tensors, reason) before an operation without a rule for its split arguments gets whole ones.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    sequence: bool = False
    gathered: Callable[[str, list[Split], str], None] = field(default=lambda name, splits, reason: None)
    views: list[tuple[Tensor, int, str, frozenset[str]]] = field(default_factory=list)
    """Gathered tensors of which the forward got views, with their versions, the function and the weights; see `tensor.place`."""

    def divides(self, parts: Parts) -> bool:
        return all(part % self.size == 0 for part in parts)

    def runs(self, parts: Parts, rank: int | None = None) -> list[tuple[int, int]]:
        """(start, length) in the whole dim of what `rank` (by default, this one) holds."""
        rank = self.rank if rank is None else rank
        if len(parts) == 1:
            most = -(-parts[0] // self.size)
            start = min(most * rank, parts[0])
            return [(start, min(most, parts[0] - start))]
        starts = accumulate(parts, initial=0)
        return [(start + rank * (part // self.size), part // self.size) for start, part in zip(starts, parts, strict=False)]

    def length(self, parts: Parts) -> int:
        return sum(length for _, length in self.runs(parts))


class Split(torch.Tensor):
    """A tensor of which this rank holds `local`: the runs of `dim` that `peers.runs(parts)` names.

    Attributes:
        sources: names of the parameters whose placement made this value split.
    """

    local: Tensor
    split_dim: int
    parts: Parts
    peers: Peers
    sources: frozenset[str]

    @staticmethod
    def __new__(cls, local: Tensor, dim: int, parts: Parts, peers: Peers, sources: frozenset[str] = frozenset()) -> Split:
        if local.requires_grad and torch.is_grad_enabled():
            return _Show.apply(local, dim, parts, peers, sources)
        return cls._wrap(local, dim, parts, peers, sources)

    @classmethod
    def _wrap(cls, local: Tensor, dim: int, parts: Parts, peers: Peers, sources: frozenset[str]) -> Split:
        shape = list(local.shape)
        dim %= len(shape)
        assert shape[dim] == peers.length(parts), (shape, dim, parts)
        shape[dim] = sum(parts)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        self.local, self.split_dim, self.parts, self.peers, self.sources = local, dim, tuple(parts), peers, sources
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Split(shape={tuple(self.shape)}, dim={self.split_dim}, parts={self.parts}, local={tuple(self.local.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from paratrain.parallel.tp_rules import apply

        return apply(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """What autograd itself does to tensors, below the functions that rules are for."""
        name = func.overloadpacket.__name__
        if (
            name in ("detach", "alias", "view", "view_as")
            and args[0].shape == func(torch.empty(args[0].shape, device="meta"), *args[1:]).shape
        ):
            return args[0].like(args[0].local.detach())
        if name in ("add", "add_", "clone"):
            from paratrain.parallel.tp_rules import pointwise

            result = pointwise(func.overloadpacket, args, kwargs or {})
            if result is not None:
                return result
        raise UserError(f"parallel.tp: {func} reached a tensor that is split over ranks in a way that cannot be followed; {_FIX}")

    def like(self, local: Tensor, dim: int | None = None, parts: Parts | None = None) -> Split:
        """Another part of a whole, split over the same ranks."""
        return Split(local, self.split_dim if dim is None else dim, self.parts if parts is None else parts, self.peers, self.sources)


_FIX = "write replicate for the weights of this module in parallel.tp_plan"


def part_of(split: Split) -> Tensor:
    """This rank's part, as a function of what the split tensor is a function of."""
    node = node_of(split)
    return split.local if node is None or node.name() == _Show.__name__ + "Backward" else _Part.apply(split)


def node_of(split: Split) -> Any:
    """The function that autograd knows of for the split tensor as such; its part mostly has a history of its own."""
    with plain_functions():
        return split.grad_fn


def enter(whole: Tensor, peers: Peers) -> Tensor:
    """A plain tensor that goes into the computation of one part: its gradient is the sum of what the ranks contribute.

    Several uses of one tensor share the sum.
    """
    if not (whole.requires_grad and torch.is_grad_enabled()):
        return whole
    if whole.is_leaf:
        return _Enter.apply(whole, peers)
    known = getattr(whole, "_entered", None)
    if known is None or known[0] != whole._version or known[1] is not peers:
        known = whole._version, peers, _Enter.apply(whole, peers)
        whole._entered = known  # type: ignore[attr-defined]
    return known[2]


def scatter(whole: Tensor, dim: int, parts: Parts, peers: Peers) -> Tensor:
    """This rank's part of a plain tensor."""
    return _Scatter.apply(whole, dim % whole.ndim, parts, peers)


def gather(split: Split) -> Tensor:
    """The whole tensor, plain."""
    return _Gather.apply(part_of(split), split.split_dim, split.parts, split.peers)


def plain(value: Any) -> Any:
    """The whole of a tensor that is split over ranks; anything else as it is."""
    return gather(value) if isinstance(value, Split) else value


def gather_and_enter(split: Split) -> Tensor:
    """`enter(gather(split))` in one collective each way; several uses of one tensor share them."""
    known = getattr(split, "_entered", None)
    if known is None or known[0] is not split.local or known[1] != split.local._version:
        known = split.local, split.local._version, _GatherAndEnter.apply(part_of(split), split.split_dim, split.parts, split.peers)
        split._entered = known  # type: ignore[attr-defined]
    return known[2]


def reduce(term: Tensor, peers: Peers) -> Tensor:
    """The sum over ranks, plain."""
    return _Reduce.apply(term, peers)


def reduce_activation(term: Tensor, peers: Peers) -> Tensor:
    """The sum over ranks of [samples, sequence, features]: plain, or split along the sequence under sequence parallelism."""
    if peers.sequence and term.ndim == 3 and term.shape[1] % peers.size == 0:
        return Split(_ReduceScatter.apply(term, 1, (term.shape[1],), peers), 1, (term.shape[1],), peers)
    return reduce(term, peers)


@contextmanager
def own_randomness(split: Split) -> Iterator[None]:
    """Numbers drawn for parts differ between ranks; afterwards all ranks' generators are in the same state again."""
    seed = int(torch.randint(1 << 62, ()))
    with rng.preserved(split.device):
        rng.reseed(split.device, seed, split.peers.rank)
        yield


# ------------------------------------------------------------------ collectives


def take(whole: Tensor, dim: int, parts: Parts, peers: Peers) -> Tensor:
    assert whole.shape[dim] == sum(parts), (whole.shape, dim, parts)
    runs = peers.runs(parts)
    if len(runs) == 1:
        return whole.narrow(dim, *runs[0])
    return torch.cat([whole.narrow(dim, *run) for run in runs], dim)


def order(parts: Parts, peers: Peers) -> list[int]:
    """Where in the whole dim the elements come from that the ranks hold, rank after rank."""
    return [i for rank in range(peers.size) for start, length in peers.runs(parts, rank) for i in range(start, start + length)]


def _all_gather(local: Tensor, dim: int, parts: Parts, peers: Peers) -> Tensor:
    if peers.group is None:
        shape = list(local.shape)
        shape[dim] = sum(parts)
        return local.new_zeros(shape)
    most = max(sum(length for _, length in peers.runs(parts, rank)) for rank in range(peers.size))
    mine = local.detach()
    if mine.shape[dim] < most:
        missing = list(mine.shape)
        missing[dim] = most - mine.shape[dim]
        mine = torch.cat([mine, mine.new_zeros(missing)], dim)
    mine = mine.contiguous()
    held = [torch.empty_like(mine) for _ in range(peers.size)]
    dist.all_gather(held, mine, group=peers.group)
    lengths = [[length for _, length in peers.runs(parts, rank)] for rank in range(peers.size)]
    held = [piece.narrow(dim, 0, sum(of)) for piece, of in zip(held, lengths, strict=True)]
    if len(parts) == 1:
        return torch.cat(held, dim)
    by_rank = [piece.split(of, dim) for piece, of in zip(held, lengths, strict=True)]
    return torch.cat([piece for run in zip(*by_rank, strict=True) for piece in run], dim)


def all_reduce(term: Tensor, peers: Peers, op: Any = dist.ReduceOp.SUM) -> Tensor:
    total = term.detach().clone(memory_format=torch.contiguous_format)
    if peers.group is not None:
        dist.all_reduce(total, op, group=peers.group)
    return total


def _reduce_scatter(term: Tensor, dim: int, parts: Parts, peers: Peers) -> Tensor:
    if peers.group is None:
        return take(term, dim, parts, peers)
    if not peers.divides(parts):
        return take(all_reduce(term, peers), dim, parts, peers)
    pieces = [term.detach()[(slice(None),) * dim + (torch.tensor(order(parts, peers)),)]] if len(parts) > 1 else [term.detach()]
    pieces = [piece.contiguous() for piece in pieces[0].chunk(peers.size, dim)]
    mine = torch.empty_like(pieces[0])
    dist.reduce_scatter(mine, pieces, group=peers.group)
    return mine


class _Show(torch.autograd.Function):
    """A part as a split tensor. Only a torch.autograd.Function of somebody else's makes autograd go this way back."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, parts: Parts, peers: Peers, sources: frozenset[str]) -> Split:
        ctx.how = dim % local.ndim, parts, peers
        return Split._wrap(local, dim, parts, peers, sources)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        dim, parts, peers = ctx.how
        if isinstance(grad, Split) and (grad.split_dim, grad.parts) == (dim, parts):
            return part_of(grad), None, None, None, None
        return _Scatter.apply(plain(grad), dim, parts, peers), None, None, None, None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: Split) -> Tensor:
        ctx.how = split.split_dim, split.parts, split.peers
        return split.local.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return Split(grad, *ctx.how)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return whole.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _Reduce.apply(grad, ctx.peers), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, term: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return all_reduce(term, peers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return enter(grad, ctx.peers), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, parts: Parts, peers: Peers) -> Tensor:
        ctx.how = dim, parts, peers
        return take(whole, dim, parts, peers).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _Gather.apply(grad, *ctx.how), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, parts: Parts, peers: Peers) -> Tensor:
        ctx.how = dim, parts, peers
        return _all_gather(local, dim, parts, peers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _Scatter.apply(grad, *ctx.how), None, None, None


class _GatherAndEnter(_Gather):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _ReduceScatter.apply(grad, *ctx.how), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, term: Tensor, dim: int, parts: Parts, peers: Peers) -> Tensor:
        ctx.how = dim, parts, peers
        return _reduce_scatter(term, *ctx.how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _GatherAndEnter.apply(grad, *ctx.how), None, None, None
