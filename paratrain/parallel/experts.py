"""Expert parallelism: the experts of a mixture dealt to the ranks of `ep`, and every row of a batch sent to the rank that holds its expert.

The ranks of `ep` see different samples. Where the model calls its experts, an all-to-all brings each (row, expert) pair to the owner of
the expert, the module's own forward computes it there with what it has, and a second all-to-all brings the results back, to be added
up (Lepikhin et al., 2021, GShard). No row is dropped, whatever the load.

What this may be done to is not assumed. Two kinds of experts qualify by their structure: a module whose parameters all have the experts
along dim 0 and whose forward takes rows, indices of experts and weights (see `expert_rows.py`); and a list of like modules, called by
the forward of the module around it (see `expert_lists.py`). That the first is the sum over the indices of a function of a single row, a
single expert and its weight, and that an expert of the second is a function of each row alone, is proven on copies before anything is
split.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from paratrain import gradients
from paratrain.compat import local_box
from paratrain.config import Config
from paratrain.distributed import rank
from paratrain.errors import UserError
from paratrain.mesh import Mesh
from paratrain.parallel import blocks, expert_lists
from paratrain.parallel.expert_lists import Listed
from paratrain.parallel.expert_rows import Form, Peers, reading_own, set_numbers
from paratrain.precision import POLICIES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experts:
    """What `place` did.

    Attributes:
        modules: (name, module) of each that has its experts dealt to ranks.
        ranks: degree of ep.
        group: the ranks of ep.
        owners: name of each parameter and buffer that one rank of ep alone holds, as those of experts in lists -> that rank.
        forms: every parameter and buffer of the whole model by name, on meta.
    """

    modules: Sequence[tuple[str, nn.Module]] = ()
    ranks: int = 1
    group: dist.ProcessGroup | None = None
    owners: Mapping[str, int] = field(default_factory=dict)
    forms: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def reduce(self, params: Sequence[torch.Tensor]) -> None:
        """Bring the reduced gradients of experts to the scale of all others.

        The backward of the all-to-all has added up what the ranks of ep contribute, and the reduction has divided by the ranks that
        hold the same experts alone, which are fewer by the degree of ep than those that it divides all other gradients by.
        """
        own = {param for _, module in self.modules for param in module.parameters()}
        gradients.scale([param.grad for param in params if param in own and param.grad is not None], 1 / self.ranks)

    def outside(self, units: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
        """Those of `units` that are no module of experts and in none."""
        return [(name, unit) for name, unit in units if not any(f"{name}.".startswith(f"{path}.") for path, _ in self.modules)]

    @property
    def elsewhere(self) -> list[str]:
        """Names that other ranks of ep alone hold."""
        return [name for name, owner in self.owners.items() if self.group is not None and owner != self.group.rank()]

    def norm(self, model: nn.Module, device: torch.device) -> torch.Tensor:
        """2-norm of all gradients of `model`, those that other ranks of ep hold included; equal on every rank. A 0-dim float64 tensor."""
        grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
        norm = gradients.total_norm([grad for name, grad in grads.items() if name not in self.owners], device)
        if not self.owners:
            return norm
        own = gradients.total_norm([grad for name, grad in grads.items() if name in self.owners], device).to(device).double().square()
        dist.all_reduce(own, group=self.group)
        return (norm.to(device).double().square() + own).sqrt()

    def whole_state(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Every entry of the model's state_dict; what one rank of ep alone holds is whole, and on all. Every rank must iterate it."""
        state = model.state_dict()
        yield from ((name, value) for name, value in state.items() if name not in self.owners)
        for name, owner in self.owners.items():
            held, form = state.get(name), self.forms[name]
            value = (
                torch.empty(form.shape, dtype=form.dtype, device=self._device(model))
                if held is None
                else gradients.whole(held).contiguous()
            )
            dist.broadcast(value.view(-1).view(torch.uint8), group=self.group, group_src=owner)
            yield name, value

    def _device(self, model: nn.Module) -> torch.device:
        return next(model.parameters()).device


