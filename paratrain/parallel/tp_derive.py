"""A plan found by running the model's forward once on tensors without data.

Each matrix that meets a whole activation is split by its results (column-wise) and each that meets a split one by its arguments
(row-wise), as Megatron-LM does by hand (Shoeybi et al., 2019). Where an operation between the two needs whole tensors, the matrices
before it stay whole and the run starts again, until every split is followed to the product that ends it. Matrices that the model
cuts into several (q, k and v in one) are split piece by piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from paratrain import rng
from paratrain.errors import UserError
from paratrain.parallel import guess
from paratrain.parallel.tp_plan import Placement, Plan, pattern
from paratrain.parallel.tp_split import Parts, Peers, Split, take

_MOST_RUNS = 500


def derive(model: nn.Module, peers: Peers) -> Plan:
    """The plan of a model whose tensors are on meta. The same on every rank, as it depends on shapes alone.

    Raises:
        UserError: the model runs on none of the inputs that were guessed.
    """
    try:
        twin, inputs = guess.runnable(model)
    except guess.NoInputs as error:
        raise UserError(
            f"parallel.tp_plan=auto: the model ran on none of the inputs that could be guessed for it ({error}); write the plan: "
            "parallel.tp_plan={'layers.*.q_proj': colwise, 'layers.*.o_proj': rowwise, ...}"
        ) from None
    search = _Search(twin, peers)
    for _ in range(_MOST_RUNS):
        search.decided.clear()
        try:
            with rng.preserved(torch.device("cpu")), torch.enable_grad(), search:
                outputs = guess.call(twin, inputs)
            search.finish(outputs)
        except _Again:
            continue
        break
    return Plan(search.placements(), "derived", search.whole)


class _Again(BaseException):
    """Something was learnt that changes what follows; not an Exception, which a model's forward might catch."""


class _Search(TorchFunctionMode):
    """Decides about each matrix where it is used. Names that differ in numbers share decisions."""

    def __init__(self, model: nn.Module, peers: Peers):
        super().__init__()
        self.peers = Peers(None, 0, peers.size, gathered=self._gathered)
        self.names: dict[int, list[str]] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(param), []).append(name)
        self.params = dict(model.named_parameters(remove_duplicate=False))
        self.whole: dict[str, str] = {}  # pattern -> why
        self.fused: dict[str, Parts] = {}
        self.decided: dict[int, Placement] = {}
        self.turned: dict[int, tuple[Tensor, Tensor]] = {}  # id of a transposed matrix -> itself, kept alive, and the matrix
        self.tied = {id(param) for param in self.params.values() if len(self.names[id(param)]) > 1}

    def placements(self) -> dict[str, Placement]:
        return {name: placement for key, placement in self.decided.items() for name in self.names[key]}

    def finish(self, outputs: Any) -> None:
        """Of results that leave the model split, only scores of many classes are worth it."""
        for leaf in tree_leaves(outputs):
            for source in leaf.sources if isinstance(leaf, Split) else ():
                param = self.params[source]
                if param.shape[0] <= param.shape[1] and id(param) not in self.tied:
                    self._keep_whole([source], "its result is an output of the model")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        args = list(args)
        if name == "linear" and len(args) >= 2:
            args[1] = self._matrix(args[0], args[1], 0, 1, args[2] if len(args) > 2 else kwargs.get("bias"))
        elif name == "addmm" and len(args) == 3:
            args[2] = self._matrix(args[1], args[2], 1, 0, args[0])
        elif name in ("matmul", "__matmul__", "mm") and id(args[1]) in self.turned:
            args[1] = self._matrix(args[0], self.turned[id(args[1])][1], 0, 1).T
        elif name in ("matmul", "__matmul__", "mm") and args[1].ndim == 2:
            args[1] = self._matrix(args[0], args[1], 1, 0)
        elif name in ("t", "transpose", "__get__") and id(args[0]) in self.names and args[0].ndim == 2:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.shape == args[0].shape[::-1] and result.stride() == args[0].stride()[::-1]:
                self.turned[id(result)] = result, args[0]
            return result
        elif name == "embedding" and len(args) >= 2 and not isinstance(args[0], Split):
            args[1] = self._table(args[1])
        elif name in ("chunk", "split") and id(args[0]) in self.names and args[0].ndim == 2:
            args[0] = self._cut(args, kwargs)
        return func(*args, **kwargs)

    def _matrix(self, x: Tensor, weight: Tensor, columns: int, rows: int, bias: Tensor | None = None) -> Tensor:
        source = self._candidate(weight)
        if source is None:
            return weight
        if isinstance(x, Split) and x.split_dim == x.ndim - 1:
            return self._decide(weight, source, Placement(rows, x.parts))
        parts = self.fused.get(pattern(source), (weight.shape[columns],))
        split = self._decide(weight, source, Placement(columns, parts))
        if isinstance(split, Split) and id(bias) in self.names:
            self.decided[id(bias)] = Placement(0, parts)
        return split

    def _table(self, weight: Tensor) -> Tensor:
        source = self._candidate(weight)
        if source is None or (weight.shape[0] <= weight.shape[1] and id(weight) not in self.tied):
            return weight
        return self._decide(weight, source, Placement(0, (weight.shape[0],)))

    def _cut(self, args: list[Any], kwargs: dict) -> Tensor:
        weight = args[0]
        source = self._candidate(weight)
        if source is None or (args[2] if len(args) > 2 else kwargs.get("dim", 0)) != 0:
            return weight
        by = args[1] if len(args) > 1 else next(iter(kwargs.values()))
        cut = torch.empty(weight.shape[0], device="meta")
        pieces = tuple(piece.numel() for piece in (cut.split(by) if isinstance(by, list | tuple) else cut.chunk(by)))
        return self._decide(weight, source, Placement(0, pieces))

    def _candidate(self, weight: Tensor) -> str | None:
        names = self.names.get(id(weight))
        if names is None or weight.ndim != 2 or any(pattern(name) in self.whole for name in names):
            return None
        return names[0]

    def _decide(self, weight: Tensor, source: str, placement: Placement) -> Tensor:
        size = self.peers.size
        if weight.shape[placement.dim] < size:
            self._keep_whole([source], f"there are fewer than {size} of its {('rows', 'columns')[placement.dim]}")
        if len(placement.parts) > 1 and not self.peers.divides(placement.parts):
            self._keep_whole([source], f"its parts {placement.parts} do not divide by {size}")
        if self.decided.setdefault(id(weight), placement) != placement:
            self._keep_whole([source], "it is used in two ways that need different splits")
        local = take(weight.detach(), placement.dim, placement.parts, self.peers)
        return Split(local, placement.dim, placement.parts, self.peers, frozenset({source}))

    def _keep_whole(self, sources: Iterable[str], reason: str) -> None:
        self.whole |= {pattern(name): reason for source in sources for name in self.names[id(self.params[source])]}
        raise _Again

    def _gathered(self, operation: str, splits: list[Split], reason: str) -> None:
        sources = frozenset().union(*(split.sources for split in splits))
        if operation == "fused":
            source, parts = min(sources), tuple(int(size) for size in re.findall(r"\d+", reason))
            if len(sources) == 1 and len(parts) > len(self.fused.get(pattern(source), ())) and self.peers.divides(parts):
                weight = self.params[source]
                rows = weight.shape[self.decided[id(weight)].dim] // sum(parts)  # the model may cut heads, not features
                self.fused[pattern(source)] = tuple(part * rows for part in parts)
                raise _Again
        elif sources:
            self._keep_whole(sources, reason if operation == "scatter" else f"{operation}: {reason}")
