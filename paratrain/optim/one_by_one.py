"""Any optimizer, run on one parameter at a time that stands somewhere else while it is updated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

States = dict[str, Any]


def one_by_one(
    cls: Any,
    name: str,
    doc: str | None,
    lend: Callable[[torch.Tensor, States, dict[str, Any]], tuple[torch.Tensor, States]],
    take_back: Callable[[torch.Tensor, torch.Tensor, States, States], States],
) -> type:
    """A subclass of the optimizer `cls` whose step runs `cls.step` once for each parameter.

    Args:
        lend: (parameter, its states, options of its group) -> what is updated in its place, with its gradient, and its states.
        take_back: (parameter, what was updated, the states before, the states after) -> the states to keep; writes the parameter.
    """

    @torch.no_grad()
    def step(self: Any, closure: Callable | None = None) -> None:
        assert closure is None, "the engine passes none"
        groups, states = self.param_groups, self.state
        try:
            for group in groups:
                before = after = {key: value for key, value in group.items() if key not in ("params", "param_names")}
                for param in group["params"]:
                    if param.grad is None:
                        continue
                    kept = states[param]
                    lent, lent_states = lend(param, kept, group)
                    self.state = defaultdict(dict, {lent: lent_states})
                    self.param_groups = [{**before, "params": [lent]}]
                    cls.step(self)
                    after = {key: value for key, value in self.param_groups[0].items() if key != "params"}
                    states[param] = take_back(param, lent, kept, self.state[lent])
                group.update(after)
        finally:
            self.param_groups, self.state = groups, states

    return type(name, (cls,), {"step": step, "__doc__": doc})
