"""verify on sound layouts: no false alarms, and its own bookkeeping."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from faults import models
from faults.corpus import config
from torch import nn
from torch.utils.checkpoint import checkpoint

import paratrain
from paratrain.config import DDP, LossScale, Precision, StdlibData, Verify
from paratrain.errors import UserError
from paratrain.models.gpt import GPT
from paratrain.verify import check, verify
from paratrain.verify.cli import cut, verify_main
from paratrain.verify.sketch import sketch

SOUND = {
    "mlp": (models.mlp, models.square_loss, models.vectors()),
    "gpt": (models.gpt, models.token_loss, models.tokens()),
    "tied": (lambda: models.Tied(0.2, preserve=True), models.token_loss, models.tokens()),
    "conv + batch norm": (models.conv_batch_norm, models.square_loss, models.vectors(length=6)),
    "dict inputs": (models.DictModel, models.dict_loss, models.dict_tokens()),
}


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_no_false_alarm(name, ranks):
    """Masked targets, 10 samples that do not divide by 3 or 4 ranks, accumulation wherever the model allows it."""
    model, loss, batches = SOUND[name]
    report = verify(model, loss, batches, config(None if name == "conv + batch norm" else 2), ranks)
    assert report.ok, report.text()
    compared = {line.kind: line.compared for line in report.lines}
    assert all(compared[kind] for kind in ("data", "activation", "loss", "gradient", "weight", "optimizer state", "resume: next step"))
    assert (compared["dropout"] > 0) == (name in ("gpt", "tied")), "dropout is looked at where there is some"
    assert (compared["recomputation"] > 0) == (name == "tied")
    assert all(line.worst <= line.tolerance or line.worst == 0 for line in report.lines)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_no_false_alarm_in_the_configured_precision(precision):
    scale = LossScale(init=256.0) if precision == "16-mixed" else None
    cfg = config(2, precision=Precision(precision, scale), verify=Verify(dtype="configured"))
    assert (report := verify(models.gpt, models.token_loss, models.tokens(), cfg, 2)).ok, report.text()
    assert report.setup["dtype"] == precision


def test_functional_dropout_is_switched_off_and_nested_calls_keep_their_names():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return F.dropout(self.linear(F.dropout(self.linear(x), 0.5, self.training)), 0.5)[:, :3]

    report = check(Functional, models.square_loss, models.vectors(), config(), 2)
    assert next(line.compared for line in report.lines if line.kind == "activation") == 2 * 3, "two calls of linear, and the model"
    assert not report.notes


def test_dropout_functions_stay_off_in_recomputation():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def block(self, x):
            y = self.linear(F.dropout(x, 0.3)).unsqueeze(1)
            return F.scaled_dot_product_attention(y, y, y, dropout_p=0.2).squeeze(1)

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False)[:, :3]

    report = check(Attends, models.square_loss, models.vectors(), config(2), 2)
    assert {line.kind: line.compared for line in report.lines}["dropout"]


def test_tolerance_follows_the_precision_and_finds_small_errors_in_float64():
    """A gradient off by one part in a million is an error in float64, and rounding in bf16."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + 1e-6 * torch.distributed.get_rank())

    class Slightly(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = models.mlp()

        def forward(self, x):
            return Off.apply(self.inner(x))

    report = verify(Slightly, models.square_loss, models.vectors(), config(), 2)
    assert not report.ok
    assert report.first_difference.key.kind == "gradient"
    assert 1e-8 < report.first_difference.amount < 1e-5
    loose = config(precision=Precision("bf16-mixed"), verify=Verify(dtype="configured"))
    assert verify(Slightly, models.square_loss, models.vectors(), loose, 2).ok


def test_sketches_are_linear_and_keep_norms():
    x, y = torch.randn(3, 50_000, dtype=torch.float64), torch.randn(3, 50_000, dtype=torch.float64)
    assert torch.allclose(sketch(x, 3) - sketch(y, 3), sketch(x - y, 3))
    assert float(sketch(x, 3).norm()) == pytest.approx(float(x.norm()), rel=0.05)
    assert torch.equal(sketch(x[:, :100], 3), x[:, :100]), "what is small is kept"
    moved = x.clone()
    moved[1, [7, 9]] = x[1, [9, 7]]
    assert not torch.equal(sketch(moved, 3), sketch(x, 3))


def test_a_report_for_people_programs_and_browsers():
    def from_rank(sown=torch.distributed.get_rank):
        torch.manual_seed(3)
        model = models.mlp()
        model.register_forward_hook(lambda module, args, output: output * (1 + sown()))
        return model

    report = verify(from_rank, models.square_loss, models.vectors(), config(), 2)
    first = report.first_difference
    assert (report.ok, first.step, first.key.kind, first.ranks) == (False, 0, "activation", [1])
    assert first.error == "factor"
    assert "2 times" in report.explanation
    data = json.loads(report.to_json())
    assert data["first_difference"]["error"] == "factor"
    assert data["verdict"] in report.text()
    page = report.to_html()
    assert page.startswith("<!doctype html>")
    assert "http" not in page
    with pytest.raises(AssertionError, match="not the same function"):
        check(from_rank, models.square_loss, models.vectors(), config(), 2)


def test_users_mistakes_are_theirs():
    batch = models.vectors()[0]
    with pytest.raises(UserError, match=r"strategy=single runs one process"):
        verify(models.mlp, models.square_loss, batch, replace(config(), strategy=paratrain.config.Single()), 2)
    with pytest.raises(UserError, match="does not train on one process"):
        verify(lambda: nn.Linear(5, 3), models.square_loss, batch, config(), 2)
    with pytest.raises(UserError, match="does not train on one process"):
        verify(models.mlp, models.square_loss, (batch[0], batch[1][:3]), config(), 2)
    with pytest.raises(UserError, match=r"verify\.layers"):
        verify(models.mlp, models.square_loss, batch, config(verify=Verify(layers=1)), 2)
    with pytest.raises(UserError, match="gloo has no bfloat16"):
        verify(models.mlp, models.square_loss, batch, config(strategy=DDP(comm_hook="bf16")), 2)


def test_the_package_can_be_called_and_data_sets_are_read_through_the_loader():
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 25

        def __getitem__(self, i):
            return torch.full((4,), float(i)), torch.ones(3)

    report = paratrain.verify(models.mlp, models.square_loss, Numbers(), config(), ranks=3)
    assert report.ok, report.text()
    assert paratrain.verify.check is check


SMALL = ["data=synthetic", "data.seq_len=8", "data.vocab_size=32", "data.global_batch=6", "model.dim=16", "model.heads=2", "verify.ranks=2"]


def test_command_line(tmp_path, capsys):
    page = tmp_path / "report.html"
    assert verify_main([*SMALL, "model.dropout=0.1", "verify.layers=1", "data.micro_batch_size=2", "--json", "--html", str(page)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert {line["kind"] for line in report["compared"]} >= {"gradient", "resume: data", "dropout"}
    assert "SAME FUNCTION" in page.read_text()
    assert verify_main([*SMALL, "verify.layers=1", "strategy.comm_hook=fp16"]) == 1
    assert "rounding to float16" in capsys.readouterr().out


def test_depth_is_cut_only_where_the_model_says_how():
    gpt = config(verify=Verify(layers=2), data=StdlibData())
    small = cut(replace(gpt, model={"_target_": "paratrain.models.gpt.GPT", "layers": 12, "vocab_size": 8, "seq_len": 4}))
    assert (small.model["layers"], small.verify.layers) == (2, None)
    assert isinstance(GPT(**{k: v for k, v in small.model.items() if k != "_target_"}), nn.Module)
    with pytest.raises(UserError, match="its depth cannot be cut"):
        cut(replace(gpt, model={"_target_": "torch.nn.Linear"}))


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ["parallel.tp=2"]),
        (2, ["parallel.pp=2"]),
        (2, ["parallel.cp=2"]),
        pytest.param(4, ["strategy=fsdp", "parallel.tp=2"], marks=pytest.mark.slow),
        (4, ["parallel.pp=2", "parallel.tp=2"]),
    ],
)
def test_layouts_that_split_the_model(ranks, layout):
    """No false alarm, and a loss that is averaged where it should be summed is found."""
    from paratrain import cross_entropy, load_config
    from paratrain.models.gpt import GPT

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (8, 9), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, 3:] = targets[5] = -100
    cfg = load_config(["trainer.clip_norm=1.0", "data.micro_batch_size=2", *layout])

    def build():
        return GPT(vocab_size=32, seq_len=8, layers=2, dim=16, heads=2, dropout=0.1)

    report = verify(build, cross_entropy, (tokens[:, :-1], targets), cfg, ranks)
    assert report.ok, report.text()
    compared = {line.kind: line.compared for line in report.lines}
    assert compared["gradient"] == compared["clipped gradient"] == cfg.verify.steps * len([*build().parameters()])
    assert ("activation" in compared) == (cfg.parallel.pp == cfg.parallel.cp == 1)

    def wrong(outputs, targets):
        total, count = cross_entropy(outputs, targets)
        return total / count, 1

    assert not verify(build, wrong, (tokens[:, :-1], targets), cfg, ranks).ok


