"""Config -> optimizers, with parameter groups by name."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from paratrain.build import locate
from paratrain.config import Optimizer as OptimizerConfig
from paratrain.errors import ConfigError
from paratrain.optim.gathered import gathered, needs_gathering, takes_one_at_a_time


def build(options: OptimizerConfig, model: nn.Module, elsewhere: Collection[str] = ()) -> list[torch.optim.Optimizer]:
    """One optimizer for each class that the config names, over all trainable parameters of `model`.

    A parameter goes to the first of `options.groups` with a pattern that matches its name, else to the default group; in each
    group, norms, biases and vectors form a subgroup without decay, unless `no_decay=none` or the group sets its own weight_decay.
    Parameters sharded over different meshes are in groups of their own.

    Args:
        elsewhere: names of trainable parameters that other ranks alone hold, which a pattern may be meant for.

    Raises:
        ConfigError: patterns that match nothing, arguments the class does not take, no trainable parameter.
    """
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not params and not elsewhere:
        raise ConfigError(["model: it has no trainable parameter (all have requires_grad=False, or there is none)"])
    exempt = undecayed(model) if options.no_decay == "norm_and_bias" else set()
    base = {"lr": options.lr, "weight_decay": options.weight_decay, **options.args}
    problems: list[str] = []
    rules = [([g.match] if isinstance(g.match, str) else g.match, g.options) for g in options.groups]
    for number, (patterns, _) in enumerate(rules):
        problems += [
            f"optimizer.groups[{number}].match: {pattern!r} matches no trainable parameter; their names look like {_examples(params)}"
            for pattern in patterns
            if not any(fnmatchcase(name, pattern) for name in (*params, *elsewhere))
        ]
    left_over = not_matrices(model) if getattr(locate(options.target, key="optimizer._target_"), "matrices_only", False) else set()
    if options.others and not left_over:
        problems.append(f"optimizer.others: {options.target} updates every parameter; leave it out, or write optimizer.groups")
    grouped: dict[tuple[int | None, bool, Any, bool], list[str]] = {}
    for name in params:
        rule = next((i for i, (patterns, _) in enumerate(rules) if any(fnmatchcase(name, p) for p in patterns)), None)
        decays = name not in exempt or (rule is not None and "weight_decay" in rules[rule][1])
        mesh = getattr(params[name], "device_mesh", None)  # one kernel cannot update a mix of meshes
        other = name in left_over and (rule is None or "_target_" not in rules[rule][1])
        grouped.setdefault((None if other else rule, decays, mesh, other), []).append(name)
    by_class: dict[str, list[dict[str, Any]]] = {}
    for (rule, decays, _, other), names in grouped.items():
        settings = {"_target_": options.target, **base, **(rules[rule][1] if rule is not None else {})}
        if other:
            settings = {"_target_": "torch.optim.AdamW", "lr": options.lr, "weight_decay": options.weight_decay, **options.others}
        if not decays:
            settings["weight_decay"] = 0.0
        target = settings.pop("_target_")
        by_class.setdefault(target, []).append({"params": [params[n] for n in names], "param_names": names, **settings})
    if not by_class:  # what is trained is in other stages
        by_class[options.target] = [{"params": [], "param_names": [], **base}]
    optimizers = [_construct(target, groups, options.fused, problems) for target, groups in by_class.items()]
    if problems:
        raise ConfigError(problems)
    built = [optimizer for optimizer in optimizers if optimizer is not None]
    for optimizer in built:
        if hasattr(optimizer, "train"):  # schedule-free ones refuse to step before
            optimizer.train()
    return built


def add(optimizers: list[torch.optim.Optimizer], options: OptimizerConfig, model: nn.Module, names: Collection[str]) -> None:
    """Let `optimizers`, which `build` made, update further parameters of `model` too, each as if it had been trained from the start."""
    by_class = {type(optimizer): optimizer for optimizer in optimizers}
    every = [name for name, _ in model.named_parameters()]
    patterns = [pattern for group in options.groups for pattern in ([group.match] if isinstance(group.match, str) else group.match)]
    for made in build(options, model, (*every, *patterns)):
        for group in made.param_groups:
            chosen = [(name, param) for name, param in zip(group["param_names"], group["params"], strict=True) if name in names]
            if not chosen:
                continue
            if type(made) not in by_class:
                by_class[type(made)] = made
                optimizers.append(made)
                break  # all that it updates is new
            settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            by_class[type(made)].add_param_group(
                {**settings, "params": [param for _, param in chosen], "param_names": [name for name, _ in chosen]}
            )


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay leaves alone: those of norm modules, biases, and anything with fewer than two dims."""
    return {
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules()
        for leaf, param in module.named_parameters(recurse=False)
        if param.ndim < 2 or leaf.endswith("bias") or "norm" in type(module).__name__.lower()
    }


