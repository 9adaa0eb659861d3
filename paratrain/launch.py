"""Starting processes: torchrun with a quiet end, and sweeps in which one torchrun is one Hydra job.

`python -m paratrain sweep TORCHRUN_OPTIONS script.py|-m module key=a,b` runs the program once, alone, under Hydra's multirun; each of
its jobs starts a torchrun of the same program that reads the resolved configuration from a file. Processes, CUDA contexts and
rendezvous are new for every job, and any Hydra launcher or sweeper works.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from paratrain.faults import INTERRUPTED
from paratrain.job import FILE, MISTAKE, RESULT

COMMAND = "PARATRAIN_LAUNCH"  # environment variable: torchrun's arguments, program included, as JSON


def launch(arguments: list[str]) -> int:
    """torchrun, ended as quietly as the program it ran: returns the exit code of the first process that failed, without a traceback
    of the launcher's own.

    Args:
        arguments: as torchrun takes them.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    if not any(text.startswith(("--signals-to-handle", "--signals_to_handle")) for text in arguments):
        arguments = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", *arguments]  # or SIGUSR1 kills torchrun alone
    try:
        main(arguments)
    except SignalException:
        return INTERRUPTED  # the workers were told, and had time for a checkpoint
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != MISTAKE:
            print(error, file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def sweep(arguments: list[str]) -> int:
    """Run a sweep; returns its exit code.

    Args:
        arguments: torchrun's options, the program (`script.py` or `-m module`), then Hydra overrides.
    """
    from torch.distributed.run import parse_args

    parsed = parse_args(arguments)
    overrides = list(parsed.training_script_args)
    torchrun = arguments[: len(arguments) - len(overrides)]
    if not (parsed.standalone or parsed.rdzv_endpoint or any(text.startswith(("--master", "--node")) for text in torchrun)):
        torchrun = ["--standalone", *torchrun]  # a free port for each of several jobs at once
    program = ["-m", parsed.training_script] if parsed.module else [parsed.training_script]
    command = [sys.executable, *program, "--multirun", *overrides]
    return subprocess.run(command, env={**os.environ, COMMAND: json.dumps(torchrun)}, check=False).returncode


def job(config: dict[str, Any], output_dir: str) -> Any:
    """One job of a sweep, inside Hydra: start torchrun, return what the task returned on rank 0.

    Raises:
        RuntimeError: when a process of the job failed.
    """
    result = Path(output_dir) / RESULT
    result.unlink(missing_ok=True)
    env = {name: value for name, value in os.environ.items() if name != COMMAND}
    command = [sys.executable, "-m", "paratrain", "launch", *json.loads(os.environ[COMMAND])]
    with tempfile.TemporaryFile("w+") as file:  # secrets, too: it has no name, and only processes of this user can open it
        json.dump([config, False, {}], file)
        file.flush()
        opened = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        code = subprocess.run(command, env={**env, FILE: opened}, check=False).returncode
    if code:
        raise RuntimeError(f"the job in {output_dir} failed with exit code {code}; its error is above")
    return json.loads(result.read_text())


def this_program() -> str:
    """How this process was started: `-m package.module` or `script.py`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"-m {spec.name.removesuffix('.__main__')}" if spec is not None else os.path.basename(sys.argv[0])
