"""Removes secrets from what is written about a job: configurations, overrides, and lines of logs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

HIDDEN = "[redacted]"

# Parts of a name that say by themselves that its value is a secret, whatever the type of the value.
_CERTAIN = re.compile(
    r"(?i)secret|passw|pass_?(?:phrase|code|key)|(?:^|[_.\W])(?:user_?)?pass$|(?:^|[_.\W])(?:pin|otp|dsn|sas|jwt|auth)$|pswd|pwd$|credential"
    r"|authori[sz]ation|auth_?header|bearer|cookie|webhook|(?:access|security)_?code|conn(?:ection)?_?str|(?:api|access|account|private|signing|encryption|license|shared)[_-]?key(?![a-z])"
    r"|(?:auth|access|refresh|id|session|hf|api|bot|oauth)[_-]?token(?![a-z])|(?:^|[_.\W])sig(?:nature)?$"
)
# Names of settings, too (`max_tokens`, `num_key_value_heads`): text under them is a secret, a number is one only under `token` or `key` itself.
_LIKELY = re.compile(r"(?i:key|token)s?(?![a-z])")
_SETTING = re.compile(r"(?i)(?:^|[_.])(?:pad|eos|bos|unk|mask|sep|cls|special|num|max|min|per|n)[_-]")
_ALONE = re.compile(r"(?i)(?:^|[_.])(?:key|token)$")

_USERINFO = re.compile(r"(?<=://)[^/\s]+(?=@)")
_SCHEME = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}")
_HEADER = re.compile(r"(?i)\b(authorization[\"']?\s*[:=]\s*[\"']?)(?!\[redacted)[^\s\"',]+(?:[^\S\n]+[^\s\"',]+)?")
_PEM = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL)
_FLAG = re.compile(r"(?<!\S)(--?(?P<name>[A-Za-z][\w-]*)\s+)(?P<value>[^\s-]\S*)")
_ASSIGNED = re.compile(r"""(?P<name>[A-Za-z][\w.-]*)(?P<sign>["']?\s*=\s*|["']?:(?!/)\s*)(?P<value>"[^"]*"|'[^']*'|[^\s?&;,{}\[\])"']+)""")
_COLON = re.compile(r":(?=[^\s/])")  # YAML wants a space behind it
_WORDS = re.compile(r"[a-z]*(?:[ _./-][a-z]+)*")
_SHORTEST = 8  # characters of a secret that is looked for in other texts: a shorter one is in many by chance


def redact(value: Any, name: str = "") -> Any:
    """A copy with secrets replaced by `[redacted]`.

    A secret is what stands under a name such as `api_key`, `hf_token`, `password` or `authorization`, text or number; user:password in
    a URL; and `password=...` or `access_token=...` inside of a text, as in a query or a connection string. What an interpolation has
    brought to another place is found there by its value: that of a secret of the same data, or of such a variable of the environment.
    """
    return _redacted(value, name, {*_secrets(value, name), *_of_environment()})


def mentioned(line: str, value: Any = None) -> str:
    """A text in which the values of the secrets in `value` and in the environment are replaced, wherever they stand; nothing else is."""
    return _without(line, {*_secrets(value, ""), *_of_environment()})


def _redacted(value: Any, name: str, secrets: set[str]) -> Any:
    if isinstance(value, Mapping):
        return {k: _redacted(v, name if _is_secret(name, "") else str(k), secrets) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(v, name, secrets) for v in value]
    if isinstance(value, str):
        return HIDDEN if value and _is_secret(name, value) else _text(_without(value, secrets))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return HIDDEN if _is_secret(name, value) or str(value) in secrets else value
    return value


def _secrets(value: Any, name: str) -> Iterator[str]:
    """What is certain to be a secret, and long enough to be looked for elsewhere."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _secrets(part, name if _is_secret(name, "") else str(key))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _secrets(part, name)
    elif not isinstance(value, bool) and isinstance(value, str | int | float) and _is_secret(name, value):
        found = str(value)
        if len(found) >= _SHORTEST and not found.startswith(("${", HIDDEN)) and (_CERTAIN.search(name) or not _WORDS.fullmatch(found)):
            yield found


def _of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and not value.startswith("/") and _named(name.lower()):  # a path tells where a secret is
            yield value


def _without(line: str, secrets: Iterable[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):  # one may be a part of another
        line = line.replace(secret, HIDDEN)
    return line


def text(line: str) -> str:
    """A text with the secrets in it replaced: user:password in URLs, private keys, those of the environment, and what has a secret name."""
    return _text(_without(line, _of_environment()))


def _text(line: str) -> str:
    line = _PEM.sub(rf"\1 {HIDDEN} \2", _USERINFO.sub(HIDDEN, line)) if "://" in line or "-----" in line else line
    line = _HEADER.sub(rf"\1{HIDDEN}", _SCHEME.sub(rf"\1 {HIDDEN}", line))
    line = _FLAG.sub(lambda found: f"{found[1]}{HIDDEN}" if _named(found["name"]) else found[0], line)
    return _ASSIGNED.sub(_assignment, line)


def line_of_overrides(line: str) -> str:
    """A line that lists overrides, as launchers of sweeps print it, with secrets replaced."""
    return text(" ".join(redact_overrides(line.split(" "))))


def redact_overrides(overrides: Iterable[str]) -> list[str]:
    """`key=value` words with secrets replaced as by `redact`, those inside of dicts and lists too."""
    return [_override(word) for word in overrides]


def _override(word: str) -> str:
    key, sign, value = word.partition("=")
    if not sign:
        return text(key)
    if _is_secret(key, _number(value)):
        return f"{key}{sign}{HIDDEN}" if value else word
    if value[:1] in ("{", "["):
        try:
            parsed = yaml.safe_load(_COLON.sub(": ", value))  # the flow style of YAML is nearly Hydra's grammar of dicts and lists
        except yaml.YAMLError:
            parsed = None
        hidden = redact(parsed, key)
        if isinstance(parsed, dict | list) and hidden != parsed:
            return f"{key}{sign}{yaml.safe_dump(hidden, default_flow_style=True, width=10**6, sort_keys=False).strip()}"
    return f"{key}{sign}{text(value)}"


def _named(name: str) -> bool:
    """Whether what is assigned to a name in a text is a secret."""
    return _CERTAIN.search(name) is not None or (_ALONE.search(name) is not None and _SETTING.search(name) is None)


def _assignment(found: re.Match) -> str:
    secret = _named(found["name"]) if "=" in found["sign"] else _CERTAIN.search(found["name"])
    if found["value"].startswith(HIDDEN[:-1]):
        return found[0]
    if not secret:
        return f"{found['name']}{found['sign']}{_ASSIGNED.sub(_assignment, found['value'])}"
    return f"{found['name']}{found['sign']}{HIDDEN}"


def _is_secret(name: str, value: Any) -> bool:
    if "*" in name:  # a glob over the names of weights
        return False
    if _CERTAIN.search(name):
        return True
    if isinstance(value, str):
        return _LIKELY.search(name) is not None
    return _ALONE.search(name) is not None and _SETTING.search(name) is None


def _number(value: str) -> Any:
    """`value` as the number that it writes, or as it is."""
    try:
        return float(value)
    except ValueError:
        return value