class Torn(torch.autograd.Function):
    """The identity, whose gradient is wrong on the ranks but 0."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + torch.distributed.get_rank())


@pytest.mark.parametrize("axis", ["tp", *(pytest.param(axis, marks=pytest.mark.slow) for axis in ("pp", "cp"))])
def test_what_is_wrong_in_a_split_model_has_a_name(axis):
    """A factor in the forward of a module, found by what it returns (tp) or by a gradient; one in a backward, by a gradient."""
    from paratrain import load_config

    cfg = load_config([f"parallel.{axis}=2", "trainer.clip_norm=1.0"])
    tokens = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = tokens[:, :-1], tokens[:, 1:]

    def build():
        torch.manual_seed(2)
        return GPT(vocab_size=32, seq_len=8, layers=2, dim=16, heads=2)

    def backward():
        model = build()
        model.blocks[1].register_forward_hook(lambda module, args, output: Torn.apply(output))
        return model

    def forward():
        model = build()
        model.blocks[1].register_forward_hook(lambda module, args, output: output * torch.distributed.get_world_size())
        return model

    found = verify(backward, paratrain.cross_entropy, batch, cfg, 2)
    assert not found.ok
    assert (found.first_difference.step, found.first_difference.key.kind) == (0, "gradient"), found.text()
    found = verify(forward, paratrain.cross_entropy, batch, cfg, 2)
    assert not found.ok
    first = ("activation", "blocks.1") if axis == "tp" else ("loss", "")
    assert found.first_difference.key[1:] == first, found.text()
