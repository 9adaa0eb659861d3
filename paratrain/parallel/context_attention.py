"""Attention over a sequence that is split over ranks: three exact exchanges, each an autograd function of its own.

all_to_all   ranks exchange sequence for heads, attend to the whole sequence, and exchange back (Jacobs et al., 2023, DeepSpeed-Ulysses)
all_gather   every rank gathers keys and values and attends from its own queries (as Llama 3 does; Dubey et al., 2024)
ring         keys and values go around; results merge by their log-sum-exp (Liu et al., 2023), queries balanced by a zigzag order
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


def order(length: int, ranks: int, zigzag: bool) -> list[torch.Tensor]:
    """The positions that each rank holds: one run, or (zigzag) one from the front and the one as far from the back, for even causal work."""
    if not zigzag:
        return list(torch.arange(length).chunk(ranks))
    runs = torch.arange(length).chunk(2 * ranks)
    return [torch.cat([runs[rank], runs[-1 - rank]]) for rank in range(ranks)]


def all_to_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: dist.ProcessGroup, **options: Any) -> torch.Tensor:
    """q, k, v [batch, heads, local time, features], heads divisible by the ranks, runs of time in the order of the ranks."""
    q, k, v = (_Exchange.apply(tensor, group, True) for tensor in (q, k, v))
    return _Exchange.apply(F.scaled_dot_product_attention(q, k, v, **options), group, False)


def all_gather(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: dist.ProcessGroup, is_causal: bool, **options: Any
) -> torch.Tensor:
    """As `all_to_all`, for any number of heads."""
    start, time = group.rank() * q.shape[-2], q.shape[-2]
    k, v = _Gather.apply(k, group), _Gather.apply(v, group)
    mask = None
    if is_causal:
        k, v = k[..., : start + time, :], v[..., : start + time, :]
        mask = torch.ones(time, start + time, dtype=torch.bool, device=q.device).tril(start)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def ring(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: dist.ProcessGroup, is_causal: bool, scale: float | None, zigzag: bool
) -> torch.Tensor:
    """As `all_to_all`, for as many heads of keys as of queries and time in the order of `order`."""
    return _Ring.apply(q, k, v, group, is_causal, scale or 1 / math.sqrt(q.shape[-1]), zigzag)


class _Exchange(torch.autograd.Function):
    """[batch, heads, time / ranks, features] to [batch, heads / ranks, time, features], or back."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup, to_heads: bool) -> torch.Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        split, join = (1, 2) if to_heads else (2, 1)
        send = torch.stack(tensor.chunk(group.size(), dim=split))
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=group)
        return torch.cat(receive.unbind(), dim=join)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _Exchange.apply(grad, ctx.group, not ctx.to_heads), None, None


