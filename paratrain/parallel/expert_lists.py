"""Experts that are modules of their own in a list, which the forward of the module around them calls with the rows they are to compute.

    for number, expert in enumerate(self.experts):
        rows = (index == number).any(-1).nonzero().flatten()
        if len(rows):
            out = out.index_add(0, rows, expert(x[rows]) * weight(rows, number))

The forward runs twice. The first time its experts only note what rows they are called with; these go to the ranks that hold the
experts, and results come back; the second time the experts answer with the results. Autograd follows the rows through the first run
and the results through the second, so gradients are those of one run.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from paratrain import rng
from paratrain.errors import UserError
from paratrain.parallel.expert_rows import Exchange
from paratrain.parallel.recompute import scratch_buffers


@dataclass(frozen=True)
class Listed:
    """A list of like experts.

    Attributes:
        experts: how many it has, on all ranks together.
        width: features of a row that an expert takes.
        result: a row of what it returns, on meta.
    """

    experts: int
    width: int
    result: torch.Tensor


def describe(experts: nn.ModuleList, autocast: AbstractContextManager) -> Listed | str:
    """How the experts of a list are called; or why they cannot be called on another rank. Runs a copy of the first on the host."""
    first = experts[0]
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in first.modules()):
        return "its experts normalise over the batch"
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(first).eval()
    for module in twin.modules():
        for leaf, param in module._parameters.items():
            if param is not None:
                value = torch.randn(param.shape, generator=generator).mul_(param.shape[-1] ** -0.5 if param.ndim else 1.0)
                module._parameters[leaf] = nn.Parameter(value.to(param.dtype), requires_grad=False)
    dtype = next(first.parameters()).dtype
    problem = "it takes no rows of features"
    for width in dict.fromkeys(size for param in first.parameters() if param.ndim == 2 for size in reversed(param.shape)):
        rows = torch.randn(4, width, generator=generator).to(dtype)
        try:
            with torch.no_grad(), autocast:
                together = twin(rows)
                apart = [twin(rows[i : i + 1]) for i in range(4)]
        except Exception as error:  # whatever the user's module raises
            problem = f"a copy of the first does not run on rows alone ({type(error).__name__}: {error})"
            continue
        if not isinstance(together, torch.Tensor) or together.ndim != 2 or len(together) != 4:
            return "an expert does not return a tensor with a row for each of the rows that it is given"
        if not torch.allclose(torch.cat(apart), together, rtol=1e-2, atol=1e-2 * float(together.abs().max())):
            return "what an expert returns for a row depends on the rows beside it"
        return Listed(len(experts), width, together[0].to("meta"))
    return problem


def place(path: str, parent: nn.Module, attribute: str, form: Listed, group: dist.ProcessGroup, device: torch.device) -> nn.Module:
    """Leave in the list `attribute` of `parent` the experts of this rank, in place; returns what holds them, under the same names."""
    experts = getattr(parent, attribute)
    owners = Owners(path, form, group, list(experts))
    parent._modules[attribute] = owners
    parent.__dict__["_experts_of"] = owners, device
    parent.__class__ = _calling(type(parent))  # type: ignore[arg-type]
    return owners


class Owners(nn.Module):
    """The experts of one rank of ep, and what stands for all of them in the forward of the module around them."""

    def __init__(self, path: str, form: Listed, group: dist.ProcessGroup, experts: Sequence[nn.Module]):
        super().__init__()
        self.path, self.form, self.group = path, form, group
        self.each = form.experts // group.size()
        self.first = group.rank() * self.each
        for number in range(self.first, self.first + self.each):
            self.add_module(str(number), experts[number])
        self._answer: Callable[[int, torch.Tensor], torch.Tensor] | None = None
        self.proven = False

    def forward(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """The results of the experts here, each for rows of its own; of none where it has no rows."""
        experts = list(self._modules.values())
        return [expert(own) if len(own) and expert is not None else self.nothing(own) for expert, own in zip(experts, rows, strict=True)]

    def nothing(self, like: torch.Tensor) -> torch.Tensor:
        """No results, hanging on `like`."""
        return like.flatten()[:0].view(0, 1).expand(0, *self.form.result.shape).to(self.form.result.dtype, copy=True)  # no view: FSDP warns

    @contextmanager
    def answering(self, answer: Callable[[int, torch.Tensor], torch.Tensor]) -> Iterator[None]:
        self._answer = answer
        try:
            yield
        finally:
            self._answer = None

    def __len__(self) -> int:
        return self.form.experts

    def __getitem__(self, index: Any) -> Any:
        numbers = range(self.form.experts)[index if isinstance(index, slice) else operator.index(index)]
        return [_Expert(self, number) for number in numbers] if isinstance(index, slice) else _Expert(self, numbers)  # type: ignore[union-attr,arg-type]

    def __iter__(self) -> Iterator[_Expert]:
        return iter(self[:])

    def ask(self, number: int, args: Any, kwargs: Any) -> torch.Tensor:
        rows = args[0] if len(args) == 1 and not kwargs else None
        if self._answer is None or not isinstance(rows, torch.Tensor) or rows.ndim != 2 or rows.shape[1] != self.form.width:
            called = ", ".join(
                str(tuple(a.shape)) if isinstance(a, torch.Tensor) else type(a).__name__ for a in tree_leaves((args, kwargs))
            )
            reason = (
                "by another module than the one around them"
                if self._answer is None
                else f"with ({called}), not with [rows, {self.form.width}]"
            )
            raise self.refusal(f"they are called {reason}")
        return self._answer(number, rows)

    def refusal(self, reason: str) -> UserError:
        return UserError(
            f"parallel.ep={self.group.size()}: the experts in {self.path} cannot be dealt to ranks: {reason}; write parallel.ep=1"
        )


class _Expert:
    """What stands for an expert in the forward of the module around it."""

    def __init__(self, owners: Owners, number: int):
        self._owners, self._number = owners, number

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._owners.ask(self._number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        raise self._owners.refusal(f"forward reads {name!r} of an expert instead of calling it")


Call = tuple[int, torch.Tensor]


class _Calling(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        owners, device = self.__dict__["_experts_of"]
        calls: list[Call] = []

        def note(number: int, rows: torch.Tensor) -> torch.Tensor:
            calls.append((number, rows))
            return rows.new_zeros(len(rows), *owners.form.result.shape, dtype=owners.form.result.dtype)

        first_args, first_kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))  # forward may write into them
        with rng.preserved(device), scratch_buffers(self, nullcontext()), owners.answering(note):
            super().forward(*first_args, **first_kwargs)
        results = _computed(
            owners, calls, next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
        )
        left = list(zip(calls, results, strict=True))

        def answer(number: int, rows: torch.Tensor) -> torch.Tensor:
            (expected, before), result = left.pop(0) if left else ((None, rows), rows)
            same = expected == number and before.shape == rows.shape
            if not same or not (owners.proven or torch.equal(before, rows)):
                raise owners.refusal("what an expert is called with depends on the results of others")
            return result

        with owners.answering(answer):
            outputs = super().forward(*args, **kwargs)
        if left:
            raise owners.refusal("which experts are called depends on the results of others")
        owners.proven = True
        if calls:
            return outputs
        nothing = results[-1].sum() if results else 0.0
        return tree_map_only(torch.Tensor, lambda leaf: leaf + nothing if leaf.is_floating_point() else leaf, outputs)


@cache
def _calling(cls: type) -> type:
    return type(cls.__name__, (_Calling, cls), {"__module__": cls.__module__})


def _computed(owners: Owners, calls: list[Call], like: torch.Tensor) -> list[torch.Tensor]:
    """The results of `calls`, each computed by the rank that holds its expert. Every rank of ep must call it."""
    order = sorted(range(len(calls)), key=lambda i: calls[i][0])
    experts, ranks, device = owners.form.experts, owners.group.size(), like.device
    counts = [0] * experts
    for number, rows in calls:
        counts[number] += len(rows)
    send = torch.tensor(counts, device=device)
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send, group=owners.group)
    arriving = receive.view(ranks, -1).tolist()
    outward = [sum(counts[r * owners.each : (r + 1) * owners.each]) for r in range(ranks)], [sum(row) for row in arriving]
    empty = like.flatten()[:0].view(0, 1).expand(0, owners.form.width)
    sent = torch.cat([calls[i][1] for i in order]) if calls else empty
    anchor = torch.zeros((), device=device, requires_grad=True)
    arrived = Exchange.apply(sent, *outward, owners.group, anchor)
    pieces = arrived.split([count for row in arriving for count in row])
    computed = owners([torch.cat(pieces[number :: owners.each]) for number in range(owners.each)])
    parts = [result.split([row[number] for row in arriving]) for number, result in enumerate(computed)]
    back = Exchange.apply(
        torch.cat([parts[number][r] for r in range(ranks) for number in range(owners.each)]), *reversed(outward), owners.group, anchor
    )
    results: list[torch.Tensor] = [back] * len(calls)
    for i, result in zip(order, back.split([len(calls[i][1]) for i in order]), strict=True):
        results[i] = result
    return results or [back]
