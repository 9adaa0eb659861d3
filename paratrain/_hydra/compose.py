"""YAML files and overrides -> one checked configuration, or every fault of both."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import GroupDefault
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from paratrain import config, redact, schema
from paratrain.errors import ConfigError, UserError
from paratrain.suggest import did_you_mean

ROOT = "paratrain"  # conf/paratrain.yaml
VERSION_BASE = "1.3"

_LISTED = (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP)


def load_config(overrides: Sequence[str] = (), config_name: str = ROOT, config_dir: str | None = None) -> config.Config:
    """The configuration that the command line would give, from Python: `load_config(["strategy=ddp", "optimizer.lr=1e-3"])`.

    Args:
        overrides: in Hydra's grammar: `group=choice`, `key=value`, `+group=choice`, `~key`.
        config_name: root file: paratrain.yaml, or one of your own in `config_dir`.
        config_dir: a directory of your own whose groups are added to the library's.

    Raises:
        ConfigError: every unknown group, choice and key, wrong type and impossible combination at once.
    """
    directory = None if config_dir is None else os.path.abspath(config_dir)
    if directory is not None and not os.path.isdir(directory):
        raise UserError(f"config_dir={config_dir}: there is no such directory")
    with _hydra_state():
        return checked(compose(make_loader(directory), config_name, overrides))


class _LibraryGroups(SearchPathPlugin):
    """Adds `paratrain.conf` after the user's own directories. Registered in this process only: no other Hydra application sees it."""

    extra: ClassVar[str | None] = None  # --config-dir

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.extra is not None:
            search_path.append("command-line", f"file://{self.extra}")
        search_path.append("paratrain", "pkg://paratrain.conf")


def make_loader(directory: str | None, extra: str | None = None) -> ConfigLoaderImpl:
    _ensure_conf_importable()
    if extra is not None and not os.path.isdir(extra):
        raise UserError(f"--config-dir {extra}: there is no such directory")
    _LibraryGroups.extra = os.path.abspath(extra) if extra is not None else None
    Plugins.instance().register(_LibraryGroups)
    return ConfigLoaderImpl(create_config_search_path(directory))


