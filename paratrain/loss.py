"""Losses as a sum and a count, from which the engine forms the exact mean over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paratrain.errors import UserError

Loss = Callable[[Any, Any], Any]  # loss_fn(outputs, targets) -> (sum, count), or a scalar mean; or a dict of them, see `named`


def cross_entropy(outputs: Tensor, targets: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of class targets.

    Args:
        outputs: logits [..., classes].
        targets: int64 [...].
        ignore_index: target that counts for nothing.

    Returns:
        The sum, in nats, computed in float32 or wider, and the number of targets that count.

    Raises:
        UserError: `outputs` is no tensor, or the shapes do not match.
    """
    _refuse_structures("cross_entropy", outputs)
    if outputs.shape[:-1] != targets.shape:
        raise UserError(
            f"cross_entropy: outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}: outputs need the shape of targets "
            "and the classes as last dim"
        )
    logits = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="sum")
    return total, (targets != ignore_index).sum()


def _refuse_structures(loss: str, outputs: Any) -> None:
    if isinstance(outputs, Tensor):
        return
    parts = (
        [f"{key}=" for key in outputs]
        if isinstance(outputs, Mapping)
        else [type(part).__name__ for part in outputs]
        if isinstance(outputs, tuple | list)
        else []
    )
    raise UserError(
        f"{loss}: the model returns {type(outputs).__name__}({', '.join(parts)}), not a tensor; write a loss that takes what it needs of it "
        "(loss._target_=my_module.my_loss), or loss=balanced_cross_entropy with model=moe"
    )


