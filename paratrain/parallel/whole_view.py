"""Split weights and gradients as the user's program sees them between steps: whole tensors, whatever the layout.

Inside the engine a split parameter is a DTensor. Between its steps the same object is a `LaidOut`: operations that work on each element
alone run on what each rank holds; any other runs on the whole tensor, gathered, and what it wrote goes back into the parts. So clipping
weights, setting a row to zero, `torch.nn.init`, norms and `load_state_dict` mean what they mean on one process. Every rank must run them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from paratrain import agreement, gradients
from paratrain.compat import plain_functions
from paratrain.errors import UserError
from paratrain.optim.matrix import part

if TYPE_CHECKING:
    from paratrain.layout import Layout

_GRAD: Any = Tensor.grad  # the property itself
_QUESTIONS = """requires_grad_ register_hook register_post_accumulate_grad_hook size dim ndimension numel nelement stride storage_offset element_size
    is_floating_point is_complex is_contiguous is_signed is_same_size is_pinned is_shared get_device retain_grad data_ptr __hash__ __len__ __set__
    _is_view is_inference is_nonzero _has_compatible_shallow_copy_type backward"""
_AS_IT_IS = frozenset(_QUESTIONS.split())
_COPIES = frozenset(["T", "mT", "H", "mH", "real", "imag"])  # properties that are operations
_ELEMENTWISE = """add sub rsub mul div true_divide neg abs square sqrt rsqrt pow exp log sign sigmoid tanh relu clamp clamp_min clamp_max clip lerp
    addcmul addcdiv zero fill copy clone zeros_like ones_like full_like empty_like maximum minimum where nan_to_num reciprocal round floor ceil
    isfinite isnan isinf eq ne lt le gt ge logical_not logical_and logical_or masked_fill
    foreach_add foreach_sub foreach_mul foreach_div foreach_neg foreach_abs foreach_sqrt foreach_pow foreach_lerp foreach_addcmul foreach_addcdiv
    foreach_zero foreach_copy foreach_clamp_min foreach_clamp_max foreach_sign foreach_reciprocal foreach_maximum foreach_minimum"""
_EACH_ELEMENT = frozenset(_ELEMENTWISE.split())
_OPERATORS = {
    f"__{before}{name}__": what
    for name, what in {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow"}.items()
    for before in ("", "r", "i")
} | {"__neg__": "neg", "__eq__": "eq", "__ne__": "ne", "__lt__": "lt", "__le__": "le", "__gt__": "gt", "__ge__": "ge"}
_DRAWS = frozenset(["normal_", "uniform_", "bernoulli_", "exponential_", "random_", "log_normal_", "cauchy_", "geometric_"])


@dataclass(eq=False)
class Source:
    """What all aliases of a split tensor share.

    Attributes:
        views: those it belongs to.
        name: of the parameter.
        natural: (dim, order) where row i of what is kept is row order[i] of the user's; None: they are the same.
        writes: how often the program wrote into it.
        param: the parameter itself, into whose gradient a backward goes; None for its gradient, and for copies.
    """

    views: Views
    name: str
    natural: tuple[int, Tensor] | None = None
    writes: int = 0
    param: Tensor | None = None

    def stamp(self) -> tuple[int, int]:
        return self.views.steps, self.writes


class Views:
    """The split parameters of a model. As a context: the engine is at work, and they are plain DTensors.

    Args:
        layout: of the model.
        group: the ranks that have other samples.

    Attributes:
        steps: how often the engine changed the weights.
    """

    def __init__(self, model: nn.Module, layout: Layout, group: dist.ProcessGroup):
        self.group, self.used, self.steps = group, layout.used, 0
        self._settle = layout.settle
        self._depth = 0
        orders = layout.placed.orders
        named = (
            model.named_parameters() if not layout.experts.owners else ()
        )  # a rank of ep holds experts that others do not have by that name
        self._params = [(name, param) for name, param in named if isinstance(param, DTensor)]
        self._kinds: list[type] = [DTensor] * len(self._params)  # what they are to the engine: plain, or watched in the course of a step
        for name, param in self._params:
            param._source = Source(self, name, orders.get(name), param=param)  # type: ignore[attr-defined]
        if self._params:
            self._outside: list[list[Any]] = []
            for module in model.modules():
                if module is model or isinstance(module, FSDPModule):
                    module.register_forward_pre_hook(self._enter_forward, prepend=True)
                    module.register_forward_hook(self._leave_forward, always_call=True)
        self._show()

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1 and self._params:
            self._hide()

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and self._params:
            self._show()

    @property
    def at_work(self) -> bool:
        """Whether the engine runs, and not the program."""
        return self._depth > 0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The program's own functions run: parameters are whole to them, in the midst of the engine's work, too."""
        self._show()
        try:
            yield
        finally:
            self._hide()

    def _show(self) -> None:
        for number, (_, param) in enumerate(self._params):
            self._kinds[number] = type(param)
            param.__class__ = LaidOut  # type: ignore[assignment]

    def _hide(self) -> None:
        for (_, param), kind in zip(self._params, self._kinds, strict=True):
            param.__class__ = kind
            grad = param.grad
            if type(grad) is LaidOut:
                grad.__class__ = DTensor  # type: ignore[assignment]

    def _enter_forward(self, module: nn.Module, args: Any) -> None:
        self.__enter__()
        contexts: list[Any] = []
        if torch.is_inference_mode_enabled():  # what is gathered is kept, and training could not use tensors of this mode
            contexts = [torch.inference_mode(False), torch.no_grad()]
            for context in contexts:
                context.__enter__()
        self._outside.append(contexts)

    def _leave_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._outside:
            return
        for context in reversed(self._outside.pop()):
            context.__exit__(None, None, None)
        if self._depth == 1 and not torch.is_grad_enabled():
            self._settle()
        self.__exit__()


