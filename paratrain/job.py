"""One job on every rank: rank 0 decides what runs, the others are told, and each error is printed once.

Nothing here knows where the configuration came from; `paratrain.main` composes it on rank 0 alone, so that resolvers, time stamps and
shuffled sweeps cannot differ between ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paratrain import config, notes
from paratrain.errors import UserError
from paratrain.redact import mentioned

if TYPE_CHECKING:
    from torch.distributed import Store

    from paratrain.agreement import Failure

FILE = "PARATRAIN_JOB"  # environment variable: the file that holds the job, where a sweep started this process
MISTAKE = 2  # exit code after a `UserError`
RESULT = "result.json"  # what the task returned in a job of a sweep, in its output directory

_LINE = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"  # as Hydra writes on rank 0
_ECHO = 1.0  # seconds for which the echo of another rank's error is held back
_OUTPUT_DIR = "paratrain/output_dir"


class Job(NamedTuple):
    """What every rank must know.

    Attributes:
        config: the resolved configuration, as `schema.to_dict` gives it.
        chdir: work in the output directory (hydra.job.chdir).
        env: environment variables to set (hydra.job.env_set).
    """

    config: dict[str, Any]
    chdir: bool = False
    env: dict[str, str] = {}  # noqa: RUF012 - read only


def announce(store: Store, message: Job | int) -> None:
    """Rank 0: give every other rank its job, or the exit code of a job that will not run, and wait until each has it.

    The wait keeps a store that lives in this process alive until everyone has read it.
    """
    store.set("job", json.dumps(message))
    peers = [f"job/received/{peer}" for peer in range(1, _ranks())]
    if peers:
        store.wait(peers, timedelta(minutes=1))


def receive(store: Store) -> Job | int:
    """Other ranks: wait for what rank 0 announces."""
    message = json.loads(store.get("job"))
    store.set(f"job/received/{_rank()}", "")
    return message if isinstance(message, int) else Job(*message)


def kept_output_dir(store: Store) -> str | None:
    """The output directory of the attempt before this one, where torchrun restarted the job."""
    kept: Any = getattr(store, "underlying_store", None)  # keys of the attempt have a prefix, this one has none
    return kept.get(_OUTPUT_DIR).decode() if kept is not None and kept.check([_OUTPUT_DIR]) else None


def keep_output_dir(store: Store, directory: str) -> None:
    kept: Any = getattr(store, "underlying_store", None)
    if kept is not None:
        kept.set(_OUTPUT_DIR, directory)


def follow(task: Callable[[config.Config], Any], job: Job, store: Store | None) -> Any:
    """Run `task` as rank 0 said; log to rank<N>.log in the output directory, and warnings to the console."""
    os.environ.update(job.env)
    cfg = config.from_dict(job.config)
    assert cfg.output_dir is not None
    _log_to(Path(cfg.output_dir))
    if job.chdir:
        os.chdir(cfg.output_dir)
    return run(task, cfg, store)


def from_file(task: Callable[[config.Config], Any], path: str, store: Store | None) -> Any:
    """Run the job that a sweep left in a file; rank 0 writes what the task returns next to it."""
    job = Job(*json.loads(Path(path).read_text()))
    result = follow(task, job, store)
    if _rank() == 0:
        (Path(job.config["output_dir"]) / RESULT).write_text(json.dumps(result if isinstance(result, int | float) else None))
    return result


def run(task: Callable[[config.Config], Any], cfg: config.Config, store: Store | None) -> Any:
    """`task(cfg)`; ends the process with one copy of an error a machine: exit code 2 for a `UserError`, else 1.

    What is printed last on every machine is the error of the rank that failed first. Alone (`store` is None), exceptions other than `UserError` pass through.
    """

    _say_once_what_files_refuse()

    def attempt() -> Any:
        try:
            return task(cfg)
        except UserError as error:
            cause = _agreed(error)
            _print_once(f"error: {error}", cause.text if cause else str(error), store)
            notes.for_launcher(mentioned(str(error)))
            sys.exit(MISTAKE)
        except Exception as error:
            _agreed(error)
            raise

    if store is None:
        return attempt()
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        return record(attempt, _whole_error_files())()
    except Exception as error:
        from paratrain import agreement

        if (cause := agreement.cause_of(error)) is not None:
            _print_once(f"error: {error}", f"{cause.kind}: {cause.text}", store)
        else:
            _print_once(f"rank {_rank()}:\n{traceback.format_exc()}", f"{type(error).__name__}: {error}", store)
        sys.exit(1)


def _agreed(error: Exception) -> Failure | None:
    """Tell the other ranks of an error; for one that is only the echo of another rank's, wait until that has said so itself."""
    from paratrain import agreement

    agreement.tell(error)
    cause = agreement.cause_of(error)
    if cause is not None:
        time.sleep(_ECHO)
    return cause


def _whole_error_files() -> Any:
    """The handler of `record`, writing the file that tells torchrun of an exception in one move.

    torchrun reads the file of a rank that it is ending, perhaps in the middle of a write, and would die of half a JSON object instead of
    restarting the job.
    """
    from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler

    class Handler(ErrorHandler):
        def record_exception(self, e: BaseException) -> None:
            path = os.environ.get("TORCHELASTIC_ERROR_FILE")
            if path is None:
                return super().record_exception(e)
            os.environ["TORCHELASTIC_ERROR_FILE"] = f"{path}.part"
            try:
                super().record_exception(e)
                kept = Path(f"{path}.part").read_text()
                Path(f"{path}.part").write_text(mentioned(kept))
                os.replace(f"{path}.part", path)
            finally:
                os.environ["TORCHELASTIC_ERROR_FILE"] = path

    return Handler()


def _print_once(text: str, identity: str, store: Store | None) -> None:
    first, text = True, mentioned(text)
    if store is not None:
        name = hashlib.blake2b(f"{socket.gethostname()}: {identity}".encode(), digest_size=8).hexdigest()
        try:
            first = store.add(f"error/{name}", 1) == 1
        except RuntimeError:  # the store died with the rank that held it: better twice than never
            first = True
    if first:
        print(text, file=sys.stderr, flush=True)
    if _rank() > 0:
        logging.getLogger("paratrain").error(text, extra={"printed": True})


def _log_to(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    console = logging.StreamHandler()
    console.setLevel(logging.INFO if _rank() == 0 else logging.WARNING)
    console.addFilter(lambda record: not getattr(record, "printed", False))
    file = logging.FileHandler(directory / f"rank{_rank()}.log", encoding="utf-8")
    logging.basicConfig(level=logging.INFO, format=_LINE, handlers=[console, file], force=True)


def _say_once_what_files_refuse() -> None:
    """A disk that takes no more lines of a log is told once: logging shows a traceback for each line."""

    def once(handler: logging.FileHandler) -> Callable[[logging.LogRecord], None]:
        said = False

        def fails(record: logging.LogRecord) -> None:
            nonlocal said
            if not isinstance(error := sys.exc_info()[1], OSError):
                logging.Handler.handleError(handler, record)
            elif not said:
                said = True
                print(
                    f"warning: {handler.baseFilename} takes no more lines ({error.strerror}); they are only here",
                    file=sys.stderr,
                    flush=True,
                )

        return fails

    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = once(handler)  # type: ignore[method-assign,assignment]


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))
