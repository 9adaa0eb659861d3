"""A plan found by running the model's forward once on tensors without data.

Each matrix that meets a whole activation is split by its results (column-wise) and each that meets a split one by its arguments
(row-wise), as Megatron-LM does by hand (Shoeybi et al., 2019). Where an operation between the two needs whole tensors, the matrices
before it stay whole and the run starts again, until every split is followed to the product that ends it. Matrices that the model
cuts into several (q, k and v in one) are split piece by piece.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from paratrain import rng
from paratrain.errors import UserError
from paratrain.parallel import guess, tp_products
from paratrain.parallel.tp_plan import NOTHING, Placement, Plan, example, pattern
from paratrain.parallel.tp_rules import ABOUT, argument, is_pointwise
from paratrain.parallel.tp_split import Parts, Peers, Split, take

_MOST_RUNS = 500


def derive(model: nn.Module, peers: Peers) -> Plan:
    """The plan of a model whose tensors are on meta. The same on every rank, as it depends on shapes alone.

    Raises:
        UserError: the model runs on none of the inputs that were guessed, or its forward cannot be followed.
    """
    try:
        twin, inputs = guess.runnable(model)
    except guess.NoInputs as error:
        raise UserError(
            f"parallel.tp_plan=auto: the model ran on none of the inputs that could be guessed for it ({error}); write the plan: {example(model)}"
        ) from None
    search = _Search(twin, peers)
    differentiable = True
    for _ in range(_MOST_RUNS):
        search.begin()
        try:
            with rng.preserved(torch.device("cpu")), torch.set_grad_enabled(differentiable), search:
                outputs = guess.call(twin, inputs)
            search.finish(outputs)
        except _Again:
            continue
        except UserError:
            raise
        except Exception as error:  # whatever a user's forward does to a tensor that is in parts, or that has no values to save
            if differentiable:
                differentiable = False
                continue
            text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise UserError(
                f"parallel.tp_plan=auto: the model's forward cannot be followed after torch's {search.last}: {text}; write the plan, of weights that are "
                f"used before or after it: {example(model)} (or {NOTHING}, so that nothing is split)"
            ) from error
        break
    return Plan(search.placements(), "derived", search.reasons())


_Key = tuple[str, torch.Size]
"""Of weights that share decisions: names that differ in their first number, and one shape."""


class _Again(BaseException):
    """Something was learnt that changes what follows; not an Exception, which a model's forward might catch."""


@dataclass(frozen=True)
class _Function:
    """A tensor that is an element-wise function of parameters of its own shape: a masked or a normalised weight.

    Attributes:
        result: the tensor, kept alive so that its id is no other's.
        roots: the parameters.
        turned: whether it is the transpose of that.
    """

    result: Tensor
    roots: tuple[Tensor, ...]
    turned: bool = False