Plan = dict[str, Form | Listed]  # by names of modules


def planned(model: nn.Module, cfg: Config) -> Plan:
    """The experts of the whole of `model`, whose parameters are on meta, found before stages of a pipeline divide it.

    Raises:
        UserError: the model has no experts, or experts that cannot be dealt; says which, why and what to write.
    """
    ep = cfg.parallel.ep
    found = _find(model, cfg) if ep > 1 else {}
    for name, form in found.items():
        if form.experts % ep:
            divisors = " or ".join(str(n) for n in range(2, form.experts + 1) if form.experts % n == 0)
            raise UserError(
                f"parallel.ep={ep}: {name} has {form.experts} experts, which do not divide over {ep} ranks; write parallel.ep={divisors}"
            )
    if found and rank() == 0:
        log.info("experts dealt to the ranks of ep:\n  %s", "\n  ".join(lines(found, ep)))
    return found


def fused_names(plan: Plan) -> list[str]:
    """The modules whose parameters have experts of several ranks of ep."""
    return [name for name, form in plan.items() if isinstance(form, Form)]


def lines(plan: Plan, ep: int) -> list[str]:
    """Which experts are on which ranks of ep, a line for each module."""
    text = []
    for name, form in plan.items():
        each = form.experts // ep
        owners = ", ".join(f"{r * each}-{r * each + each - 1} on rank {r}" if each > 1 else f"{r} on rank {r}" for r in range(ep))
        text.append(f"{name}: experts {owners}")
    return text


def describe(model: nn.Module, cfg: Config) -> str:
    """The experts of a model, whose tensors are on meta, and which ranks of ep hold them under a configuration."""
    plan, ep = planned(model, cfg), cfg.parallel.ep
    everything = sum(param.numel() for param in model.parameters())
    dealt = sum(param.numel() for name in plan for param in model.get_submodule(name).parameters())
    head = f"{type(model).__name__}: {everything:,} parameters, {everything - dealt + dealt // ep:,} on a rank before sharding"
    return "\n".join([head, *lines(plan, ep)])


