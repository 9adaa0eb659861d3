"""A GPT as a plain `nn.Module`: pre-norm, rotary positions, RMSNorm, SwiGLU, grouped key/value heads.

Every leaf module draws its own initial weights in `reset_parameters()`, so a model built on the meta device and materialised later
can be initialised module by module, in any order.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INIT_STD = 0.02  # GPT-2 (Radford et al., 2019)
NORM_EPS = 1e-5  # torch's default follows the dtype, and bfloat16's epsilon of 8e-3 would change the model


class GPT(nn.Module):
    """Decoder-only transformer language model.

    Args:
        vocab_size: tokens in the vocabulary.
        seq_len: longest sequence it accepts.
        layers: number of blocks.
        dim: width of the residual stream.
        heads: query heads of `dim / heads` features each.
        kv_heads: key/value heads, each shared by `heads / kv_heads` query heads (Ainslie et al., 2023); None: as many as `heads`.
        ffn: hidden width of the SwiGLU; None: 8/3 of `dim`, rounded up to a multiple of 64.
        dropout: probability for embeddings, attention weights and both residual branches.
        tied: share the weights of the embedding and of the output head.
        rope_theta: base of the rotary wavelengths.
        norm: torch, or apex for NVIDIA Apex' fused kernel.

    Raises:
        ValueError: when the sizes do not divide.
    """

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        layers: int = 4,
        dim: int = 128,
        heads: int = 4,
        kv_heads: int | None = None,
        ffn: int | None = None,
        dropout: float = 0.0,
        tied: bool = False,
        rope_theta: float = 10000.0,
        norm: Literal["torch", "apex"] = "torch",
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        ffn = 64 * math.ceil(dim * 8 / 3 / 64) if ffn is None else ffn
        if heads < 1 or dim % heads or dim // heads % 2:
            raise ValueError(f"dim={dim} over heads={heads}: each head needs the same even number of features (rotary turns pairs)")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"heads={heads} over kv_heads={kv_heads}: each key/value head must serve the same number of query heads")
        self.seq_len, self.tied = seq_len, tied
        self.head_dim, self.rope_theta = dim // heads, rope_theta
        residual_std = INIT_STD / math.sqrt(2 * layers)  # 2 * layers branches add up to a variance that does not grow with depth
        self.embed = Embedding(vocab_size, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, kv_heads, ffn, dropout, residual_std) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.head = Linear(dim, vocab_size)
        if norm == "apex":
            from paratrain.backends.apex import fuse_norms

            fuse_norms(self)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Tie the weights again where they are tied: materialising a meta model gives each module a tensor of its own."""
        if self.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: int64 [batch, time].
            positions: int64 [time] or [batch, time], for sequences that do not start at 0; None: 0, 1, 2, ...

        Returns:
            [batch, time, vocab_size].

        Raises:
            ValueError: `time` exceeds `seq_len`.
        """
        x, rotation = self.embedded(tokens, positions)
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.norm(x))

    def embedded(self, tokens: Tensor, positions: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the blocks get: embeddings [batch, time, dim], and the rotation of each position."""
        time = tokens.shape[1]
        if time > self.seq_len:
            raise ValueError(f"sequence of {time} tokens, but the model was built for seq_len={self.seq_len}")
        if positions is None:
            positions = torch.arange(time, device=tokens.device)
        x = self.dropout(self.embed(tokens))
        return x, rotary(positions, self.head_dim, self.rope_theta, torch.promote_types(x.dtype, torch.float32))


class Block(nn.Module):
    """Attention and feed-forward, each reading a normalised residual stream and adding to it. [batch, time, dim] -> the same."""

    def __init__(self, dim: int, heads: int, kv_heads: int, ffn: int, dropout: float, residual_std: float):
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.attention = Attention(dim, heads, kv_heads, dropout, residual_std)
        self.ffn_norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.ffn = SwiGLU(dim, ffn, residual_std)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, dim: int, heads: int, kv_heads: int, dropout: float, residual_std: float):
        super().__init__()
        self.head_dim, self.dropout, self.grouped = dim // heads, dropout, kv_heads != heads
        self.q = Linear(dim, heads * self.head_dim)
        self.k = Linear(dim, kv_heads * self.head_dim)
        self.v = Linear(dim, kv_heads * self.head_dim)
        self.out = Linear(dim, dim, residual_std)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        # The number of heads is left to -1: under tensor parallelism a rank holds only some of them.
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in (self.q, self.k, self.v))
        q, k = rotate(q, rotation), rotate(k, rotation)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=self.grouped)
        return self.out(y.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, dim: int, hidden: int, residual_std: float):
        super().__init__()
        self.gate = Linear(dim, hidden)
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim, residual_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Linear(nn.Linear):
    """A linear map without bias, initially normal with the given standard deviation."""

    def __init__(self, in_features: int, out_features: int, std: float = INIT_STD):
        self.std = std
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class Embedding(nn.Embedding):
    """An embedding, initially normal."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [*positions.shape, head_dim / 2], of the angles by which rotary embedding (Su et al., 2021) turns pairs."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    angles = positions.to(dtype).unsqueeze(-1) * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + head_dim / 2) of x [batch, heads, time, head_dim], in the dtype of x."""
    cos, sin = (part.to(x.dtype).unsqueeze(-3) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    steps: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Extend sequences by sampled tokens. The model sees at most its last `seq_len` tokens, and is left in the mode it was in.

    Args:
        model: a `GPT`, or anything with `seq_len` that maps tokens [batch, time] to logits [batch, time, vocab].
        tokens: int64 [batch, time], at least one token each.
        steps: tokens to add.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among this many likeliest tokens; None: among all.
        generator: source of the randomness, on the device of `tokens`; None: torch's own.

    Returns:
        int64 [batch, time + steps].
    """
    seq_len: Any = model.seq_len
    training = model.training
    model.eval()
    try:
        for _ in range(steps):
            logits = model(tokens[:, -seq_len:])[:, -1].float()
            if top_k is not None:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < least, -math.inf)
            if temperature == 0:
                chosen = logits.argmax(dim=-1, keepdim=True)
            else:
                chosen = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
            tokens = torch.cat([tokens, chosen], dim=1)
    finally:
        model.train(training)
    return tokens