def _ensure_conf_importable() -> None:
    """In a checkout `paratrain.conf` is the directory `conf` next to the package, and not that of another installation."""
    name, root = "paratrain.conf", Path(__file__).resolve().parents[2] / "conf"
    if name in sys.modules or not (root / f"{ROOT}.yaml").is_file():
        return
    spec = spec_from_file_location(name, root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


@contextlib.contextmanager
def _hydra_state() -> Iterator[None]:
    """Hydra's process-wide state as it was before, for callers that are Hydra applications themselves."""
    settings, base = HydraConfig.instance(), version.VersionBase.instance()
    before = settings.cfg, base.version_base
    version.setbase(VERSION_BASE)
    setup_globals()
    try:
        yield
    finally:
        settings.cfg, base.version_base = before


class Composed(NamedTuple):
    """
    Attributes:
        overrides: as Hydra takes them: keys that no YAML file has are added, groups outside the defaults list are appended.
        cfg: the composed configuration, Hydra's part included; None where Hydra could not make one.
        problems: what was wrong on the way.
        doubtful: sections whose faulty choice was left out.
    """

    overrides: list[str]
    cfg: DictConfig | None
    problems: list[str]
    doubtful: set[str]


def compose(loader: ConfigLoaderImpl, config_name: str, overrides: Sequence[str], sweep: bool = False) -> Composed:
    problems: list[str] = []
    doubtful: set[str] = set()
    parsed = [override for text in overrides if (override := _parse(text, problems)) is not None]
    try:
        in_use = loader.compute_defaults_list(config_name, [], RunMode.MULTIRUN).overrides.known_choices
    except (HydraException, RecursionError) as error:
        raise ConfigError([_explain(error, loader, config_name)]) from None
    rewritten: list[tuple[Override, str]] = []
    for override in parsed:
        name = _section_of(override)
        if override.is_hydra_override():
            rewritten.append((override, str(override.input_line)))
        elif (problem := _group_problem(loader, override)) is not None:
            problems.append(problem)
            doubtful.add(name)
        else:
            rewritten.append((override, _rewrite(loader, override, in_use)))
    kept = [(override, text) for override, text in rewritten if _section_of(override) not in doubtful]
    final = [text for _, text in kept]
    trial = [part for override, text in kept for part in (_first(override, text) if sweep else [text])]
    cfg = _try(loader, config_name, trial, problems)
    if cfg is not None:
        problems += _silent_overrides(loader, config_name, trial)
    return Composed(final, cfg, problems, doubtful)


def _parse(text: str, problems: list[str]) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        problems.append(f"{redact.redact_overrides([text])[0]}: no override, which is written key=value or group=choice ({_line(error)})")
        return None


def _section_of(override: Override) -> str:
    return override.key_or_group.split(".")[0].split("/")[0]


def _is_group(loader: ConfigLoaderImpl, name: str) -> bool:
    return bool(loader.get_group_options(name, ObjectType.CONFIG) or loader.list_groups(name))


def _choices(override: Override) -> list[Any] | None:
    """The choices that an override of a group names; None where they cannot be told."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator()) if override.value_type in _LISTED else None
    value = override.value()
    return value if isinstance(value, list) else [value]


def _group_problem(loader: ConfigLoaderImpl, override: Override) -> str | None:
    """What is wrong with an override that names a group, or nothing that exists."""
    name, fields = override.key_or_group, list(schema.kinds(config.Config))
    if not _is_group(loader, name):
        if "." in name or name in fields or isinstance(override.value(), dict):
            return None
        groups = loader.list_groups("")
        known = sorted({*fields, *groups} - {"hydra"})
        return f"{name}: there is no group and no key of that name{did_you_mean(name, known)} (known: {', '.join(known)})"
    if override.is_delete() or isinstance(override.value(), dict):
        return None
    known = loader.get_group_options(name, ObjectType.CONFIG)
    optional = name not in fields or type(None) in schema.members(schema.kinds(config.Config)[name])
    for choice in _choices(override) or []:
        if choice is None and optional:
            continue
        if str(choice) not in known:
            said = "null" if choice is None else repr(str(choice))
            return f"{name}: there is no choice {said}{did_you_mean(str(choice), known)} (choices: {', '.join(known)})"
    return None


def _rewrite(loader: ConfigLoaderImpl, override: Override, in_use: dict) -> str:
    """The override as Hydra takes it without asking whether a file mentions the key: `config.from_dict` knows which keys exist."""
    text, name = str(override.input_line), override.key_or_group
    if override.type is not OverrideType.CHANGE:
        return text
    if not _is_group(loader, name) or isinstance(override.value(), dict):
        return f"++{text}"
    if override.value() is None:
        return f"~{name}" if name in in_use else f"+{text}"
    return text if name in in_use or override.package is not None else f"+{text}"


def _first(override: Override, text: str) -> list[str]:
    """One job of a sweep, to check before any starts."""
    if not override.is_sweep_override():
        return [text]
    if not override.is_discrete_sweep():
        return []
    return [f"{text.partition('=')[0]}={value}" for value in list(override.sweep_string_iterator())[:1]]


def _try(loader: ConfigLoaderImpl, config_name: str, overrides: list[str], problems: list[str]) -> DictConfig | None:
    """Compose; where Hydra refuses, without the overrides that it refuses."""

    def load(some: list[str]) -> DictConfig:
        return loader.load_configuration(config_name, some, RunMode.RUN, from_shell=False)

    try:
        return load(overrides)
    except (HydraException, OmegaConfBaseException, RecursionError, ValueError) as error:
        first = error
    accepted: list[str] = []
    count = len(problems)
    for override in overrides:
        try:
            load([*accepted, override])
            accepted.append(override)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            problems.append(f"{redact.redact_overrides([override])[0]}: {_line(error)}")
        except RecursionError:
            break
    if len(problems) == count:
        problems.append(_explain(first, loader, config_name))
        return None
    return load(accepted)


def _silent_overrides(loader: ConfigLoaderImpl, config_name: str, overrides: list[str]) -> list[str]:
    """`override group: choice` in two files: Hydra 1.3 obeys the first and drops the second without a word."""
    defaults = loader.compute_defaults_list(config_name, overrides, RunMode.RUN).defaults
    said: dict[str, dict[str, str]] = {}
    for default in defaults:
        loaded = loader.repository.load_config(default.config_path) if default.config_path else None
        for entry in (loaded.defaults_list or []) if loaded is not None else []:
            if isinstance(entry, GroupDefault) and entry.override and not str(entry.group).startswith("hydra"):
                said.setdefault(str(entry.group).lstrip("/"), {})[str(default.config_path)] = str(entry.value)
    given = {override.partition("=")[0].lstrip("+~") for override in overrides}
    return [
        f"{group}: overridden in two files ({', '.join(f'{file}: {choice}' for file, choice in files.items())}), of which Hydra would drop "
        f"one without a word; in {config_name}.yaml list the group directly (- {group}: ...) instead of `override {group}`"
        for group, files in said.items()
        if len(set(files.values())) > 1 and group not in given
    ]


def checked(composed: Composed) -> config.Config:
    """The typed configuration.

    Raises:
        ConfigError: what composition found, and every fault of the values.
    """
    problems = list(composed.problems)
    if composed.cfg is not None:
        try:
            cfg = _typed(composed)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return cfg


def _typed(composed: Composed) -> config.Config:
    assert composed.cfg is not None
    full = composed.cfg
    with read_write(full.hydra), open_dict(full.hydra):  # as Hydra does before the job, for ${hydra:runtime.output_dir}
        HydraConfig.instance().set_config(full)
    with read_write(full.hydra.runtime), open_dict(full.hydra.runtime):
        full.hydra.runtime.output_dir = os.path.abspath(str(full.hydra.run.dir))
    HydraConfig.instance().set_config(full)
    task = full.copy()
    with read_write(task), open_dict(task):
        del task["hydra"]
    return from_hydra(task, composed.doubtful)


def from_hydra(cfg: DictConfig, ignore: Iterable[str] = ()) -> config.Config:
    try:
        data = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([f"{error.full_key or 'interpolation'}: {_line(error)}"]) from None
    assert isinstance(data, dict)
    try:
        return config.from_dict(data, ignore=set(ignore), targets=True)  # type: ignore[arg-type]
    except ConfigError as error:  # a value at fault may be what an interpolation brought there
        raise ConfigError([redact.mentioned(problem, data) for problem in error.problems]) from None


def _line(error: BaseException) -> str:
    """Hydra's message on one line, without the search path and the advice that does not hold here."""
    text = str(error.__cause__ or error) if not str(error) else str(error)
    lines = [line.strip() for line in text.splitlines()]
    for end in ("Config search path:", "Search path:"):
        lines = lines[: lines.index(end)] if end in lines else lines
    return redact.text(
        " ".join(line for line in lines if line and not line.startswith(("full_key:", "object_type=", "reference_type=", "See https:")))
    )


def _explain(error: BaseException, loader: ConfigLoaderImpl, config_name: str) -> str:
    if isinstance(error, RecursionError):
        clashes = _same_names(loader)
        which = f": {', '.join(clashes)}" if clashes else ""
        return f"a configuration file includes itself; a file must not have the name of the library's file that it extends{which}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file == config_name:
        known = loader.get_group_options("", ObjectType.CONFIG)
        return f"config_name: there is no {config_name}.yaml{did_you_mean(config_name, known)} (searched: {', '.join(_sources(loader))})"
    return _line(error)


def _sources(loader: ConfigLoaderImpl) -> list[str]:
    return [source.path for source in loader.get_sources() if source.provider not in ("hydra", "schema")]


def _same_names(loader: ConfigLoaderImpl) -> list[str]:
    """Files of the user's directories that have the group and name of one of the library's."""
    sources = {source.provider: source for source in loader.get_sources()}
    library = sources.pop("paratrain")
    clashes = []
    for group in ["", *loader.list_groups("")]:
        names = set(library.list(group, ObjectType.CONFIG)) if library.is_group(group) else set()
        for provider in ("main", "command-line"):
            if (source := sources.get(provider)) is not None and source.is_group(group):
                clashes += [f"{group}/{name}.yaml".lstrip("/") for name in sorted(names & set(source.list(group, ObjectType.CONFIG)))]
    return clashes
