"""Faults under every layout, on 2 and 4 ranks: afterwards the weights are those of a job that nothing happened to, bit for bit."""

from __future__ import annotations

import pytest
from jobs import attempts, fault, same, train

LAYOUTS = {
    "ddp": (2, ["strategy=ddp"]),
    "fsdp": (2, ["strategy=fsdp"]),
    "ddp-4": (4, ["strategy=ddp"]),
    "fsdp-4": (4, ["strategy=fsdp"]),
    "tp-pp-4": (4, ["parallel.tp=2", "parallel.pp=2", "model.layers=2", "data.micro_batch_size=1"]),
}

# what happens to one job: kind, step and rank of each fault; overrides; what the output must tell
STORIES = {
    "deaths": (
        [("sigkill", 2, 1), ("segv", 4, 0), ("raise", 7, 1), ("memory", 10, 1), ("loader", 11, 0)],
        ["data.workers=1"],
        ["raised on purpose", "out of memory on cpu", "memory.recompute=full", "DataLoader worker (pid"],
    ),
    "saves": ([("save-data", 3, 1), ("save-manifest", 6, 0), ("save-rename", 9, 0)], [], []),
    "hangs": (
        [("hang", 4, 1), ("SIGSTOP", 7, 1), ("hang-with-gil", 10, 1)],
        ["trainer.step_timeout=10s"],
        ["no progress for", "rank 0 of", "stacks and collectives of all ranks are in"],
    ),
    "damage": (
        [("damage-flip", 7, 0), ("damage-truncate", 8, 0), ("damage-zero", 10, 0), ("damage-missing", 11, 0), ("damage-swap", 12, 0)],
        ["checkpoint.at_end=false"],
        ["set aside as .damaged-step-000006", "set aside as .damaged-step-000009"],
    ),
    "values": (
        [("nonfinite", 5, 1), ("bit", 8, 1)],
        ["+callbacks.replicas._target_=paratrain.verify.ReplicaCheck", "+callbacks.replicas.every=1"],
        ["the loss is nan", "trainer.nonfinite=raise", "replicas differ: parameter", "norm"],
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("story", STORIES)
def test_the_weights_are_those_of_an_undisturbed_job(story, layout, tmp_path, undisturbed):
    faults, overrides, told = STORIES[story]
    ranks, how = LAYOUTS[layout]
    if story == "values" and "fsdp" in layout:  # sharded weights have no replica that could tell
        faults, overrides, told = faults[:1], [], told[:2]
    injected = [text for kind, step, rank in faults for text in fault(kind, step, on=rank)]
    text = train(tmp_path, *injected, *how, *overrides, ranks=ranks, restarts=len(faults) + 2, seconds=800)
    same(tmp_path, undisturbed(*how, ranks=ranks))
    assert all((tmp_path / f"did-{kind}").exists() for kind, *_ in faults)
    assert len(attempts(tmp_path)) > len(faults)
    assert not [path.name for path in (tmp_path / "checkpoints").iterdir() if ".tmp-" in path.name]
    for words in told:
        assert words in text