def place(model: nn.Module, mesh: Mesh, plan: Plan, forms: Mapping[str, torch.Tensor], device: torch.device) -> Experts:
    """Deal the experts of `model` to the ranks of `mesh.root["ep"]`, in place; names stay.

    Args:
        plan: from `planned`; it may name modules that other stages hold.
        forms: every parameter and buffer of the whole model by name.
    """
    axis = mesh.root["ep"]
    owners: dict[str, int] = {}
    modules: list[tuple[str, nn.Module]] = []
    for name, form in plan.items():
        module = model.get_submodule(name)
        if isinstance(form, Listed):
            each = form.experts // axis.size()
            inside = [entry for entry in forms if entry.startswith(f"{name}.")]
            owners |= {entry: int(entry.removeprefix(f"{name}.").partition(".")[0]) // each for entry in inside}
            path, _, attribute = name.rpartition(".")
            modules.append((name, expert_lists.place(name, model.get_submodule(path), attribute, form, axis.get_group(), device)))
            continue
        if not any(True for _ in module.parameters()):
            continue
        for inner in module.modules():
            for leaf, param in inner._parameters.items():
                if param is not None:
                    setattr(inner, leaf, _dealt(param, axis))
            inner.__class__ = reading_own(type(inner), inner is module)  # type: ignore[arg-type]
        module.__dict__["_expert_peers"] = Peers(form, axis.get_group(), name)
        modules.append((name, module))
    return Experts(modules, axis.size(), axis.get_group(), owners, forms)


def _dealt(param: nn.Parameter, axis: Any) -> nn.Parameter:
    sizes, _ = local_box(param.shape, axis, [Shard(0)])
    local = torch.empty(sizes, dtype=param.dtype, device=param.device)
    value = DTensor.from_local(local, axis, [Shard(0)], run_check=False, shape=param.shape, stride=param.stride())
    new = nn.Parameter(value, requires_grad=param.requires_grad)
    new.__dict__.update(param.__dict__)
    return new


# ---------------------------------------------------------------------- which modules


def _find(model: nn.Module, cfg: Config) -> Plan:
    patterns = cfg.parallel.ep_plan
    named = {name: module for name, module in model.named_modules() if name}
    if patterns == "auto":
        asked = {name: module for name, module in named.items() if isinstance(_structure(module), Form) or _is_list(name, module)}
    else:
        asked = {}
        for pattern in patterns:
            matches = {name: module for name, module in named.items() if fnmatchcase(name, pattern)}
            if not matches:
                raise UserError(f"parallel.ep_plan: {pattern!r} matches no module; their names look like {', '.join(list(named)[:4])}")
            asked |= matches
    if not asked:
        raise UserError(
            f"parallel.ep={cfg.parallel.ep}: no experts found: no module has all its parameters with the experts along dim 0 (one of them with "
            "three dims) and a forward that takes (rows, indices, weights), and no nn.ModuleList of like modules has 'expert' in its name; name "
            "such a list in parallel.ep_plan, write the mixture so, or write parallel.ep=1"
        )
    shared = {id(param) for _, param in _shared(model)}
    lists = Counter(name.rpartition(".")[0] for name, module in asked.items() if isinstance(module, nn.ModuleList))
    known: dict[Any, Form | Listed | str] = {}
    found: Plan = {}
    for name, module in asked.items():
        key = blocks.structure(module), next((param.dtype for param in module.parameters()), None)
        if key not in known:
            known[key] = _understood(module, cfg)
        form = known[key]
        if any(id(param) in shared for param in module.parameters()):
            form = "it shares parameters with another module"
        elif isinstance(form, Listed) and lists[name.rpartition(".")[0]] > 1:
            form = "the module around them has several lists"
        elif isinstance(form, Listed) and cfg.parallel.pp > 1:
            form = "a list of experts inside a stage of parallel.pp is not built yet"
        if isinstance(form, str):
            raise UserError(
                f"parallel.ep={cfg.parallel.ep}: the experts of {name} ({type(module).__name__}) cannot be dealt to ranks: {form}; "
                "name the modules that can in parallel.ep_plan=[...], or write parallel.ep=1"
            )
        found[name] = form
    return found


def _understood(module: nn.Module, cfg: Config) -> Form | Listed | str:
    """How the experts of a module are called, proven; or why they cannot be dealt to ranks."""
    if not isinstance(module, nn.ModuleList):
        form = _structure(module)
        return form if isinstance(form, str) else _disprove(module, form) or form
    if len({blocks.structure(expert) for expert in module}) != 1 or not any(True for _ in module.parameters()):
        return "they are not alike"
    return expert_lists.describe(module, POLICIES[cfg.precision.name].autocast("cpu"))


def _shared(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that have more than one name."""
    first: dict[int, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(param), name) != name:
            yield name, param


def fused(model: nn.Module) -> Iterator[tuple[nn.Module, Form]]:
    """The modules of a model, laid out or not, that hold the weights of all their experts, and how they are called."""
    for module in model.modules():
        peers = module.__dict__.get("_expert_peers")
        form = peers.form if peers is not None else _structure(module)
        if isinstance(form, Form):
            yield module, form


def _is_list(name: str, module: nn.Module) -> bool:
    return (
        isinstance(module, nn.ModuleList)
        and "expert" in name.rpartition(".")[2].lower()
        and len(module) > 1
        and any(True for _ in module.parameters())
    )


def _structure(module: nn.Module) -> Form | str:
    """How a module of experts would be called; or why it is none."""
    shapes = [param.shape for param in module.parameters()]
    if not shapes or not all(shape and shape[0] == shapes[0][0] for shape in shapes) or not any(len(shape) == 3 for shape in shapes):
        return "its parameters do not all have the experts along dim 0, with three dims for one of them"
    experts = shapes[0][0]
    parameters = inspect.signature(type(module).forward).parameters
    names = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
    if experts < 2 or len(names) != len(parameters) - 1 or len(names) < 3:
        return "its forward does not take three arguments: rows, indices of experts, and weights"
    if any(buffer.ndim and buffer.shape[0] == experts for buffer in module.buffers()):
        return "it has a buffer with an entry for each expert"
    rows, second, third = names[:3]
    if any(word in second for word in ("weight", "score", "prob", "gate")):
        second, third = third, second
    return Form(experts, (rows, second, third), tuple(names))


# ---------------------------------------------------------------------- proof

_ROWS = 6


@torch.no_grad()
def _disprove(module: nn.Module, form: Form) -> str | None:
    """Why the experts of `module` cannot be computed apart; None where they can.

    Runs a copy with two experts, and copies with one of them each. Values are drawn on the host, one module at a time.
    """
    try:
        whole = _copy(module, form.experts, slice(0, 2), None)
        parts = [_copy(module, form.experts, slice(i, i + 1), whole) for i in range(2)]
        generator = torch.Generator().manual_seed(0)
        width, dtype = _width(whole, form, generator)
    except Exception as error:  # whatever the user's module raises
        return f"a copy with two experts does not run ({type(error).__name__}: {error})"
    rows = torch.randn(_ROWS, width, generator=generator).to(dtype)
    index = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0]])
    weights = torch.rand(_ROWS, 2, generator=generator).to(dtype) + 0.1

    def close(a: torch.Tensor, b: torch.Tensor) -> bool:
        return a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-3 * float(b.double().abs().max())))

    try:
        together = _call(whole, form, rows, index, weights)
        if not isinstance(together, torch.Tensor) or together.ndim != 2 or together.shape[0] != _ROWS:
            return "its forward does not return one tensor with a row for each of the rows that it is given"
        apart = torch.zeros_like(together)
        for expert, part in enumerate(parts):
            chosen = (index == expert).nonzero()
            token, slot = chosen[:, 0], chosen[:, 1]
            here = _call(part, form, rows[token], torch.zeros(len(token), 1, dtype=torch.long), weights[token, slot, None])
            apart.index_add_(0, token, here)
        if not close(apart, together):
            return "what it computes is not the sum over the chosen experts of a function of a row, one expert and its weight"
        if not close(
            torch.cat([_call(whole, form, rows[i : i + 1], index[i : i + 1], weights[i : i + 1]) for i in range(_ROWS)]), together
        ):
            return "the result of a row depends on the rows beside it"
    except Exception as error:
        return f"its forward fails on rows dealt to experts apart ({type(error).__name__}: {error})"
    return None


def _copy(module: nn.Module, experts: int, which: slice, values: nn.Module | None) -> nn.Module:
    """`module` with some of its experts, on the host, in evaluation mode; fresh values unless `values` has them."""
    twin = copy.deepcopy(module).eval()
    sources = dict(values.named_parameters()) if values is not None else {}
    generator = torch.Generator().manual_seed(1)
    for path, inner in twin.named_modules():
        for leaf, param in inner._parameters.items():
            if param is None:
                continue
            name = f"{path}.{leaf}" if path else leaf
            if sources:
                value = sources[name].detach()[which].clone()
            else:
                scale = param.shape[-1] ** -0.5
                value = torch.randn(which.stop - which.start, *param.shape[1:], generator=generator).mul_(scale).to(param.dtype)
            inner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    set_numbers(twin, experts, which.stop - which.start)
    return twin


def _width(module: nn.Module, form: Form, generator: torch.Generator) -> tuple[int, torch.dtype]:
    """Features of a row: a size that occurs among the dims of the parameters and with which the module runs."""
    dtype = next(module.parameters()).dtype
    sizes = dict.fromkeys(size for param in module.parameters() if param.ndim == 3 for size in reversed(param.shape[1:]))
    problem: Exception | None = None
    for size in sizes:
        try:
            rows = torch.randn(1, size, generator=generator).to(dtype)
            _call(module, form, rows, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=dtype))
            return size, dtype
        except Exception as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _call(module: nn.Module, form: Form, rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
    return module(**dict(zip(form.names, (rows, index, weights), strict=True)))
