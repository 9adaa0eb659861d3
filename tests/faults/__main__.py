"""`python -m tests.faults [PATH]`: sow every fault, and write the table of what verify found and said."""

from __future__ import annotations

import sys
from pathlib import Path

from .corpus import ANY, CORPUS

HEAD = """# Detection table of verify

Written by `python -m tests.faults` (torch {version}, CPU, gloo). Every fault is sown into the ranks of a `ddp` layout (that of experts: with `parallel.ep=2`),
the one process it is compared with stays sound. *Found*: exit code 1. *Explained*: the kind of error is the right one, and the explanation names the cause;
where no simple relation holds between right and wrong (unknown), it names the module or weight in which the difference begins. From "a BatchNorm subclass loses its own forward" on they are programs as users write them, each with what a layout has done to it in silence:
whether that is found with the mend taken out.

{found} of {total} found, {explained} of {total} explained.

| fault | found | explained | first difference | error | explanation |
|---|---|---|---|---|---|
"""


def main(path: str, only: str = "") -> int:
    """Write the table to `path`, of the faults whose name contains `only`."""
    import torch

    rows, found, explained = [], 0, 0
    for fault in (fault for fault in CORPUS if only in fault.name):
        report = fault.verify()
        first = report.first_difference
        hit = first is not None
        right = first is not None and fault.error in (first.error, ANY) and fault.says in report.explanation
        found, explained = found + hit, explained + right
        where = f"step {first.step}: {first.what}" if first is not None else ""
        said = report.explanation.partition("\n")[0].replace("|", "\\|")
        rows.append(
            f"| {fault.name} | {'yes' if hit else 'NO'} | {'yes' if right else 'NO'} | {where} | {first.error if first else ''} | {said} |"
        )
        print(rows[-1], flush=True)
    text = HEAD.format(
        version=torch.__version__.partition("+")[0],
        found=found,
        explained=explained,
        total=len(CORPUS),
    )
    Path(path).write_text(text + "\n".join(rows) + "\n", encoding="utf-8")
    return 0 if explained == len(CORPUS) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:] or ["docs/verify_table.md"]))
