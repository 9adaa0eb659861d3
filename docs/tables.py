"""Tables of the README and of docs/: benchmarks from benchmarks/results/*.json, choices from conf/, pages from docs/, so that none can drift.

python docs/tables.py          write them between their markers, <!-- table NAME --> and <!-- end -->
python docs/tables.py --check  exit with 1 where they differ
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def exactness(rows: dict) -> list[list[str]]:
    head = ["20 steps, 2 ranks, accumulation 2, float64", "equal lengths", "masked tokens"]
    return [head, *([name, f"{row['equal_lengths']:.0e}", f"{row['masked_tokens']:.0e}"] for name, row in rows.items())]


def overhead(rows: dict) -> list[list[str]]:
    head = ["", "µs a step", "added to the loop by hand, median (quartiles)"]
    return [head, *([name, f"{row['us_per_step']:.0f}", row["spread_of_added"]] for name, row in rows.items())]


def import_time(rows: dict) -> list[list[str]]:
    return [["", "seconds over `import torch`"], *([name, f"{row['seconds']:.3f}"] for name, row in rows.items())]


def recovery(rows: dict) -> list[list[str]]:
    table = [["", "median (quartiles)"]]
    for row in rows["saves"]:
        table += [
            [f"training waits for a checkpoint of {row['state_mib']:.0f} MiB, written before it goes on", _spread(row["sync_s"])],
            [f"the same, written while it goes on: {100 * row['ratio']:.1f} %", _spread(row["async_stall_s"])],
            [f"by how much the step beside the writing, of {row['step_s']:.1f} s, is longer", _spread(row["async_beside_s"])],
        ]
    killed = f"{statistics.median(rows['sigkill_to_next_step_s']):.1f} s"
    return [*table, ["SIGKILL of a rank to the next training step, restarted by torchrun", killed]]


def sharding_memory(rows: dict) -> list[list[str]]:
    def cell(row: dict, when: str) -> str:
        return f"{row[f'bytes a parameter between {when}']:g} ({row['theory' if when == 'steps' else f'theory between {when}']:g})"

    body = [
        [name.removeprefix("memory, "), cell(row, "steps"), cell(row, "micro-batches")] for name, row in rows.items() if "theory" in row
    ]
    return [["bytes a parameter on a rank (in theory)", "between steps", "between micro-batches"], *body]


def sharding_time(rows: dict) -> list[list[str]]:
    body = [
        [name.removeprefix("time, "), row["ms"], f"{row['ratio']:.3f} ({row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f})"]
        for name, row in rows.items()
        if "ms" in row
    ]
    return [["", "ms a step, median (quartiles)", "over the loop by hand"], *body]


def backends(rows: dict) -> list[list[str]]:
    return [
        ["strategy", "ms a step, median (middle half)", "MiB held a rank"],
        *([name, row["step_ms"], str(row["held_mib"])] for name, row in rows.items()),
    ]


def overflow(rows: dict) -> list[list[str]]:
    def ended(row: dict) -> str:
        if row["loss"] is None:
            return f"stops at step {row['steps']}: every step overflows" if row["steps"] < 200 else "never takes a step: all overflow"
        return f"{row['loss']:.4f} ({row['loss'] / exact - 1:+.2%})"

    def rest(row: dict) -> str:
        words = [f"{row['moved']:.0%} of the modules left half"] if "moved" in row else []
        words += [f"{row['skipped']} steps skipped"] if row["skipped"] and row["loss"] else []
        return ", ".join(words + ([f"computes in {row['computed in']}, without a word"] if row.get("computed in") == "float32" else []))

    exact = rows["paratrain, fp32"]["loss"]
    return [["", "mean loss of the last 20 of 200 steps", ""], *([name, ended(row), rest(row)] for name, row in rows.items())]


def optimizers(rows: dict) -> list[list[str]]:
    """Largest difference of a weight from one process."""
    layouts = list(dict.fromkeys(layout for row in rows.values() for layout in row["differences"]))

    def cell(value: float | str | None) -> str:
        return "refused" if isinstance(value, str) else "" if value is None else f"{value:.0e}"

    body = [[name, *(cell(row["differences"].get(layout)) for layout in layouts)] for name, row in rows.items() if not _absent(row)]
    return [["`optimizer=`", *layouts], *body]


def optimizer_states(rows: dict) -> list[list[str]]:
    body = [[name, f"`{row['class']}`", "not installed here" if _absent(row) else f"{row['state']:.2f}"] for name, row in rows.items()]
    return [["`optimizer=`", "class", "state, bytes a parameter"], *body]


def _absent(row: dict) -> bool:
    return isinstance(row["state"], str)


TABLES: dict[str, Callable[[dict], list[list[str]]]] = {
    "exactness": exactness,
    "overhead": overhead,
    "import_time": import_time,
    "recovery": recovery,
    "overflow": overflow,
    "sharding_memory": sharding_memory,
    "sharding_time": sharding_time,
    "backends": backends,
    "optimizers": optimizers,
    "optimizer_states": optimizer_states,
}
# tables of a result of another name
RESULT_OF = {"optimizer_states": "optimizers", "sharding_memory": "sharding", "sharding_time": "sharding"}


def gpu() -> str:
    """Every GPU on which `make gpu` was run."""
    lines = []
    for path in sorted(RESULTS.glob("gpu-*.json")):
        result = json.loads(path.read_text())
        head = [result["machine"], "tokens/s", "MFU (causal)", "peak GiB", "time, by hand = 1"]
        body = [
            [name, f"{row['tokens_per_sec']:.0f}", _mfu(row), f"{row['peak_bytes'] / 2**30:.1f}", f"{row['time_over_hand']:.3f}"]
            for name, row in result["rows"].items()
            if "left_out" not in row
        ]
        lines += [_table(head, body), "", f"[`benchmarks/gpu.py`](benchmarks/gpu.py): {result['note']}.", ""]
    return "\n".join(lines or ["No GPU yet: `make gpu` on a machine that has one fills this table.", ""])


def faults() -> str:
    """How each kind of random fault ended, and what was said of the first one."""
    result = json.loads((RESULTS / "faults.json").read_text())
    good, body = ("survived", "stopped"), []
    for kind, row in result["rows"].items():
        counts = [row["ends"].get(end, 0) for end in good]
        every = sum(row["ends"].values())
        body.append([kind, *map(str, (every, *counts, every - sum(counts))), row["said"].replace("|", "\\|").replace("\n", " ")])
    total = [str(sum(int(cells[column]) for cells in body)) for column in range(1, 5)]
    head = ["fault", "times", "survived, bit-equal", "stopped by name", "lost or wrong", "what was said of the first"]
    table = _table(head, [*body, ["**all**", *total, ""]], right=False)
    return f"{table}\n\n[`tests/chaos/five_hundred.py`](tests/chaos/five_hundred.py), {result['note']}, on {result['machine']}.\n"


def choices() -> str:
    """The choices of the groups that one overrides first."""
    aliases = {"64-true", "32-true", "bf16-mixed", "bf16-true", "16-mixed"}
    rows = []
    for group in ("strategy", "precision", "optimizer", "scheduler", "model", "data", "logger"):
        names = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml") if path.stem not in aliases)
        rows.append([f"`{group}=`", " ".join(f"`{name}`" for name in names)])
    return _table(["group", "choices"], rows, right=False) + "\n"


def pages() -> str:
    """A line for each page of docs/, by its title."""
    titles = {page.name: page.read_text().splitlines()[0].lstrip("# ") for page in sorted((ROOT / "docs").glob("*.md"))}
    return "\n".join(f"- [{title}](docs/{name})" for name, title in titles.items()) + "\n"


def render(name: str) -> str:
    """What stands between the markers of `name`: a benchmark's result with its machine and note, or what a function of that name makes."""
    if name in OTHERS:
        return OTHERS[name]()
    source_name = RESULT_OF.get(name, name)
    result = json.loads((RESULTS / f"{source_name}.json").read_text())
    head, *body = TABLES[name](result["rows"])
    source = f"[`benchmarks/{source_name}.py`](benchmarks/{source_name}.py): {result['note']}. {result['machine']}."
    return "\n".join([_table(head, body), "", source, ""])


def _table(head: list[str], body: list[list[str]], right: bool = True) -> str:
    rule = ["---", *["---:" if right else "---"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


def _spread(seconds: list[float]) -> str:
    low, middle, high = (1e3 * value for value in statistics.quantiles(seconds, n=4))
    return f"{middle:.0f} ms ({low:.0f} to {high:.0f})"


def _mfu(row: dict) -> str:
    return f"{row['mfu']:.1%} ({row['mfu_causal']:.1%})" if "mfu" in row else "no peak known"


OTHERS: dict[str, Callable[[], str]] = {"gpu": gpu, "faults": faults, "choices": choices, "pages": pages}


def rewritten(page: Path) -> str:
    """A page with every marked table as it is measured."""
    link = "](" if page.parent == ROOT else "](../"
    return MARKED.sub(
        lambda match: (
            f"{match[1]}{render(match[2]).replace('](benchmarks/', f'{link}benchmarks/').replace('](tests/', f'{link}tests/')}{match[3]}"
        ),
        page.read_text(),
    )


def main(arguments: list[str]) -> int:
    texts = {page: rewritten(page) for page in PAGES}
    if "--check" in arguments:
        return int(any(page.read_text() != text for page, text in texts.items()))
    for page, text in texts.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
