"""Training a part of the parameters: named by globs, or the adapters of `peft`, under every strategy."""

from __future__ import annotations

import pytest
import torch
from reference import config, token_batches, token_loss, train_by_hand
from sharding_zoo import gpt
from test_sharding import STRATEGIES, TOLERANCE, difference, train
from test_sharding_transformers import build, data, loss_fn

from paratrain.api import setup
from paratrain.config import DDP, EMA, HSDP, Memory, Parallel, Single
from paratrain.errors import UserError
from paratrain.spawn import run

LAYOUTS = STRATEGIES | {
    "ddp": {"strategy": DDP()},
    "recomputed": {**STRATEGIES["fsdp"], "memory": Memory(recompute="full")},
    "zero1, states on the host": {**STRATEGIES["zero1"], "memory": Memory(offload="optimizer")},
    "hsdp": {"strategy": HSDP(), "parallel": Parallel(dp_replicate=2)},
}
PARTS = {
    "the head and norms": ["*", "!head.*", "!*norm*"],
    "all but two blocks": ["blocks.0.*", "embed*"],
}


def test_frozen_parameters_stay_under_every_strategy():
    batches = token_batches(3, 8, True)

    def body():
        return {
            (name, part): train(config(1, freeze=patterns, **sections), gpt(tied=False), token_loss, batches)
            for name, sections in LAYOUTS.items()
            for part, patterns in PARTS.items()
        }

    found = run(body, 4)[0]
    for part in PARTS:
        model = gpt(tied=False)().double()
        for name, param in model.named_parameters():
            trained = (
                name.startswith("head.") or "norm" in name if part == "the head and norms" else not name.startswith(("blocks.0.", "embed"))
            )
            param.requires_grad_(trained)
        assert len({param.requires_grad for param in model.parameters()}) == 2
        start = {name: value.clone() for name, value in model.state_dict().items()}
        expected = train_by_hand(model, batches, loss_fn=token_loss)
        for layout in LAYOUTS:
            result = found[layout, part]
            assert difference(result, expected) < TOLERANCE, (layout, part)
            assert all(torch.equal(result[2][name], start[name]) for name, p in model.named_parameters() if not p.requires_grad)


def test_frozen_parameters_have_no_states_and_no_average():
    engine = setup(gpt(tied=False), token_loss, config(strategy=Single(), freeze=["*", "!head.weight"], ema=EMA()))
    engine.train_step(token_batches(1, 4, False)[0])
    assert [name for name in engine.tensors() if not name.startswith("model/")] == [
        "optimizer/head.weight/step",
        "optimizer/head.weight/exp_avg",
        "optimizer/head.weight/exp_avg_sq",
        "ema/head.weight",
    ]


def test_mistakes_are_refused():
    for patterns, message in (
        (["blcks.*"], "freeze: 'blcks.*' matches no parameter.*names look like"),
        (["embed.*", "!hed.weight"], r"'!hed\.weight' matches no parameter; did you mean 'head\.weight'"),
        (["*"], "no parameter is left to train"),
    ):
        with pytest.raises(UserError, match=message):
            setup(gpt(tied=False), token_loss, config(strategy=Single(), freeze=patterns))


ADAPTED = {  # architecture -> what is adapted
    "decoder, grouped heads": {"target_modules": ["q_proj", "v_proj"]},
    "decoder, tied, fused attention": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "encoder and decoder": {"target_modules": ["q", "v"], "bias": "lora_only"},
    "vision": {"target_modules": "all-linear", "modules_to_save": ["classifier"], "use_rslora": True},
}


def adapted(name):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    options = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, init_lora_weights=False, **ADAPTED[name])
    return peft.get_peft_model(build(name), options)


KINDS = {"vision": "pixel_values", "encoder and decoder": "input_ids decoder_input_ids"}


@pytest.mark.parametrize("names", [list(ADAPTED)[1:2], pytest.param(list(ADAPTED), marks=pytest.mark.slow)], ids=["fused", "all"])
def test_lora_trains_as_one_process_under_every_strategy(names):
    def body():
        found = {}
        for name in names:
            for layout, sections in LAYOUTS.items():
                engine = setup(lambda name=name: adapted(name), loss_fn, config(1, **sections))
                steps = [engine.train_step(engine.local(batch)) for batch in data(KINDS.get(name, "input_ids"))]
                found[name, layout] = [s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict()
        return found

    pytest.importorskip("peft")
    found = run(body, 4, timeout=280)[0]
    for name in names:
        model = adapted(name).double()
        start = {key: value.clone() for key, value in model.state_dict().items()}
        expected = train_by_hand(model, data(KINDS.get(name, "input_ids")), loss_fn=loss_fn)
        trained = {key for key, param in model.named_parameters() if param.requires_grad}
        assert all("lora" in key or "modules_to_save" in key or key.endswith("bias") for key in trained)
        for layout in LAYOUTS:
            result = found[name, layout]
            assert difference((*result[:2], {}), (*expected[:2], {})) < 1e-6, (name, layout)
            assert result[2].keys() == expected[2].keys()
            assert max(float((result[2][key] - value).abs().max()) for key, value in expected[2].items()) < 1e-4, (name, layout)
            moved = {key for key, value in result[2].items() if not torch.equal(value, start[key])}
            assert moved
            assert moved <= trained