class _Gather(torch.autograd.Function):
    """The whole of dim 2 on every rank; backward sums what every rank made of this rank's part."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        send = torch.stack(grad.chunk(ctx.group.size(), dim=2))
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=ctx.group)
        return receive.sum(0), None


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, group, is_causal, scale, zigzag) -> torch.Tensor:
        rank, ranks = group.rank(), group.size()
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=wide, device=q.device)
        lse = torch.full((*q.shape[:-1], 1), -math.inf, dtype=wide, device=q.device)
        kv = torch.cat([k, v], dim=-1).contiguous()
        positions = [part.to(q.device) for part in order(q.shape[-2] * ranks, ranks, zigzag)]
        for step in range(ranks):
            source = (rank - step) % ranks
            coming = _start_turn(kv, group) if step + 1 < ranks else None
            keys, values = kv.split([k.shape[-1], v.shape[-1]], dim=-1)
            for rows, columns, masked in _pieces(positions[rank], positions[source], is_causal, zigzag):
                scores = _scores(q[..., rows, :].to(wide), keys[..., columns, :].to(wide), scale, masked)
                part_lse = scores.logsumexp(-1, keepdim=True)
                part = (scores - part_lse).exp() @ values[..., columns, :].to(wide)
                total = torch.logaddexp(lse[..., rows, :], part_lse)
                out[..., rows, :] = out[..., rows, :] * (lse[..., rows, :] - total).exp() + part * (part_lse - total).exp()
                lse[..., rows, :] = total
            if coming:
                kv = _finish_turn(coming)
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.settings = group, is_causal, scale, zigzag
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        group, is_causal, scale, zigzag = ctx.settings
        rank, ranks = group.rank(), group.size()
        wide = lse.dtype
        grad = grad.to(wide)
        delta = (grad * out.to(wide)).sum(-1, keepdim=True)
        grad_q = torch.zeros_like(q, dtype=wide)
        sizes = [k.shape[-1], v.shape[-1]]
        # keys, values and the gradients of both travel together, and after a whole turn are home again
        pack = torch.cat([k.to(wide), v.to(wide), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)], dim=-1).contiguous()
        positions = [part.to(q.device) for part in order(q.shape[-2] * ranks, ranks, zigzag)]
        for step in range(ranks):
            source = (rank - step) % ranks
            keys, values, grad_k, grad_v = pack.split(sizes * 2, dim=-1)
            for rows, columns, masked in _pieces(positions[rank], positions[source], is_causal, zigzag):
                queries, part_keys = q[..., rows, :].to(wide), keys[..., columns, :]
                weights = (_scores(queries, part_keys, scale, masked) - lse[..., rows, :]).exp()
                grad_v[..., columns, :] += weights.transpose(-1, -2) @ grad[..., rows, :]
                grad_weights = grad[..., rows, :] @ values[..., columns, :].transpose(-1, -2)
                grad_scores = weights * (grad_weights - delta[..., rows, :]) * scale
                grad_q[..., rows, :] += grad_scores @ part_keys
                grad_k[..., columns, :] += grad_scores.transpose(-1, -2) @ queries
            if step + 1 == ranks:  # only the gradients have a home to go to
                pack = pack[..., sum(sizes) :].contiguous()
            pack = _finish_turn(_start_turn(pack, group))
        grad_k, grad_v = pack.split(sizes, dim=-1)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None


def _pieces(rows: torch.Tensor, columns: torch.Tensor, is_causal: bool, zigzag: bool) -> list[tuple[slice, slice, torch.Tensor | None]]:
    """The pairs of runs of queries and keys that attend to each other, with the mask of those that do in part."""
    if not is_causal:
        return [(slice(None), slice(None), None)]
    runs = 2 if zigzag else 1
    size = len(rows) // runs
    pieces: list[tuple[slice, slice, torch.Tensor | None]] = []
    for row in range(runs):
        for column in range(runs):
            here, there = slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size)
            if columns[there][0] < rows[here][0]:
                pieces.append((here, there, None))
            elif columns[there][0] == rows[here][0]:
                pieces.append((here, there, columns[there] > rows[here][:, None]))
    return pieces


def _scores(queries: torch.Tensor, keys: torch.Tensor, scale: float, masked: torch.Tensor | None) -> torch.Tensor:
    scores = (queries @ keys.transpose(-1, -2)) * scale
    return scores if masked is None else scores.masked_fill(masked, -math.inf)


def _start_turn(tensor: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor, list[dist.Work]]:
    """Send to the next rank, receive from the one before."""
    coming = torch.empty_like(tensor)
    rank, ranks = group.rank(), group.size()
    ops = [
        dist.P2POp(dist.isend, tensor, group=group, group_peer=(rank + 1) % ranks),
        dist.P2POp(dist.irecv, coming, group=group, group_peer=(rank - 1) % ranks),
    ]
    return tensor, coming, dist.batch_isend_irecv(ops)


def _finish_turn(turn: tuple[torch.Tensor, torch.Tensor, list[dist.Work]]) -> torch.Tensor:
    for work in turn[2]:
        work.wait()
    return turn[1]
