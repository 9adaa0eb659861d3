import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from paratrain.models.gpt import GPT, generate, rotary, rotate

SMALL = {"vocab_size": 50, "seq_len": 16, "layers": 2, "dim": 32, "heads": 4}


def small(**kwargs):
    torch.manual_seed(0)
    return GPT(**{**SMALL, **kwargs}).eval()


def tokens(*shape, seed=1):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def test_shapes_and_sizes():
    model = small()
    assert model(tokens(3, 16)).shape == (3, 16, 50)
    assert model(tokens(3, 5)).shape == (3, 5, 50)
    assert sum(p.numel() for p in model.parameters()) == 2 * 50 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 128 + 2 * 32) + 32


def test_logits_see_only_the_past():
    model, x = small().double(), tokens(2, 16)
    y = x.clone()
    y[:, 7] = (y[:, 7] + 1) % 50
    before, after = model(x), model(y)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=0)
    assert ((after - before)[:, 7:].abs().amax(dim=(0, 2)) > 1e-9).all()


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind()

    def score(i, j):
        turned = [rotate(x, rotary(torch.tensor([at]), 8, 10000.0, torch.float64)) for x, at in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101))
    assert (score(3, 1) - score(3, 2)).abs() > 1e-6
    torch.testing.assert_close(rotate(q, rotary(torch.tensor([5]), 8, 10000.0, torch.float64)).norm(), q.norm())


def test_rotary_angles_are_those_of_the_paper():
    cos, sin = rotary(torch.arange(3), 4, 100.0, torch.float64)
    angles = [[position * 100 ** (-2 * i / 4) for i in range(2)] for position in range(3)]
    torch.testing.assert_close(cos, torch.tensor([[math.cos(a) for a in row] for row in angles], dtype=torch.float64))
    torch.testing.assert_close(sin, torch.tensor([[math.sin(a) for a in row] for row in angles], dtype=torch.float64))


def test_positions_may_be_given_and_only_their_distance_matters():
    model, x = small().double(), tokens(2, 6)
    plain = model(x)
    torch.testing.assert_close(model(x, positions=torch.arange(40, 46)), plain)
    torch.testing.assert_close(model(x, positions=torch.arange(6).expand(2, 6)), plain)
    assert (model(x, positions=torch.arange(6) * 2) - plain).abs().max() > 1e-6


def test_order_of_tokens_matters():
    model, x = small().double(), tokens(1, 6)
    assert (model(x)[:, -1] - model(x[:, [1, 0, 2, 3, 4, 5]])[:, -1]).abs().max() > 1e-6


def test_grouped_heads_equal_repeated_ones():
    grouped, full = small(kv_heads=2).double(), small().double()
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if name.endswith(("attention.k.weight", "attention.v.weight")):
            assert weight.shape == (16, 32)
            weights[name] = weight.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    x = tokens(2, 16)
    torch.testing.assert_close(grouped(x), full(x))


def test_tied_weights_are_one_parameter_that_learns_from_both_uses():
    model = small(tied=True)
    assert model.head.weight is model.embed.weight
    assert len(list(model.parameters())) == len(list(small().parameters())) - 1
    model(tokens(1, 4)).logsumexp(-1).sum().backward()
    unused = [t for t in range(50) if t not in tokens(1, 4)]
    assert model.embed.weight.grad[unused].abs().sum() > 0  # through the head
    untied = small()
    assert untied.head.weight is not untied.embed.weight


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_built_on_meta_and_reset_in_any_order_it_is_like_one_built_directly(tied, backwards):
    with torch.device("meta"):
        model = GPT(**SMALL, tied=tied)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    modules = list(model.modules())
    for module in reversed(modules) if backwards else modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert (model.head.weight is model.embed.weight) == tied
    assert not list(model.buffers())
    direct = small(tied=tied)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in direct.named_parameters()]
    for (name, a), b in zip(model.named_parameters(), direct.parameters(), strict=True):
        if "norm" in name:
            assert (a == 1).all()
        else:
            assert a.std().item() == pytest.approx(b.std().item(), rel=0.2), name
    assert model(tokens(2, 16)).isfinite().all()


def test_initial_scale():
    model = small(layers=8, dim=64, heads=2)
    assert model.blocks[3].ffn.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for residual in (model.blocks[3].ffn.down, model.blocks[3].attention.out):
        assert residual.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    x = tokens(4, 16)
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
    assert loss.item() == pytest.approx(math.log(50), abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = small(kv_heads=1).to(dtype)
    logits = model(tokens(2, 16))
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    reference = small(kv_heads=1)(tokens(2, 16))
    torch.testing.assert_close(logits.float(), reference, rtol=0, atol=1e-5 if dtype == torch.float64 else 0.02)


def test_autocast_keeps_the_angles_exact():
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens(2, 16))
    torch.testing.assert_close(logits.float(), model(tokens(2, 16)), rtol=0, atol=0.02)


def test_dropout_acts_in_training_only():
    model, x = small(dropout=0.3), tokens(2, 16)
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    model.train()
    assert (model(x) - model(x)).abs().max() > 0


def test_it_learns():
    model = small().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = tokens(4, 17)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.3
    continued = generate(model, x[:, :8], 8, temperature=0)
    assert (continued[:, :9] == x[:, :9]).float().mean() > 0.9


def test_generation_is_a_function_of_the_generator():
    model, x = small().train(), tokens(2, 3)

    def draw(seed, **kwargs):
        return generate(model, x, 30, generator=torch.Generator().manual_seed(seed), **kwargs)

    first = draw(1)
    assert first.shape == (2, 33)  # beyond seq_len: the context is cropped
    assert torch.equal(first[:, :3], x)
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
    assert torch.equal(draw(1, top_k=1), generate(model, x, 30, temperature=0))
    assert model.training


def test_top_k_samples_only_among_the_likeliest():
    class Fixed(nn.Module):
        seq_len = 4

        def forward(self, tokens):
            return torch.tensor([0.0, 3.0, 2.0, 1.0]).expand(*tokens.shape, 4)

    drawn = generate(Fixed(), torch.zeros(1, 1, dtype=torch.int64), 200, top_k=2)[0, 1:]
    assert set(drawn.tolist()) == {1, 2}
    cold = generate(Fixed(), torch.zeros(1, 1, dtype=torch.int64), 200, temperature=0.05)[0, 1:]
    assert set(cold.tolist()) == {1}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"heads": 5}, "dim=32 over heads=5"),
        ({"dim": 12, "heads": 4}, "dim=12 over heads=4"),
        ({"kv_heads": 3}, "heads=4 over kv_heads=3"),
        ({"kv_heads": 0}, "heads=4 over kv_heads=0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        small(**wrong)


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"sequence of 17 tokens.*seq_len=16"):
        small()(tokens(1, 17))


@pytest.mark.parametrize(
    ("name", "vocab_size", "millions"), [("gpt", 256, 0.919), ("gpt_124m", 50257, 124), ("gpt_1b", 128256, 1236), ("gpt_7b", 32000, 6738)]
)
def test_configurations_have_the_size_they_claim(name, vocab_size, millions):
    folder = Path(__file__).parents[1] / "conf" / "model"
    values = {**yaml.safe_load((folder / "gpt.yaml").read_text()), **yaml.safe_load((folder / f"{name}.yaml").read_text())}
    del values["_target_"]
    values.pop("defaults", None)
    with torch.device("meta"):
        model = GPT(**{**values, "vocab_size": vocab_size, "seq_len": 1024})
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
