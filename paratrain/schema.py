"""Plain data <-> frozen dataclasses, strictly: nothing is dropped, guessed or half accepted, and every fault is found in one pass.

A field may be bool, int, float, str, a Literal, a dataclass, a union of dataclasses told apart by a field with a one-valued
Literal (`name`, `source`), `X | None`, `list[X]`, `dict[str, X]`, a plain dict, a `Target`, or `Annotated[str, check, words]`:
check raises ValueError, words say what is expected. `config.key` gives a field its documentation, minimum, alias, and the keys
that have no field of their own.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union

from paratrain.errors import ConfigError
from paratrain.redact import redact
from paratrain.suggest import did_you_mean

T = TypeVar("T")

MISSING = "???"  # what YAML files write for a value that the user must give
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # 1e-3 is text in YAML 1.1
_FAULTY: Any = object()


class Target(dict):
    """`{_target_: dotted.path, **arguments}`: an object of the user's own, built by `paratrain.build.instantiate`."""


class Fault(NamedTuple):
    """What is wrong with one key.

    Attributes:
        key: dotted, as an override would write it.
        message: the value, the reason and the fix.
    """

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


def load(cls: type[T], data: Any) -> tuple[T | None, list[Fault]]:
    """An instance of `cls`, and what is wrong with `data`.

    Every faulty key has its default in the instance, which is None where there is no default to fall back on.
    """
    faults: list[Fault] = []
    value = _section(cls, data, "", faults)
    return (None if value is _FAULTY else value), faults


def from_dict(cls: type[T], data: Any) -> T:
    """An instance of the dataclass `cls` from nested plain data.

    Raises:
        ConfigError: every unknown key, wrong type, bad value and missing value, one a line, under its full dotted key.
    """
    value, faults = load(cls, data)
    if faults:
        raise ConfigError([str(fault) for fault in faults])
    assert value is not None
    return value


def to_dict(value: Any) -> Any:
    """The plain data from which `from_dict` makes `value` again."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            part = to_dict(getattr(value, field.name))
            result.update(part if field.metadata.get("rest") else {yaml_name(field): part})
        return result
    if isinstance(value, Mapping):
        return {key: to_dict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(part) for part in value]
    return value


def yaml_name(field: dataclasses.Field) -> str:
    """The key of `field` in YAML."""
    return field.metadata.get("alias") or field.name


@cache
def kinds(cls: type) -> dict[str, Any]:
    """Field name -> resolved annotation of the dataclass `cls`."""
    return typing.get_type_hints(cls, include_extras=True)


def members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union; the kind itself where it is none."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def variants(kind: Any) -> list[type]:
    """The dataclasses among the alternatives of `kind`."""
    return [member for member in members(kind) if dataclasses.is_dataclass(member) and isinstance(member, type)]


@cache
def tag(cls: type) -> tuple[str, str] | None:
    """(field, value) that tells the dataclass `cls` from the others of its union, if it has one."""
    for name, kind in kinds(cls).items():
        if typing.get_origin(kind) is Literal and len(typing.get_args(kind)) == 1 and name in ("name", "source"):
            return name, typing.get_args(kind)[0]
    return None


def describe(kind: Any) -> str:
    """What a value of `kind` is, in a person's words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return args[2]
    if len(members(kind)) > 1:
        return " or ".join(dict.fromkeys(describe(member) for member in members(kind)))
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is list:
        return f"list of {describe(args[0])}"
    if dataclasses.is_dataclass(kind):
        return "a section of keys"
    if kind is Target:
        return "a section with `_target_`"
    words = {bool: "true or false", int: "int", float: "float", str: "str", types.NoneType: "null"}
    return words.get(kind, "a section of keys")


