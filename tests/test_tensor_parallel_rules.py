"""Every rule for split tensors against the same function of whole tensors: values and gradients, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from paratrain.spawn import run

B, T, C, H = 2, 4, 12, 6  # divisible by 2 and 3 where heads are split

# name: (function, shapes of its tensors, index of the split argument, dim, parts or None, whether it must stay split or be reduced)
CASES = {
    "residual": (lambda x, y: x * 2 + y, [(B, T, C), (B, T, C)], 0, 2, None),
    "bias": (lambda x, y: F.gelu(x + y), [(B, T, C), (C,)], 0, 2, None),
    "scalar operands": (lambda x: (1 - x) / (x.abs() + 1) ** 2, [(B, T, C)], 0, 2, None),
    "reflected": (lambda x, y: y - x, [(B, T, C), (B, T, C)], 0, 1, None),
    "broadcast": (lambda x, y: torch.where(y > 0, x, x.neg()), [(B, H, T, T), (T, T)], 0, 1, None),
    "heads by view": (lambda x: x.view(B, T, H, C // H).transpose(1, 2).contiguous().exp(), [(B, T, C)], 0, 2, None),
    "heads and back": (lambda x: x.view(B, T, -1, 2).transpose(1, 2).transpose(1, 2).reshape(B, T, C), [(B, T, C)], 0, 2, None),
    "merge batch": (lambda x: x.view(B * H, T, 2).mul(2).view(B, H, T, 2), [(B, H, T, 2)], 0, 1, None),
    "flatten": (lambda x: x.flatten(0, 1).flatten(), [(B, T, C)], 0, 2, None),
    "unflatten": (lambda x: x.unflatten(-1, (-1, 2)).sin(), [(B, T, C)], 0, 2, None),
    "fused view": (lambda x: x.view(B, T, 3, H, 2).permute(2, 0, 3, 1, 4)[1], [(B, T, 3 * C)], 0, 2, (C, C, C)),
    "fused split": (lambda x: x.split([C, 6, 6], -1)[1].exp() * x[..., -6:], [(B, T, 2 * C)], 0, 2, (C, 6, 6)),
    "fused chunk": (lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, dim=-1)[1], [(B, T, 2 * C)], 0, 2, (C, C)),
    "glu": (lambda x: F.glu(x, -1), [(B, T, 2 * C)], 0, 2, (C, C)),
    "rotate": (lambda x: torch.cat([-x[..., 1:], x[..., :1]], -1), [(B, H, T, 2)], 0, 1, None),
    "repeat heads": (lambda x: x[:, :, None].expand(B, H, 2, T, 2).reshape(B, 2 * H, T, 2), [(B, H, T, 2)], 0, 1, None),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, dim=1), [(B, H, T, 2)], 0, 1, None),
    "softmax elsewhere": (lambda x: F.softmax(x, dim=-1) * x.softmax(-2), [(B, H, T, T)], 0, 1, None),
    "norm elsewhere": (lambda x, w: F.layer_norm(x, (C,), w), [(B, T, C), (C,)], 0, 1, None),
    "normalize": (lambda x: F.normalize(x, dim=-1), [(B, H, T, 2)], 0, 1, None),
    "root mean square over parts": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), [(B, T, C)], 0, 2, None),
    "sum of all": (lambda x: x.square().sum(), [(B, T, C)], 0, 2, None),
    "mean elsewhere": (lambda x: x.mean(dim=1).amax(0), [(B, T, C)], 0, 2, None),
    "column": (lambda w, x, b: F.linear(x, w, b), [(C, 5), (B, T, 5), (C,)], 0, 0, None),
    "uneven column": (lambda w, x: F.linear(x, w).tanh(), [(7, 5), (B, T, 5)], 0, 0, None),
    "row": (lambda w, x, b: F.linear(x, w, b), [(5, C), (B, T, C), (5,)], 0, 1, None),
    "row of split": (lambda x, w, v: F.linear(F.linear(w, v.T), x), [(5, C), (B, T, C), (C, C)], 0, 1, None),
    "one more than ranks": (lambda w, x: F.linear(x, w), [(4, 5), (T, 5)], 0, 0, None),
    "linear elsewhere": (lambda x, w, b: F.linear(x, w, b), [(B, T, C), (3, C), (3,)], 0, 1, None),
    "matmul batch": (lambda q, k: q @ k.transpose(-1, -2), [(B, H, T, 2), (B, H, T, 2)], 0, 1, None),
    "matmul contracted": (lambda q, k: q @ k, [(B, T, C), (B, C, 3)], 0, 2, None),
    "addmm": (lambda w, b, x: torch.addmm(b, x, w), [(5, C), (C,), (T, 5)], 0, 1, None),
    "addmm row": (lambda w, b, x: torch.addmm(b, x, w), [(C, 5), (5,), (T, C)], 0, 0, None),
    "bmm": (lambda q, k: torch.bmm(q, k), [(H, T, 2), (H, 2, T)], 0, 0, None),
    "baddbmm": (lambda q, a, k: torch.baddbmm(a, q, k, beta=0.5, alpha=2), [(H, T, 2), (H, 1, T), (H, 2, T)], 0, 0, None),
    "einsum": (lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k), [(B, H, T, 2), (B, H, T, 2)], 0, 1, None),
    "einsum contracted": (lambda q, k: torch.einsum("bhid,hdc->bic", q, k), [(B, H, T, 2), (H, 2, C)], 0, 1, None),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [(B, H, T, 2)] * 3, 0, 1, None),
    "attention bias": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), [(B, H, T, 2)] * 3 + [(1, H, T, T)], 0, 1, None),
    "shared heads": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [(B, 12, T, 2), (B, H, T, 2), (B, H, T, 2)],
        0,
        1,
        None,
    ),
    "shared values": (
        lambda v, q, k: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [(B, H, T, 2), (B, 12, T, 2), (B, H, T, 2)],
        0,
        1,
        None,
    ),
    "one shared head": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [(B, H, T, 2), (B, 1, T, 2), (B, 1, T, 2)],
        0,
        1,
        None,
    ),
    "embedding": (lambda w: F.embedding(torch.tensor([[0, 6, 3], [5, 6, 1]]), w), [(7, C)], 0, 0, None),
    "embedding features": (lambda w: F.embedding(torch.tensor([[0, 6, 3]]), w, padding_idx=3), [(7, C)], 0, 1, None),
    "padding": (lambda w: F.embedding(torch.tensor([[0, 6, 3]]), w, padding_idx=6), [(7, C)], 0, 0, None),
    "cross entropy": (lambda x: F.cross_entropy(x, torch.tensor([0, 6, -100, 3])), [(T, 7)], 0, 1, None),
    "smoothed": (lambda x: F.cross_entropy(x, torch.tensor([0, 6, -100, 3]), label_smoothing=0.1, reduction="sum"), [(T, 7)], 0, 1, None),
    "classes inside": (lambda x: F.cross_entropy(x, torch.tensor([[0, 6], [5, -100]]), reduction="none"), [(2, 7, 2)], 0, 1, None),
    "log_softmax": (lambda x: F.nll_loss(x.log_softmax(-1), torch.tensor([0, 6, 2, 3])), [(T, 7)], 0, 1, None),
    "picked": (lambda x: x.softmax(-1).gather(-1, torch.tensor([[0], [6], [2], [3]])), [(T, 7)], 0, 1, None),
    "weighted classes": (lambda x: F.cross_entropy(x, torch.tensor([0, 6, 2, 3]), weight=torch.arange(7.0).double()), [(T, 7)], 0, 1, None),
    "convolution": (lambda w, x, b: F.conv2d(x, w, b, padding=1).relu(), [(C, 3, 3, 3), (B, 3, 5, 5), (C,)], 0, 0, None),
    "convolution row": (lambda w, x, b: F.conv2d(x, w, b, stride=2), [(4, C, 3, 3), (B, C, 5, 5), (4,)], 0, 1, None),
    "group norm": (lambda x, w, b: F.group_norm(x, 6, w, b), [(B, C, 5), (C,), (C,)], 0, 1, None),
    # no rule: gathered, and right
    "misaligned heads": (lambda x: x.view(B, T, 5, 6).exp(), [(B, T, 30)], 0, 2, None),
    "misaligned cut": (lambda x: x.split([5, 7], -1)[0], [(B, T, C)], 0, 2, None),
    "norm over parts": (lambda x, w: F.layer_norm(x, (C,), w), [(B, T, C), (C,)], 0, 2, None),
    "fused norm over parts": (lambda x: F.layer_norm(x, (2 * C,)), [(B, T, 2 * C)], 0, 2, (C, C)),
    "cumulative": (lambda x: x.cumsum(-1).flip(1), [(B, T, C)], 0, 2, None),
    "indexed": (lambda x: x[:, :, [0, 5, 1]] + x[..., 1:4], [(B, T, C)], 0, 2, None),
    "unbound": (lambda x: sum(x.unbind(0)) + x.unbind(1)[0][:1], [(B, B, C)], 0, 1, None),
    "split in two ways": (lambda x: x + x.T.exp(), [(C, C)], 0, 0, None),
}


GATHERED = set(list(CASES)[list(CASES).index("misaligned heads") :]) | {"weighted classes"}


def check(name, peers, gathered):
    from paratrain.parallel.tp_split import Split, gather, scatter

    function, shapes, which, dim, parts = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    reference = [value.clone().requires_grad_() for value in values]
    expected = function(*reference)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected.backward(upstream)
    mine = [value.clone().requires_grad_() for value in values]
    parts = parts or (shapes[which][dim],)
    args = [tensor.mul(1) for tensor in mine]
    args[which] = Split(scatter(args[which], dim, parts, peers), dim, parts, peers)
    result = function(*args)
    result = gather(result) if isinstance(result, Split) else result
    result.backward(upstream)
    problems = [] if bool(gathered) == (name in GATHERED) else [f"{name}: gathered {gathered}"]
    gathered.clear()
    if result.shape != expected.shape or not torch.allclose(result, expected, atol=1e-12, rtol=1e-12):
        problems.append(f"{name}: value")
    for number, (ours, theirs) in enumerate(zip(mine, reference, strict=True)):
        if (ours.grad is None) != (theirs.grad is None):
            problems.append(f"{name}: gradient {number} is missing")
        elif ours.grad is not None and not torch.allclose(ours.grad, theirs.grad, atol=1e-12, rtol=1e-12):
            problems.append(f"{name}: gradient {number}")
    return problems


@pytest.mark.parametrize("ranks", [2, 3])
def test_rules_compute_the_same_function(ranks):
    def body():
        import torch.distributed as dist

        from paratrain.parallel import tp_products, tp_shapes  # noqa: F401
        from paratrain.parallel.tp_split import Peers

        gathered = []
        peers = Peers(
            dist.group.WORLD,
            dist.get_rank(),
            dist.get_world_size(),
            gathered=lambda *what: what[0] in ("fused", "scatter") or gathered.append(what),
        )
        problems = []
        for name in CASES:
            try:
                problems += check(name, peers, gathered)
            except Exception as error:
                import traceback

                problems.append(f"{name}: {type(error).__name__}: {error} {traceback.format_exc().splitlines()[-3:]}")
        return problems

    for problems in run(body, ranks):
        assert problems == []
