"""Which parameters are not trained, by their names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from paratrain.errors import UserError
from paratrain.suggest import did_you_mean


def apply(model: nn.Module, patterns: Sequence[str]) -> None:
    """Set requires_grad=False on every parameter that the globs name, in place; what is frozen already stays so.

    Args:
        patterns: taken in turn; one that begins with '!' takes parameters out again that those before it named.

    Raises:
        UserError: a pattern that matches no parameter, or nothing is left to train.
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    frozen: dict[torch.Tensor, None] = {}
    for pattern in patterns:
        out, glob = pattern.startswith("!"), pattern.removeprefix("!")
        matches = [param for name, param in params.items() if fnmatchcase(name, glob)]
        if not matches:
            raise UserError(
                f"freeze: {pattern!r} matches no parameter{did_you_mean(glob, params)}; their names look like {', '.join(list(params)[:3])}"
            )
        for param in matches:
            if out:
                frozen.pop(param, None)
            else:
                frozen[param] = None
    for chosen in frozen:
        chosen.requires_grad_(False)
    if patterns and not any(param.requires_grad for param in params.values()):
        raise UserError(f"freeze={list(patterns)}: no parameter is left to train; take some out again, as '!head.*' does")
