"""Mixtures of experts of the transformers library, unedited, with their experts dealt to two ranks."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reference import config, token_loss, train_by_hand
from test_tensor_parallel import assert_same
from torch import nn

from paratrain.api import setup
from paratrain.config import DDP, FSDP, Optimizer, Parallel, Precision
from paratrain.loss import sequence_balance
from paratrain.spawn import run

pytest.importorskip("transformers")
os.environ["HF_HUB_OFFLINE"] = "1"
VOCAB = 33
_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MODELS = {  # configuration class, arguments, a tensor of experts
    "mixtral": ("MixtralConfig", {"intermediate_size": 48, "num_local_experts": 4}, "model.layers.1.mlp.experts.gate_up_proj"),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
        "model.layers.0.mlp.experts.down_proj",
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        "model.layers.0.mlp.experts.down_proj",
    ),
    "olmoe": (
        "OlmoeConfig",
        {"intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
        "model.layers.0.mlp.experts.gate_up_proj",
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        "model.layers.0.mlp.experts.down_proj_bias",
    ),
}


def build(name, how="eager"):
    import transformers

    cls, options, _ = MODELS[name]
    options = getattr(transformers, cls)(**_SMALL, **_SPECIAL, **options, output_router_logits=True)
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(options, experts_implementation=how).train()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:  # theirs compute in float32, whatever the dtype of the model
            module.normalized_shape, module.eps, module.elementwise_affine = tuple(module.weight.shape), module.variance_epsilon, True
            module.__class__ = nn.RMSNorm
    return model


def in_double(monkeypatch):
    """Routers ask for probabilities in float32; let them stay in float64, so that rounding does not hide anything."""
    softmax, to_float = F.softmax, torch.Tensor.float

    def wide(x, dim=None, dtype=None, **others):
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype, **others)

    monkeypatch.setattr(F, "softmax", wide)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float(x))


def batches(steps=3):
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        tokens = torch.randint(0, VOCAB, (8, 9), generator=generator)
        inputs, targets = {"input_ids": tokens[:, :-1].clone()}, tokens[:, 1:].clone()
        targets[1, 3:] = -100
        found.append((inputs, targets))
    return found


def loss(outputs, targets):
    total, count = token_loss(outputs.logits, targets)
    balance = sequence_balance(outputs.router_logits, 2, len(targets))
    return total + 0.1 * (balance * (targets != -100).sum(1)).sum(), count


def lm_loss(outputs, targets):
    return token_loss(outputs.logits, targets)


def train(cfg, name, how="eager"):
    engine = setup(lambda: build(name, how), loss, cfg)
    steps = [engine.train_step(engine.local(batch)) for batch in batches()]
    held = dict(engine.model.named_parameters())[MODELS[name][2]].to_local().shape
    return [s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict(), held


def test_transformers_train_as_one_process_does(monkeypatch):
    def body():
        in_double(pytest.MonkeyPatch())
        cfg = config(
            2, parallel=Parallel(ep=2), optimizer=Optimizer(lr=1e-2, weight_decay=0.0)
        )  # by name here, by dims in the loop by hand
        return {name: train(cfg, name) for name in MODELS}

    results, _ = run(body, 2, timeout=400)
    in_double(monkeypatch)
    for name in MODELS:
        *result, held = results[name]
        assert held[0] == 2
        assert_same(result, train_by_hand(build(name).double(), batches(), loss_fn=loss, weight_decay=0.0))


def test_grouped_products_and_shards():
    def body():
        cfg = replace(config(2, parallel=Parallel(ep=2), strategy=FSDP()), precision=Precision("32-true"))
        return train(cfg, "mixtral", "grouped_mm")

    (*result, held), *_ = run(body, 4, timeout=400)
    assert held[0] == 1
    assert_same(result, train_by_hand(build("mixtral", "grouped_mm"), batches(), loss_fn=loss), 1e-4)


@pytest.mark.parametrize("parallel", [Parallel(ep=2, tp=2), Parallel(ep=2, pp=2)], ids=["matrices", "stages"])
def test_with_tensors_split_and_in_stages(parallel, monkeypatch):
    """Which rows an expert gets is known by values, which a stage has not of blocks that are not its own."""

    def alone():  # the logits of its routers would leave the blocks past their results
        model = build("mixtral")
        model.config.output_router_logits = False
        return model

    def body():
        in_double(pytest.MonkeyPatch())
        cfg = config(2, parallel=parallel, strategy=DDP(), optimizer=Optimizer(lr=1e-2, weight_decay=0.0))
        engine = setup(alone, lm_loss, cfg)
        steps = [engine.train_step(engine.local(batch)) for batch in batches()]
        return [s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict()

    results = run(body, 4, timeout=400)
    in_double(monkeypatch)
    assert_same(results[0], train_by_hand(alone().double(), batches(), loss_fn=lm_loss, weight_decay=0.0))
