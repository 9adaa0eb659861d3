"""Any layout to any layout, bit for bit, on real processes; failures on one rank are told on all."""

import itertools
import os
import random
import resource

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from paratrain import checkpoint, spawn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]
SHAPES = [(), (1,), (7,), (5, 3), (2, 9), (13, 1, 4), (0, 3)]


def expected():
    """Tensors of every dtype and of shapes that no number of ranks divides."""
    random = torch.Generator().manual_seed(1)
    return {
        f"{str(dtype)[6:]}/{'x'.join(map(str, shape))}": (torch.randn(shape, generator=random, dtype=torch.float64) * 50).to(dtype)
        for dtype, shape in itertools.product(DTYPES, SHAPES)
    }


def placed(kind, full):
    """`full` laid out over all ranks."""
    ranks = dist.get_world_size()
    if kind == "plain":
        return {name: tensor.clone() for name, tensor in full.items()}
    flat, square = init_device_mesh("cpu", (ranks,)), init_device_mesh("cpu", (2, ranks // 2) if ranks % 2 == 0 else (1, ranks))
    found = {}
    for name, tensor in full.items():
        last = Shard(tensor.ndim - 1)
        mesh, placements = {
            "shard0": (flat, [Shard(0)]),
            "shard1": (flat, [last]),
            "hybrid": (square, [Replicate(), Shard(0)]),
            "grid": (square, [Shard(0), last]),
            "nested": (square, [Shard(0), Shard(0)]),
        }[kind]
        found[name] = distribute_tensor(tensor, mesh, placements) if tensor.ndim else tensor.clone()
    return found


def full_value(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_as(kind, path):
    checkpoint.save(path, placed(kind, expected()), {"kind": kind}, {"rank": dist.get_rank()})


def load_as(kind, path):
    full = expected()
    target = placed(kind, {name: torch.zeros_like(tensor) for name, tensor in full.items()})
    meta, rank_meta = checkpoint.load(path, target)
    wrong = [name for name, tensor in full.items() if not torch.equal(full_value(target[name]), tensor)]
    assert not wrong, wrong
    return meta["kind"], [entry["rank"] for entry in rank_meta]


@pytest.mark.parametrize("kind", ["plain", "shard0", "shard1", "hybrid", "grid", "nested"])
def test_any_layout_on_4_ranks_comes_back_under_any_other(kind, tmp_path):
    spawn.run(save_as, 4, kind, tmp_path / "c")
    assert checkpoint.check(tmp_path / "c") == []
    alone = {name: torch.zeros_like(tensor) for name, tensor in expected().items()}
    checkpoint.load(tmp_path / "c", alone)
    assert all(torch.equal(alone[name], tensor) for name, tensor in expected().items())

    def load_all(kinds):
        return [load_as(other, tmp_path / "c") for other in kinds]

    for ranks, kinds in {
        2: ["plain", "shard0", "shard1"],
        3: ["shard0", "shard1"],
        4: ["plain", "shard0", "hybrid", "grid", "nested"],
    }.items():
        for answers in spawn.run(load_all, ranks, kinds):
            assert answers == [(kind, [0, 1, 2, 3])] * len(kinds)


def test_every_byte_is_written_once_and_replicas_share_the_work(tmp_path):
    def replicated():
        checkpoint.save(tmp_path / "c", {str(index): torch.zeros(1000) for index in range(8)})

    spawn.run(replicated, 4)
    sizes = [saved.size for saved in checkpoint.read(tmp_path / "c").files]
    assert len(sizes) == 4
    assert sum(sizes) < 8 * 4000 + 4 * 1000


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 5, bias=False)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        return self.norm(self.down(torch.relu(self.up(x))))


def network(layout):
    torch.manual_seed(3)
    model = Net()
    if layout == "fsdp":
        fully_shard(model.up, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 and 8 % dist.get_world_size() == 0 else Shard(0))
        fully_shard(model.down)
        fully_shard(model)
    elif layout == "tp_fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model.up, mesh=mesh["dp"])
        fully_shard(model.down, mesh=mesh["dp"])
    return model


def train(model, optimizer, steps):
    torch.manual_seed(9)
    for _ in range(steps):
        model(torch.randn(6, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def state(model, optimizer):
    names = {param: name for name, param in model.named_parameters()}
    return {**model.state_dict(), **checkpoint.optimizer_tensors([optimizer], names)}


def train_and_save(layout, path):
    model = network(layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=layout != "tp_fsdp")
    train(model, optimizer, 3)
    checkpoint.save(path, state(model, optimizer))
    return {name: full_value(tensor) for name, tensor in state(model, optimizer).items()}


def load_and_compare(layout, path, wanted):
    model = network(layout)
    for param in model.parameters():
        param.data.zero_()
    optimizer = torch.optim.AdamW([{"params": [param]} for param in model.parameters()], lr=0.1, foreach=layout != "tp_fsdp")
    names = {param: name for name, param in model.named_parameters()}
    tensors, finish = checkpoint.prepare_optimizer([optimizer], names, checkpoint.tensors(path))
    checkpoint.load(path, {**model.state_dict(), **tensors})
    finish()
    found = {name: full_value(tensor) for name, tensor in state(model, optimizer).items()}
    assert found.keys() == wanted.keys()
    wrong = [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)]
    assert not wrong, wrong
    train(model, optimizer, 1)


@pytest.mark.parametrize("layout", ["plain", "fsdp", "tp_fsdp"])
def test_weights_and_optimizer_cross_layouts(layout, tmp_path):
    path = tmp_path / "c"
    wanted = spawn.run(train_and_save, 4, layout, path)[0]
    assert "optimizer/up.weight/exp_avg" in wanted
    load_and_compare("plain", path, wanted)
    for ranks, other in [(1, "fsdp"), (2, "fsdp"), (3, "fsdp"), (2, "tp_fsdp"), (4, "tp_fsdp")]:
        spawn.run(load_and_compare, ranks, other, path, wanted)


def test_ranks_that_hold_different_names(tmp_path):
    """As pipeline stages do."""

    def stages():
        rank = dist.get_rank()
        checkpoint.save(tmp_path / "c", {f"stage{rank}": torch.full((3,), rank + 1.0), "shared": torch.ones(2)})
        other = {f"stage{1 - rank}": torch.zeros(3), "shared": torch.zeros(2)}
        checkpoint.load(tmp_path / "c", other)
        return other[f"stage{1 - rank}"][0].item(), other["shared"][0].item()

    assert spawn.run(stages, 2) == [(2.0, 1.0), (1.0, 1.0)]
    assert checkpoint.tensors(tmp_path / "c") == {
        name: (shape, torch.float32) for name, shape in [("shared", (2,)), ("stage0", (3,)), ("stage1", (3,))]
    }


def test_a_name_asked_for_by_no_rank_is_told_on_all(tmp_path):
    checkpoint.save(tmp_path / "c", {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)})

    def load():
        with pytest.raises(checkpoint.CheckpointError) as error:
            checkpoint.load(tmp_path / "c", {"ab"[dist.get_rank()]: torch.zeros(2)})
        return str(error.value)

    first, second = spawn.run(load, 2)
    assert first == second
    assert "'c' is in the checkpoint" in first
    assert "'a'" not in first


@pytest.mark.parametrize(("mine", "theirs"), [(torch.zeros(2), torch.zeros(3)), (torch.zeros(2), torch.zeros(2, dtype=torch.float64))])
def test_ranks_that_disagree_about_a_tensor_are_refused(mine, theirs, tmp_path):
    def save():
        with pytest.raises(checkpoint.CheckpointError, match=r"'w' is .* on rank 0 and .* on rank 1: one name must be one tensor"):
            checkpoint.save(tmp_path / "c", {"w": [mine, theirs][dist.get_rank()]})

    spawn.run(save, 2)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_on_one_rank_is_told_on_all_and_leaves_the_old_checkpoint(tmp_path):
    path = checkpoint.step_path(tmp_path, 1)

    def save(value, limited):
        if limited and dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        mesh = init_device_mesh("cpu", (2,))
        tensors = {"w": distribute_tensor(torch.full((40_000,), value), mesh, [Shard(0)])}
        if not limited:
            return checkpoint.save(path, tensors)
        for step in (1, 2):
            with pytest.raises(checkpoint.CheckpointError) as error:
                checkpoint.save(checkpoint.step_path(tmp_path, step), tensors)
        return str(error.value)

    spawn.run(save, 2, 1.0, False)
    messages = spawn.run(save, 2, 2.0, True)
    assert messages[0] == messages[1]
    assert "step-000002:\n  rank 1: rank-00001.safetensors: File too large after 50000 bytes" in messages[0]
    assert os.listdir(tmp_path) == ["step-000001"]
    restored = {"w": torch.zeros(40_000)}
    checkpoint.load(path, restored)
    assert (restored["w"] == 1).all()


def test_damage_is_named_by_rank_and_file_on_all_ranks(tmp_path):
    spawn.run(save_as, 2, "shard0", tmp_path / "c")
    with open(tmp_path / "c" / "rank-00001.safetensors", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 4]))

    def load():
        with pytest.raises(checkpoint.CheckpointError) as error:
            load_as("shard0", tmp_path / "c")
        return str(error.value)

    first, second = spawn.run(load, 2)
    assert first == second
    assert "rank-00001.safetensors: damaged: bytes 0 to " in first
    assert "rank-00000" not in first


