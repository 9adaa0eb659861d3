"""`main`: a function of a `Config` as a command, alone or on every rank of a job."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins import basic_launcher, basic_sweeper
from hydra._internal.utils import _run_hydra, detect_calling_file_or_module_from_task_function, detect_task_name, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, setup_globals
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from paratrain import _help, config, job, launch, lock, notes, schema
from paratrain._hydra.compose import ROOT, VERSION_BASE, Composed, checked, compose, from_hydra, make_loader
from paratrain.errors import ConfigError, UserError
from paratrain.redact import HIDDEN, line_of_overrides, mentioned, redact, redact_overrides, text

if TYPE_CHECKING:
    from torch.distributed import Store

_WITHOUT_SECRETS = "+hydra.callbacks.redaction={_target_: paratrain._hydra.app.WithoutSecrets}"


def main(config_path: str | None = None, config_name: str = ROOT) -> Callable[[Callable[[config.Config], Any]], Callable[..., Any]]:
    """Make a function of a `Config` a command: `@paratrain.main(config_path="conf", config_name="mine")`.

    Run it alone or under torchrun. The function is called once on every rank with the same configuration; a `UserError` ends the
    command with its message, printed once, and exit code 2. Called with a `Config`, it is the plain function.

    Args:
        config_path: directory of your own configuration, relative to the file of the function; the library's groups are added to it.
        config_name: root file in it; its defaults list names groups directly (`- strategy: ddp`), never `override strategy`.
    """

    def decorate(task: Callable[[config.Config], Any]) -> Callable[..., Any]:
        @functools.wraps(task)
        def command(cfg: config.Config | None = None) -> Any:
            return task(cfg) if cfg is not None else _start(task, config_path, config_name)

        return command

    return decorate


def _start(task: Callable[[config.Config], Any], config_path: str | None, config_name: str) -> Any:
    store: Store | None = None
    rank = int(os.environ.get("RANK", 0))
    try:
        if "RANK" in os.environ:  # under a launcher
            from paratrain import distributed

            store = distributed.rendezvous()
        if (path := os.environ.get(job.FILE)) is not None:
            return job.from_file(task, path, store)
        if rank > 0:
            assert store is not None
            told = job.receive(store)
            if isinstance(told, int):
                if told:
                    notes.for_launcher("rank 0 ended before the job began; its error is above")
                return sys.exit(told)
            return job.follow(task, told, store)
        return _lead(task, config_path, config_name, store)
    except UserError as error:
        print(f"error: {mentioned(str(error))}", file=sys.stderr, flush=True)
        return sys.exit(job.MISTAKE)


def _lead(task: Callable[[config.Config], Any], config_path: str | None, config_name: str, store: Store | None) -> Any:
    """Rank 0: run Hydra, tell the others."""
    code = job.MISTAKE
    announced = False

    def announce(message: job.Job | int) -> None:
        nonlocal announced
        if store is not None and not announced:
            announced = True
            job.announce(store, message)

    try:
        _run(task, config_path, config_name, store, announce)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        raise
    finally:
        announce(code)


def _run(
    task: Callable[[config.Config], Any],
    config_path: str | None,
    config_name: str,
    store: Store | None,
    announce: Callable[[job.Job | int], None],
) -> None:
    version.setbase(VERSION_BASE)
    setup_globals()
    parser = _arguments()
    args = parser.parse_intermixed_args()
    if args.experimental_rerun is not None:
        raise UserError("--experimental-rerun reads a pickle, which can run any code; pass the overrides again instead")
    if args.multirun and store is not None:
        raise UserError(_no_multirun())
    args.overrides = [_WITHOUT_SECRETS, *args.overrides]
    config_name = args.config_name or config_name
    directory = _directory(task, args.config_path or config_path)
    JobRuntime.instance().set("name", detect_task_name(*detect_calling_file_or_module_from_task_function(task)))
    loader = make_loader(directory, args.config_dir)
    composed = compose(loader, config_name, args.overrides, sweep=args.multirun)
    if args.help:
        print(_help.text(_groups(loader, composed), _shown(composed)))
        return
    args.overrides = list(composed.overrides)
    subdirectory: str | None = None
    if not (args.cfg or args.info or args.shell_completion or args.hydra_help):
        checked(composed)
        assert composed.cfg is not None
        if composed.cfg.hydra.mode == RunMode.MULTIRUN and store is not None:
            raise UserError(_no_multirun())
        if not args.multirun:
            args.overrides += _output_dir(composed, store)
        subdirectory = composed.cfg.hydra.output_subdir
        args.overrides += ["hydra.output_subdir=null"]  # Hydra writes what it was told, secrets too
    elif composed.problems:
        raise ConfigError(composed.problems)

    def run(cfg: DictConfig) -> Any:
        settings = HydraConfig.get()

        if subdirectory is not None:
            _keep(Path(settings.runtime.output_dir) / subdirectory, cfg, settings)

        def typed() -> config.Config:
            return dataclasses.replace(from_hydra(cfg), output_dir=settings.runtime.output_dir)

        if launch.COMMAND in os.environ:
            return launch.job(schema.to_dict(typed()), settings.runtime.output_dir)
        ready = typed()
        env = {name: str(value) for name, value in settings.job.env_set.items()}
        announce(job.Job(schema.to_dict(ready), bool(settings.job.chdir), env))
        return job.run(task, ready, store)

    args.config_name = args.config_path = args.config_dir = None
    named = functools.wraps(task)(run)
    with _printed_without_secrets(printing=bool(args.cfg or args.info)):
        _run_hydra(args=args, args_parser=parser, task_function=named, config_path=directory, config_name=config_name)


@contextmanager
def _printed_without_secrets(printing: bool) -> Iterator[None]:
    """Keep secrets out of the configuration that Hydra logs with hydra.verbose=true, and prints with --cfg and --info (`printing`)."""
    with ExitStack() as stack:
        for name in ("hydra._internal.hydra", "hydra"):
            logging.getLogger(name).addFilter(_yaml_without_secrets)
            stack.callback(logging.getLogger(name).removeFilter, _yaml_without_secrets)
        if printing:
            printed = stack.enter_context(redirect_stdout(io.StringIO()))
            stack.callback(lambda: sys.__stdout__ and sys.__stdout__.write(_redacted_yaml(printed.getvalue())))
        yield


def _keep(directory: Path, cfg: DictConfig, settings: Any) -> None:
    """The files that Hydra keeps of a job, without its secrets."""
    own = _settings_without_secrets(OmegaConf.to_container(settings, resolve=False))
    kept = {"config": redact(OmegaConf.to_container(cfg, resolve=False)), "hydra": {"hydra": own}, "overrides": own["overrides"]["task"]}
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in kept.items():
        notes.write_private(directory / f"{name}.yaml", OmegaConf.to_yaml(OmegaConf.create(content)))


def _settings_without_secrets(settings: Any) -> dict[str, Any]:
    """Hydra's own part of a configuration, in which the overrides stand twice."""
    overrides = {kind: redact_overrides(words) for kind, words in settings["overrides"].items()}
    kept = {**redact(settings), "overrides": overrides}
    if overrides != settings["overrides"]:
        kept["job"]["override_dirname"] = HIDDEN
    return kept


