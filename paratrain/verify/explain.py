"""From the first tensor that differs to the kind of error: hypotheses, tried from the most specific to the most general.

A hypothesis is a tensor computed from the reference and from what each rank alone would have contributed. It holds when it explains
all but a hundredth of the difference, or leaves no more than rounding.
"""

from __future__ import annotations

from paratrain.verify import sums, values
from paratrain.verify.case import REDUCTION, Evidence, Explanation, ranks_text
from paratrain.verify.compare import Difference
from paratrain.verify.trace import Key

_HYPOTHESES = (
    values.not_finite,
    sums.wrong_count,
    values.zero,
    sums.tied,
    sums.own_gradient,
    sums.norm,
    values.learning_rate,
    values.weight_update,
    sums.known_factor,
    sums.means,
    values.stale,
    values.own_statistics,
    sums.any_factor,
    values.permuted,
    values.one_rank,
    values.initial,
    values.rounded,
)


def explain(evidence: Evidence) -> Explanation:
    """The most specific explanation that fits."""
    for hypothesis in _HYPOTHESES:
        for found in hypothesis(evidence):
            return found
    return Explanation(
        "unknown",
        "no simple relation to what one process has: not a factor, a missing reduction, another step's value, a permutation or rounding",
        f"a computation in or before {evidence.key.name or 'the loss'} that depends on which samples a rank holds, or on the rank itself",
        "the module named above, and anything in it that uses the rank, the position in the batch, or statistics over samples",
    )


def missing(key: Key, wrong: list[int]) -> Explanation:
    ranks = ranks_text(wrong)
    if "gradient" in key.kind:
        return Explanation(
            "missing",
            f"there is no gradient on {ranks}",
            "the layout does not use this parameter: a module was replaced or detached, or the gradient was cleared before the step",
            REDUCTION,
        )
    return Explanation("missing", f"not there on {ranks}", "the layout renamed, dropped or replaced it", "strategy, parallel")


def moved(first: Difference) -> Explanation:
    """A plain attribute that forward moves."""
    return Explanation(
        "state",
        f"{first.detail}",
        "forward (or the loss) moves it once a micro-batch, once a rank, or once more in recomputation, where one process moves it once a step; "
        "or each rank moves it by its own samples",
        "move it once a step, from what all ranks have: in a callback's on_step_end, or by a collective in forward with data.micro_batch_size=null",
    )


def shape(key: Key, detail: str) -> Explanation:
    return Explanation(
        "shape",
        f"{detail}",
        "padding that the layout added and did not take away again, such as a vocabulary padded to a multiple of the ranks: padded classes "
        "take part in the softmax and leak into the loss",
        "vocab_size of the model; slice the logits back before the loss",
    )
