"""Training that was stopped and resumed has the state of training that was not, bit for bit: tensors, counters and generators."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import paratrain as pt
from paratrain import build, checkpoint, data
from paratrain.callbacks import Callback
from paratrain.spawn import run

STEPS, STOP = 6, 4
COMMON = [
    "data.seq_len=8", "data.global_batch=4", "model.layers=2", "model.dim=16", "model.heads=2", "model.dropout=0.2", "seed=3",
    "trainer.clip_norm=1.0", "trainer.device=cpu", "scheduler=cosine", f"trainer.max_steps={STEPS}", "trainer.log_every=1",
    "checkpoint.every=3", "checkpoint.keep=null", "logger.sinks=[jsonl]",
]  # fmt: skip
RANDOM = ["data=synthetic", "data.vocab_size=16", "data.samples=21", "data.eval_samples=4"]
PACKED = ["data=text", "data.path=TEXT", "data.tokenizer=byte"]
SPLIT = ["data.micro_batch_size=1"]
AVERAGE = ["ema.decay=0.9"]
MUON = ["optimizer=muon", "optimizer.lr=1e-2"]  # and AdamW for vectors: several optimizers
FP16 = ["precision=fp16", "precision.loss_scale.init=65536", "precision.loss_scale.growth_interval=2"]

CASES = {  # ranks, overrides
    "single, packed text": (1, PACKED),
    "single, schedule-free": (1, ["optimizer=schedule_free"]),
    "ddp, workers, packed text": (2, ["strategy=ddp", "data.workers=2", *PACKED]),
    "ddp, fp16, micro-batches": (2, ["strategy=ddp", *FP16, *SPLIT]),
    "ddp, spikes, rollback": (2, ["strategy=ddp", "trainer.nonfinite=rollback", "trainer.spike.min_steps=4"]),
    "zero1, two optimizers, average": (2, ["strategy=zero1", *MUON, *AVERAGE]),
    "zero2, 8-bit": (2, ["strategy=zero2", "optimizer=adamw_8bit"]),
    "fsdp, two optimizers, average": (2, ["strategy=fsdp", *MUON, *AVERAGE]),
    "fsdp, fp16, workers": (2, ["strategy=fsdp", *FP16, "data.workers=1"]),
    "fsdp, offload, bf16": (2, ["strategy=fsdp", "memory.offload=params", "precision=bf16"]),
    "fsdp, stochastic rounding": (2, ["strategy=fsdp", "precision=bf16_true", "optimizer=adamw_stochastic"]),
    "fsdp, recomputed": (2, ["strategy=fsdp", "memory.recompute=full", "optimizer=soap"]),
    "update in backward": (2, ["strategy=fsdp", "trainer.update_in_backward=true", "trainer.clip_norm=null"]),
    "tensor parallel": (2, ["parallel.tp=2", *AVERAGE]),
    "sequence parallel, fp16": (2, ["parallel.tp=2", "parallel.sp=true", *FP16]),
    "pipeline, fp16": (2, ["parallel.pp=2", *SPLIT, *FP16]),
    "context parallel": (2, ["parallel.cp=2", "model.dropout=0"]),
    "hsdp": (4, ["strategy=hsdp", "parallel.dp_replicate=2"]),
    "tensor and pipeline parallel": (4, ["parallel.tp=2", "parallel.pp=2", *SPLIT, *AVERAGE]),
    "fsdp and tensor parallel": (4, ["strategy=fsdp", "parallel.tp=2", *MUON]),
}
QUICK = ("ddp, workers, packed text", "ddp, fp16, micro-batches", "fsdp, two optimizers, average", "pipeline, fp16", "tensor parallel")


class Crash(Callback):
    def on_step_end(self, trainer, result):
        if trainer.engine.global_step == STOP:
            raise RuntimeError("crashed on purpose")


def train(directories, crash):
    """Train in each directory, with the configuration that belongs to it."""
    for directory, cfg in directories.items():
        cfg = replace(cfg, output_dir=str(directory))
        train_data, eval_data = data.build(cfg.data, cfg.seed)
        trainer = pt.Trainer(cfg, build.model_fn(cfg), build.loss_fn(cfg), train_data, eval_data, [Crash()] if crash else [])
        if not crash:
            trainer.fit()
            continue
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer.fit()


def final(directory):
    """(tensors, counters, generators) of the last checkpoint, and what was logged but for times."""
    path = checkpoint.step_path(directory / "checkpoints", STEPS)
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors(path).items()}
    meta, ranks = checkpoint.load(path, tensors)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    timed = ("throughput/", "time/", "memory/", "goodput/")
    logged = [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]
    extra = {name: meta["extra"][name] for name in ("data", "spike", "left_out", "best")}
    return tensors, (meta["engine"], extra, ranks, logged)


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_resumed_training_has_the_state_of_training_that_went_through(ranks, quick, tmp_path):
    """Crashed and resumed in different processes."""
    chosen = {case: overrides for case, (needed, overrides) in CASES.items() if needed == ranks and (case in QUICK) == quick}
    if not chosen:
        pytest.skip("no such case")
    for number in range(5):
        text = tmp_path / "text" / f"{number}.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text("the quick brown fox jumps over the lazy dog. " * (number + 2))
    whole, broken = {}, {}
    for case, overrides in chosen.items():
        source = [] if "data=text" in overrides else RANDOM
        cfg = pt.load_config([*COMMON, *source, *(override.replace("TEXT", str(tmp_path / "text")) for override in overrides)])
        whole[tmp_path / case / "whole"], broken[tmp_path / case / "broken"] = cfg, cfg
    run(lambda: (train(whole, False), train(broken, True)), ranks, timeout=280)
    run(lambda: train(broken, False), ranks, timeout=280)
    for case in chosen:
        tensors, rest = final(tmp_path / case / "broken")
        expected, expected_rest = final(tmp_path / case / "whole")
        assert rest == expected_rest, case
        assert tensors.keys() == expected.keys(), case
        assert [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])] == [], case
        assert any(name.startswith("optimizer/") for name in tensors), case
