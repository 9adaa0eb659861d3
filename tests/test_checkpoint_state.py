"""Optimizer state by name and generator states: what comes back goes on exactly as if nothing had happened."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from paratrain import checkpoint


class Counting(torch.optim.Optimizer):
    """Keeps Python numbers, as optimizers outside torch do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["decay"] = state.get("decay", 1.0) / 3
                state["fresh"] = False
                state["nothing"] = None
                p -= group["lr"] * state["decay"] / state["step"] * p.grad


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "foreach": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, initial_accumulator_value=0.5),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.1),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.1),
    "radam": lambda params: torch.optim.RAdam(params, lr=0.1),
    "asgd": lambda params: torch.optim.ASGD(params, lr=0.1),
    "rprop": lambda params: torch.optim.Rprop(params, lr=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.1, centered=True, momentum=0.5),
    "numbers": Counting,
}


def network(dtype=torch.float32):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1, bias=False)).to(dtype)
    return model, {param: name for name, param in model.named_parameters()}


def train(model, optimizers, steps, seed):
    torch.manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        model(torch.randn(6, 4, dtype=dtype)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def save(path, model, optimizers, names):
    checkpoint.save(path, {**model.state_dict(), **checkpoint.optimizer_tensors(optimizers, names)})


def load(path, model, optimizers, names):
    tensors, finish = checkpoint.prepare_optimizer(optimizers, names, checkpoint.tensors(path))
    checkpoint.load(path, {**model.state_dict(), **tensors})
    finish()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_bit_for_bit_in_other_groups_and_optimizers(kind, dtype, tmp_path):
    model, names = network(dtype)
    optimizers = [OPTIMIZERS[kind](model.parameters())]
    train(model, optimizers, 3, seed=1)
    save(tmp_path / "c", model, optimizers, names)
    states = {names[param]: dict(state) for param, state in optimizers[0].state.items()}
    train(model, optimizers, 3, seed=2)

    again, names = network(dtype)
    *matrices, last = again.parameters()
    optimizers = [OPTIMIZERS[kind]([last]), OPTIMIZERS[kind]([{"params": [param]} for param in reversed(matrices)])]
    load(tmp_path / "c", again, optimizers, names)
    for optimizer in optimizers:
        for param, state in optimizer.state.items():
            saved = states[names[param]]
            assert state.keys() == saved.keys()
            for key, value in state.items():
                assert type(value) is type(saved[key])
                if isinstance(value, torch.Tensor):
                    assert (value.dtype, value.device, value.shape) == (saved[key].dtype, saved[key].device, saved[key].shape)
    train(again, optimizers, 3, seed=2)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_muon_for_matrices_next_to_adamw(tmp_path):
    def both(model):
        matrices = [param for param in model.parameters() if param.ndim == 2]
        return [torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW([param for param in model.parameters() if param.ndim < 2])]

    model, names = network()
    optimizers = both(model)
    train(model, optimizers, 3, seed=1)
    save(tmp_path / "c", model, optimizers, names)
    train(model, optimizers, 2, seed=2)
    again, names = network()
    optimizers = both(again)
    load(tmp_path / "c", again, optimizers, names)
    train(again, optimizers, 2, seed=2)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_a_live_optimizer_goes_back_in_place_and_loses_what_came_later(tmp_path):
    model, names = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    save(tmp_path / "start", model, [optimizer], names)
    train(model, [optimizer], 1, seed=1)
    save(tmp_path / "one", model, [optimizer], names)
    after_one = [param.clone() for param in model.parameters()]
    buffers = [optimizer.state[param]["momentum_buffer"] for param in model.parameters()]
    train(model, [optimizer], 1, seed=2)
    load(tmp_path / "one", model, [optimizer], names)
    assert all(optimizer.state[param]["momentum_buffer"] is buffer for param, buffer in zip(model.parameters(), buffers, strict=True))
    load(tmp_path / "start", model, [optimizer], names)
    assert not optimizer.state
    train(model, [optimizer], 1, seed=1)
    assert all(torch.equal(param, value) for param, value in zip(model.parameters(), after_one, strict=True))


def test_preparing_takes_no_step_and_draws_no_numbers(tmp_path):
    model, names = network()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, [optimizer], 1, seed=1)
    save(tmp_path / "c", model, [optimizer], names)
    again, names = network()
    before, generator = [param.clone() for param in again.parameters()], torch.get_rng_state()
    checkpoint.prepare_optimizer([torch.optim.AdamW(again.parameters())], names, checkpoint.tensors(tmp_path / "c"))
    assert all(torch.equal(param, value) for param, value in zip(again.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(("wrote", "reads"), [("adamw", "momentum"), ("adamw", "sgd"), ("momentum", "adamw"), ("adamw", "amsgrad")])
def test_another_optimizer_is_refused_by_name(wrote, reads, tmp_path):
    model, names = network()
    optimizer = OPTIMIZERS[wrote](model.parameters())
    train(model, [optimizer], 1, seed=1)
    save(tmp_path / "c", model, [optimizer], names)
    with pytest.raises(checkpoint.CheckpointError, match=r"keeps .* of parameter '0.weight', and the checkpoint has .*: another optimizer"):
        load(tmp_path / "c", model, [OPTIMIZERS[reads](model.parameters())], names)


def test_the_state_of_lbfgs_is_refused():
    model, names = network()
    optimizer = torch.optim.LBFGS(model.parameters())
    optimizer.step(lambda: model(torch.ones(2, 4)).square().mean())
    optimizer.state[next(model.parameters())]["old_dirs"] = []
    with pytest.raises(checkpoint.CheckpointError, match=r"LBFGS keeps 'old_dirs' of parameter '0.weight' as list"):
        checkpoint.optimizer_tensors([optimizer], names)


def test_a_hostile_state_cannot_ask_for_memory_without_end():
    model, names = network()
    saved = {f"optimizer/0.weight/{key}": ((1 << 40,), torch.float32) for key in ("step", "exp_avg", "exp_avg_sq", "row")}
    with pytest.raises(checkpoint.CheckpointError, match="far larger than its parameter"):
        checkpoint.prepare_optimizer([torch.optim.AdamW(model.parameters())], names, saved)


def test_lower_precision_states_follow_the_parameter(tmp_path):
    model, names = network()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, [optimizer], 1, seed=1)
    save(tmp_path / "c", model, [optimizer], names)
    again, names = network(torch.bfloat16)
    optimizer = torch.optim.AdamW(again.parameters())
    load(tmp_path / "c", again, [optimizer], names)
    state = optimizer.state[again[0].weight]
    assert (state["exp_avg"].dtype, state["step"].dtype) == (torch.bfloat16, torch.float32)
    train(again, [optimizer], 1, seed=1)


def draw():
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.rand(3).tolist(), torch.randn(1).item()]


