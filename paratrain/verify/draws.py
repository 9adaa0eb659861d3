"""Random numbers made comparable: dropout passes its input on, and every other draw is a number that names where it is drawn.

One process draws for the whole batch at once and ranks draw for their own samples, so that what is drawn differs by right and with it
everything behind it. Here a draw of torch fills its whole tensor with one value, a function of the step, the module and how often the module
has drawn in this call: the same for any number of samples, and again in recomputation. `random` and `numpy.random` start from such a state in
every call of a module; a module that draws from them once a sample, or asks torch for a permutation of its samples, cannot be compared, and is
named.
"""

from __future__ import annotations

import hashlib
import math
import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paratrain.compat import in_backward

LOSS = "the loss"


class Draws:
    """Where the program is, and what it has drawn in ways that may depend on the samples at hand.

    Attributes:
        step: of training.
        marks: (step, module) -> what tells how much was drawn there: lengths of permutations, states that `random` and numpy are left in.
    """

    def __init__(self) -> None:
        self.step = 0
        self.marks: dict[tuple[int, str], set[str]] = defaultdict(set)
        self._at: list[tuple[str, int]] = [("", 0)]

    def uniform(self) -> float:
        """The next number of the module that is running, inside (0, 1)."""
        path, number = self._at[-1]
        self._at[-1] = path, number + 1
        return (self._seed(path, number) + 0.5) / 2.0**64

    def normal(self) -> float:
        return NormalDist().inv_cdf(self.uniform())

    def permutation(self, length: int) -> list[int]:
        path, number = self._at[-1]
        self._at[-1] = path, number + 1
        if not in_backward():
            self.marks[self.step, path].add(f"a permutation of {length}")
        return random.Random(self._seed(path, number)).sample(range(length), length)

    def _seed(self, path: str, number: int) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self.step}/{path}/{number}".encode(), digest_size=8).digest())

    def of_loss(self, loss_fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """`loss_fn`, whose draws are its own."""

        @wraps(loss_fn, updated=())
        def measured(outputs: Any, targets: Any) -> Any:
            state = self.enter(LOSS)
            try:
                return loss_fn(outputs, targets)
            finally:
                self.leave(state)

        return measured

    def enter(self, path: str) -> tuple[Any, Any, Any]:
        before = random.getstate(), np.random.get_state()
        seed = self._seed(path, -1)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        self._at.append((path, 0))
        return *before, self._digest()

    def leave(self, state: tuple[Any, Any, Any], noted: bool = True) -> None:
        path, _ = self._at.pop()
        if noted and (now := self._digest()) != state[2]:
            self.marks[self.step, path].add(f"a state of its generators, of {now}")
        random.setstate(state[0])
        np.random.set_state(state[1])

    @staticmethod
    def _digest() -> str:
        mine, numpy = random.getstate()[1], np.random.get_state()
        return f"{hash(mine):x}/{zlib.crc32(numpy[1].tobytes()):x}/{numpy[2]}"  # type: ignore[union-attr,index]


@contextmanager
def comparable(model: nn.Module) -> Iterator[Draws]:
    """Switch every dropout of `model` off, modules for good and functions inside the context, and make all other draws comparable.

    torch leaves function modes while backward runs, so for what is computed again there the functions themselves are replaced; nobody
    else uses this process.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0
    draws = Draws()
    handles = [handle for path, module in model.named_modules() for handle in _watch(draws, path, module)]
    replaced = _replacements(draws)
    functions = {getattr(owner, name): function for (owner, name), function in replaced.items()}
    originals = {place: getattr(*place) for place in replaced}
    own = {place for place in replaced if place[1] in vars(place[0])}
    try:
        for (owner, name), function in replaced.items():
            setattr(owner, name, function)
        with _Replaced(functions):
            yield draws
    finally:
        for (owner, name), original in originals.items():
            if (owner, name) in own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)
        for handle in handles:
            handle.remove()


def _watch(draws: Draws, path: str, module: nn.Module) -> Iterator[Any]:
    if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
        return
    entered: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(draws.enter(path))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if entered:
            draws.leave(entered.pop(), noted=module.training and not in_backward())

    yield module.register_forward_pre_hook(enter, prepend=True)
    yield module.register_forward_hook(leave, always_call=True)


class _Replaced(TorchFunctionMode):
    """Functions that a model holds under names of its own are replaced, too."""

    def __init__(self, functions: dict[Any, Callable]):
        super().__init__()
        self.functions = functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.functions.get(func, func)(*args, **(kwargs or {}))


# ---------------------------------------------------------------------- functions

_DROPOUT = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout")
_sdpa, _leaky_relu = nn.functional.scaled_dot_product_attention, nn.functional.leaky_relu


def _identity(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, *args: Any, **kwargs: Any
) -> Tensor:
    return _sdpa(query, key, value, attn_mask, 0.0, *args, **kwargs)


def _rrelu(input: Tensor, lower: float = 1.0 / 8, upper: float = 1.0 / 3, training: bool = False, inplace: bool = False) -> Tensor:
    return _leaky_relu(input, (lower + upper) / 2)


def _replacements(draws: Draws) -> dict[tuple[Any, str], Callable]:
    """(owner, name) -> the function to put there."""
    found: dict[tuple[Any, str], Callable] = {
        (owner, name): _identity for owner in (nn.functional, torch) for name in _DROPOUT if hasattr(owner, name)
    }
    found[nn.functional, "scaled_dot_product_attention"] = _attention
    found[nn.functional, "rrelu"] = found[torch, "rrelu"] = _rrelu
    found |= {(owner, "manual_seed"): lambda seed: torch.default_generator for owner in (torch, torch.random)}  # nothing is drawn from it
    u, z = draws.uniform, draws.normal

    def new(make: Callable, value: Callable[[], float]) -> Callable:
        def drawn(*args: Any, generator: Any = None, **kwargs: Any) -> Tensor:
            with torch.no_grad():
                return make(*args, **kwargs).fill_(value())

        return drawn

    empty, empty_like = torch.empty, torch.empty_like
    found |= {(torch, "rand"): new(empty, u), (torch, "randn"): new(empty, z)}
    found |= {(torch, "rand_like"): new(empty_like, u), (torch, "randn_like"): new(empty_like, z)}

    def randint(low: Any, high: Any = None, size: Any = None, *, generator: Any = None, dtype: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(high, tuple | list | torch.Size):
            low, high, size = 0, low, high
        elif high is None:
            low, high = 0, low
        return empty(size, dtype=dtype or torch.int64, **kwargs).fill_(int(low) + math.floor((int(high) - int(low)) * u()))

    def randint_like(input: Tensor, low: Any, high: Any = None, **kwargs: Any) -> Tensor:
        low, high = (0, low) if high is None else (low, high)
        return empty_like(input, **kwargs).fill_(int(low) + math.floor((int(high) - int(low)) * u()))

    def randperm(n: int, *, generator: Any = None, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        return torch.tensor(draws.permutation(int(n)), dtype=dtype or torch.int64, device=device)

    def bernoulli(input: Tensor, p: float | None = None, *, generator: Any = None, **kwargs: Any) -> Tensor:
        return (u() < (input.detach() if p is None else torch.full_like(input, p))).to(input.dtype)

    def normal(mean: Any, std: Any = 1.0, size: Any = None, *, generator: Any = None, **kwargs: Any) -> Tensor:
        return (empty(size, **kwargs).fill_(1.0) if size is not None else 1.0) * mean + std * z()

    def multinomial(input: Tensor, num_samples: int, replacement: bool = False, **kwargs: Any) -> Tensor:
        if not replacement and num_samples > 1:
            return input.detach().topk(num_samples, dim=-1).indices
        share = (input.detach() / input.detach().sum(-1, keepdim=True)).cumsum(-1)
        return torch.cat([(share < u()).sum(-1, keepdim=True).clamp(max=input.shape[-1] - 1) for _ in range(num_samples)], -1)

    found |= {(torch, "randint"): randint, (torch, "randint_like"): randint_like, (torch, "randperm"): randperm}
    found |= {(torch, "bernoulli"): bernoulli, (torch, "normal"): normal, (torch, "multinomial"): multinomial}
    found |= {(Tensor, "bernoulli"): bernoulli, (Tensor, "multinomial"): multinomial}

    def in_place(value: Callable[..., Any]) -> Callable:
        def drawn(self: Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> Tensor:
            with torch.no_grad():
                made = value(self, *args, **kwargs)
                return self.copy_(made) if isinstance(made, Tensor) else self.fill_(made)

        return drawn

    def uniform_(self: Tensor, *bounds: float, **named: float) -> float:
        low, high = (*bounds, named.get("from", 0.0))[0], (*bounds, None, None)[1]
        high = named.get("to", 1.0) if high is None else high
        return low + (high - low) * u()

    def bernoulli_(self: Tensor, p: Any = 0.5) -> Any:
        return (u() < p).to(self.dtype) if isinstance(p, Tensor) else float(u() < p)

    def random_(self: Tensor, *bounds: int) -> int:
        low, high = (bounds[0], bounds[1]) if len(bounds) > 1 and bounds[1] is not None else (0, bounds[0] if bounds else 2)
        return int(low) + math.floor((int(high) - int(low)) * u())

    values: dict[str, Callable[..., Any]] = {
        "uniform_": uniform_,
        "normal_": lambda self, mean=0.0, std=1.0: mean + std * z(),
        "exponential_": lambda self, lambd=1.0: -math.log(u()) / lambd,
        "log_normal_": lambda self, mean=1.0, std=2.0: math.exp(mean + std * z()),
        "cauchy_": lambda self, median=0.0, sigma=1.0: median + sigma * math.tan(math.pi * (u() - 0.5)),
        "geometric_": lambda self, p: 1 + math.floor(math.log(u()) / math.log1p(-p)),
        "bernoulli_": bernoulli_,
        "random_": random_,
    }
    return found | {(Tensor, name): in_place(value) for name, value in values.items()}
