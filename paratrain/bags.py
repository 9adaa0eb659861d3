"""Bags of tokens: a flat list and the offsets of each bag in it, which no dim 0 of both counts samples of.

With as many tokens as bags, by chance, such a pair looks like a batch whose samples can be dealt. What each rank and micro-batch is dealt
then are bags that begin elsewhere. So the first steps look at how torch.nn.functional.embedding_bag is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from paratrain import deal
from paratrain.batch import LocalBatch
from paratrain.errors import UserError

_FUNCTIONAL = ("input", "weight", "offsets")
_NATIVE = ("weight", "input", "offsets")


def watching(model: nn.Module, batch: Any, micro: Sequence[tuple[Any, Any, int]]) -> AbstractContextManager:
    """A context for forwards that refuses bags whose tokens were dealt as samples; nothing where the batch is not cut or cannot hold any."""
    cut = len(micro) > 1 or (isinstance(batch, LocalBatch) and batch.form is not None)
    flat = [leaf for inputs, _, _ in micro for leaf in deal.leaves(inputs) if _is_flat(leaf)]
    return _Watch(model, flat) if cut and len(flat) > len(micro) else nullcontext()


def _is_flat(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() == 1 and leaf.dtype in (torch.int32, torch.int64)


class _Watch(TorchFunctionMode):
    """Args: the 1-D integer tensors of the batch."""

    def __init__(self, model: nn.Module, flat: Sequence[torch.Tensor]):
        super().__init__()
        self._model, self._flat = model, flat

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.embedding_bag or func is torch.embedding_bag:
            names = _FUNCTIONAL if func is nn.functional.embedding_bag else _NATIVE
            self._look(
                **{name: None for name in names} | {k: v for k, v in (dict(zip(names, args, strict=False)) | kwargs).items() if k in names}
            )
        return func(*args, **kwargs)

    def _look(self, input: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None) -> None:
        if offsets is None or input.dim() != 1 or not offsets.numel():
            return
        found = offsets.detach().cpu().long()
        begins_elsewhere = bool(found[0] != 0) or int(found[-1]) > len(input)
        if not (begins_elsewhere or self._is_of_the_batch(offsets) or self._has_other_bags(input, found)):
            return
        raise UserError(
            f"the model: {self._name(weight)} is given a flat list of tokens and the offsets of bags in it, and both are parts of the batch, whose samples "
            "ranks and micro-batches are dealt by dim 0: there a token is no sample, and an offset counts tokens of the whole batch; let the batch hold one "
            "row of tokens a sample, padded to one length (input of shape [bags, length], with padding_idx=... of nn.EmbeddingBag, or per_sample_weights that "
            "are 0 there), or a jagged tensor (torch.nested.nested_tensor(rows, layout=torch.jagged)), whose values() and offsets()[:-1] forward gives to the bag"
        )

    def _is_of_the_batch(self, tensor: torch.Tensor) -> bool:
        return any(tensor.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr() for leaf in self._flat)

    def _has_other_bags(self, tokens: torch.Tensor, offsets: torch.Tensor) -> bool:
        """Whether the tokens are a tensor of the batch, one a sample, and the bags are not one for each of them."""
        if len(offsets) >= len(tokens) and torch.equal(offsets[: len(tokens)], torch.arange(len(tokens))):
            return False
        plain = tokens.detach().cpu()
        return any(leaf.shape == plain.shape and torch.equal(leaf.cpu().to(plain.dtype), plain) for leaf in self._flat)

    def _name(self, weight: torch.Tensor) -> str:
        modules = [(name, module) for name, module in self._model.named_modules() if isinstance(module, nn.EmbeddingBag)]
        names = [name for name, module in modules if module.weight is weight] or [name for name, _ in modules]
        return f"{names[0]} (EmbeddingBag)" if names else "torch.nn.functional.embedding_bag"