class _Search(TorchFunctionMode):
    """Decides about each matrix where it is used. Names that differ in numbers, of one shape, share decisions."""

    def __init__(self, model: nn.Module, peers: Peers):
        super().__init__()
        self.peers = Peers(None, 0, peers.size, gathered=self._gathered)
        self.names: dict[int, list[str]] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(param), []).append(name)
        self.params = dict(model.named_parameters(remove_duplicate=False))
        self.whole: dict[_Key, str] = {}  # -> why
        self.fused: dict[_Key, Parts] = {}
        self.decided: dict[int, Placement] = {}
        self.functions: dict[int, _Function] = {}  # by the id of their result
        self.uses: dict[int, str] = {}  # id of a parameter -> the function that it is first given to
        self.last = "nothing"
        self.tied = {id(param) for param in self.params.values() if len(self.names[id(param)]) > 1}

    def begin(self) -> None:
        """Before a run."""
        self.decided.clear()
        self.functions.clear()
        self.uses.clear()

    def placements(self) -> dict[str, Placement]:
        return {name: placement for key, placement in self.decided.items() for name in self.names[key]}

    def reasons(self) -> dict[str, str]:
        """Pattern of names -> why these matrices stay whole."""
        found = dict(self.whole)
        for name, param in self.params.items():
            if param.ndim > 1 and id(param) not in self.decided and self._key(name) not in found:
                use = self.uses.get(id(param))
                found[self._key(name)] = "no operation that can be followed uses it" if use is None else f"no rule splits {use}"
        patterns = Counter(like for like, _ in {*found, *(self._key(self.names[key][0]) for key in self.decided)})
        return {like if patterns[like] == 1 else f"{like} {tuple(shape)}": reason for (like, shape), reason in found.items()}

    def finish(self, outputs: Any) -> None:
        """Of results that leave the model split, only scores of many classes are worth it."""
        for leaf in tree_leaves(outputs):
            if not isinstance(leaf, Split):
                continue
            params = {source: self.params[source] for source in leaf.sources}
            few = [source for source, param in params.items() if param.shape[0] <= param.shape[1] and id(param) not in self.tied]
            kernels = any(param.ndim > 2 for param in params.values())
            if few or kernels:
                self._keep_whole(params if kernels else few, "its result is an output of the model")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name != "__get__" and name not in ABOUT:
            self.last = name
        args = list(args)
        self._note(name, args, kwargs)
        if name == "linear" and len(args) >= 2:
            args[1] = self._matrix(args[0], args[1], 0, 1, argument(tuple(args), kwargs, 2, "bias"))
        elif name == "addmm" and len(args) == 3:
            args[2] = self._matrix(args[1], args[2], 1, 0, args[0])
        elif name in ("matmul", "__matmul__", "mm") and args[1].ndim == 2:
            args[1] = self._matrix(args[0], args[1], 1, 0)
        elif name in tp_products.CONVOLUTIONS and len(args) >= 2:
            args[1] = self._kernel(name, args, kwargs)
        elif name == "embedding" and len(args) >= 2 and not isinstance(args[0], Split):
            args[1] = self._table(args[1])
        elif name in ("chunk", "split") and id(args[0]) in self.names and args[0].ndim == 2:
            args[0] = self._cut(args, kwargs)
        try:
            result = func(*args, **kwargs)
        except Exception as error:  # a rule that does not fit, or what a user's own tensor says
            if isinstance(error, NotImplementedError) and torch.is_grad_enabled():
                raise  # hooks that save tensors want values: `derive` goes on without them
            sources = frozenset().union(*(leaf.sources for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Split)))
            if not sources:
                raise
            self._keep_whole(sources, f"{name}: {error}".splitlines()[0][:200])
        self._follow(name, args, kwargs, result)
        return result

    def _note(self, name: str, args: list[Any], kwargs: dict) -> None:
        if name != "__get__" and name not in ABOUT:
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.names:
                    self.uses.setdefault(id(leaf), name)

    def _follow(self, name: str, args: list[Any], kwargs: dict, result: Any) -> None:
        """Remember a result that is a function of parameters, element by element, or weight norm or the transpose of one."""
        if not isinstance(result, Tensor) or isinstance(result, Split) or result.ndim < 2:
            return
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {id(leaf): found for leaf in leaves if (found := self._function(leaf)) is not None}
        if not known or id(result) in self.names:
            return
        if name in ("t", "transpose", "__get__"):
            (found,) = list(known.values())[:1]
            if result.ndim == 2 and result.shape == args[0].shape[::-1] and result.stride() == args[0].stride()[::-1]:
                self.functions[id(result)] = _Function(result, found.roots, not found.turned)
        elif name == "_weight_norm" and id(args[0]) in known:
            self.functions[id(result)] = _Function(result, known[id(args[0])].roots)
        elif is_pointwise(name) and "out" not in kwargs:
            same = [known[id(leaf)] for leaf in leaves if id(leaf) in known and leaf.shape == result.shape]
            if same and len({found.turned for found in same}) == 1:
                roots = {id(root): root for found in same for root in found.roots}
                self.functions[id(result)] = _Function(result, tuple(roots.values()), same[0].turned)

    def _function(self, tensor: Tensor) -> _Function | None:
        return _Function(tensor, (tensor,)) if id(tensor) in self.names and tensor.ndim > 1 else self.functions.get(id(tensor))

    def _matrix(self, x: Tensor, weight: Tensor, columns: int, rows: int, bias: Tensor | None = None) -> Tensor:
        found = self._candidate(weight)
        if found is None or weight.ndim != 2:
            return weight
        if isinstance(x, Split) and x.split_dim == x.ndim - 1:
            return self._decide(found, Placement(rows, x.parts))
        parts = self.fused.get(self._key(self._name(found)), (weight.shape[columns],))
        split = self._decide(found, Placement(columns, parts))
        if id(bias) in self.names:
            self.decided[id(bias)] = Placement(0, parts)
        return split

    def _kernel(self, name: str, args: list[Any], kwargs: dict) -> Tensor:
        """The weight of a convolution, split over the channels it makes or over those that it takes."""
        x, kernel = args[0], args[1]
        found = self._candidate(kernel)
        if found is None or x.ndim != kernel.ndim:
            return kernel
        groups, bias = argument(tuple(args), kwargs, 6, "groups", 1), argument(tuple(args), kwargs, 2, "bias")
        makes, takes = (1, 0) if "transpose" in name else (0, 1)
        follows = isinstance(x, Split) and x.split_dim == 1
        if groups > 1:
            grouped = tp_products.grouped_parts(x, groups, kernel.shape[0]) if follows and not makes else None
            if grouped is None:
                return kernel
            placement = Placement(0, grouped)
        elif follows:
            placement = Placement(takes, x.parts)  # type: ignore[attr-defined]
        else:
            placement = Placement(makes, self.fused.get(self._key(self._name(found)), (kernel.shape[makes],)))
        split = self._decide(found, placement)
        if id(bias) in self.names and (placement.dim == makes or groups > 1):
            self.decided[id(bias)] = Placement(0, placement.parts)
        return split

    def _table(self, weight: Tensor) -> Tensor:
        found = self._candidate(weight)
        if found is None or weight.ndim != 2:
            return weight
        if weight.shape[0] <= weight.shape[1] and id(weight) not in self.tied:
            self.uses[id(weight)] = "a table of no more rows than columns"
            return weight
        return self._decide(found, Placement(0, (weight.shape[0],)))

    def _cut(self, args: list[Any], kwargs: dict) -> Tensor:
        weight = args[0]
        found = self._candidate(weight)
        if found is None or (args[2] if len(args) > 2 else kwargs.get("dim", 0)) != 0:
            return weight
        by = args[1] if len(args) > 1 else next(iter(kwargs.values()))
        cut = torch.empty(weight.shape[0], device="meta")
        pieces = tuple(piece.numel() for piece in (cut.split(by) if isinstance(by, list | tuple) else cut.chunk(by)))
        return self._decide(found, Placement(0, pieces))

    def _candidate(self, weight: Tensor) -> _Function | None:
        found = None if isinstance(weight, Split) else self._function(weight)
        if found is None or any(self._key(name) in self.whole for root in found.roots for name in self.names[id(root)]):
            return None
        return found

    def _key(self, name: str) -> _Key:
        return pattern(name), self.params[name].shape

    def _name(self, found: _Function) -> str:
        return self.names[id(found.roots[0])][0]

    def _decide(self, found: _Function, placement: Placement) -> Tensor:
        weight, size, sources = found.result, self.peers.size, [self.names[id(root)][0] for root in found.roots]
        if weight.shape[placement.dim] < size:
            kind = ("rows", "columns")[placement.dim] if weight.ndim == 2 else "channels"
            self._keep_whole(sources, f"there are fewer than {size} of its {kind}")
        if len(placement.parts) > 1 and not self.peers.divides(placement.parts):
            self._keep_whole(sources, f"its parts {placement.parts} do not divide by {size}")
        kept = Placement(1 - placement.dim, placement.parts) if found.turned else placement
        for root in found.roots:
            if self.decided.setdefault(id(root), kept) != kept:
                self._keep_whole(sources, "it is used in two ways that need different splits")
        local = take(weight.detach(), placement.dim, placement.parts, self.peers)
        return Split(local, placement.dim, placement.parts, self.peers, frozenset(sources))

    def _keep_whole(self, sources: Iterable[str], reason: str) -> NoReturn:
        named = set(sources)
        ordered = [source for key in self.decided for source in self.names[key][:1] if source in named] or sorted(named)
        if any(self.params[source].ndim > 2 for source in ordered):
            ordered = ordered[:1]  # what first made a stream of channels split, and not all that follows
        self.whole |= {self._key(name): reason for source in ordered for name in self.names[id(self.params[source])]}
        raise _Again

    def _gathered(self, operation: str, splits: list[Split], reason: str) -> None:
        sources = frozenset().union(*(split.sources for split in splits))
        if operation == "fused":
            source, parts = min(sources), tuple(int(size) for size in re.findall(r"\d+", reason))
            key, weight = self._key(source), self.params[source]
            if len(sources) == 1 and len(parts) > len(self.fused.get(key, ())) and self.peers.divides(parts):
                rows = weight.shape[self.decided[id(weight)].dim] // sum(parts)  # the model may cut heads, not features
                self.fused[key] = tuple(part * rows for part in parts)
                raise _Again
        elif sources:
            self._keep_whole(sources, reason if operation == "scatter" else f"{operation}: {reason}")
