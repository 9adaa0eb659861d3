"""The user's own objects: from the dotted paths of a configuration to what they name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from paratrain.errors import UserError
from paratrain.schema import Fault, Target
from paratrain.suggest import did_you_mean

if TYPE_CHECKING:
    from paratrain.config import Config

_OPTIMIZER_KEYS = ("lr", "weight_decay", "fused")  # keys of our own schema, which `optim.build` passes on where the class has them

_INSTALL = {  # packages that shipped configurations name and that do not come with paratrain
    "pytorch_optimizer": "run: pip install 'paratrain[optim]'",
    "apex": (
        "it is on no package index, so build it where nvcc is: pip install -v --no-build-isolation "
        "--config-settings '--build-option=--cpp_ext --cuda_ext' git+https://github.com/NVIDIA/apex; "
        "or write optimizer=adamw optimizer.fused=true, torch's own fused kernel"
    ),
}


def locate(path: str, key: str = "_target_") -> Any:
    """What the dotted path names: a class, function or other attribute of a module, or a module.

    Args:
        key: the configuration key that holds the path, for the error.

    Raises:
        UserError: when a part of the path does not exist; names the nearest that does. An exception inside the user's module is theirs
            to see, and passes through.
    """
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts):
        raise UserError(f"{key}: {path!r} is no dotted path; write for instance my_package.models.Net")
    found, names = _import_prefix(parts, path, key)
    for done, name in enumerate(names, start=len(parts) - len(names)):
        if not hasattr(found, name):
            owner = ".".join(parts[:done])
            raise UserError(f"{key}: {path!r}: {owner} has no {name!r}{did_you_mean(name, _children(found))}")
        found = getattr(found, name)
    return found


def _import_prefix(parts: list[str], path: str, key: str) -> tuple[Any, list[str]]:
    """The longest prefix of `parts` that is a module, and the rest."""
    module: Any = None
    for done in range(1, len(parts) + 1):
        name = ".".join(parts[:done])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            if module is None:
                if parts[0] in _INSTALL:
                    raise UserError(f"{key}: {path!r} needs {parts[0]}, which is not installed; {_INSTALL[parts[0]]}") from None
                near = did_you_mean(parts[0], {info.name for info in pkgutil.iter_modules()})
                raise UserError(f"{key}: {path!r}: there is no module {parts[0]!r}{near} (searched: sys.path)") from None
            return module, parts[done - 1 :]
    return module, []


def _children(found: Any) -> set[str]:
    submodules = {info.name for info in pkgutil.iter_modules(getattr(found, "__path__", []))}
    return submodules | {name for name in dir(found) if not name.startswith("_")}


def instantiate(target: Mapping[str, Any], key: str = "_target_") -> Any:
    """Call what `_target_` names with the other keys as arguments; a section among these with a `_target_` is built first.

    Raises:
        UserError: as `locate`, and for arguments that it does not take.
    """
    if faults := list(_target_faults(target, key)):
        raise UserError("\n".join(map(str, faults)))
    found, arguments = locate(target["_target_"], f"{key}._target_"), _arguments(target, key)
    try:
        return found(**arguments)
    except ValueError as error:
        if isinstance(error, UserError) or not target["_target_"].startswith("paratrain."):
            raise  # where a module of the user's own fails is theirs to see
        raise UserError(f"{key}: {target['_target_']} refused its arguments: {error}") from error


def _arguments(target: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: _built(value, f"{key}.{name}") for name, value in target.items() if name != "_target_"}


def _built(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return instantiate(value, key) if "_target_" in value else {name: _built(part, f"{key}.{name}") for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_built(part, f"{key}.{i}") for i, part in enumerate(value)]
    return value


def model_fn(cfg: Config) -> Callable[[], Any]:
    """A callable without arguments that builds `cfg.model`."""
    if cfg.model is None:
        raise UserError("model: required: write model=gpt, or model._target_=my_package.Net and its arguments")
    return partial(instantiate, cfg.model, "model")


def loss_fn(cfg: Config) -> Callable[[Any, Any], Any]:
    """`cfg.loss` as loss_fn(outputs, targets): a class is built with the arguments of its section, a function gets them bound."""
    if cfg.loss is None:
        raise UserError("loss: required: write loss=cross_entropy, or loss._target_=my_package.my_loss and its arguments")
    found = locate(cfg.loss["_target_"], "loss._target_")
    if inspect.isclass(found):
        return instantiate(cfg.loss, "loss")
    return partial(found, **_arguments(cfg.loss, "loss"))


def record(configured: dict[str, Any], model_fn: Any, model: Any, loss: Any, train_data: Any, eval_data: Any) -> dict[str, Any]:
    """The configuration as it is recorded: where Python gave a model, a loss or data, their classes stand for what would have been built."""
    from paratrain.compat import own_class

    given = dict(configured)
    if not (isinstance(model_fn, partial) and model_fn.func is instantiate):
        given["model"] = {"_target_": _named(own_class(model))}
    if _named(loss) != (configured.get("loss") or {}).get("_target_"):
        given["loss"] = {"_target_": _named(loss)}
    own = configured["data"].get("source") == "custom" and (configured["data"].get("train") or {}).get("_target_") == _named(train_data)
    if not own and not type(train_data).__module__.startswith("paratrain."):
        kept = {name: configured["data"][name] for name in ("global_batch", "micro_batch_size", "shuffle", "workers")}
        sets = {"train": train_data} if eval_data is None else {"train": train_data, "eval": eval_data}
        given["data"] = {"source": "python", **{name: {"_target_": _named(part)} for name, part in sets.items()}, **kept}
    return given


def _named(thing: Any) -> str:
    """The dotted path of a function, or of the class of an object."""
    while isinstance(thing, partial):
        thing = thing.func
    found = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{found.__module__}.{found.__qualname__}"


def callbacks(cfg: Config) -> list[Any]:
    """The callbacks of `cfg`, in its order."""
    return [instantiate(target, f"callbacks.{name}") for name, target in cfg.callbacks.items()]


def check_targets(cfg: Config) -> list[Fault]:
    """What is wrong with the dotted paths of `cfg` and the arguments they are given; imports what they name."""
    faults = list(_optimizer_faults(cfg))
    sections: dict[str, Target | None] = {"model": cfg.model}
    sections |= {f"data.{name}": getattr(cfg.data, name, None) for name in ("train", "eval")}
    sections |= {f"callbacks.{name}": callback for name, callback in cfg.callbacks.items()}
    for key, target in sections.items():
        if isinstance(target, Mapping):
            faults += _target_faults(target, key)
    if cfg.loss is not None:
        faults += _target_faults(cfg.loss, "loss", bound=2)
    return faults


def _target_faults(target: Mapping[str, Any], key: str, bound: int = 0) -> Iterator[Fault]:
    """Faults of a section with a `_target_`. A function keeps its first `bound` parameters for whoever calls it."""
    for name, value in target.items():
        yield from _nested_faults(value, f"{key}.{name}")
    found, missing = _found(target["_target_"], f"{key}._target_")
    if missing is not None:
        yield missing
        return
    names = [name for name in target if name != "_target_"]
    parameters = _parameters(found)
    if parameters is None:
        return
    if not inspect.isclass(found):
        parameters = dict(list(parameters.items())[bound:])
    yield from _argument_faults(names, parameters, target["_target_"], key)
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if required and name not in target:
            yield Fault(f"{key}.{name}", f"required by {target['_target_']}: write {key}.{name}=...")


def _nested_faults(value: Any, key: str) -> Iterator[Fault]:
    if isinstance(value, Mapping) and "_target_" in value:
        yield from _target_faults(value, key)
    elif isinstance(value, Mapping | list):
        for name, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _nested_faults(part, f"{key}.{name}")


def _optimizer_faults(cfg: Config) -> Iterator[Fault]:
    own = ("_target_", "lr", "weight_decay", "no_decay", "fused", "groups", "others")
    sections = [("optimizer", cfg.optimizer.target, list(cfg.optimizer.args))]
    for i, group in enumerate(cfg.optimizer.groups):
        options = [name for name in group.options if name != "_target_"]
        sections.append((f"optimizer.groups.{i}", group.options.get("_target_", cfg.optimizer.target), options))
    others = [name for name in cfg.optimizer.others if name != "_target_"]
    sections.append(("optimizer.others", cfg.optimizer.others.get("_target_", "torch.optim.AdamW"), others))
    for key, path, names in sections:
        found, missing = _found(path, f"{key}._target_")
        if missing is not None:
            yield missing
        elif (parameters := _parameters(found)) is not None:
            accepted = dict(list(parameters.items())[1:])  # the first takes the parameters to optimise
            yield from _argument_faults(names, accepted, path, key, own if key == "optimizer" else (*_OPTIMIZER_KEYS, "match"))


def _found(path: Any, key: str) -> tuple[Any, Fault | None]:
    try:
        found = locate(str(path), key)
    except UserError as error:
        return None, Fault(key, str(error).removeprefix(f"{key}: "))
    return (found, None) if callable(found) else (None, Fault(key, f"{path!r} is a {type(found).__name__}, not a class or function"))


def _parameters(found: Any) -> dict[str, inspect.Parameter] | None:
    """Parameters by name; None where Python does not know them."""
    try:
        return dict(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        return None


def _argument_faults(
    names: list[str], parameters: Mapping[str, inspect.Parameter], path: str, key: str, own: tuple[str, ...] = ()
) -> Iterator[Fault]:
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    accepted = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_POSITIONAL]
    for name in names:
        if name not in accepted:
            known = dict.fromkeys((*own, *accepted))
            yield Fault(f"{key}.{name}", f"{path} takes no such argument{did_you_mean(name, known)} (it takes {', '.join(accepted)})")