def _convert(kind: Any, value: Any, key: str, faults: list[Fault]) -> Any:
    """`value` as a `kind`, or _FAULTY and at least one more fault."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, str) and value == MISSING:
        return _fault(faults, key, f"required: write {key}=...")
    if len(members(kind)) > 1:
        return _union(kind, value, key, faults)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _section(kind, value, key, faults)
    if origin is Annotated:
        return _checked(kind, value, key, faults)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        return _fault(
            faults, key, f"expected one of {', '.join(map(str, args))}; got {_got(value)}{did_you_mean(str(value), map(str, args))}"
        )
    if kind is Target:
        return _target(value, key, faults)
    if kind is dict or origin is dict:
        return _mapping(args[1] if args else Any, value, key, faults)
    if origin is list:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            return _wrong(faults, kind, value, key)
        items = [_convert(args[0], item, f"{key}.{i}", faults) for i, item in enumerate(value)]
        return _FAULTY if any(item is _FAULTY for item in items) else items
    if kind is Any:
        return _plain(value, key, faults)
    return _scalar(kind, value, key, faults)


def _scalar(kind: Any, value: Any, key: str, faults: list[Fault]) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (int, float) and isinstance(value, str) and _EXPONENT.fullmatch(value):
        value, number = float(value), True
    if kind is float and number and value == value:
        return float(value)
    if kind is int and number and float(value).is_integer():
        return int(value)
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a run or directory named 2024
    if kind in (bool, str, types.NoneType) and isinstance(value, kind):
        return value
    return _wrong(faults, kind, value, key)


def _checked(kind: Any, value: Any, key: str, faults: list[Fault]) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(int(value)) if float(value).is_integer() else str(value)
    if not isinstance(value, str):
        return _wrong(faults, kind, value, key)
    try:
        typing.get_args(kind)[1](value)
    except ValueError as error:
        return _fault(faults, key, str(error))
    return value


def _union(kind: Any, value: Any, key: str, faults: list[Fault]) -> Any:
    options = [member for member in members(kind) if member is not types.NoneType]
    if value is None and len(options) < len(members(kind)):
        return None
    sections = variants(kind)
    if isinstance(value, Mapping) and len(sections) > 1:
        return _variant(sections, value, key, faults)
    if len(options) == 1:
        return _convert(options[0], value, key, faults)
    tries: list[list[Fault]] = []
    for option in options:
        tries.append([])
        result = _convert(option, value, key, tries[-1])
        if not tries[-1]:
            return result
    inside = [found for found in tries if any(fault.key != key for fault in found)]
    if inside:  # a list of the right kind with a wrong element says more than the union as a whole
        faults += inside[0]
        return _FAULTY
    return _wrong(faults, kind, value, key)


def _variant(sections: list[type], value: Mapping, key: str, faults: list[Fault]) -> Any:
    by_tag = {marker[1]: section for section in sections if (marker := tag(section))}
    field = next(marker[0] for section in sections if (marker := tag(section)))
    chosen = value.get(field)
    if chosen is None:
        return _fault(faults, f"{key}.{field}", f"required: one of {', '.join(by_tag)}")
    if chosen not in by_tag:
        return _fault(
            faults, f"{key}.{field}", f"expected one of {', '.join(by_tag)}; got {_got(chosen)}{did_you_mean(str(chosen), by_tag)}"
        )
    others = {name: section for name, section in by_tag.items() if name != chosen}
    return _section(by_tag[chosen], value, key, faults, others)


def _section(cls: type, value: Any, key: str, faults: list[Fault], others: Mapping[str, type] = types.MappingProxyType({})) -> Any:
    if not isinstance(value, Mapping):
        return _wrong(faults, cls, value, key)
    fields = {yaml_name(field): field for field in dataclasses.fields(cls) if not field.metadata.get("rest")}
    rest = next((field for field in dataclasses.fields(cls) if field.metadata.get("rest")), None)
    result: dict[str, Any] = {rest.name: {}} if rest else {}
    complete = True
    for name, part in value.items():
        path = f"{key}.{name}" if key else str(name)
        if (field := fields.get(name)) is not None:
            loaded = _bounded(field, _convert(kinds(cls)[field.name], _tagged(field, part), path, faults), path, faults)
            if loaded is not _FAULTY:
                result[field.name] = loaded
            else:
                complete &= not _required(field)
        elif rest:
            loaded = _plain(part, path, faults)
            if loaded is not _FAULTY:
                result[rest.name][str(name)] = loaded
        else:
            faults.append(Fault(path, _unknown(str(name), cls, fields, others)))
    for name, field in fields.items():
        if name not in value and _required(field):
            path = f"{key}.{name}" if key else name
            faults.append(Fault(path, f"required: write {path}=..."))
            complete = False
    return cls(**result) if complete else _FAULTY


def _tagged(field: dataclasses.Field, value: Any) -> Any:
    """A section that does not say which of a union it is, is the default one."""
    default: Any = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    marker = tag(type(default)) if dataclasses.is_dataclass(default) and not isinstance(default, type) else None
    return {marker[0]: marker[1], **value} if marker and isinstance(value, Mapping) else value


def _unknown(name: str, cls: type, fields: Mapping[str, Any], others: Mapping[str, type]) -> str:
    owners = [other for other, section in others.items() if name in (yaml_name(f) for f in dataclasses.fields(section))]
    if owners:
        marker = tag(cls)
        assert marker is not None
        return f"no key of {marker[0]}={marker[1]}; it belongs to {', '.join(owners)}"
    return f"unknown key{did_you_mean(name, fields)} (known: {', '.join(fields)})"


def _bounded(field: dataclasses.Field, value: Any, key: str, faults: list[Fault]) -> Any:
    minimum = field.metadata.get("minimum")
    if minimum is not None and isinstance(value, int | float) and value < minimum:
        return _fault(faults, key, f"must be at least {minimum:g}; got {value}")
    return value


def _mapping(kind: Any, value: Any, key: str, faults: list[Fault]) -> Any:
    if not isinstance(value, Mapping):
        return _wrong(faults, dict, value, key)
    result = {str(name): _convert(kind, part, f"{key}.{name}", faults) for name, part in value.items()}
    return {name: part for name, part in result.items() if part is not _FAULTY}


def _target(value: Any, key: str, faults: list[Fault]) -> Any:
    if not isinstance(value, Mapping):
        return _wrong(faults, Target, value, key)
    if not isinstance(value.get("_target_"), str):
        return _fault(faults, f"{key}._target_", "required: the dotted path of what to build, for instance my_package.models.Net")
    plain = _plain(value, key, faults)
    return plain if plain is _FAULTY else Target(plain)


def _plain(value: Any, key: str, faults: list[Fault]) -> Any:
    """A copy of data that the schema says nothing about; only a missing value is a fault."""
    if isinstance(value, str) and value == MISSING:
        return _fault(faults, key, f"required: write {key}=...")
    if isinstance(value, Mapping):
        parts = {str(name): _plain(part, f"{key}.{name}", faults) for name, part in value.items()}
        return _FAULTY if any(part is _FAULTY for part in parts.values()) else parts
    if isinstance(value, list | tuple):
        items = [_plain(part, f"{key}.{i}", faults) for i, part in enumerate(value)]
        return _FAULTY if any(item is _FAULTY for item in items) else items
    return value


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _wrong(faults: list[Fault], kind: Any, value: Any, key: str) -> Any:
    hint = ""
    if isinstance(value, str) and _is_number(value) and {int, float} & set(members(kind)):
        hint = "; write it without quotes, and what comes from the environment as ${oc.decode:${oc.env:NAME}}"
    return _fault(faults, key, f"expected {describe(kind)}; got {_got(value)}{hint}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _got(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"a section of keys ({', '.join(map(str, value))})" if value else "an empty section"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{reprlib.repr(redact(value))} ({type(value).__name__})"


def _fault(faults: list[Fault], key: str, message: str) -> Any:
    faults.append(Fault(key, message))
    return _FAULTY
