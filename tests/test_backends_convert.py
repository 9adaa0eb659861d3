"""Checkpoints of plain DeepSpeed become ours and ours become DeepSpeed's: both programs go on as the other would have."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from reference import LENGTH, Tiny, config, token_batches, token_loss
from torch import nn

from paratrain import Trainer, checkpoint
from paratrain.__main__ import main
from paratrain.api import setup
from paratrain.checkpoint.convert import convert_run
from paratrain.checkpoint.deepspeed import read
from paratrain.checkpoint.manifest import CheckpointError
from paratrain.checkpoint.sources import weights
from paratrain.config import DDP, FSDP, DeepSpeedZero2, Precision
from paratrain.errors import UserError
from paratrain.spawn import run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs pip install 'paratrain[deepspeed]'")
BOUND = 5e-6
"""As in test_backends.py: rounding of float32 amplified by AdamW."""


class Partly(Tiny):
    """Tied, partly frozen, with a buffer, and sizes that no number of ranks divides."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(12, 7).requires_grad_(False)
        self.extra = nn.Parameter(torch.ones(5))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens):
        if self.training:
            self.seen += 1
        return super().forward(tokens) * self.extra.mean() + self.frozen.weight.mean()


def build():
    torch.manual_seed(11)
    return Partly()


def plain_deepspeed(stage, steps, ranks=2, save=None, load=None, bf16=False):
    """Train as a user of DeepSpeed does, without paratrain: (losses, weights)."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    model = build()
    trained = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    options = {
        "train_micro_batch_size_per_gpu": 8 // ranks,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": load is not None},
        "bf16": {"enabled": bf16},
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options, dist_init_required=False)
    if load is not None:
        assert engine.load_checkpoint(load)[0] is not None
        for kept in optimizer.state.values() if stage == 3 else ():  # it gives all groups one tensor to count steps in
            kept["step"] = kept["step"].clone()
    losses = []
    for inputs, targets in token_batches(6, 8, False)[steps]:
        share = slice(torch.distributed.get_rank() * 8 // ranks, (torch.distributed.get_rank() + 1) * 8 // ranks)
        total, count = token_loss(engine(inputs[share]), targets[share])
        engine.backward(total / count)
        engine.step()
        mean = (total / count).detach()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / ranks)
    assert engine.global_steps == steps.stop
    if save is not None:
        engine.save_checkpoint(save, client_state={"epoch": 3})
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return losses, {name: value.detach().float().clone() for name, value in model.state_dict().items()}


def ours(strategy, steps, load=None, save=None):
    engine = setup(build, token_loss, config(2, precision=Precision("32-true"), strategy=strategy))
    if load is not None:
        engine.load(load)
        assert engine.global_step == steps.start == engine.updates
    losses = [engine.train_step(engine.local(batch)).loss for batch in token_batches(6, 8, False)[steps]]
    if save is not None:
        engine.save(save)
    return losses, engine.full_state_dict()


def everything(path):
    values = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors(path).items()}
    checkpoint.load(path, values)
    return values


def close(found, expected):
    assert max(abs(a - b) for a, b in zip(found[0], expected[0], strict=True)) < BOUND
    assert found[1].keys() == expected[1].keys()
    assert (
        max(float((found[1][name].double() - value.double()).abs().max()) for name, value in expected[1].items() if name != "seen") < BOUND
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directory of what plain DeepSpeed saved after three steps (zero1, zero2, zero3), and how it went on."""
    directory = tmp_path_factory.mktemp("deepspeed")

    def body():
        results = {}
        for stage in (1, 2, 3):
            plain_deepspeed(stage, slice(0, 3), save=directory / f"zero{stage}")
            results[stage] = plain_deepspeed(stage, slice(0, 6))
        plain_deepspeed(3, slice(0, 3), save=directory / "bf16", bf16=True)
        return results

    with contextlib.redirect_stdout(io.StringIO()):
        return directory, run(body, 2)[0]


def test_a_run_of_deepspeed_goes_on_as_ours(saved, tmp_path):
    directory, expected = saved
    for stage in expected:
        assert main(["convert", str(directory / f"zero{stage}"), str(tmp_path / f"{stage}"), "--to", "paratrain"]) == 0

    def body():
        cases = [(1, DDP()), (2, FSDP()), (3, FSDP()), (2, DeepSpeedZero2())]
        return [(stage, ours(strategy, slice(3, 6), load=tmp_path / f"{stage}")) for stage, strategy in cases]

    for stage, found in run(body, 2)[0]:
        losses, last = expected[stage]
        close(found, (losses[3:], last))
        assert found[1]["seen"] == 3 + 3, "3 forwards of DeepSpeed's, and 3 steps of ours, each of which moves it once"


def test_a_run_of_ours_goes_on_as_deepspeeds(tmp_path):
    """Under every stage, on another number of ranks."""
    expected = run(lambda: ours(FSDP(), slice(0, 6)), 2)[0]
    run(lambda: ours(FSDP(), slice(0, 3), save=tmp_path / "ours"), 2)
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "deepspeed"]) == 0

    def body():
        return [plain_deepspeed(stage, slice(3, 6), ranks=1, load=tmp_path / "theirs") for stage in (1, 2, 3)]

    for found in run(body, 1)[0]:
        close(found, (expected[0][3:], expected[1]))
        assert found[1]["seen"] == 3, "DeepSpeed does not restore buffers from a universal checkpoint"
    convert_run(tmp_path / "theirs", tmp_path / "back", "paratrain")
    there, back = everything(tmp_path / "ours"), everything(tmp_path / "back")
    assert there.keys() == back.keys()
    assert all(torch.equal(back[name], value) for name, value in there.items())