class WithoutSecrets(Callback):
    """Keeps secrets out of what Hydra itself writes: multirun.yaml, its list of a sweep's jobs, and its report of a failed one."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        class Redacting(OmegaConf):
            @staticmethod
            def save(config: Any, f: Any, resolve: bool = False) -> None:
                content = redact(OmegaConf.to_container(config, resolve=resolve))
                content["hydra"] = _settings_without_secrets(OmegaConf.to_container(config.hydra, resolve=resolve))
                notes.write_private(Path(f), OmegaConf.to_yaml(OmegaConf.create(content)))

        basic_sweeper.OmegaConf = Redacting  # type: ignore[misc]  # the sweeper writes the file, and asks nobody
        launcher = str(config.hydra.launcher["_target_"]).rpartition(".")[0]
        for name in (basic_launcher.__name__, launcher, f"{launcher}._core"):
            logging.getLogger(name).addFilter(_without_secrets)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if job_return.status is JobStatus.FAILED:
            job_return.overrides = redact_overrides(job_return.overrides or [])


def _without_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = line_of_overrides(record.getMessage()), None
    return True


def _yaml_without_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = _redacted_yaml(record.getMessage()), None
    return True


def _redacted_yaml(printed: str) -> str:
    """A configuration as Hydra prints it, of the task or of Hydra itself or both, without secrets; any other text as `redact.text` leaves it."""
    try:
        content = yaml.safe_load(printed) if "\n" in printed else None
    except yaml.YAMLError:
        content = None
    if not isinstance(content, dict):
        return text(printed)
    kept = redact(content)
    if isinstance(content.get("hydra"), dict) and "overrides" in content["hydra"]:
        kept["hydra"] = _settings_without_secrets(content["hydra"])
    elif isinstance(content.get("overrides"), dict):
        kept = _settings_without_secrets(content)
    head = "".join(re.findall(r"^# @package .*\n", printed))
    return printed if kept == content else head + OmegaConf.to_yaml(OmegaConf.create(kept))


def _arguments() -> argparse.ArgumentParser:
    """Hydra's own flags. Python 3.14 formats help texts as they are declared, and Hydra 1.3 has one that is no text."""
    check = getattr(argparse.ArgumentParser, "_check_help", None)
    if check is None:
        return get_args_parser()
    argparse.ArgumentParser._check_help = lambda *_: None  # type: ignore[attr-defined]
    try:
        return get_args_parser()
    finally:
        argparse.ArgumentParser._check_help = check  # type: ignore[attr-defined]


