"""nn.MultiheadAttention in operations that can be followed: torch's own is one function of all of its parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def shardable_attention(model: nn.Module) -> None:
    """Let every nn.MultiheadAttention without extra keys compute the same step by step, in place; names stay."""
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn:
            module.__class__ = _Attention


class _Attention(nn.MultiheadAttention):
    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Any, Any]:
        batched = query.ndim == 3
        same = query is key and key is value
        inputs = [query] if same else [query, key, value]
        if not batched:
            inputs = [x.unsqueeze(0) for x in inputs]
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in self._project(inputs))
        mask = _mask(q, k, key_padding_mask if batched or key_padding_mask is None else key_padding_mask.unsqueeze(0), attn_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = F.linear(y.transpose(1, 2).flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _project(self, inputs: list[Tensor]) -> list[Tensor]:
        if len(inputs) == 1 and self._qkv_same_embed_dim:
            return list(F.linear(inputs[0], self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1))
        inputs = inputs * 3 if len(inputs) == 1 else inputs
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = self.in_proj_weight.chunk(3, 0) if self._qkv_same_embed_dim else weights  # type: ignore[assignment]
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3, 0)
        return [F.linear(x, weight, bias) for x, weight, bias in zip(inputs, weights, biases, strict=True)]


def _mask(q: Tensor, k: Tensor, padding: Tensor | None, attention: Tensor | None) -> Tensor | None:
    """What is added to the scores [batch, heads, queries, keys]."""
    masks = []
    if padding is not None:
        masks.append(_additive(padding, q.dtype)[:, None, None, :])
    if attention is not None:
        attention = _additive(attention, q.dtype)
        masks.append(attention if attention.ndim == 2 else attention.view(-1, q.shape[1], q.shape[2], k.shape[2]))
    return None if not masks else sum(masks[1:], masks[0])


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype is torch.bool else mask.to(dtype)
