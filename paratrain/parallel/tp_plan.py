"""Which parameters tensor parallelism splits, and how: told by the user, declared by the model, or found by following its forward.

A plan decides memory and communication, never the result: whatever is split, `tp_rules` computes the same function.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import NamedTuple

from torch import nn

from paratrain.config import Config
from paratrain.errors import UserError
from paratrain.parallel.tp_split import Parts, Peers
from paratrain.suggest import did_you_mean

log = logging.getLogger(__name__)
STYLES = ("colwise", "rowwise", "vocab", "replicate", "sequence")
NOTHING = "'parallel.tp_plan={}'"
"""An override under which nothing is split, as an error shows it."""

_FROM_RIGHT = ("Conv1D",)  # Hugging Face's GPT-2 keeps its matrices as [in, out]


class Placement(NamedTuple):
    """`dim` of a parameter is split; see `tp_split.Parts`."""

    dim: int
    parts: Parts


@dataclass(frozen=True)
class Plan:
    """What is split.

    Attributes:
        placements: parameter name -> how it is split; parameters without an entry are whole on every rank.
        source: "user", "model" or "derived".
        reasons: name pattern -> why these weights stay whole.
    """

    placements: Mapping[str, Placement]
    source: str
    reasons: Mapping[str, str]

    def lines(self) -> Iterator[str]:
        """The plan for people: one line a pattern of names."""
        shown: dict[tuple[str, Placement], list[str]] = {}
        for name, placement in self.placements.items():
            shown.setdefault((pattern(name), placement), []).append(name)
        for (like, placement), names in shown.items():
            fused = f" as {len(placement.parts)} runs {placement.parts}" if len(placement.parts) > 1 else ""
            who, many = (like, f" ({len(names)} of them)") if len(names) > 1 else (names[0], "")
            yield f"{who}: dim {placement.dim} split{fused}{many}"
        for name, reason in self.reasons.items():
            yield f"{name}: whole on every rank, because {reason}"


def pattern(name: str) -> str:
    """Names that differ in their first number, as those of repeated blocks, are one."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name, count=1)


def example(model: nn.Module) -> str:
    """An override with a plan for two matrices of this model that follow each other, as an error shows it; it can be pasted into a shell."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and name]
    pairs = [
        (first, second)
        for (first, a), (second, b) in pairwise(linears)
        if a.out_features == b.in_features and a.in_features < a.out_features
    ]
    pairs = pairs or [(first, second) for (first, a), (second, b) in pairwise(linears) if a.out_features == b.in_features]
    if not pairs:
        return NOTHING
    first, second = pairs[len(pairs) // 2]
    if pattern(first) != pattern(second):
        first, second = pattern(first), pattern(second)
    return f"'parallel.tp_plan={{{first}: colwise, {second}: rowwise}}'"


def make(model: nn.Module, cfg: Config, peers: Peers) -> Plan:
    """The plan for `model`, whose tensors are on meta.

    Raises:
        UserError: a pattern of `parallel.tp_plan` that matches nothing, or no plan can be found.
    """
    if isinstance(cfg.parallel.tp_plan, Mapping):
        return _from_user(model, cfg.parallel.tp_plan)
    declared = _declared(model) if cfg.parallel.tp_plan == "model" else {}
    if cfg.parallel.tp_plan == "model":
        if not declared:
            raise UserError(
                "parallel.tp_plan=model: the model declares no plan (_tp_plan); write parallel.tp_plan=auto, or globs of your own"
            )
        return _from_user(model, declared, "model")
    from paratrain.parallel.tp_derive import derive

    return derive(model, peers)


def _from_user(model: nn.Module, rules: Mapping[str, str], source: str = "user") -> Plan:
    placements: dict[str, Placement] = {}
    names = [name for name, _ in model.named_modules() if name]
    params = dict(model.named_parameters(remove_duplicate=False))
    for glob, told in rules.items():
        style, fused = _style(glob, told)
        found = [(name, module) for name, module in model.named_modules() if name and fnmatchcase(name, glob)]
        direct = [name for name in params if fnmatchcase(name, glob)]
        if not found and not direct and source == "user":
            raise UserError(
                f"parallel.tp_plan: {glob!r} matches no module and no parameter{did_you_mean(glob, names)}; write a glob on their names"
            )
        if style in ("replicate", "sequence"):
            for name in [n for n in placements if fnmatchcase(n, glob) or fnmatchcase(n.rpartition(".")[0], glob)]:
                del placements[name]
            continue
        for name, module in found:
            placements |= {f"{name}.{leaf}": placement for leaf, placement in _split_module(glob, style, fused, module).items()}
        for name in direct:
            owner, _, leaf = name.rpartition(".")
            split = _split_module(glob, style, fused, model.get_submodule(owner), [leaf])
            placements |= {f"{owner}.{leaf}" if owner else leaf: placement for leaf, placement in split.items()}
    return Plan(placements, source, {})


def _style(glob: str, told: str) -> tuple[str, Parts | int]:
    match = re.fullmatch(r"(\w+)(?:/(\d+(?:\+\d+)*))?", told)
    if match is None or match[1] not in STYLES:
        raise UserError(
            f"parallel.tp_plan: {glob!r}: {told!r} is no style; write one of {', '.join(STYLES)}, with colwise/3 for three matrices fused "
            "into one, or colwise/64+16+16 for matrices of those rows"
        )
    sizes = tuple(int(size) for size in (match[2] or "1").split("+"))
    return match[1], sizes if len(sizes) > 1 else sizes[0]


def _split_module(glob: str, style: str, fused: Parts | int, module: nn.Module, only: list[str] | None = None) -> dict[str, Placement]:
    if isinstance(module, nn.MultiheadAttention) and only is None:
        size = module.embed_dim
        found = {"in_proj_weight": Placement(0, (size,) * 3), "in_proj_bias": Placement(0, (size,) * 3)}
        found |= {f"{letter}_proj_weight": Placement(0, (size,)) for letter in "qkv"} | {"out_proj.weight": Placement(1, (size,))}
        known = dict(module.named_parameters())
        return {name: placement for name, placement in found.items() if name in known}
    found = {}
    for leaf, param in module.named_parameters(recurse=False):
        if only is not None and leaf not in only:
            continue
        first, second = (0, 1)
        if type(module).__name__ in _FROM_RIGHT or (isinstance(module, nn.Embedding) and style != "vocab"):
            first, second = (1, 0)
        if param.ndim >= 2:
            dim = second if style == "rowwise" else first
        elif style == "rowwise" or param.ndim == 0:
            continue
        else:
            dim = 0
        size = param.shape[dim]
        parts = (size // fused,) * fused if isinstance(fused, int) else fused
        if sum(parts) != size:
            raise UserError(f"parallel.tp_plan: {glob!r}: {leaf} has {size} rows or columns, which are not {fused} runs")
        found[leaf] = Placement(dim, parts)
    return found


def _declared(model: nn.Module) -> dict[str, str]:
    """The plan of a Hugging Face model, in our words; styles without a word of ours stay whole."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        for glob, style in (getattr(module, "_tp_plan", None) or {}).items():
            ours = {"colwise": "colwise", "rowwise": "rowwise", "embedding_rowwise": "vocab"}.get(
                style.split("_rep")[0].split("_gather")[0]
            )
            if ours:
                found.setdefault(f"{prefix}.{glob}" if prefix else glob, ours)
    return found