def _no_multirun() -> str:
    return (
        "-m under torchrun would run every job of the sweep in the same processes; start one torchrun a job instead: "
        f"python -m paratrain sweep --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', '2')} {launch.this_program()} key=a,b"
    )


def _output_dir(composed: Composed, store: Store | None) -> list[str]:
    """The override that says where this job writes, checked to be a place where it can."""
    assert composed.cfg is not None
    run_dir, output_dir = str(composed.cfg.hydra.run.dir), composed.cfg.get("output_dir")
    if output_dir is not None and any(text.startswith("hydra.run.dir=") for text in composed.overrides) and run_dir != output_dir:
        raise ConfigError([f"output_dir: {output_dir!r} and hydra.run.dir={run_dir!r} name two directories; write one of them"])
    chosen = (job.kept_output_dir(store) if store is not None else None) or os.path.abspath(output_dir or run_dir)
    try:
        os.makedirs(chosen, exist_ok=True)
        if not os.access(chosen, os.W_OK | os.X_OK):
            raise PermissionError(13, os.strerror(13))
        if os.path.lexists(os.path.join(chosen, lock.FILE_NAME)):
            with lock.held(Path(chosen)):  # or this job would write over the configuration of another before it is refused
                pass
    except OSError as error:
        where = f"hydra.run.dir: cannot write to {chosen}: {error.strerror}; write hydra.run.dir=DIRECTORY, one that this user may write to"
        raise ConfigError([where]) from None
    if store is not None:
        job.keep_output_dir(store, chosen)
    return [f"hydra.run.dir={json.dumps(chosen, ensure_ascii=False)}"]


def _groups(loader: ConfigLoaderImpl, composed: Composed) -> dict[str, tuple[list[str], str | None]]:
    used = composed.cfg.hydra.runtime.choices if composed.cfg is not None else {}
    names = [name for name in loader.list_groups("") if name != "hydra"]
    return {name: (loader.get_group_options(name, ObjectType.CONFIG), used.get(name)) for name in names}


def _shown(composed: Composed) -> config.Config:
    """The values that --help shows: faulty ones are its reader's reason to look, so they have their defaults."""
    if composed.cfg is not None:
        data = OmegaConf.to_container(composed.cfg, resolve=False)
        assert isinstance(data, dict)
        cfg, _ = schema.load(config.Config, {name: part for name, part in data.items() if name != "hydra"})
        if cfg is not None:
            return cfg
    return config.Config()


def _directory(task: Callable, config_path: str | None) -> str | None:
    if config_path is None or config_path.startswith("pkg://"):
        return config_path
    directory = Path(inspect.getfile(task)).resolve().parent / config_path
    if not directory.is_dir():
        raise UserError(f"config_path={config_path!r}: there is no directory {directory}")
    return str(directory)
