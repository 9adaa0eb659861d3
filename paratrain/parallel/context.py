"""Context parallelism: every sequence split over ranks, for any model whose positions meet in `scaled_dot_product_attention` only.

The calls are found while the user's forward runs and answered by `context_attention.py`. Whether there is nothing else by which one
position depends on another, and no position that the model counts by itself, is not assumed: before the first step the model runs on a
probe, with attention replaced by a function of each position alone, and must then be a function of each position alone.

Under tensor parallelism a rank answers for its heads, under pipelines for the blocks of its stages; the probe runs over all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from paratrain import batch as batches
from paratrain import deal, rng
from paratrain.config import Config
from paratrain.errors import UserError
from paratrain.mesh import Mesh
from paratrain.parallel import context_attention, tp_rules
from paratrain.parallel.context_loss import Targets, WholeLoss
from paratrain.parallel.tp_split import Split, plain
from paratrain.unchanged import unchanged

_POSITIONS = ("positions", "position_ids")

_MET = (
    "positions of the sequence meet elsewhere than in scaled_dot_product_attention (attention by hand, a convolution, a mean over "
    "time, nn.MultiheadAttention ...), so it cannot be split; let them meet there"
)

_ATTENTION = F.scaled_dot_product_attention  # `verify` replaces the name while it compares


class Context:
    """Splits sequences and answers attention on one rank of the cp axis.

    Attributes:
        ranks: degree of the axis.
        length: positions of the sequence that is running, on this rank; 0 outside of the engine's steps.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, cfg: Config):
        axis = mesh.root["cp"]
        self.group: dist.ProcessGroup = axis.get_group()
        self.rank, self.ranks = axis.get_local_rank(), axis.size()
        self.method = cfg.context.method
        self.taken = inspect.signature(model.forward).parameters
        self.argument = next((name for name in _POSITIONS if name in self.taken), None)
        self.told = False  # whether `part` adds positions that the batch has not
        # Hugging Face models take position ids that do not count up for packed documents, so these keep runs
        self.zigzag = self.method == "ring" and self.argument != "position_ids"
        self.model, self.length, self.calls = model, 0, 0
        self.loss = WholeLoss(self.group)
        self.probing = self.proven = False

    def refuse_shared(self, inputs: Any, targets: Any) -> None:
        """UserError for a batch with parts of which nothing says whether they go along the sequence."""
        if deal.shares((inputs, targets)):
            raise UserError(
                f"parallel.cp={self.ranks}: the batch holds paratrain.Shared, of which nothing says whether it goes along the sequence; let the model "
                "hold it as a buffer, or write parallel.cp=1"
            )

    def for_loss(self, outputs: Any, targets: Targets, real: int, pairs: Callable) -> tuple[Any, Any]:
        """What loss_fn is given for a micro-batch: see `context_loss.py`."""
        return self.loss.choose(outputs, targets, real, self.length, self._inverse, pairs)

    def whole(self, outputs: Any) -> Any:
        """The outputs for every position of the sequences."""
        return self.loss.whole(outputs, self.length, self._inverse)

    def part(self, inputs: Any, targets: Any) -> tuple[Any, Targets]:
        """This rank's part of every sequence (dim 1) of a batch, with its positions where the model takes them.

        Raises:
            UserError: the tensors have no common sequence, or one that the ranks cannot share.
        """
        tensors = [leaf for leaf in deal.leaves((inputs, targets)) if isinstance(leaf, torch.Tensor)]
        lengths = {tensor.shape[1] for tensor in tensors if tensor.ndim > 1}
        if len(lengths) != 1 or any(tensor.ndim == 1 for tensor in tensors):
            raise UserError(
                f"parallel.cp={self.ranks}: every tensor of a batch must have the sequence along dim 1, got shapes {[tuple(t.shape) for t in tensors]}; "
                "train with parallel.cp=1"
            )
        (length,) = lengths
        runs = self.ranks * (2 if self.zigzag else 1)
        if length % runs:
            raise UserError(
                f"parallel.cp={self.ranks}: sequences of {length} positions do not divide into {runs} equal runs (context.method={self.method}); "
                f"pad or cut them to a multiple of {runs} (data.seq_len)"
            )
        order = context_attention.order(length, self.ranks, self.zigzag)
        positions, self._inverse = order[self.rank], torch.cat(order).argsort()
        self.length = len(positions)

        def take(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:, positions.to(tensor.device)] if tensor.ndim > 1 else tensor

        inputs, part = batches.map_tensors(take, inputs), batches.map_tensors(take, targets)
        return self._with_positions(inputs, positions.to(tensors[0].device)), Targets(part, targets)

    def _with_positions(self, inputs: Any, positions: torch.Tensor) -> Any:
        if self.argument is None or (isinstance(inputs, dict) and self.argument in inputs):
            return inputs
        self.told = True
        given = {self.argument: positions.unsqueeze(0)}
        if isinstance(inputs, dict):
            return {**inputs, **given}
        values = inputs if isinstance(inputs, tuple | list) else (inputs,)
        return {**dict(zip(self.taken, values, strict=False)), **given}

    # ------------------------------------------------------------------ attention

    def scaled_dot_product_attention(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """torch's function of that name over the whole sequence, for the heads of this rank."""
        if not self.length:
            return self._alone(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # the same mode is active once more where a block is inside of the model
            return self._attend(*args, **kwargs)

    def _alone(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The same where the program calls the model by itself: then each rank has whole sequences, and no other rank need take part."""
        if torch.is_grad_enabled() and any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in (*args, *kwargs.values())):
            raise UserError(
                f"parallel.cp={self.ranks}: a forward outside of engine.train_step() has whole sequences on every rank, so training on it would share "
                "nothing; write engine.train_step(batch), call the model under torch.no_grad() to evaluate it, or write parallel.cp=1"
            )
        with torch._C.DisableTorchFunction():
            return _ATTENTION(*args, **kwargs)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> torch.Tensor:  # fmt: skip
        """UserError for a form of it that cannot be honoured exactly."""
        self.calls += 1
        if attn_mask is not None and not self.probing:  # positions that do not count up may look like packed documents
            raise UserError(
                f"parallel.cp={self.ranks}: attention with a mask (attn_mask {tuple(attn_mask.shape)}) cannot be split; let the model call "
                "scaled_dot_product_attention(is_causal=True) without padding masks or sliding windows, or write parallel.cp=1"
            )
        if q.ndim != 4 or not q.shape[-2] == k.shape[-2] == self.length:
            raise UserError(
                f"parallel.cp={self.ranks}: attention from {tuple(q.shape)} to {tuple(k.shape)} is not self-attention [batch, heads, time, features] over "
                f"this rank's {self.length} positions; write parallel.cp=1"
            )
        heads = q.shape[1]
        if self.probing or self.method != "all_gather":
            k, v = (tensor.repeat_interleave(heads // tensor.shape[1], 1) for tensor in (k, v))
        if self.probing:
            return v * (1 + torch.tanh(q.sum(-1, keepdim=True) + k.sum(-1, keepdim=True)))
        if self.method == "all_to_all":
            if heads % self.ranks:
                raise UserError(
                    f"context.method=all_to_all: the {heads} heads of a rank do not divide by parallel.cp={self.ranks}; write context.method=ring or all_gather"
                )
            return context_attention.all_to_all(q, k, v, self.group, is_causal=is_causal, scale=scale, dropout_p=dropout_p)
        if self.method == "all_gather":
            return context_attention.all_gather(q, k, v, self.group, is_causal, scale=scale, dropout_p=dropout_p, enable_gqa=enable_gqa)
        if dropout_p:
            raise UserError(
                f"context.method=ring: attention dropout ({dropout_p}) is not built for the ring; write context.method=all_gather, or 0"
            )
        return context_attention.ring(q, k, v, self.group, is_causal, scale, self.zigzag)

    # ------------------------------------------------------------------ probe

    @torch.no_grad()
    def prove(self, run: Callable[[list[Any]], list[Any]], inputs: Any, everywhere: Callable[[Any], list[Any]]) -> None:
        """Refuse a model in which positions meet elsewhere than in attention, or that counts positions by itself. Every rank must call it.

        Args:
            run: the outputs of the model for each of several inputs; none on the stages of a pipeline but the last.
            inputs: of one micro-batch, this rank's part.
            everywhere: what each stage of the pipeline gives it.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        self.probing, self.calls = True, 0
        try:
            here = batches.one(inputs)
            same = batches.map_tensors(lambda x: x[:, :1].expand_as(x).contiguous() if x.ndim > 1 else x, here)
            ends = batches.map_tensors(lambda x: torch.cat([x[:, :-1], _changed(x[:, -1:], x)], 1) if x.ndim > 1 else x, here)
            starts = batches.map_tensors(lambda x: torch.cat([_changed(x[:, :1], x), x[:, 1:]], 1) if x.ndim > 1 else x, here)
            outputs = self._run(run, [here, same, ends, starts, *self._counted(here)])
            fault = _by_length(self.model, self.length * self.ranks) or (self._fault(outputs) if outputs else None)
            for module, mode in modes:
                module.training = mode and not isinstance(module, _BatchNorm | _DropoutNd)
            fault = self._in_training(run, here, ends, starts) or fault
            calls, faults = zip(*everywhere((self.calls, fault)), strict=True)
        finally:
            self.probing = False
            for module, mode in modes:
                module.training = mode
        fault = next((fault for fault in faults if fault), None)
        if not sum(calls):
            fault = (
                "the model never calls torch.nn.functional.scaled_dot_product_attention, by which sequences are split; "
                "use it (Hugging Face: attn_implementation='sdpa')"
            )
        if fault:
            raise UserError(f"parallel.cp={self.ranks}: {fault}, or write parallel.cp=1")
        self.proven = True

    def _in_training(self, run: Callable[[list[Any]], list[Any]], here: Any, ends: Any, starts: Any) -> str | None:
        """What a model does only while it trains, if it draws no numbers for it."""
        outputs = []
        with unchanged(self.model):
            for inputs, seed in ((here, 0), (here, 1), (ends, 0), (starts, 0)):
                rng.seed_all(seed)
                outputs += self._run(run, [inputs])
        if not outputs:
            return None
        plain, again, end, start = (_leaves(each) for each in outputs)
        if any(leaf.ndim < 2 for leaf in plain):  # refused by what it returns in evaluation
            return None
        if len(plain) != len(again) or not all(a.shape == b.shape and _close(a, b) for a, b in zip(plain, again, strict=True)):
            return None
        return _MET if _met(plain, end, start) else None

    def _counted(self, here: Any) -> list[Any]:
        """Positions that count from 0, and none, which must mean the same where we add those of the whole sequence."""
        if self.argument is None or not self.told or self.taken[self.argument].default is inspect.Parameter.empty:
            return []
        positions = here[self.argument]
        return [
            {**here, self.argument: torch.arange(positions.shape[1], device=positions.device).unsqueeze(0)},
            {name: value for name, value in here.items() if name != self.argument},
        ]

    def _run(self, run: Callable[[list[Any]], list[Any]], inputs: list[Any]) -> list[Any]:
        try:
            return run(inputs)
        except RuntimeError as error:
            raise UserError(
                f"parallel.cp={self.ranks}: the model does not run on {self.length} positions of each sequence ({error}); a batch needs the sequence "
                "along dim 1, and a model that takes any length of it; or write parallel.cp=1"
            ) from error

    def _fault(self, outputs: list[Any]) -> str | None:
        """What is wrong with the outputs of the probes, if anything."""
        leaves = [_leaves(each) for each in outputs]
        odd = next((leaf for leaf in leaves[0] if leaf.ndim < 2 or leaf.shape[1] != self.length), None)
        if odd is not None:
            return (
                f"an output of shape {tuple(odd.shape)} has no sequence of {self.length} positions along dim 1, so it joins positions that are on "
                "several ranks; return one along dim 1"
            )
        plain, flat, end, start, *counted = leaves
        if _met(plain, end, start):
            return _MET
        if any(not _close(a, a[:, :1].expand_as(a)) for a in flat):
            return (
                "the model counts positions by itself, which would start at 0 on every rank; let forward take "
                f"{' or '.join(_POSITIONS)} [1, time] and use it"
            )
        if counted and any(not _close(a, b) for a, b in zip(*counted, strict=True)):
            return (
                f"without {self.argument} the model does not count positions from 0 (RoBERTa counts from padding_idx + 1); put {self.argument} [batch, time] "
                "into the batch"
            )
        return None


def _by_length(model: nn.Module, length: int) -> str | None:
    """What a Hugging Face model, which sees a part of `length` positions, would compute otherwise if it saw all of them.

    It passes a mask for a sliding window, or for chunks, only where they are shorter than what it sees, and some rotary embeddings change
    with the length.
    """
    for holder in {id(h): h for module in model.modules() for h in (module, getattr(module, "config", None))}.values():
        for name in ("sliding_window", "attention_chunk_size"):
            window = getattr(holder, name, None)
            if type(window) is int and 0 < window < length:
                return f"{name}={window} is shorter than the sequence of {length} positions, and attention within it cannot be split; write None for it"
        rope = getattr(holder, "rope_parameters", None) or getattr(holder, "rope_scaling", None)
        every = [rope, *rope.values()] if isinstance(rope, dict) else []  # of the model, or of each kind of layer
        for rules in [each for each in every if isinstance(each, dict)]:
            kind = rules.get("rope_type", rules.get("type"))
            limits = (rules.get("original_max_position_embeddings"), getattr(holder, "max_position_embeddings", None), 0)
            if kind in ("dynamic", "longrope") and length > next(limit for limit in limits if limit is not None):
                return (
                    f"rotary embeddings of rope_type={kind} change with the length, of which a rank sees a part; choose another rope_type"
                )
    return None


def planned(model: nn.Module, mesh: Mesh, cfg: Config) -> Context | None:
    """What splits the sequences of `model`, made before stages of a pipeline divide it; None where the cp axis has one rank."""
    return Context(model, mesh, cfg) if cfg.parallel.cp > 1 else None


def apply(context: Context | None, units: Sequence[tuple[str, nn.Module]]) -> None:
    """Answer the attention of its model over the cp axis, in place.

    Args:
        units: blocks of the model that this rank runs.
    """
    if context is None:
        return
    made: dict[type, type] = {}
    for module in (context.model, *(block for _, block in units)):  # blocks too: recomputation runs them outside of the model's forward
        cls = type(module)
        made[cls] = made.get(cls) or type(cls.__name__, (_Answered, cls), {"_context": context, "__module__": cls.__module__})
        module.__class__ = made[cls]


class _Answered(nn.Module):
    _context: Context

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Attention(self._context):
            return super().forward(*args, **kwargs)


class _Attention(TorchFunctionMode):
    def __init__(self, context: Context):
        super().__init__()
        self.context = context

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not _ATTENTION:
            return func(*args, **kwargs)
        if any(isinstance(leaf, Split) for leaf in (*args, *kwargs.values())):
            return tp_rules.apply(self.context.scaled_dot_product_attention, args, kwargs)
        return self.context.scaled_dot_product_attention(*args, **kwargs)


def _met(plain: Sequence[torch.Tensor], end: Sequence[torch.Tensor], start: Sequence[torch.Tensor]) -> bool:
    """Whether another last position changed one before it, or another first one any after it."""
    return any(not _close(a[:, :-1], b[:, :-1]) for a, b in zip(plain, end, strict=True)) or any(
        not _close(a[:, 1:], b[:, 1:]) for a, b in zip(plain, start, strict=True)
    )


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rounding: experts compute other numbers of rows at once when one position is routed elsewhere."""
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def _changed(one: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Another value for one position, out of those that the input has."""
    if one.is_floating_point():
        return one + 1
    others = whole[whole != one.flatten()[0]]
    return torch.full_like(one, int(others[0])) if len(others) else torch.zeros_like(one)


def _leaves(outputs: Any) -> list[torch.Tensor]:
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return [plain(leaf) for leaf in leaves]