def test_weights_are_those_of_deepspeeds_own_script(saved, tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    directory, _ = saved
    for name in ("zero1", "zero2", "zero3", "bf16"):
        with contextlib.redirect_stdout(io.StringIO()):
            expected = get_fp32_state_dict_from_zero_checkpoint(directory / name)
        found, _ = weights(directory / name)
        assert found.keys() >= expected.keys()
        assert set(found) - set(expected) <= {"frozen.weight", "frozen.bias"}, "which the script leaves out of stage 1"
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert main(["convert", str(directory / "bf16"), str(tmp_path / "w.safetensors"), "--to", "safetensors"]) == 0
    assert main(["inspect", str(directory / "zero2")]) == 0


def test_the_trainer_goes_on_from_a_converted_run(saved, tmp_path):
    from dataclasses import replace

    convert_run(saved[0] / "zero2", tmp_path / "ours", "paratrain")
    inputs, targets = token_batches(1, 16, False)[0]
    data = torch.utils.data.TensorDataset(inputs, targets)

    def body(seed, path):
        cfg = config(2, precision=Precision("32-true"), seed=seed, resume=str(path), output_dir=str(tmp_path / "run"))
        trainer = Trainer(replace(cfg, trainer=replace(cfg.trainer, max_steps=5)), build, token_loss, data)
        trainer.fit()
        return trainer.engine.global_step, trainer.engine.tokens

    assert run(body, 1, 9, tmp_path / "ours")[0] == (5, 2 * 16 * LENGTH)
    assert checkpoint.read_meta(checkpoint.latest(tmp_path / "run" / "checkpoints"))["seed"] == 9


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_damaged_and_hostile_directories(saved, tmp_path):
    def refused(path, match, to="paratrain"):
        with pytest.raises(UserError, match=match):
            convert_run(path, tmp_path / "out", to)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == before

    def copy(name):
        shutil.copytree(saved[0] / name, tmp_path / name)
        return tmp_path / name, tmp_path / name / "global_step3"

    zero2, files = copy("zero2")
    zero3, pieces = copy("zero3")
    before = ["zero2", "zero3"]
    Bomb.path = tmp_path / "exploded"
    refused(zero2, "takes a checkpoint of paratrain", "deepspeed")
    shard = files / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    whole = shard.read_bytes()
    state = torch.load(shard, weights_only=False)
    torch.save({**state, "more": Bomb()}, shard)
    refused(zero2, r"zero_pp_rank_1_.*reading it would run code \(it names posix.system")
    shard.write_bytes(whole[: len(whole) // 2])
    refused(zero2, "zero_pp_rank_1_")
    torch.save({"optimizer_state_dict": {"zero_stage": 2}}, shard)
    refused(zero2, "not readable as a checkpoint of DeepSpeed")
    shard.unlink()
    refused(zero2, r"2 ranks wrote it, and there are 1 \*_optim_states.pt files")
    shard.write_bytes(whole)
    shutil.copy(files / "mp_rank_00_model_states.pt", files / "mp_rank_01_model_states.pt")
    refused(zero2, "tensor- or pipeline-parallel ranks wrote it; merge them first")
    (files / "mp_rank_01_model_states.pt").unlink()
    for number in (0, 1):
        (files / f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt").unlink()
    refused(zero2, "no optimizer states that could be read")
    (pieces / "zero_pp_rank_1_mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Bomb()))
    refused(zero3, r"zero_pp_rank_1_mp_rank_00_model_states.pt")
    (zero3 / "latest").write_text("../zero2")
    refused(zero3, "no weights there that can be read")
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(SystemExit):
        main(["convert", str(zero2), "x", "--to", "paratrain", "--dtype", "float16"])


def test_what_a_universal_checkpoint_cannot_hold(tmp_path):
    bare = {"seed": 1, "engine": {"global_step": 1, "updates": 1}, "extra": {}}
    checkpoint.save(tmp_path / "bare", {"model/w": torch.ones(2)}, bare, {"rng": {}})
    with pytest.raises(CheckpointError, match="no optimizer states, which DeepSpeed asks for"):
        convert_run(tmp_path / "bare", tmp_path / "out", "deepspeed")
    checkpoint.save(tmp_path / "odd", {"model/../../w": torch.ones(2), "optimizer/../../w/m": torch.ones(2)}, bare, {"rng": {}})
    with pytest.raises(CheckpointError, match="cannot be the name of a directory"):
        convert_run(tmp_path / "odd", tmp_path / "out", "deepspeed")
    assert {entry.name for entry in Path(tmp_path).iterdir()} == {"bare", "odd"}
    with pytest.raises(UserError, match="no weights there"):
        convert_run(tmp_path, tmp_path / "out", "paratrain")


def test_reading_needs_no_deepspeed(saved):
    import subprocess
    import sys

    code = "import sys; from pathlib import Path; from paratrain.checkpoint.deepspeed import read; read(Path(sys.argv[1])); assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(saved[0] / "zero3")], check=True)
    assert read(saved[0] / "zero1").steps == 3
