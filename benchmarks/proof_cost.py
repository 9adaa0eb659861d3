"""What the proof of a job costs: `python -m benchmarks.proof_cost` runs the examples with trainer.prove=before, and reads the CPU seconds of the verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import write

SHORT = ["trainer.prove=before", "trainer.max_steps=2", "scheduler.warmup_steps=0"]
TEN_MINUTES = 600.0
JOBS = {  # name -> (ranks, program, overrides)
    "examples/vision.py": (2, ["examples/vision.py"], []),
    "examples/own_conf": (2, ["examples/own_conf/train.py"], []),
    "examples/overflow.py": (1, ["examples/overflow.py"], []),
    "experiment=first_run": (2, ["-m", "paratrain.train"], ["experiment=first_run", "callbacks=default"]),
    "experiment=first_run, fsdp with micro-batches": (
        2,
        ["-m", "paratrain.train"],
        ["experiment=first_run", "callbacks=default", "strategy=fsdp", "~strategy.find_unused_parameters", "data.micro_batch_size=2"],
    ),
    "experiment=first_run, parallel.tp=2": (2, ["-m", "paratrain.train"], ["experiment=first_run", "callbacks=default", "parallel.tp=2"]),
    "experiment=first_run, parallel.pp=2": (2, ["-m", "paratrain.train"], ["experiment=first_run", "callbacks=default", "parallel.pp=2"]),
}


def cost(ranks: int, program: list[str], overrides: list[str]) -> dict:
    """Verdict and CPU seconds of one job, proven with an empty cache."""
    with tempfile.TemporaryDirectory() as scratch:
        env = {**os.environ, "XDG_CACHE_HOME": f"{scratch}/cache", "OMP_NUM_THREADS": "1"}
        env.pop("PARATRAIN_PROVE", None)
        launch = (
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable]
        )
        done = subprocess.run(
            [*launch, *program, f"output_dir={scratch}/run", *SHORT, *overrides], env=env, capture_output=True, text=True, check=False
        )
        records = sorted(Path(scratch).glob("run/**/config.json"))
        if not records:
            raise SystemExit(f"{' '.join(program)} {' '.join(overrides)} did not train:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        proof = json.loads(records[0].read_text())["proof"]
    seconds = proof["cpu_seconds"]
    share = 100 * seconds / (TEN_MINUTES * (os.cpu_count() or 1))
    return {"verdict": proof["line"], "cpu_seconds": seconds, "percent_of_ten_minutes": round(share, 2)}


def main() -> None:
    rows = {}
    for name, job in JOBS.items():
        rows[name] = cost(*job)
        print(
            f"{name:48} {rows[name]['cpu_seconds']:6.1f} s  {rows[name]['percent_of_ten_minutes']:.2f} %  {rows[name]['verdict']}",
            flush=True,
        )
    write(
        "proof_cost",
        rows,
        "CPU seconds of all processes of the proof, imports included; share of the CPU of this host in the first ten minutes",
    )


if __name__ == "__main__":
    main()
