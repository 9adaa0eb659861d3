"""The text of --help: every group with its choices, every key with its type, value and meaning."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from paratrain import schema
from paratrain.config import Config
from paratrain.launch import this_program
from paratrain.redact import redact

_FLAGS = """\
flags
  --config-dir DIR        a directory of yours whose groups are added to these; its files win over those of the same name
  --config-name NAME      your own root file in it, instead of paratrain.yaml
  --cfg job               print the composed configuration and stop; --cfg hydra for Hydra's part of it
  --multirun, -m          a job for every combination of key=a,b,c in this process; over several processes: python -m paratrain sweep
  --hydra-help            what else Hydra understands
"""


def text(groups: Mapping[str, tuple[list[str], str | None]], cfg: Config) -> str:
    """
    Args:
        groups: group -> its choices, and the one in use.
        cfg: the configuration whose values are shown.
    """
    lines = [
        f"usage: torchrun --nproc_per_node=2 {this_program()} [group=choice ...] [key=value ...] [flags]",
        "",
        "groups, with the choice in use in brackets",
    ]
    width = max(map(len, groups), default=0)
    for group, (choices, used) in sorted(groups.items()):
        marked = " ".join(f"[{choice}]" if choice == used else choice for choice in choices)
        lines.append(f"  {group:{width}}  {marked}")
    rows = list(_section(Config, redact(schema.to_dict(cfg)), ""))
    left = max(len(key) for key, _, doc in rows if doc is not None)
    middle = min(44, max(len(kind) for _, kind, doc in rows if doc is not None))
    lines += ["", "keys: type = value in use, meaning"]
    for key, kind, doc in rows:
        lines.append(f"  {key:{left}}  {kind:{middle}}  {doc}" if doc is not None else f"\n  {key}  {kind}")
    return "\n".join([*lines, "", _FLAGS])


def _section(cls: type, values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str, str | None]]:
    """(key, type and value, meaning) of every key of `cls`; (key, title, None) where a section begins."""
    for field in dataclasses.fields(cls):
        kind, name, doc = schema.kinds(cls)[field.name], schema.yaml_name(field), field.metadata["doc"]
        key = f"{prefix}{name}"
        if field.metadata["rest"]:
            yield f"{prefix}*", "", doc
            continue
        value = values.get(name)
        sections = schema.variants(kind)
        if not sections:
            is_target = schema.Target in schema.members(kind)
            yield key, _short(kind) if is_target else f"{_short(kind)} = {_shown(value)}", doc
            if is_target and value:
                yield from ((f"{key}.{argument}", f"= {_shown(part)}", "") for argument, part in value.items())
            continue
        yield key, f"({doc}{'; now null' if value is None else ''})", None
        chosen = next((cls for cls in sections if (schema.tag(cls) or ("", ""))[1] == (value or {}).get(_tag_field(cls))), sections[0])
        yield from _section(chosen, value or _defaults(chosen), f"{key}.")
        for other in sections:
            if other is not chosen:
                mine = {row[0] for row in _section(chosen, {}, f"{key}.")}
                own = [row for row in _section(other, _defaults(other), f"{key}.") if row[0] not in mine]
                marker = schema.tag(other)
                yield from ((row[0], row[1], f"{row[2]} [{name}={marker[1] if marker else ''}]") for row in own)


def _tag_field(cls: type) -> str | None:
    marker = schema.tag(cls)
    return marker[0] if marker else None


def _defaults(cls: type) -> dict[str, Any]:
    return schema.to_dict(cls())


def _short(kind: Any) -> str:
    words = {int: "int", float: "float", str: "str", bool: "bool", schema.Target: "_target_", dict: "keys"}
    args = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Annotated:
        return "time"
    if len(schema.members(kind)) > 1:
        return " | ".join("null" if member is type(None) else _short(member) for member in schema.members(kind))
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, args))
    if typing.get_origin(kind) in (list, dict):
        return f"{typing.get_origin(kind).__name__} of {_short(args[-1])}"
    return words.get(kind, "section")


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
