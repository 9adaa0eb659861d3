"""Models of the transformers library, unedited and without a plan, under two tensor-parallel ranks."""

from __future__ import annotations

import os

import pytest
import torch
from reference import config, token_loss, train_by_hand

from paratrain.api import setup
from paratrain.config import Parallel
from paratrain.spawn import run

pytest.importorskip("transformers")
os.environ["HF_HUB_OFFLINE"] = "1"
VOCAB = 33
_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_NO_DROPOUT = {"hidden_dropout": 0, "attention_dropout": 0}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MODELS = {  # configuration class, model class or None for causal language models, arguments, a matrix that must be split
    "llama": ("LlamaConfig", None, {**_SMALL, "num_key_value_heads": 2}, "model.layers.0.self_attn.k_proj.weight"),
    "qwen3": ("Qwen3Config", None, {**_SMALL, "num_key_value_heads": 2, "head_dim": 8}, "model.layers.1.self_attn.o_proj.weight"),
    "olmo2": ("Olmo2Config", None, {**_SMALL, "num_key_value_heads": 2}, "model.layers.0.self_attn.q_proj.weight"),
    "phi3": ("Phi3Config", None, {**_SMALL, "num_key_value_heads": 2}, "model.layers.0.self_attn.qkv_proj.weight"),
    "gpt2": (
        "GPT2Config",
        None,
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0},
        "transformer.h.0.attn.c_attn.weight",
    ),
    "gpt_neox": ("GPTNeoXConfig", None, {**_SMALL, **_NO_DROPOUT}, "gpt_neox.layers.1.attention.query_key_value.weight"),
    "opt": (
        "OPTConfig",
        None,
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}
        | {"dropout": 0, "attention_dropout": 0},
        "model.decoder.layers.0.fc1.weight",
    ),
    "bloom": (
        "BloomConfig",
        None,
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_NO_DROPOUT},
        "transformer.h.0.self_attention.dense.weight",
    ),
    "falcon": (
        "FalconConfig",
        None,
        {
            **{k: v for k, v in _SMALL.items() if k != "intermediate_size"},
            **_NO_DROPOUT,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
        },
        "transformer.h.0.self_attention.query_key_value.weight",
    ),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        {**_SMALL, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
        "bert.encoder.layer.0.attention.self.value.weight",
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0},
        "decoder.block.1.layer.1.EncDecAttention.k.weight",
    ),
}
IN_FLOAT32 = {"llama", "qwen3", "olmo2", "phi3", "bloom", "t5"}  # their norms or scores are, whatever the dtype of the model


def build(name):
    import transformers

    cls, model, options, _ = MODELS[name]
    options = getattr(transformers, cls)(**{**_SPECIAL, **options})
    torch.manual_seed(11)
    made = getattr(transformers, model)(options) if model else transformers.AutoModelForCausalLM.from_config(options)
    return made.train()


def batches(name):
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3):
        tokens = torch.randint(0, VOCAB, (4, 9), generator=generator)
        inputs, targets = {"input_ids": tokens[:, :-1].clone()}, tokens[:, 1:].clone()
        targets[1, 3:] = -100
        found.append((inputs | ({"decoder_input_ids": tokens[:, :-1].flip(1)} if name == "t5" else {}), targets))
    return found


def loss(outputs, targets):
    return token_loss(outputs.logits, targets)


@pytest.mark.parametrize("sequence", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_transformers_train_split_as_one_process_does(sequence):
    def body():
        found = {}
        for name in MODELS:
            engine = setup(lambda name=name: build(name), loss, config(2, parallel=Parallel(tp=2, sp=sequence)))
            losses = [engine.train_step(engine.local(batch)).loss for batch in batches(name)]
            found[name] = losses, engine.full_state_dict(), set(engine._layout.placed.plan.placements)
        return found

    results, _ = run(body, 2, timeout=400)
    for name in MODELS:
        losses, weights, split = results[name]
        expected, _, reference = train_by_hand(build(name).double(), batches(name), loss_fn=loss)
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < (1e-6 if name in IN_FLOAT32 else 1e-10), name
        off = max(float((weights[key] - value).abs().max()) for key, value in reference.items())
        assert off < (1e-4 if name in IN_FLOAT32 else 1e-10), name
        assert MODELS[name][3] in split, name
