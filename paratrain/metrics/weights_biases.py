"""Weights & Biases, kept at arm's length: its calls run in a thread of their own, so that neither an error nor a dead network
nor a slow server reaches the training loop."""

from __future__ import annotations

import collections
import contextlib
import logging
import netrc
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from paratrain import notes
from paratrain.config import WandB

log = logging.getLogger(__name__)

_PREFLIGHT_SECONDS = 2
_INIT_SECONDS = 30
_FINISH_SECONDS = 60
_LOOK_SECONDS = 60  # from one look at the server of an online run to the next
_QUEUE_ROWS = 10_000
_KEPT_ROWS = 1000  # logged again after a failure: W&B writes its file every 15 s, so a dead service loses the newest rows


class WeightsAndBiases:
    """One run a job, continued by a resume.

    Args:
        options: section `logger.wandb`.
        run_dir: W&B writes below it, and the run's id is kept there.
        resume: continue the run whose id is kept there.
    """

    def __init__(self, options: WandB, run_dir: Path, resume: bool):
        self.options, self.run_dir, self.resume = options, run_dir, resume
        self.rows: queue.Queue[dict[str, float] | tuple[str, str] | int] = queue.Queue(_QUEUE_ROWS)
        self.thread: threading.Thread | None = None
        self.recent: collections.deque[dict[str, float]] = collections.deque(maxlen=_KEPT_ROWS)
        self.dropped = 0
        self.looked, self.gone = time.monotonic(), False

    def start(self, run: Mapping[str, Any]) -> None:
        identity = self.options.id or _kept_id(self.run_dir / "wandb_id", self.resume)
        # Imported here, not in the thread: a data loader that forks meanwhile would inherit a half-imported package.
        try:
            import wandb
        except Exception as error:
            log.warning("wandb cannot be imported (%s); nothing is logged to it", _say(error))
            return
        self.thread = threading.Thread(target=self._work, args=(wandb, identity, run), name="wandb", daemon=True)
        self.thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self.thread or not self.thread.is_alive():
            return
        try:
            self.rows.put_nowait({"step": step, **metrics})
        except queue.Full:
            if not self.dropped:
                log.warning("W&B is %d rows behind; rows are dropped until it catches up", _QUEUE_ROWS)
            self.dropped += 1

    def note(self, name: str, text: str) -> None:
        with contextlib.suppress(queue.Full):
            if self.thread and self.thread.is_alive():
                self.rows.put_nowait((name, text))

    def finish(self, exit_code: int) -> None:
        if not self.thread or not self.thread.is_alive():
            return
        with contextlib.suppress(queue.Full):
            self.rows.put(exit_code, timeout=_FINISH_SECONDS)
        self.thread.join(_FINISH_SECONDS)
        if self.thread.is_alive():
            log.warning("W&B did not finish within %d s; upload the rest of %s/wandb with `wandb sync`", _FINISH_SECONDS, self.run_dir)

    def _work(self, wandb: Any, identity: str, info: Mapping[str, Any]) -> None:
        mode, reason = choose_mode(wandb, self.options.mode)
        if reason:
            log.warning("W&B is offline: %s. Metrics are kept in %s/wandb; upload them with `wandb sync`", reason, self.run_dir)
        try:
            self._session(wandb, identity, info, mode)
        except Exception as error:
            log.warning("W&B failed (%s); metrics are kept offline in %s/wandb", _say(error), self.run_dir)
            with contextlib.suppress(Exception):
                wandb.teardown(exit_code=1)  # a run that did not start holds the id; the service process may be dead
            try:
                self._session(wandb, identity, info, "offline")
            except Exception as error:
                log.warning("W&B failed again (%s); nothing more is logged to it", _say(error))

    def _session(self, wandb: Any, identity: str, info: Mapping[str, Any], mode: str) -> None:
        run = self._init(wandb, identity, info, mode)
        server = wandb.setup().settings.base_url if mode == "online" else None
        for row in list(self.recent):
            run.log(row)
        while not isinstance(item := self._next(server), int):
            if isinstance(item, tuple):
                run.summary[item[0]] = item[1]
                continue
            self.recent.append(item)
            run.log(item)
        self.rows.put_nowait(item)  # the end is still to come if this session fails at it
        run.finish(exit_code=item)
        if self.gone:
            log.warning("W&B did not answer until the end (%s); upload the rest of %s/wandb with `wandb sync`", server, self.run_dir)

    def _next(self, server: str | None) -> dict[str, float] | tuple[str, str] | int:
        """What is to be logged next. W&B says nothing of a server that is gone, and sends what it has kept once that is back."""
        while True:
            if server and time.monotonic() - self.looked >= _LOOK_SECONDS:
                self._look(server)
            with contextlib.suppress(queue.Empty):
                return self.rows.get(timeout=_LOOK_SECONDS)

    def _look(self, server: str) -> None:
        self.looked = time.monotonic()
        try:
            _connect(server)
        except OSError as error:
            if not self.gone:
                log.warning(
                    "W&B does not answer (%s: %s); training goes on, and the metrics are kept in %s/wandb until it does", server, error, self.run_dir,
                )  # fmt: skip
            self.gone = True
        else:
            if self.gone:
                log.warning("W&B answers again (%s), and gets what was kept", server)
            self.gone = False

    def _init(self, wandb: Any, identity: str, info: Mapping[str, Any], mode: str) -> Any:
        options = self.options
        run = wandb.init(
            project=options.project,
            entity=options.entity,
            name=options.name or Path(info["run_dir"]).resolve().name,
            group=options.group,
            tags=options.tags,
            id=identity,
            resume="allow",
            mode=mode,
            dir=str(self.run_dir),
            config={**info["config"], "git_commit": info["git_commit"], "world_size": info["world_size"]},
            allow_val_change=True,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=_INIT_SECONDS,
                finish_timeout=_FINISH_SECONDS - 10,
                x_disable_meta=info["secret_arguments"],  # among them is the command line
            ),
        )
        # `step` is a metric like any other: W&B's own step must rise, and drops what a resumed run logs again.
        run.define_metric("step")
        run.define_metric("tokens")
        run.define_metric("*", step_metric="step")
        return run


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def choose_mode(wandb: Any, asked: str) -> tuple[str, str]:
    """(mode, why it is not online): online needs a key, so that nothing ever prompts, and with `auto` a server that answers.

    WANDB_MODE decides what `auto` leaves open.
    """
    try:
        wandb.setup(settings=wandb.Settings(silent=True))
        if asked == "auto":
            asked = os.environ.get("WANDB_MODE", "auto")
        if asked not in ("auto", "online"):
            return asked, ""
        url = wandb.setup().settings.base_url
        if not _has_key(url):
            return "offline", f"no API key is set for {url}"
        if asked == "auto":
            _connect(url)
    except Exception as error:
        return "offline", f"the server does not answer ({_say(error)})"
    return "online", ""


def _has_key(url: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    files = [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    return any(file.exists() and netrc.netrc(file).authenticators(urlsplit(url).netloc) for file in files)


def _connect(url: str) -> None:
    server = urlsplit(url)
    proxy = getproxies().get(server.scheme)
    if proxy and not proxy_bypass(server.netloc):
        server = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = server.port or {"http": 80, "https": 443}.get(server.scheme, 443)
    socket.create_connection((server.hostname or "", port), timeout=_PREFLIGHT_SECONDS).close()


def _kept_id(path: Path, resume: bool) -> str:
    if resume and path.exists() and (kept := path.read_text().strip()):
        return kept
    identity = secrets.token_hex(4)
    notes.replace(path, identity)
    return identity