def not_matrices(model: nn.Module) -> set[str]:
    """Names of the parameters that an optimizer of matrices leaves to `optimizer.others`.

    Vectors; embeddings, with what is tied to them; and the output layer, which is the last Linear: the rows of both are tokens or
    classes, each with a scale of its own (Jordan et al. 2024).
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    apart = {param for module in (*tables, *linear[-1:]) for param in module.parameters(recurse=False)}
    return {name for name, param in model.named_parameters() if param.ndim < 2 or param in apart}


def _construct(target: str, groups: list[dict[str, Any]], fused: bool | None, problems: list[str]) -> torch.optim.Optimizer | None:
    cls = locate(target, key="optimizer._target_")
    if target.startswith("apex.") and any(isinstance(p, DTensor) for g in groups for p in g["params"]):
        problems.append(f"optimizer._target_: {target}: Apex' kernels cannot read sharded weights; write strategy=ddp, or optimizer=adamw")
    accepted: Mapping[str, inspect.Parameter] = inspect.signature(cls).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    for group in groups:
        for name in [n for n in group if n not in ("params", "param_names") and n not in accepted and not takes_all]:
            if name == "weight_decay" and group[name] in (0.0, OptimizerConfig().weight_decay):
                del group[name]  # nobody asked for it: the class has no decay to set
                continue
            problems.append(f"optimizer.{name}: {target} takes no such argument (it takes {', '.join(list(accepted)[1:])})")
    kwargs: dict[str, Any] = {}
    sharded = any(isinstance(p, DTensor) for g in groups for p in g["params"])
    # torch's fused SGD leaves 16-bit weights on the CPU as they are, silently (2.13)
    if cls is torch.optim.SGD and any(p.device.type != "cuda" and p.dtype.itemsize < 4 for g in groups for p in g["params"]):
        if fused:
            problems.append(
                f"optimizer.fused: torch's kernel of {target} does not update 16-bit weights on the CPU; leave optimizer.fused out"
            )
    elif "fused" in accepted and not (sharded and cls not in (torch.optim.Adam, torch.optim.AdamW)):
        kwargs["fused"] = fused if fused is not None else all(p.is_floating_point() for g in groups for p in g["params"])
    elif fused and sharded:
        problems.append(f"optimizer.fused: torch has no fused kernel of {target} for sharded weights; leave optimizer.fused out")
    elif fused:
        problems.append(f"optimizer.fused: {target} has no fused kernel; leave optimizer.fused out")
    if problems:
        return None
    for group in groups:
        if isinstance(group.get("betas"), list):
            group["betas"] = tuple(group["betas"])
    try:
        given = [{name: value for name, value in group.items() if name in accepted and name != "params"} for group in groups]
        for settings in given:  # torch checks what its constructor is given, not what groups say
            cls([nn.Parameter(torch.zeros(2, 2))], **settings)
        if needs_gathering(cls, [param for group in groups for param in group["params"]]):
            if not all(takes_one_at_a_time(cls, settings) for settings in given):
                problems.append(
                    f"optimizer._target_: {target} updates a parameter by what it sees of the others, or at random, which cannot be done to split "
                    "weights, gathered one at a time; write strategy=ddp without parallel.tp, or another optimizer"
                )
                return None
            cls = gathered(cls)
        required = [name for name, given in list(accepted.items())[1:] if given.default is given.empty and name in groups[0]]
        optimizer = cls(groups, **{name: groups[0][name] for name in required}, **kwargs)  # groups have their own, and count
        for name in sorted({name for group in groups for name in group} - optimizer.defaults.keys() - {"params", "param_names", *accepted}):
            problems.append(f"optimizer.{name}: {target} takes no such argument (it takes {', '.join(optimizer.defaults)})")
        return optimizer
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        problems.append(f"optimizer: {target} refused its arguments: {error}")
        return None


def _examples(params: Mapping[str, Any]) -> str:
    return ", ".join(list(params)[:3])
