"""Configuration drift: what a job was told differently from the one that wrote the checkpoint it goes on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from paratrain.config import Config
from paratrain.errors import UserError
from paratrain.schema import to_dict

SAFE = (
    "app.*",
    "callbacks.*",
    "checkpoint.*",
    "compile",
    "compile_fallback",
    "context.*",
    "data.cache_dir",
    "data.micro_batch_size",
    "data.workers",
    "ema*",
    "logger.*",
    "memory.*",
    "output_dir",
    "parallel.*",
    "pipeline.*",
    "resume",
    "resume_force",
    "scheduler.total_steps",
    "strategy.*",
    "trainer.deterministic",
    "trainer.device",
    "trainer.eval_*",
    "trainer.log_every",
    "trainer.max_*",
    "trainer.nonfinite",
    "trainer.prove",
    "trainer.spike*",
    "trainer.*timeout*",
    "trainer.update_in_backward",
    "verify.*",
)
"""Globs of keys that change how training runs, and not what is computed."""

_NEVER = ("seed", "data.global_batch", "data.shuffle")
"""Keys that no `resume_force` can change: the data order would not continue. The trainer refuses them with that reason."""


def check(path: Any, saved: Any, now: Mapping[str, Any], forced: Sequence[str]) -> list[str]:
    """The lines of the difference that are allowed, for the log.

    Args:
        path: the checkpoint, for the message.
        saved: the configuration kept in it; not trusted, only compared and printed. None compares nothing.
        now: the configuration of this job in the same form, secrets replaced.
        forced: globs of keys that may differ (`resume_force`); a section stands for all its keys.

    Raises:
        UserError: keys differ that change what is computed; shows the difference.
    """
    if not isinstance(saved, Mapping):
        return []
    default = dict(_flat(to_dict(Config())))  # a key that one of two versions does not know stands there for its default
    before, after = default | dict(_flat(saved)), default | dict(_flat(now))
    changed = [key for key in dict.fromkeys((*before, *after)) if key not in before or key not in after or before[key] != after[key]]
    lines = {key: f"{key}: {_shown(before, key)} -> {_shown(after, key)}" for key in changed}
    refused = [key for key in changed if not _matches(key, (*SAFE, *_NEVER)) and not _matches(key, forced)]
    if refused:
        shown = "\n".join(f"  {lines[key]}" for key in refused)
        raise UserError(
            f"resume={path}: the configuration changed since that checkpoint was written, so that training would not go on as it began:\n"
            f"{shown}\nRestore it, or accept the change with resume_force=[{','.join(refused)}]"
        )
    return list(lines.values())


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _flat(part, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return f"{values[key]!r:.200}" if key in values else "(absent)"


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) or key.startswith(f"{pattern}.") for pattern in patterns)