def test_generators_come_back_bit_for_bit_through_json():
    draw()  # so that both gaussians have a second value in store
    state = json.loads(json.dumps(checkpoint.rng_state()))
    wanted = [draw() for _ in range(400)]
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    checkpoint.set_rng_state(state)
    assert [draw() for _ in range(400)] == wanted


@pytest.mark.gpu
def test_the_generator_of_the_gpu_comes_back():
    state = json.loads(json.dumps(checkpoint.rng_state()))
    wanted = torch.randn(5, device="cuda")
    checkpoint.set_rng_state(state)
    assert torch.equal(torch.randn(5, device="cuda"), wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"torch": "00"},
        {"torch": "zz"},
        {"torch": "ff" * 5056},
        {"python": [3, [1, 2], None]},
        {"python": [3, [0] * 624 + [700], None]},
        {"numpy": ["00" * 2496, 4000, 0, "0x0p+0"]},
        {"numpy": ["00" * 2496, -5, 0, "0x0p+0"]},
        {"numpy": ["00" * 4, 3, 0, "0x0p+0"]},
        {"numpy": None},
    ],
)
def test_a_hostile_generator_state_is_refused(change):
    with pytest.raises(checkpoint.CheckpointError, match="random number generators"):
        checkpoint.set_rng_state({**checkpoint.rng_state(), **change})
