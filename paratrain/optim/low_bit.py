"""AdamW whose moments take 8 or 4 bits, and whose bfloat16 weights are rounded at random so that small updates are not lost.

Moments are quantised in blocks along the last dim, so a block belongs to one row, wherever the row is: sharded by rows, every rank
computes exactly what one process does. Vectors and small parameters keep their moments whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Shard

from paratrain.compat import local_box

SMALLEST = 4096  # elements below which quantising saves nothing worth its error (Dettmers et al. 2022)


class LowBitAdamW(torch.optim.Optimizer):
    """AdamW with quantised moments (8 bits: Dettmers et al. 2022, blocks and dynamic map; 4 bits: Li et al. 2023, linear second moment).

    Args:
        lr: learning rate.
        betas: of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        bits: of a moment: 8, 4, or 32 for moments in float32.
        block: elements that share a scale.
        stochastic_rounding: round bfloat16 weights up or down at random, in proportion, so that the expected weight is the float32 one.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bits: int = 8,
        block: int = 256,
        stochastic_rounding: bool = False,
    ):
        if bits not in (4, 8, 32):
            raise ValueError(f"bits={bits}: expected 8, 4 or 32")
        if block % 2:
            raise ValueError(f"block={block}: two 4-bit codes share a byte, so write an even number")
        self.rounding = stochastic_rounding
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bits": bits, "block": block}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                if param.grad is not None:
                    names = group.get("param_names")
                    self._update(param, self.state[param], group, names[position] if names else f"{number}.{position}")
        return loss

    def _update(self, param: torch.Tensor, state: dict[str, Any], group: dict[str, Any], name: str) -> None:
        weight, grad = _local(param), _local(param.grad)
        wide = torch.promote_types(weight.dtype, torch.float32)
        bits = group["bits"] if _quantised(param) else 32
        if not state:
            state["step"] = 0
            for key in ("exp_avg", "exp_avg_sq"):
                for name, value in zip(
                    (key, f"{key}_scale"), _encode(torch.zeros_like(weight, dtype=wide), bits, group["block"], key), strict=True
                ):
                    state[name] = _like(param, value)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        grad = grad.to(wide)
        moments = []
        for key, value, beta in (("exp_avg", grad, beta1), ("exp_avg_sq", grad.square(), beta2)):
            code, scale = (_local(_placed(state[name], param)) for name in (key, f"{key}_scale"))
            moments.append(_decode(code, scale, weight.shape, bits, group["block"], key).lerp(value, 1 - beta))
            for name, new in zip((key, f"{key}_scale"), _encode(moments[-1], bits, group["block"], key), strict=True):
                state[name] = _like(param, new)
        first, second = moments[0] / (1 - beta1 ** state["step"]), moments[1] / (1 - beta2 ** state["step"])
        value = weight.to(wide) * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * first / (second.sqrt() + group["eps"])
        if self.rounding and weight.dtype is torch.bfloat16:
            value = stochastic_round(value, random_bits(param, zlib.crc32(f"{name} {state['step']}".encode())))
        weight.copy_(value)


def random_bits(param: torch.Tensor, seed: int) -> torch.Tensor:
    """16 random bits for each element that this rank holds of `param`, int32: a hash of (seed, index in the whole), so that they are the
    same however it is sharded (SplitMix64, Steele et al. 2014)."""
    sizes, offsets = (
        local_box(param.shape, param.device_mesh, param.placements) if isinstance(param, DTensor) else (param.shape, [0] * param.ndim)
    )
    mixed = torch.full((), seed * 0x2545F491 & (1 << 62) - 1, dtype=torch.int64, device=_local(param).device)
    for size, offset, whole in zip(sizes, offsets, param.shape, strict=True):
        mixed = mixed.unsqueeze(-1) * whole + torch.arange(offset, offset + size, device=mixed.device)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((mixed >> 40) & 0xFFFF).to(torch.int32)


def stochastic_round(value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16, up or down with probabilities such that the expected value is `value` (Zamirai et al. 2021).

    Args:
        noise: 16 random bits for each element, int32.
    """
    bits = value.view(torch.int32)
    return torch.where(value.isfinite(), (bits + noise) & -65536, bits).view(torch.float32).bfloat16()


@cache
def code_book(bits: int, signed: bool) -> torch.Tensor:
    """The values of the codes, ascending in [-1, 1] or [0, 1]: dynamic exponents (Dettmers 2016), and a linear one for 4 unsigned bits."""
    if bits == 4 and not signed:
        return torch.linspace(0, 1, 17)[1:]  # without zero, which a second moment in a denominator must not be (Li et al. 2023)
    exponents = 7 if bits == 8 else 3
    values = [0.0, 1.0]
    for i in range(exponents):
        edges = torch.linspace(0.1, 1, 2 ** (i + bits - 1 - exponents + (0 if signed else 1)) + 1)
        means = 10.0 ** (i + 1 - exponents) * (edges[:-1] + edges[1:]) / 2
        values += means.tolist() + ((-means).tolist() if signed else [])
    return torch.tensor(sorted(values))


def _encode(value: torch.Tensor, bits: int, block: int, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, a scale for each block); moments kept whole have no scales."""
    if bits == 32:
        return value, value.new_zeros((*value.shape[:1], 0))
    blocks = F.pad(value, (0, -value.shape[-1] % block)).unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1)
    book = code_book(bits, key == "exp_avg").to(value)
    codes = torch.bucketize(blocks / scale.clamp(min=1e-30).unsqueeze(-1), (book[1:] + book[:-1]) / 2).to(torch.uint8)
    codes = codes.flatten(-2)[..., : value.shape[-1]]
    if bits == 4:
        pairs = F.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2))
        codes = pairs[..., 0] | pairs[..., 1] << 4
    return codes.contiguous(), scale.float()


def _decode(codes: torch.Tensor, scale: torch.Tensor, shape: torch.Size, bits: int, block: int, key: str) -> torch.Tensor:
    if bits == 32:
        return codes
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., : shape[-1]]
    book = code_book(bits, key == "exp_avg").to(codes.device)
    return book[codes.int()] * scale.repeat_interleave(block, -1)[..., : shape[-1]]


def _quantised(param: torch.Tensor) -> bool:
    by_rows = not isinstance(param, DTensor) or all(p.is_replicate() or p == Shard(0) for p in param.placements)
    return param.ndim >= 2 and param.numel() >= SMALLEST and by_rows and param.dtype is not torch.float64


def _local(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(param: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A rank's rows, as the part of a tensor that is laid out as `param`."""
    if not isinstance(param, DTensor):
        return local
    shape = (*param.shape[: local.ndim - 1], local.shape[-1]) if local.ndim > 1 else param.shape
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, param.device_mesh, param.placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _placed(tensor: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """A checkpoint gives states of another shape than the parameter's back whole."""
    return tensor.redistribute(placements=param.placements) if isinstance(tensor, DTensor) and isinstance(param, DTensor) else tensor
