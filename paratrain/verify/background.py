"""Proving a job beside its training: which process does it, what that costs, and when its verdict is known."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from paratrain import distributed
from paratrain.engine import Engine
from paratrain.errors import UserError
from paratrain.mesh import AXES
from paratrain.recipe import dumps
from paratrain.schema import to_dict
from paratrain.verify import verdict as verdicts
from paratrain.verify.smaller import Smaller, elements_of, smaller
from paratrain.verify.verdict import Verdict, not_proven
from paratrain.verify.worker import Task

log = logging.getLogger(__name__)

SWITCH = "PARATRAIN_PROVE"
"""Environment variable that overrides `trainer.prove`."""

LONGEST = 600.0
"""Seconds that a proof gets which somebody waits for; beside training it may wait for the processor, and its CPU time is what is bounded."""

NICE = 19
"""Of a proof beside training: the lowest priority."""

_BESIDE = 6 * 3600.0
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "SLURM_PROCID", "PARATRAIN_JOB", "TORCH_NCCL")


def chosen(asked: str) -> str:
    """`trainer.prove`, or what the environment says instead.

    Raises:
        UserError: it says something else.
    """
    mode = os.environ.get(SWITCH) or asked
    if mode not in ("background", "before", "off"):
        raise UserError(f"{SWITCH}={mode}: an environment variable in place of trainer.prove; write background, before or off")
    return mode


class Proof:
    """The proof of the job of `engine`: begun on rank 0, known to all ranks once they ask together.

    Args:
        batches: the first global batches, cut to about so many samples.
        total: updates in the training.

    Attributes:
        verdict: as far as it is known on this rank.
    """

    def __init__(self, engine: Engine, batches: Callable[[int], list[tuple[Any, Any]]], total: int | None, mode: str):
        self.verdict = Verdict("running", "not proven yet")
        self._process: subprocess.Popen | None = None
        self._directory: Path | None = None
        self._name = ""
        self._began, self._longest = time.monotonic(), LONGEST
        self._told = False
        if mode == "off":
            self.verdict = Verdict("off", "nothing was proven: trainer.prove=off; the layout is taken on trust")
        elif engine.is_main_process:
            self._begin(engine, batches, total, beside=mode == "background")

    def _begin(self, engine: Engine, batches: Callable[[int], list[tuple[Any, Any]]], total: int | None, beside: bool) -> None:
        if engine.recipe.data is None:
            self.verdict = not_proven(engine.recipe.reason)
            return
        root = engine.mesh.root
        small = smaller(engine.cfg, {axis: root[axis].size() for axis in AXES}, engine.cfg.data.global_batch)
        try:
            task = _task(engine, small, batches(small.samples), total)
            self._longest, task = (_BESIDE, replace(task, patience=_BESIDE, nice=NICE)) if beside else (LONGEST, task)
        except Exception as error:  # whatever reading and pickling the user's samples raises
            self.verdict = not_proven(f"the first batches cannot be sent to another process ({type(error).__name__}: {error})")
            return
        self._name = verdicts.fingerprint(
            task.payload, task.batches, repr(to_dict(small.cfg)), repr((small.ranks, total, task.budget)), packages=_packages(engine)
        )
        found = verdicts.kept(self._name)
        if found is not None:
            self.verdict = found
            return
        self._directory = Path(tempfile.mkdtemp(prefix="paratrain-proof-"))
        (self._directory / "task").write_bytes(pickle.dumps(task))
        env = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHED)}
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", SWITCH: "off"}
        with (self._directory / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(self._directory), *sys.path],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for training, which ends this
            )

    # ------------------------------------------------------------------ as it goes

    def failed(self) -> bool:
        """Whether it is known now, on this rank, that the layout is wrong; takes a microsecond or two."""
        if self._process is not None and (self._process.poll() is not None or time.monotonic() - self._began > self._longest):
            self._read()
        return self.verdict.status == "different"

    def told(self) -> bool:
        """Whether the verdict has become known since this was asked last; true once."""
        new = self.verdict.status != "running" and not self._told
        self._told = self._told or new
        return new

    def wait(self, seconds: float) -> Verdict:
        """The verdict, the same on every rank; waits up to so many seconds for it. Every rank must call it."""
        return distributed.on_main(lambda: self._wait(seconds))

    def _wait(self, seconds: float) -> Verdict:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
            self._read()
        return self.verdict

    def close(self) -> None:
        """End what still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _read(self) -> None:
        assert self._process is not None
        assert self._directory is not None
        code, answer = self._process.poll(), self._directory / "verdict"
        if answer.exists():
            self.verdict = pickle.loads(answer.read_bytes())
            verdicts.keep(self._name, self.verdict)
        elif code is None:
            passed = time.monotonic() - self._began
            self.verdict = not_proven(f"training ended first, after {passed:.0f} s of proving; write trainer.prove=before to wait for it")
        else:
            said = (self._directory / "output").read_text(errors="replace").strip().splitlines()
            self.verdict = not_proven(f"the process that proves ended with code {code}{': ' + said[-1] if said else ''}")
        self.close()


_START = "import sys; sys.path[:] = sys.argv[2:]; del sys.argv[2:]\nfrom paratrain.verify import worker; worker.main(sys.argv[1])"


def _task(engine: Engine, small: Smaller, batches: list[tuple[Any, Any]], total: int | None) -> Task:
    data = dumps(batches)
    assert engine.recipe.data is not None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    budget = max(30.0, 0.02 * 600 * cores)  # 2 % of ten minutes of this host
    model = engine.blueprint or engine.model
    return Task(engine.recipe.data, data, small, total, elements_of(model), budget, LONGEST / 2, 0, list(sys.path), os.getcwd())


def _packages(engine: Engine) -> set[str]:
    """The packages that the modules of the model come from."""
    return {type(module).__module__.partition(".")[0] for module in (engine.blueprint or engine.model).modules()}


def prove(engine: Engine, batches: Any) -> Any:
    """`Engine.prove`."""
    given = [batches] if isinstance(batches, tuple) else list(itertools.islice(batches, verdicts.STEPS))  # they may have no end
    if not given:
        raise UserError("engine.prove([]): give it at least one global batch (inputs, targets), as engine.local takes it")
    proof = Proof(engine, lambda samples: given, engine.total_updates, "before")
    try:
        verdict = proof.wait(min(LONGEST, 48.0 * engine.cfg.trainer.timeout_minutes))
    finally:
        proof.close()
    if verdict.status == "different":
        raise UserError(refusal(verdict))
    if engine.is_main_process:
        log.info(verdict.line)
    return verdict


def refusal(verdict: Verdict, saved: str = "") -> str:
    """What to tell the user of a job whose layout is wrong."""
    return (
        f"this layout does not train as one process does: {verdict.line.removeprefix('different: ')}\n{saved}"
        "For all that differs run python -m paratrain verify, or pt.verify(model_fn, loss_fn, batch, cfg); to train all the same, write "
        "trainer.prove=off"
    )
