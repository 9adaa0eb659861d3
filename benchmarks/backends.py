"""Native strategies and those of other packages: time of a step and bytes held a rank, on the same model and data, 2 processes.

Bytes are those of the distinct storages behind every live tensor of rank 0 after a step, without the batch: weights, optimizer states,
and whatever buffers an engine keeps. Steps of all strategies are taken in turn in the same two processes.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from benchmarks import report

RANKS, ROUNDS = 2, 15
BUCKET = 2**20  # elements: DeepSpeed keeps a buffer of this size, 2 GB with its own default, beside a model of 13 MB
NATIVE = ["ddp", "zero1", "zero2", "zero3", "zero1 parallel.pp=2"]
FOREIGN = ["fairscale_oss", "fairscale_sddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero1 parallel.pp=2"]


def engine(name: str) -> Any:
    """The engine of a strategy; `name` may have overrides after it."""
    import paratrain as pt
    from paratrain.models.gpt import GPT

    strategy, *options = name.split()
    options += [f"strategy.reduce_bucket_size={BUCKET}", f"strategy.allgather_bucket_size={BUCKET}"] if "deepspeed" in strategy else []
    cfg = pt.load_config(
        [f"strategy={strategy}", "trainer.clip_norm=1.0", "trainer.device=cpu", "data.micro_batch_size=4", "data.global_batch=16", *options]
    )
    return pt.setup(lambda: GPT(vocab_size=256, seq_len=64, layers=4, dim=256), pt.cross_entropy, cfg)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 256, (16, 65), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def live_bytes() -> int:
    from paratrain.parallel.pipeline_ghost import Ghost

    gc.collect()
    storages = {}
    for item in gc.get_objects():
        kind = type(item)  # isinstance would ask lazy modules for their class
        if issubclass(kind, torch.Tensor) and not issubclass(kind, Ghost) and not item.is_meta:
            local = item.to_local() if hasattr(item, "to_local") else item
            storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def held(name: str) -> float:
    """MiB of tensors on this rank after three steps."""
    before = live_bytes()
    trained = engine(name)
    for _ in range(3):
        trained.train_step(trained.local(batch()))
    return (live_bytes() - before) / 2**20


def times() -> dict[str, list[float]]:
    """Milliseconds of steps of every strategy, in turn."""
    engines = {name: engine(name) for name in (*NATIVE, *FOREIGN)}
    shares = {name: each.local(batch()) for name, each in engines.items()}

    def step(name: str) -> float:
        engines[name].barrier()
        began = time.perf_counter()
        engines[name].train_step(shares[name])
        engines[name].barrier()
        return 1000 * (time.perf_counter() - began)

    for name in engines:
        step(name), step(name)
    return report.interleaved({name: lambda name=name: step(name) for name in engines}, ROUNDS)


def main() -> None:
    from paratrain.spawn import close, run

    taken = run(times, RANKS, timeout=600)[0]
    rows = {}
    for name in (*NATIVE, *FOREIGN):
        mib = max(run(held, RANKS, name, timeout=300))
        rows[name] = {"step_ms": report.spread(taken[name]), "held_mib": round(mib, 1)}
        print(f"{name:28} step {rows[name]['step_ms']} ms   held {mib:.1f} MiB a rank")
    close()
    packages = ", ".join(f"{name} {version}" for name, version in report.versions("deepspeed", "fairscale").items())
    note = f"GPT of 3.3 M parameters in float32, 2 processes over gloo, 16 sequences of 64 tokens a step in micro-batches of 4; {packages}"
    report.write("backends", rows, note)


if __name__ == "__main__":
    main()
