"""A checkpoint of every layout resumes under every other one: losses and norms go on as if nothing had happened."""

from __future__ import annotations

import pytest
import torch
from reference import config, token_loss
from test_context import Written, batches
from test_pipeline import by_hand

from paratrain.api import setup
from paratrain.config import DDP, FSDP, HSDP, Context, Parallel, Pipeline, Single, Zero1, Zero2
from paratrain.spawn import run

LAYOUTS = {  # degrees, strategy, schedule, how attention is exchanged
    "one process": (Parallel(), Single()),
    "ddp": (Parallel(), DDP()),
    "zero1": (Parallel(), Zero1()),
    "zero2": (Parallel(), Zero2()),
    "fsdp": (Parallel(), FSDP()),
    "hsdp": (Parallel(dp_replicate=2, dp_shard=2), HSDP()),
    "tp4": (Parallel(tp=4), DDP()),
    "tp": (Parallel(tp=2), DDP()),
    "tp sp x fsdp": (Parallel(tp=2, sp=True), FSDP()),
    "pp4": (Parallel(pp=4), DDP(), "gpipe"),
    "pp": (Parallel(pp=2), DDP()),
    "pp interleaved x fsdp": (Parallel(pp=2), FSDP(), "interleaved"),
    "pp zbv": (Parallel(pp=2), DDP(), "zbv"),
    "pp x tp": (Parallel(pp=2, tp=2), DDP()),
    "cp": (Parallel(cp=2), DDP(), None, "ring"),
    "cp x fsdp": (Parallel(cp=2), FSDP(), None, "all_gather"),
    "cp x tp": (Parallel(cp=2, tp=2), DDP()),
    "cp x pp": (Parallel(cp=2, pp=2), DDP()),
}
BY_RANKS = {4: [*LAYOUTS][1:], 2: ["fsdp", "tp", "pp zbv", "cp"], 1: ["one process"]}


def layout(name):
    parallel, strategy, schedule, method = (*LAYOUTS[name], None, None)[:4]
    pipeline = Pipeline(schedule) if schedule else Pipeline()
    return config(2, parallel=parallel, strategy=strategy, pipeline=pipeline, context=Context(method) if method else Context())


def model(tied):
    torch.manual_seed(3)
    return Written(layers=4, tied=tied)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_training_goes_on_from_layout_to_layout(tied, tmp_path):
    """One step under each, from the checkpoint of the one before. q, k and v are one matrix, kept in another order under tp."""
    chain = [(ranks, name) for ranks, names in BY_RANKS.items() for name in names]
    data = batches(len(chain), 8)

    def go_on(first, names):
        found = []
        for number, name in enumerate(names, first):
            engine = setup(lambda: model(tied), token_loss, layout(name))
            if number:
                engine.load(tmp_path / str(number - 1))
            step = engine.train_step(engine.local(data[number]))
            engine.save(tmp_path / str(number))
            found.append((step.loss, step.grad_norm))
        return found

    losses, norms, _ = by_hand(lambda: model(tied), data)
    found = []
    for ranks, names in BY_RANKS.items():
        found += run(go_on, ranks, len(found), names, timeout=250)[0]
    for number, (where, (loss, norm)) in enumerate(zip(chain, found, strict=True)):
        assert (loss, norm) == pytest.approx((losses[number], norms[number]), abs=1e-10), where


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_checkpoint_resumes_under_every_layout(tmp_path):
    data = batches(4, 8)

    def save(names):
        for name in names:
            engine = setup(lambda: model(True), token_loss, layout(name))
            for batch in data[:2]:
                engine.train_step(engine.local(batch))
            engine.save(tmp_path / name)

    def resume(names):
        found = {}
        for name in names:
            engine = setup(lambda: model(True), token_loss, layout(name))
            for path in sorted(tmp_path.iterdir()):
                engine.load(path)
                steps = [engine.train_step(engine.local(batch)) for batch in data[2:]]
                found[path.name, name] = [s.loss for s in steps] + [s.grad_norm for s in steps]
        return found

    for ranks in (4, 1):
        run(save, ranks, BY_RANKS[ranks], timeout=600)
    losses, norms, _ = by_hand(lambda: model(True), data)
    for ranks, names in BY_RANKS.items():
        found = run(resume, ranks, names, timeout=1000)[0]
        assert len(found) == len(LAYOUTS) * len(names)
        for pair, numbers in found.items():
            assert numbers == pytest.approx(losses[2:] + norms[2:], abs=1e-10), pair
