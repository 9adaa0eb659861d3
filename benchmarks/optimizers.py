"""Bytes of state per parameter for every optimizer of `conf/optimizer`: the table of docs/optimizers.md.

python -m benchmarks.optimizers
"""

from __future__ import annotations

from pathlib import Path

import torch

from paratrain import optim
from paratrain.config import Optimizer
from paratrain.errors import UserError
from paratrain.models.gpt import GPT
from paratrain.schema import from_dict

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured: python -m benchmarks.optimizers -->", "<!-- end -->"


def options(name: str) -> Optimizer:
    import yaml

    return from_dict(Optimizer, yaml.safe_load((ROOT / "conf/optimizer" / f"{name}.yaml").read_text()))


def measure(name: str) -> tuple[float, int] | str:
    """(bytes of state per parameter, parameters), or why it cannot run here."""
    torch.manual_seed(0)
    model = GPT(vocab_size=512, seq_len=128, layers=4, dim=256, heads=4)
    try:
        optimizers = optim.build(options(name), model)
    except UserError as error:
        return str(error).split(",")[0]
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    for optimizer in optimizers:
        optimizer.step()
    count = sum(param.numel() for param in model.parameters())
    states = [v for optimizer in optimizers for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(v.numel() * v.element_size() for v in states if v.numel() > 1) / count, count


def main() -> None:
    names = sorted(path.stem for path in (ROOT / "conf/optimizer").glob("*.yaml"))
    rows = ["| `optimizer=` | class | state, bytes a parameter |", "|---|---|---|"]
    for name in names:
        result = measure(name)
        numbers = "not installed here" if isinstance(result, str) else f"{result[0]:.2f}"
        rows.append(f"| {name} | `{options(name).target}` | {numbers} |")
    page = ROOT / "docs/optimizers.md"
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n" + "\n".join(rows) + f"\n{END}" + rest.partition(END)[2])
    print("\n".join(rows))


if __name__ == "__main__":
    main()
