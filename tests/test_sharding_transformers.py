"""Architectures of Hugging Face transformers, built from small configs and unedited, under every way to shard: one table, no code for any."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import config, train_by_hand

from paratrain.api import setup
from paratrain.config import FSDP, HSDP, Memory, Parallel, Zero1
from paratrain.spawn import run

pytest.importorskip("transformers")

WIDTH = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = {"image_size": 16, "patch_size": 8, "num_labels": 5}
TOKENS, IMAGES, PAIRS = "input_ids", "pixel_values", "input_ids decoder_input_ids"

ARCHITECTURES = {  # name -> (class, config class, its arguments, what the model is fed)
    "decoder, grouped heads": ("LlamaForCausalLM", "LlamaConfig", {**WIDTH, "num_key_value_heads": 1, "vocab_size": 32}, TOKENS),
    "decoder, tied, fused attention": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
        TOKENS,
    ),
    "encoder": ("BertForMaskedLM", "BertConfig", {**WIDTH, **CALM, "vocab_size": 32}, TOKENS),
    "encoder, one block called three times": (
        "AlbertForMaskedLM",
        "AlbertConfig",
        {**WIDTH, **CALM, "num_hidden_layers": 3, "embedding_size": 8, "vocab_size": 32},
        TOKENS,
    ),
    "encoder and decoder": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 32, "dropout_rate": 0.0},
        PAIRS,
    ),
    "vision": ("ViTForImageClassification", "ViTConfig", {**WIDTH, **CALM, **IMAGE}, IMAGES),
    "vision, hierarchical": (
        "SwinForImageClassification",
        "SwinConfig",
        {
            **CALM,
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 2,
            "image_size": 16,
            "patch_size": 4,
            "num_labels": 5,
        }
        | {"drop_path_rate": 0.0},
        IMAGES,
    ),
    "mixture of experts": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**WIDTH, "num_key_value_heads": 1, "num_local_experts": 4, "vocab_size": 32, "experts_implementation": "eager"},
        TOKENS,
    ),
    "state space": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 32},
        TOKENS,
    ),
    "convolutions": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [4, 8], "depths": [2, 2], "num_stages": 2, "image_size": 16, "patch_size": 2, "num_labels": 5},
        IMAGES,
    ),
}
LAYOUTS = {
    "zero1": {"strategy": Zero1()},
    "fsdp": {"strategy": FSDP()},
    "fsdp, recomputed": {"strategy": FSDP(), "memory": Memory(recompute="full")},
    "hsdp": {"strategy": HSDP(), "parallel": Parallel(dp_replicate=2)},
}
TOLERANCE = 1e-6  # these models compute norms and softmaxes in float32, whatever the weights


def build(name):
    import transformers

    cls, config_cls, arguments, _ = ARCHITECTURES[name]
    torch.manual_seed(11)
    return getattr(transformers, cls)(getattr(transformers, config_cls)(**arguments))


def data(kind, steps=2, size=8):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(steps):
        if kind == IMAGES:
            inputs = {IMAGES: torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64)}
            targets = torch.randint(0, 5, (size,), generator=generator)
        else:
            inputs = {name: torch.randint(2, 32, (size, 6), generator=generator) for name in kind.split()}
            targets = torch.randint(0, 32, (size, 6), generator=generator)
            targets[: size // 2, 3:] = -100
        batches.append((inputs, targets))
    return batches


def loss_fn(outputs, targets):
    total = F.cross_entropy(outputs.logits.flatten(0, -2), targets.flatten(), reduction="sum")
    return total, (targets != -100).sum()


def test_architectures_train_as_one_process():
    def body():
        found = {}
        for name, (*_, kind) in ARCHITECTURES.items():
            for layout, sections in LAYOUTS.items():
                engine = setup(lambda name=name: build(name), loss_fn, config(1, **sections))
                found[name, layout] = [engine.train_step(engine.local(batch)) for batch in data(kind)], engine.full_state_dict()
                found[name, layout] = [(s.loss, s.grad_norm) for s in found[name, layout][0]], found[name, layout][1]
        return found

    found = run(body, 4, timeout=280)[0]
    for name, (*_, kind) in ARCHITECTURES.items():
        losses, norms, weights = train_by_hand(build(name).double(), data(kind), loss_fn=loss_fn)
        for layout in LAYOUTS:
            steps, final = found[name, layout]
            for (loss, norm), expected_loss, expected_norm in zip(steps, losses, norms, strict=True):
                assert loss == pytest.approx(expected_loss, abs=TOLERANCE), (name, layout)
                assert norm == pytest.approx(expected_norm, abs=TOLERANCE), (name, layout)
            assert final.keys() == weights.keys()
            assert max(float((final[key] - value).abs().max()) for key, value in weights.items()) < 1e-4, (name, layout)
