"""What `import paratrain`, and the names of a first script, cost beyond `import torch`."""

from __future__ import annotations

from benchmarks import report

ROUNDS = 7
TIMED = "import time, torch; began = time.perf_counter(); {}; print(time.perf_counter() - began)"
IMPORTS = {
    "paratrain": "import paratrain",
    "paratrain, all public names": "from paratrain import *",
    "Accelerate": "from accelerate import Accelerator",
    "Fabric": "from lightning.fabric import Fabric",
}


def main() -> None:
    def measure(statement: str):
        return lambda: report.run_python(TIMED.format(statement))

    taken = report.interleaved({name: measure(statement) for name, statement in IMPORTS.items()}, ROUNDS)
    rows = {name: {"seconds": report.median(values)} for name, values in taken.items()}
    for name, row in rows.items():
        print(f"{name:28} {row['seconds']:.3f} s over torch")
    report.write("import_time", rows, f"median of {ROUNDS} interleaved rounds, fresh interpreters, time after `import torch`")


if __name__ == "__main__":
    main()