def test_300_flips_of_300_are_found_whichever_file_they_hit(tmp_path):
    """A bit at a random byte of a checkpoint that two ranks wrote: the fault names the file, and so the rank."""
    path = tmp_path / "c"
    spawn.run(save_as, 2, "shard0", path)
    chance, files = random.Random(5), sorted(path.iterdir())
    original = {file: file.read_bytes() for file in files}
    hits = dict.fromkeys(files, 0)
    for _ in range(300):
        (victim,) = chance.choices(files, [len(original[file]) for file in files])
        content = bytearray(original[victim])
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        victim.write_bytes(content)
        faults = checkpoint.check(path)
        assert len(faults) == 1
        assert victim.name in faults[0]
        hits[victim] += 1
        victim.write_bytes(original[victim])
    assert checkpoint.check(path) == []
    assert sum(hits.values()) == 300
    assert all(hits.values())


def test_a_mistake_on_one_rank_is_told_on_all(tmp_path):
    def save():
        bad = {"rng": torch.zeros(2)} if dist.get_rank() == 1 else {}
        with pytest.raises(checkpoint.CheckpointError, match=r"rank 1: rank_meta\['rng'\] is of type Tensor"):
            checkpoint.save(tmp_path / "c", {"w": torch.zeros(2)}, {}, bad)

    spawn.run(save, 2)
    assert os.listdir(tmp_path) == []
