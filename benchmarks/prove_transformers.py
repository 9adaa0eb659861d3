"""Are there false alarms? The proof of every architecture of transformers that a small configuration builds: `python -m benchmarks.prove_transformers`.

Each model is proven as a job is, over two ranks with micro-batches and masked targets. A difference is a false alarm unless the model itself computes
what depends on its micro-batch, which its line then says. Options: LAYOUT [NAME ...], where LAYOUT is ddp, zero1 or fsdp.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from benchmarks.report import write
from paratrain import spawn
from paratrain.config import DDP, FSDP, Config, Precision, SyntheticData, Trainer, Zero1
from paratrain.verify import run
from paratrain.verify.compare import compare
from paratrain.verify.doubt import doubts
from paratrain.verify.report import MEASURED
from paratrain.verify.run import Job, exact
from paratrain.verify.trace import Trace
from paratrain.verify.verdict import STEPS

CHUNK = 20  # architectures that a process proves, one after another
PATIENCE = 120  # seconds that a rank waits for the other
SLOW = 1.0  # CPU seconds of a forward, above which a model is left out
VOCAB, TIME, SAMPLES, MOST = 33, 8, 5, 3_000_000
SIZES = {
    "vocab_size": VOCAB,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"), 2
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "kv_channels"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("rotary_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "shared_expert_intermediate_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}


class Logits(nn.Module):
    """The logits of a model of transformers, called with tokens."""

    def __init__(self, kind: type, config: object):
        super().__init__()
        self.model = kind(config)  # type: ignore[call-arg]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def token_loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum"), (targets != -100).sum()


def label_loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return F.cross_entropy(outputs, targets[:, 0].clamp(min=0) % outputs.shape[-1], reduction="sum"), len(targets)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(STEPS):
        tokens = torch.randint(3, VOCAB, (SAMPLES, TIME + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[0, 3:] = -100
        found.append((tokens[:, :-1].clone(), targets))
    return found


def architectures() -> dict[str, tuple[str, str]]:
    """class -> (type of model, what it is for)."""
    from transformers.models.auto import modeling_auto as auto

    tables = {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "labels": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    found: dict[str, tuple[str, str]] = {}
    for use, table in tables.items():
        for model_type, classes in table.items():
            for name in [classes] if isinstance(classes, str) else classes:
                found.setdefault(name, (model_type, use))
    return found


def configured(name: str, model_type: str) -> tuple[type, object] | str:
    """(class, small configuration), or why there is none."""
    import transformers

    try:
        config = transformers.AutoConfig.for_model(model_type)
        for inner in [config, *(getattr(config, part, None) for part in ("text_config", "decoder", "encoder"))]:
            for key, value in SIZES.items():
                with contextlib.suppress(Exception):  # what has a value for each layer, or none that can be set
                    if inner is not None and getattr(inner, key, None) is not None:
                        setattr(inner, key, value)
        config._experts_implementation = "eager"  # the fused kernels know no float64
        kind = getattr(transformers, name)
        with torch.device("meta"):
            size = sum(param.numel() for param in kind(config).parameters())
        if size > MOST:
            return f"{size / 1e6:.0f}M parameters"
        model, began = Logits(kind, config).eval(), time.process_time()
        model(batches()[0][0])
        return (
            (kind, config) if time.process_time() - began < SLOW else "a forward of such few tokens takes long: a fallback of fused kernels"
        )
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:80]


def job(name: str, model_type: str, use: str, layout: str) -> Job | str:
    found = configured(name, model_type)
    if isinstance(found, str):
        return found
    strategy = {"ddp": DDP(), "zero1": Zero1(), "fsdp": FSDP()}[layout]
    data, trainer = SyntheticData(micro_batch_size=2, global_batch=SAMPLES), Trainer(clip_norm=1.0, device="cpu")
    cfg = exact(Config(seed=1, strategy=strategy, data=data, trainer=trainer))
    return Job(lambda: Logits(*found), label_loss if use == "labels" else token_loss, batches(), cfg, STEPS, 2, activations=False)


def proven(chunk: list[tuple[str, str, str]], layout: str, directory: str) -> list[object]:
    """In a rank: of each model (whether in float32, the trace of one process, that of the layout); text where that fails.

    The process of rank 1 moves the weights by their last bit. Every model has a process of its own, forked from this one.
    """
    import transformers.models.auto.modeling_auto  # noqa: F401  read once, and not in every process

    found: list[object] = []
    for index, one in enumerate(chunk):
        answer = Path(directory) / f"{index}-{os.environ['RANK']}"
        child = os.fork()
        if not child:
            try:
                answer.write_bytes(pickle.dumps(_proven(one, layout, f"{directory}/{index}")))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        found.append(
            pickle.loads(answer.read_bytes())
            if answer.exists()
            else (False, "not proven  its process died", "not proven  its process died")
        )
    return found


def _proven(one: tuple[str, str, str], layout: str, store: str) -> tuple[bool, object, object]:
    launched = dict(os.environ)
    rank, narrow = int(launched["RANK"]), False
    made = job(*one, layout)
    single = _attempted(lambda: run.reference(made, rank == 1) if isinstance(made, Job) else made)
    if isinstance(made, Job) and not isinstance(single, Trace):  # as the proof of a job does it, where a model knows no float64
        narrow, made = True, dataclasses.replace(made, cfg=dataclasses.replace(made.cfg, precision=Precision("32-true")))
        _alone()
        again = _attempted(lambda: run.reference(made, rank == 1) if isinstance(made, Job) else made)
        single = again if isinstance(again, Trace) else single
    _alone()
    os.environ.update(launched)
    shared = dist.FileStore(store, 2)
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE))
    both: list[object] = [None, None]
    dist.all_gather_object(both, isinstance(single, Trace))
    if not all(both):
        return narrow, single, "not proven  one of two processes failed"
    return narrow, single, _attempted(lambda: run.layout(made) if isinstance(made, Job) else made)


def _alone() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _attempted(call: Callable[[], object]) -> object:
    try:
        made = call()
        return f"not built  {made}" if isinstance(made, str) else made
    except Exception as error:
        return f"not proven  {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]


def judged(reference: object, noise: object, ranks: list[object], dtype: torch.dtype) -> str:
    """What came out, in a line."""
    for found in (reference, noise, *ranks):
        if not isinstance(found, Trace):
            return str(found)
    traces = [rank for rank in ranks if isinstance(rank, Trace)]
    assert isinstance(reference, Trace)
    assert isinstance(noise, Trace)
    result = compare(reference, noise, traces, dtype)
    if doubt := doubts(result, reference, traces):
        return f"not proven  {doubt}"
    if result.differences:
        first = result.differences[0]
        return (
            f"different  step {first.step}: {first.what}, {first.amount:.1e} where rounding explains {first.tolerance:.1e}; {first.detail}"
        )
    return f"proven      {max(line.worst for kind, line in result.lines.items() if kind in MEASURED):.0e}"


def main(layout: str = "ddp", *names: str) -> int:
    """Print a line an architecture, and how many came out how."""
    seen: collections.Counter[str] = collections.Counter()
    rows: dict[str, str] = {}
    every = [(name, *rest) for name, rest in architectures().items() if not names or name in names]
    for start in range(0, len(every), CHUNK):
        chunk = every[start : start + CHUNK]
        try:
            with tempfile.TemporaryDirectory() as directory:
                ranks = spawn.run(run.quietly, 2, proven, chunk, layout, directory, timeout=3600, init=False)
        except spawn.RankError as error:
            print(f"not proven  {', '.join(name for name, _, _ in chunk)}: {error.summary}", flush=True)
            seen["not proven"] += len(chunk)
            continue
        for index, (name, _, _) in enumerate(chunk):
            narrow = ranks[0][index][0]
            said = judged(
                *(rank[index][1] for rank in ranks), [rank[index][2] for rank in ranks], torch.float32 if narrow else torch.float64
            )
            said += " in float32, the only dtype it trains in" * (narrow and said.startswith("proven"))
            seen[said.partition("  ")[0]] += 1
            rows[name] = said
            print(f"{name:45} {said}", flush=True)
    print(", ".join(f"{count} {status}" for status, count in seen.most_common()), f"(strategy={layout}, torch {torch.__version__})")
    if not names:
        note = f"strategy={layout}, 2 ranks, micro-batches of 2, 4 steps, transformers {version('transformers')}; {dict(seen)}"
        write(f"prove_transformers_{layout}", rows, note)
    return 1 if seen["different"] else 0


if __name__ == "__main__":
    import benchmarks.prove_transformers as module  # so that the ranks import it instead of being sent it

    sys.exit(module.main(*sys.argv[1:]))