def mse(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Squared error.

    Args:
        outputs: any shape.
        targets: the same shape.

    Returns:
        The sum, computed in float32 or wider, and the number of elements.

    Raises:
        UserError: `outputs` is no tensor, or the shapes differ, which broadcasting would hide.
    """
    _refuse_structures("mse", outputs)
    if outputs.shape != targets.shape:
        raise UserError(f"mse: outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}: give both the same shape")
    dtype = torch.promote_types(torch.promote_types(outputs.dtype, targets.dtype), torch.float32)
    return F.mse_loss(outputs.to(dtype), targets.to(dtype), reduction="sum"), targets.numel()


def huggingface_loss(outputs: Any, labels: Tensor, shift: bool = True, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """The loss that Hugging Face models compute of `labels` among their inputs, as a sum and a count.

    A model that is given labels returns a mean over those of the micro-batch it sees, of which nobody can make the mean over the whole batch. So give
    it none, and make them the targets: `({"input_ids": ids, "attention_mask": mask}, labels)`.

    Args:
        outputs: what the model returns, with `logits` [batch, time, classes] (or [batch, classes]); or the logits.
        labels: int64 [batch, time] (or [batch]), not shifted, as for the model.
        shift: position t predicts label t + 1, as in causal language models; false for masked ones, classifiers and encoder-decoder models.
        ignore_index: label that counts for nothing.

    Returns:
        The sum of the negative log likelihoods, in nats, and the number of labels that count.

    Raises:
        UserError: no logits, or the shapes do not match.
    """
    logits = outputs["logits"] if isinstance(outputs, Mapping) and "logits" in outputs else getattr(outputs, "logits", outputs)
    _refuse_structures("huggingface_loss", logits)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits, labels, ignore_index)


def is_a_sum(loss_fn: Loss) -> bool:
    """Whether it is one of the losses above, sums over what they count by construction."""
    return (loss_fn.func if isinstance(loss_fn, partial) else loss_fn) in (cross_entropy, mse, huggingface_loss)


def sequence_balance(router_logits: Tensor | Sequence[Tensor], top_k: int, batch: int | None = None, mask: Tensor | None = None) -> Tensor:
    """How unevenly each sequence is spread over the experts: 1 where it is even, up to the number of experts / top_k.

    The sequence-wise loss of DeepSeek-V3 (2024, equations 17 to 20), with softmax probabilities: experts * sum over experts of (share of
    the choices) * (mean probability). It is a function of each sequence alone, so a loss that adds it up over sequences is the same
    under every layout; a loss over the whole batch, such as Hugging Face's `aux_loss`, changes with micro-batches and ranks.

    Args:
        router_logits: [batch, time, experts], or [batch * time, experts] with `batch` (as Hugging Face models return them); or a
            sequence of such tensors, one a layer, over which the mean is taken.
        top_k: experts chosen for each token.
        batch: number of sequences.
        mask: [batch, time], true where a token counts; None: all do.

    Returns:
        [batch], in float32 or wider.
    """
    if not isinstance(router_logits, Tensor):
        each = [sequence_balance(logits, top_k, batch, mask) for logits in router_logits]
        return torch.stack([value.to(each[0].device) for value in each]).mean(0)
    logits = router_logits if router_logits.ndim == 3 else router_logits.unflatten(0, (batch or 1, -1))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probabilities, experts = logits.softmax(-1), logits.shape[-1]
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(top_k, dim=-1).indices, 1.0)
    counts = torch.ones_like(logits[..., :1]) if mask is None else mask.unsqueeze(-1).to(logits)
    tokens = counts.sum(1).clamp(min=1)
    share, probability = (chosen * counts).sum(1) / (top_k * tokens), (probabilities * counts).sum(1) / tokens
    return experts * (share * probability).sum(-1)


def checked(loss_fn: Loss, device: torch.device, dtype: torch.dtype) -> Loss:
    """`loss_fn`, where it is a module with its buffers on `device`, and in float64 if that is the `dtype` of the weights.

    Raises:
        UserError: it has parameters, which nothing would train; or it is a loss of torch that returns a sum, or a mean over something else
            than `trainer.loss_count` can count.
    """
    if isinstance(loss_fn, nn.Module):
        if trained := [name for name, param in loss_fn.named_parameters() if param.requires_grad]:
            raise UserError(
                f"loss: {type(loss_fn).__name__} has parameters ({', '.join(trained[:3])}), and only those of the model are trained; make it a "
                "part of the model, whose outputs loss_fn then takes the loss from"
            )
        loss_fn.to(device, torch.float64 if dtype is torch.float64 else None)
    function, options = (
        (loss_fn.func, loss_fn.keywords) if isinstance(loss_fn, partial) else (type(loss_fn), getattr(loss_fn, "__dict__", {}))
    )
    if not str(getattr(function, "__module__", "")).startswith("torch.nn"):
        return loss_fn
    weighted = options.get("weight") is not None or getattr(loss_fn, "weight", None) is not None
    instead = "let loss_fn return (sum, count): F.cross_entropy(..., reduction='sum') and what it counts"
    if options.get("reduction", "mean") == "sum":
        raise UserError(
            f"loss: {function.__name__} with reduction=sum returns a sum, which would be taken for a mean; write reduction=mean"
        )
    if options.get("ignore_index", -100) != -100:
        raise UserError(
            f"loss: {function.__name__} with ignore_index={options['ignore_index']} is a mean over fewer targets than are counted, which are all but "
            f"-100; mark them by -100, write loss=cross_entropy with that ignore_index, or {instead}"
        )
    if weighted and function in (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss):
        raise UserError(f"loss: {function.__name__} with weight=... is a mean over the weights of the classes, not over targets; {instead}")
    return loss_fn


def named(losses: Any, weights: Mapping[str, float], count: Any) -> list[tuple[torch.Tensor, Any]]:
    """The (sum, count) of each loss that `trainer.loss_weights` names, in its order.

    Args:
        losses: what loss_fn returned: name -> (sum, count), or a scalar mean over `count`.

    Raises:
        UserError: the names are not those of `weights`.
    """
    if not isinstance(losses, Mapping) or set(losses) != set(weights):
        got = ", ".join(map(str, losses)) if isinstance(losses, Mapping) else f"a {type(losses).__name__}"
        raise UserError(
            f"trainer.loss_weights names {', '.join(weights)}, and loss_fn returned {got}; return a dict with a (sum, count) or a mean for each name"
        )
    return [as_sum_and_count(losses[name], count) for name in weights]


def _scalar(one: Tensor) -> Tensor:
    return one.reshape(()) if one.ndim else one


def as_sum_and_count(loss: Any, count: Any = None) -> tuple[torch.Tensor, Any]:
    """A pair (sum, count) as it is; a scalar mean over `count` as (mean x count, count).

    Raises:
        UserError: for anything else.
    """
    if isinstance(loss, tuple | list) and len(loss) == 2 and isinstance(loss[0], torch.Tensor):
        if loss[0].numel() != 1:
            raise UserError(f"loss_fn returned a sum of shape {tuple(loss[0].shape)}; reduce it to a scalar (losses.sum(), losses.numel())")
        if not (isinstance(loss[1], (int, float, np.number)) or (isinstance(loss[1], torch.Tensor) and loss[1].numel() == 1)):
            what = f"a tensor of shape {tuple(loss[1].shape)}" if isinstance(loss[1], torch.Tensor) else f"a {type(loss[1]).__name__}"
            raise UserError(
                f"loss_fn returned {what} as the second of a pair; return (sum, count): how many terms the sum has, or a mean alone"
            )
        return _scalar(loss[0]), loss[1]
    if isinstance(loss, torch.Tensor):
        if loss.numel() != 1:
            raise UserError(
                f"loss_fn returned a tensor of shape {tuple(loss.shape)}; return (losses.sum(), losses.numel()), or a scalar mean"
            )
        assert count is not None
        return _scalar(loss) * count, count
    if isinstance(loss, Mapping):
        weights = ", ".join(f"{name}: 1.0" for name in loss)
        raise UserError(f"loss_fn returned several losses; say what each weighs in their sum: trainer.loss_weights={{{weights}}}")
    raise UserError(f"loss_fn returned {type(loss).__name__}; return (sum, count), or a scalar tensor that is a mean")
