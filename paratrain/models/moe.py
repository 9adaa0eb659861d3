"""A GPT whose feed-forward layers are mixtures of experts, as a plain `nn.Module` that knows nothing of ranks.

A router chooses `top_k` of the experts for each token and weighs their results by its probabilities, normalised over the chosen
(Jiang et al., 2024, Mixtral). No token is dropped. So that no expert starves, the model can report how unevenly each sequence is
spread over the experts; `balanced_cross_entropy` adds it to the loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paratrain.compat import grouped_product
from paratrain.loss import cross_entropy, sequence_balance
from paratrain.models.gpt import GPT, INIT_STD, Block, Linear


class MoE(GPT):
    """Decoder-only transformer language model with a mixture of experts in every block.

    Args:
        experts: experts of each block.
        top_k: experts that compute each token.
        balance: report the balance of each sequence while training, for `balanced_cross_entropy`.
        others: of `GPT`; `ffn` is the hidden width of one expert.

    Raises:
        ValueError: when the sizes do not divide, or `top_k` exceeds `experts`.
    """

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        layers: int = 4,
        dim: int = 128,
        experts: int = 8,
        top_k: int = 2,
        balance: bool = False,
        **others: Any,
    ):
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k={top_k} of experts={experts}: a token needs at least one expert and at most all of them")
        ffn = others.pop("ffn", None)
        super().__init__(vocab_size, seq_len, layers, dim, ffn=1, **others)
        hidden = 64 * math.ceil(dim * 4 / 3 / 64) if ffn is None else ffn
        for block in self.blocks:
            assert isinstance(block, Block)
            block.ffn = Mixture(dim, hidden, experts, top_k, INIT_STD / math.sqrt(2 * layers))  # type: ignore[assignment]
            block.__class__ = SparseBlock
        self.balance = balance

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Any:
        """Logits as of `GPT`; while training with `balance`, (logits, balance [batch]), see `paratrain.loss.sequence_balance`."""
        x, rotation = self.embedded(tokens, positions)
        uneven = x.new_zeros(x.shape[0])
        for block in self.blocks:
            x, here = block(x, rotation)
            uneven = uneven + here / len(self.blocks)
        logits = self.head(self.norm(x))
        return (logits, uneven) if self.balance and self.training else logits


class SparseBlock(Block):
    """A block of `GPT` that also returns the balance [batch] of its router."""

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Any:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation))
        y, uneven = self.ffn(self.ffn_norm(x))
        return x + self.dropout(y), uneven


class Mixture(nn.Module):
    """A router and its experts. [batch, time, dim] -> the same, and the balance [batch]."""

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int, residual_std: float):
        super().__init__()
        self.top_k = top_k
        self.router = Linear(dim, experts)
        self.experts = Experts(dim, hidden, experts, residual_std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights, index = logits.softmax(-1).topk(self.top_k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        y = self.experts(x.flatten(0, 1), index.flatten(0, 1), weights.flatten(0, 1))
        return y.view_as(x), sequence_balance(logits, self.top_k)


class Experts(nn.Module):
    """SwiGLU feed-forward networks side by side, the weights of all in one tensor each."""

    def __init__(self, dim: int, hidden: int, experts: int, residual_std: float):
        super().__init__()
        self.residual_std = residual_std
        self.gate_up = nn.Parameter(torch.empty(experts, dim, 2 * hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_up, std=INIT_STD)
        nn.init.normal_(self.down, std=self.residual_std)

    def forward(self, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' results.

        Args:
            rows: [rows, dim].
            index: int64 [rows, chosen], numbers of experts.
            weights: [rows, chosen].

        Returns:
            [rows, dim].
        """
        chosen, order = index.flatten().sort(stable=True)
        ends = chosen.new_zeros(self.down.shape[0]).scatter_add(0, chosen, torch.ones_like(chosen)).cumsum(0)
        gate, up = grouped_product(rows[order // index.shape[1]], self.gate_up, ends).chunk(2, dim=-1)
        results = grouped_product(F.silu(gate) * up, self.down, ends)
        results = torch.empty_like(results).index_copy(0, order, results)
        return (results.view(*index.shape, -1) * weights.unsqueeze(-1)).sum(1)


def balanced_cross_entropy(outputs: Any, targets: Tensor, coefficient: float = 0.01) -> tuple[Tensor, Tensor]:
    """`cross_entropy`, plus `coefficient` times the mean balance of the sequences, each weighted by the targets that count in it.

    Args:
        outputs: logits [batch, time, classes] with the balance [batch], as `MoE` returns while it trains; or logits alone.
        targets: int64 [batch, time]; -100 counts for nothing.

    Returns:
        The sum and the number of targets that count. Both add up over sequences, so no layout changes their quotient.
    """
    if isinstance(outputs, Tensor):
        return cross_entropy(outputs, targets)
    logits, uneven = outputs
    total, count = cross_entropy(logits, targets)
    return total + coefficient * (uneven * (targets != -100).sum(1)).sum(), count