class LaidOut(DTensor):
    """A split parameter or gradient, shown whole. Instances are DTensors whose class `Views` has changed, and results of operations."""

    __slots__ = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if (name == "__get__" and func.__self__.__name__ not in _COPIES) or name in _AS_IT_IS:
            with plain_functions():
                return func(*args, **(kwargs or {}))
        return _compute(func, name, args, kwargs or {})

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return _alias(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.dtype != self.dtype:
            raise UserError(
                f"{_source(self).name} is {self.dtype} in the layout, and cannot become {value.dtype} after set-up; write precision=..., which says what "
                "everything is kept and computed in, and leave model.half(), .bfloat16() and .to() out"
            )
        _write(self, value)

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        with plain_functions():
            grad = _GRAD.__get__(self)
        if type(grad) is DTensor:
            source = _source(self)
            grad._source = Source(source.views, f"the gradient of {source.name}", source.natural)  # type: ignore[attr-defined]
            grad.__class__ = LaidOut  # type: ignore[assignment]
        return grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None and not isinstance(value, DTensor):
            value = _like(self, _local_part(self, _plain(value)), None)
        with plain_functions():
            _GRAD.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        """The whole tensor, in the user's order; every rank must call it."""
        return _gather(self) if grad_placements is None else super().full_tensor(grad_placements=grad_placements)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LaidOut({_source(self).name}: {tuple(self.shape)}, {self.dtype}, {self.placements} over {self.device_mesh.size()} ranks)"

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        source = _source(self)
        with plain_functions():
            made: Any = _dtensor(self, self._local_tensor.detach().clone())
            made = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        made._source, made.__class__ = Source(source.views, f"a copy of {source.name}", source.natural), LaidOut
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UserError(
            f"{_source(self).name} is split over ranks, and a pickle of it would hold this rank's part alone; write engine.full_state_dict() "
            "(or engine.save(path)), which every rank must call, and save what rank 0 gets"
        )


class Part(Tensor):
    """A view of a whole weight, as an index or a reshape gives: what is written into it is written into the weight."""

    _whole: _Whole

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name == "__get__" and func.__self__.__name__ not in (*_COPIES, "data"):
            with plain_functions():
                return func(*args, **(kwargs or {}))
        return _compute(func, name, args, kwargs or {})


@dataclass(eq=False)
class _Whole:
    """A gathered tensor: whose, of when, and its values."""

    owner: LaidOut
    stamp: tuple[int, int]
    values: Tensor

    def refresh(self) -> None:
        if self.stamp != _source(self.owner).stamp():
            self.values.copy_(_gather(self.owner))
            self.stamp = _source(self.owner).stamp()


def _compute(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    if name == "detach":
        return _alias(args[0]) if isinstance(args[0], LaidOut) else _on_whole(func, name, args, kwargs)
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    tracked = torch.is_grad_enabled() and any(_requires_grad(leaf) for leaf in leaves)
    if name == "copy_" and not tracked and isinstance(args[0], LaidOut) and args[0].shape == args[1].shape:
        _write(args[0], args[1])
        return args[0]
    bare = _OPERATORS.get(name, name.strip("_"))
    if bare in _EACH_ELEMENT and not tracked and _alike(leaves, bare.startswith("foreach")):
        return _on_parts(func, name, args, kwargs)
    return _on_whole(func, name, args, kwargs)


def _requires_grad(leaf: Tensor) -> bool:
    with plain_functions():
        return leaf.requires_grad


def _alike(leaves: Iterable[Tensor], lists: bool) -> bool:
    """Whether operations on each element may run on the parts: those of all tensors are on the same ranks, but for single numbers."""
    split = [leaf for leaf in leaves if isinstance(leaf, DTensor)]
    others = [leaf for leaf in leaves if not isinstance(leaf, DTensor)]
    if not split or any(isinstance(leaf, Part) or leaf.ndim for leaf in others):
        return False
    if lists:
        return len({(_layout(leaf)[0], _layout(leaf)[1]) for leaf in split}) == 1 and all(_layout(leaf)[3] is None for leaf in split)
    first = _layout(split[0])
    return all(_layout(leaf)[:3] == first[:3] and _layout(leaf)[3] is first[3] for leaf in split[1:])


def _layout(leaf: DTensor) -> tuple[Any, ...]:
    source = getattr(leaf, "_source", None)
    with plain_functions():
        return leaf.device_mesh, leaf.placements, leaf.shape, source.natural if source is not None else None


def _on_parts(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    owners: dict[int, LaidOut] = {}

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        local = leaf._local_tensor.detach()
        owners[id(local)] = leaf  # type: ignore[assignment]
        kept.append(local)
        return local

    kept: list[Tensor] = []
    inner, named = tree_map(take, (args, kwargs))
    with torch.no_grad():
        result = func(*inner, **named)
    first = next(iter(owners.values()))
    if (
        (name.endswith("_") and not name.endswith("__"))
        or name in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__")
        or "out" in kwargs
    ):
        for leaf in tree_leaves((args[:1], kwargs.get("out"))):
            if isinstance(leaf, LaidOut):
                _source(leaf).writes += 1
    lists = list(owners.values()) if isinstance(result, list | tuple) else []
    sizes = {id(leaf): leaf for leaf in lists}

    def back(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in owners:
            return owners[id(leaf)]
        like = next((each for each in sizes.values() if each._local_tensor.shape == leaf.shape), first)
        source = _source(like)
        return _like(like, leaf, Source(source.views, source.name, source.natural))

    return tree_map(back, result)


def _on_whole(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    wholes: dict[int, tuple[_Whole, int]] = {}
    given: dict[int, Any] = {}

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, LaidOut | Part):
            return leaf
        if id(leaf) not in given:
            if isinstance(leaf, Part):
                whole = leaf._whole
                whole.refresh()
                with plain_functions():
                    given[id(leaf)] = leaf.as_subclass(Tensor)
            else:
                whole = _Whole(leaf, _source(leaf).stamp(), _gather(leaf))
                if torch.is_grad_enabled() and _requires_grad(leaf):
                    whole.values.requires_grad_().register_hook(lambda grad: _accumulate(leaf, grad))
                given[id(leaf)] = whole.values
            wholes[id(whole)] = whole, whole.values._version
        return given[id(leaf)]

    inner, named = tree_map(take, (args, kwargs))
    result = func(*inner, **named)
    for whole, version in wholes.values():
        if whole.values._version != version:
            if name in _DRAWS:
                for dim in range(whole.owner.device_mesh.ndim):
                    dist.broadcast(whole.values, group=whole.owner.device_mesh.get_group(dim), group_src=0)
            _write(whole.owner, whole.values)
            whole.stamp = _source(whole.owner).stamp()
    if not isinstance(result, Tensor | list | tuple):
        return result
    places = {whole.values.untyped_storage().data_ptr(): whole for whole, _ in wholes.values() if whole.values.numel()}
    back = {id(value): key for key, value in given.items()}
    leaves = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LaidOut | Part)}

    def give(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.requires_grad:
            return leaf
        if id(leaf) in back:
            return leaves[back[id(leaf)]]
        whole = places.get(leaf.untyped_storage().data_ptr()) if leaf.numel() and leaf.layout is torch.strided else None
        if whole is None:
            return leaf
        view = leaf.as_subclass(Part)
        view._whole = whole
        return view

    return tree_map(give, result)


def _source(tensor: Any) -> Source:
    return tensor._source


def _plain(value: Any) -> Tensor:
    if isinstance(value, LaidOut):
        return _gather(value)
    with plain_functions():
        return value.as_subclass(Tensor) if isinstance(value, Part) else value


@torch.no_grad()
def _gather(tensor: Any) -> Tensor:
    """The whole of it, in the user's order, in memory of its own."""
    local, natural = tensor._local_tensor, _source(tensor).natural
    if not _source(tensor).views.at_work:
        agreement.note_reading(tensor)
    whole = gradients.whole(_dtensor(tensor, local.detach()))
    if natural is not None:
        dim, order = natural
        return whole.index_select(dim, torch.argsort(order).to(whole.device))
    return whole.clone() if whole.untyped_storage().data_ptr() == local.untyped_storage().data_ptr() else whole


@torch.no_grad()
def _local_part(tensor: Any, whole: Tensor) -> Tensor:
    """This rank's part of a whole value in the user's order."""
    if whole.shape != tensor.shape:
        raise UserError(f"{_source(tensor).name} has shape {tuple(tensor.shape)}; it cannot be given a value of shape {tuple(whole.shape)}")
    natural, local = _source(tensor).natural, tensor._local_tensor
    whole = whole.detach()
    if natural is not None:
        whole = whole.index_select(natural[0], natural[1].to(whole.device))
    mine: Any = part(whole.to(tensor.device_mesh.device_type), _dtensor(tensor, local.detach()))
    return mine._local_tensor.to(local.device)


@torch.no_grad()
def _write(tensor: Any, value: Any) -> None:
    """Give a split tensor the value of a whole one, or of one that is split alike."""
    same = isinstance(value, DTensor) and _layout(value)[:3] == _layout(tensor)[:3]
    if same and isinstance(value, LaidOut) and _source(value).natural is not _source(tensor).natural:
        same = False
    tensor._local_tensor.copy_(value._local_tensor if same else _local_part(tensor, _plain(value)))
    _source(tensor).writes += 1


def _alias(tensor: Any) -> LaidOut:
    return _like(tensor, tensor._local_tensor.detach(), _source(tensor))


def _like(tensor: Any, local: Tensor, source: Source | None) -> Any:
    made = _dtensor(tensor, local)
    if source is not None:
        made._source = source
        made.__class__ = LaidOut
    return made


def _dtensor(tensor: Any, local: Tensor) -> Any:
    with plain_functions(), torch.no_grad():
        return DTensor.from_local(local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


@torch.no_grad()
def _accumulate(tensor: Any, grad: Tensor) -> None:
    """Add what a backward gives of the whole of a parameter, on each rank for its own samples, to the gradient of its parts."""
    source = _source(tensor)
    views, param = source.views, source.param
    total = grad.detach().clone()
    if views.group.size() > 1:
        dist.all_reduce(total.div_(views.group.size()), group=views.group)
    mine = _local_part(tensor, total)
    with plain_functions():
        held: Any = _GRAD.__get__(param)
        if held is None:
            _GRAD.__set__(param, _dtensor(tensor, mine))
        else:
            held._local_tensor.add_(mine)
    if views.used is not None and param is not None:
        views.used.add(param)
