"""Modules written as people write them, none for this library: what a derived plan has to cope with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, TIME, DIM = 33, 8, 24  # a vocabulary that no number of ranks divides


class NanoBlock(nn.Module):
    """Fused q, k and v, and heads counted by attributes, as in nanoGPT."""

    def __init__(self, n_head: int = 4, dropout: float = 0.0):
        super().__init__()
        self.n_head, self.n_embd = n_head, DIM
        self.ln_1, self.ln_2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.c_attn = nn.Linear(DIM, 3 * DIM)
        self.c_proj = nn.Linear(DIM, DIM)
        self.c_fc, self.c_out = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("bias", torch.tril(torch.ones(TIME, TIME)).view(1, 1, TIME, TIME))

    def attend(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        y = self.drop(F.softmax(att, dim=-1)) @ v
        return self.drop(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.ln_1(x))
        return x + self.drop(self.c_out(F.gelu(self.c_fc(self.ln_2(x)))))


class CutHeadsBlock(NanoBlock):
    """Heads of q, k and v cut out of one view, with keys and values that queries share, as in Falcon."""

    def __init__(self, shared: int = 2):
        super().__init__()
        self.shared = shared
        self.c_attn = nn.Linear(DIM, DIM + 2 * shared * DIM // self.n_head)

    def attend(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        heads = self.c_attn(x).view(B, T, self.n_head + 2 * self.shared, C // self.n_head)
        q, k, v = heads.split([self.n_head, self.shared, self.shared], dim=2)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.drop(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class SharedHeadsBlock(nn.Module):
    """Grouped keys and values repeated by hand, separate projections, a norm of each head, SwiGLU from one matrix."""

    def __init__(self, heads: int = 6, groups: int = 2):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, DIM // heads
        self.norm1, self.norm2 = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.to_q = nn.Linear(DIM, DIM, bias=False)
        self.to_k, self.to_v = nn.Linear(DIM, groups * self.size, bias=False), nn.Linear(DIM, groups * self.size, bias=False)
        self.q_norm, self.k_norm = nn.LayerNorm(self.size), nn.LayerNorm(self.size)
        self.o = nn.Linear(DIM, DIM, bias=False)
        self.gate_up, self.down = nn.Linear(DIM, 2 * 36), nn.Linear(36, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        h = self.norm1(x)
        q = self.q_norm(self.to_q(h).reshape(b, t, self.heads, self.size)).permute(0, 2, 1, 3)
        k = self.k_norm(self.to_k(h).reshape(b, t, self.groups, self.size)).permute(0, 2, 1, 3)
        v = self.to_v(h).reshape(b, t, self.groups, self.size).permute(0, 2, 1, 3)
        k, v = (z.repeat_interleave(self.heads // self.groups, dim=1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.permute(0, 2, 1, 3).reshape(b, t, -1))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class ParallelBlock(nn.Module):
    """Attention and MLP side by side on one norm, and one matrix for all of their inputs (as in PaLM and GPT-J)."""

    def __init__(self, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(DIM)
        self.wide = nn.Linear(DIM, 3 * DIM + 4 * DIM, bias=False)
        self.attention_out, self.mlp_out = nn.Linear(DIM, DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, h = torch.split(self.wide(self.norm(x)), [DIM, DIM, DIM, 4 * DIM], dim=-1)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).movedim(2, 1) for z in (q, k, v))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        y = torch.einsum("bhij,bhjd->bhid", scores.masked_fill(future, -math.inf).softmax(-1), v)
        return x + self.attention_out(y.movedim(1, 2).flatten(2)) + self.mlp_out(F.gelu(h))


class Decoder(nn.Module):
    """A language model around blocks."""

    def __init__(self, block, tied: bool = False, layers: int = 2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, DIM), nn.Embedding(TIME, DIM)
        self.h = nn.ModuleList(block() for _ in range(layers))
        self.ln_f = nn.LayerNorm(DIM)
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class TorchDecoder(nn.Module):
    """torch's own encoder layers, with nn.MultiheadAttention."""

    def __init__(self, batch_first: bool = True):
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(VOCAB, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 4, 48, dropout=0.0, batch_first=batch_first, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.out = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device, dtype=self.out.weight.dtype)
        x = self.embedding(tokens)
        x = self.encoder(x if self.batch_first else x.transpose(0, 1), mask=mask, is_causal=True)
        return self.out(x if self.batch_first else x.transpose(0, 1))


class MixerBlock(nn.Module):
    def __init__(self, patches: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.tokens = nn.Sequential(nn.Linear(patches, 32), nn.GELU(), nn.Linear(32, patches))
        self.channels = nn.Sequential(nn.Linear(DIM, 48), nn.GELU(), nn.Linear(48, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer: products along the patches as well as along the features."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, DIM, 4, stride=4)
        self.blocks = nn.Sequential(MixerBlock(16), MixerBlock(16))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class ViT(nn.Module):
    """A vision transformer with a class token and learned positions, q, k and v stacked by a view."""

    class Block(nn.Module):
        def __init__(self, heads: int = 4):
            super().__init__()
            self.num_heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
            self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
            self.mlp = nn.Sequential(nn.Linear(DIM, 96), nn.GELU(), nn.Dropout(0.0), nn.Linear(96, DIM))

        def forward(self, x: Tensor) -> Tensor:
            B, N, C = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            attn = ((q * (C // self.num_heads) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
            x = x + self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))
            return x + self.mlp(self.norm2(x))

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, DIM, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, DIM))
        self.blocks = nn.ModuleList(ViT.Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2), nn.GroupNorm(4, 8), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.rnn = nn.LSTM(DIM, DIM, batch_first=True)
        self.out = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.rnn(self.embed(tokens))[0])


LANGUAGE = {
    "fused": lambda: Decoder(NanoBlock),
    "fused, tied": lambda: Decoder(NanoBlock, tied=True),
    "cut heads": lambda: Decoder(CutHeadsBlock),
    "shared heads": lambda: Decoder(SharedHeadsBlock),
    "parallel": lambda: Decoder(ParallelBlock),
    "torch": TorchDecoder,
    "torch, time first": lambda: TorchDecoder(batch_first=False),
    "lstm": Recurrent,
}
VISION = {"mixer": Mixer, "vit": ViT, "convolutions": ConvNet}
