"""Weights go out to other programs and come back bit for bit; nothing read on the way is executed."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from paratrain import checkpoint
from paratrain.__main__ import main
from paratrain.checkpoint.convert import FORMATS, convert, describe
from paratrain.checkpoint.manifest import CheckpointError
from paratrain.checkpoint.sources import weights
from paratrain.errors import UserError
from paratrain.spawn import run


def model_tensors():
    generator = torch.Generator().manual_seed(4)
    return {
        "embed.weight": torch.randn(11, 6, generator=generator),
        "block.0.norm.weight": torch.randn(6, generator=generator).bfloat16(),
        "block.0.count": torch.tensor(7),
        "block.0.mask": torch.tensor([True, False]),
    }


def same(found, wanted=None):
    wanted = wanted or model_tensors()
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype is value.dtype and torch.equal(found[name], value) for name, value in wanted.items())


@pytest.fixture
def source(tmp_path):
    path = checkpoint.step_path(tmp_path / "run" / "checkpoints", 20)
    tensors = {f"model/{name}": value for name, value in model_tensors().items()} | {"optimizer/embed.weight/step": torch.tensor(3.0)}
    meta = {"seed": 3, "engine": {"global_step": 20, "updates": 19, "counted": 640.0}, "extra": {"metrics": {"eval/loss": 1.5}}}
    checkpoint.save(path, tensors, meta, {"rng": {}})
    return path


@pytest.mark.parametrize("to", FORMATS)
def test_out_and_back(to, source, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    target = tmp_path / "out" / ("weights.safetensors" if to == "safetensors" else "weights.pt" if to == "torch" else "weights")
    assert main(["convert", str(source.parents[1]), str(target), "--to", to, "--hf-config", str(tmp_path)]) == 0
    found, config = weights(target)
    same(found)
    assert config == ({"model_type": "mine"} if to == "hf" else None)
    again = tmp_path / "again.safetensors"
    convert(target, again, "safetensors", dtype=torch.float16)
    same(safetensors.torch.load_file(again), {n: t.half() if t.is_floating_point() else t for n, t in model_tensors().items()})
    assert not [name for name in os.listdir(target.parent) if name.startswith(".")]
    with pytest.raises(UserError, match="exists: it will not be replaced"):
        convert(source, target, to)


def test_shards_and_their_index(source, tmp_path):
    convert(source, tmp_path / "out", "safetensors-sharded", shard_bytes=100)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    same(weights(tmp_path / "out")[0])
    same(weights(tmp_path / "out" / "model.safetensors.index.json")[0])
    index["weight_map"]["embed.weight"] = "../secret.safetensors"
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="does not name files of its directory"):
        weights(tmp_path / "out")


def test_sharded_dcp_of_several_ranks_is_read(tmp_path):
    def body():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (3,))
        state = {name: distribute_tensor(value, mesh, [Shard(0)]) if value.ndim == 2 else value for name, value in model_tensors().items()}
        dcp.save({"model": state, "step": 3, "optimizer": {"m": torch.ones(3)}}, checkpoint_id=tmp_path / "dcp")

    run(body, 3)
    same(weights(tmp_path / "dcp")[0])


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_files_that_would_run_code_are_refused(tmp_path):
    bomb = Bomb()
    Bomb.path = tmp_path / "exploded"
    torch.save({"w": torch.ones(1), "x": bomb}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="reading it would run code"):
        weights(tmp_path / "a.pt")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match=r"\.metadata asks for posix\.system"):
        weights(tmp_path / "dcp")
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "entry", no_dist=True)
    (file,) = (tmp_path / "entry").glob("*.distcp")
    buffer = io.BytesIO()
    torch.save(bomb, buffer)
    file.write_bytes(buffer.getvalue().ljust(file.stat().st_size, b"\0"))
    with pytest.raises(CheckpointError):
        weights(tmp_path / "entry")
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        weights(tmp_path / "a.safetensors")
    assert not (tmp_path / "exploded").exists()


def test_dcp_cannot_name_files_elsewhere(tmp_path):
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    metadata = pickle.loads((tmp_path / "dcp" / ".metadata").read_bytes())
    for stored in metadata.storage_data.values():
        shutil.copy(tmp_path / "dcp" / stored.relative_path, tmp_path / "outside")
        stored.relative_path = "../outside"
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside the directory"):
        weights(tmp_path / "dcp")


def test_what_a_state_dict_may_be_wrapped_in(tmp_path):
    for wrapped in (model_tensors(), {"state_dict": model_tensors(), "epoch": 3}, {"model": model_tensors()}):
        torch.save(wrapped, tmp_path / "w.pt")
        same(weights(tmp_path / "w.pt")[0])
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds no state_dict"):
        weights(tmp_path / "w.pt")
    with pytest.raises(UserError, match="no weights there that can be read"):
        weights(tmp_path)


def test_inspect(source, tmp_path, capsys):
    assert main(["inspect", str(source.parents[1])]) == 0
    text = capsys.readouterr().out
    for part in (
        "step 20, 19 updates, 640.0 tokens",
        "by 1 ranks, seed 3",
        "eval/loss 1.5",
        "embed.weight",
        "[11, 6]",
        "every byte is as it was",
    ):
        assert part in text
    file = source / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["inspect", str(source)]) == 1
    assert "DAMAGED rank-00000.safetensors" in capsys.readouterr().out
    assert main(["inspect", str(source), "--quick"]) == 0
    with pytest.raises(CheckpointError, match="damaged"):
        convert(source, tmp_path / "x.safetensors", "safetensors")
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    convert_target = tmp_path / "w.pt"
    torch.save(model_tensors(), convert_target)
    assert "embed.weight" in describe(convert_target)[0]


def test_hf_needs_a_config(source, tmp_path):
    with pytest.raises(UserError, match="--hf-config"):
        convert(source, tmp_path / "hf", "hf")
    assert not [name for name in os.listdir(tmp_path) if name != "run"]


def test_a_trained_hugging_face_model_is_loaded_by_from_pretrained(tmp_path):
    transformers = pytest.importorskip("transformers")
    import paratrain as pt
    from paratrain.config import Config, Optimizer
    from paratrain.config import Trainer as TrainerConfig

    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)

    def body():
        def loss(outputs, targets):
            return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()

        cfg = Config(optimizer=Optimizer(lr=1e-2), trainer=TrainerConfig(max_steps=1, device="cpu"))
        engine = pt.setup(lambda: transformers.GPT2LMHeadModel(config), loss, cfg)
        tokens = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(1))
        engine.train_step(engine.local(({"input_ids": tokens}, tokens)))
        engine.save(tmp_path / "step-000001")
        return engine.full_state_dict()

    trained, _ = run(body, 2)
    convert(Path(tmp_path / "step-000001"), tmp_path / "hf", "hf")
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trained.items())
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")) is transformers.GPT2LMHeadModel
