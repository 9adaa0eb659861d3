"""The typed configuration: one frozen dataclass a section, loaded strictly, with every fault reported at once.

The YAML files in `conf/` carry values and no types; Hydra composes them (see `_hydra.py`), and `from_dict` turns the resolved
dictionary into a `Config` or raises one `ConfigError` that lists every unknown key, wrong type, bad value and impossible
combination. Each key is documented here, where it is defined; `--help` prints these texts.
"""

# ruff: noqa: RUF009 - `key` makes fields, it is no default value

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from paratrain import schema
from paratrain.durations import parse_duration
from paratrain.errors import ConfigError
from paratrain.schema import Target, to_dict

REQUIRED = dataclasses.MISSING


def key(default: Any, doc: str, *, minimum: float | None = None, alias: str | None = None, rest: bool = False) -> Any:
    """A documented configuration key.

    Args:
        minimum: the least number it accepts.
        alias: its name in YAML where that is no Python name (`_target_`).
        rest: the field takes every key of its section that has no field of its own.
    """
    metadata = {"doc": doc, "minimum": minimum, "alias": alias, "rest": rest}
    if default is REQUIRED:
        return field(metadata=metadata)
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


Degree = int | None
Time = Annotated[str, parse_duration, "time (500, 1ep, 10Mtok, 30min)"]


@dataclass(frozen=True)
class Parallel:
    dp_replicate: Degree = key(None, "ranks that hold replicas of the weights; -1 fills; null: what the strategy asks for", minimum=-1)
    dp_shard: Degree = key(None, "ranks over which weights or states are sharded; -1 fills; null: as the strategy asks", minimum=-1)
    cp: int = key(1, "context parallel degree: ranks that share one sequence", minimum=1)
    tp: int = key(1, "tensor parallel degree: ranks that share one matrix", minimum=1)
    pp: int = key(1, "pipeline parallel degree: stages", minimum=1)
    ep: int = key(1, "expert parallel degree: ranks that share the experts of a mixture, and see different samples", minimum=1)
    sp: bool = key(False, "sequence parallelism: between matrix products, the ranks of tp hold parts of each sequence")
    tp_plan: Literal["auto", "model"] | dict[str, str] = key(
        "auto",
        "what tp splits. auto: found by following the model's forward; model: what a Hugging Face model declares; or globs on module or "
        "parameter names -> colwise, rowwise, vocab, replicate (colwise/3: three matrices fused into one)",
    )
    ep_plan: Literal["auto"] | list[str] = key(
        "auto", "what ep deals to ranks. auto: found from the structure; or globs on names of modules of experts"
    )


@dataclass(frozen=True)
class Pipeline:
    """How `parallel.pp` ranks share the depth of a model."""

    schedule: str = key(
        "1f1b",
        "1f1b, gpipe, interleaved, looped_bfs, interleaved_zero_bubble, zbv, dualpipev, or the path of a .csv file with a row of actions a rank",
    )
    stages_per_rank: int | None = key(None, "runs of blocks a rank holds; null: as the schedule is made for (1 or 2)", minimum=1)
    cuts: list[str] | None = key(
        None, "names of the blocks at which the second and every further stage begins; null: balanced by parameters"
    )
    micro_batches: int | None = key(
        None, "micro-batches a step and rank; null: of data.micro_batch_size samples each, or twice the ranks of the pipeline", minimum=1
    )
    place: dict = key(
        {},
        "glob on names of parameters -> stage or list of stages that hold them, those of blocks beside their own; else where forward uses them",
    )


@dataclass(frozen=True)
class Context:
    """How `parallel.cp` ranks share a sequence."""

    method: Literal["all_to_all", "all_gather", "ring"] = key(
        "all_to_all",
        "exchange sequence for heads, whose number the ranks must divide; gather keys and values; or send them around, which never holds them whole",
    )


@dataclass(frozen=True)
class Single:
    """One process."""

    name: Literal["single"] = key("single", "one process")


@dataclass(frozen=True)
class DDP:
    """Replicated weights, gradients all-reduced in buckets (torch DistributedDataParallel)."""

    name: Literal["ddp"] = key("ddp", "replicated data parallelism")
    bucket_cap_mb: float = key(25.0, "size of a gradient bucket in MiB; all-reduce starts when one is full", minimum=0.01)
    static_graph: bool = key(False, "promise that every step uses the same parameters in the same order")
    find_unused_parameters: bool = key(True, "allow parameters without a gradient in some steps; false saves a graph walk a step")
    comm_hook: Literal["none", "bf16", "fp16", "powersgd"] = key("none", "compress gradients in the all-reduce (changes the result)")
    powersgd_rank: int = key(1, "rank of the PowerSGD approximation", minimum=1)
    powersgd_start_step: int = key(1000, "steps of plain all-reduce before PowerSGD starts", minimum=2)
    broadcast_buffers: bool = key(True, "copy rank 0's buffers to the others before each forward that reduces gradients")


@dataclass(frozen=True)
class Sharded:
    """What the strategies that shard have in common; all of them are torch's `fully_shard` (FSDP2), block by block.

    Divided by the shard ranks, per rank: zero1 optimizer states; zero2 gradients too; zero3, fsdp and hsdp weights too. With zero1 and
    zero2 the weights of a block are gathered when it first runs in a step and kept until its last backward, where zero3 gathers them
    for each forward and each backward. Between steps weights are sharded under all of them.
    """

    reshard_after_forward: bool | int = key(
        True, "free a block's gathered weights after its forward; a number: keep them sharded over that many neighbouring ranks"
    )
    reduce_each_micro_batch: bool = key(
        True, "reduce gradients in every micro-batch, so that they stay sharded; false: once a step, with whole gradients until then"
    )
    param_dtype: Literal["master", "compute"] = key(
        "master", "gather weights as they are stored, or in the compute dtype of bf16-mixed and 16-mixed: half the traffic, rounded weights"
    )


@dataclass(frozen=True)
class FSDP(Sharded):
    """Weights, gradients and optimizer states sharded over all data ranks."""

    name: Literal["fsdp"] = key("fsdp", "fully sharded data parallelism")


@dataclass(frozen=True)
class HSDP(Sharded):
    """Sharded inside groups of ranks (by default, a node), replicated between them."""

    name: Literal["hsdp"] = key("hsdp", "hybrid sharded data parallelism: dp_replicate x dp_shard")


@dataclass(frozen=True)
class Zero1(Sharded):
    """Optimizer states sharded; gradients whole until the last micro-batch, weights whole from first use to last (Rajbhandari et al., 2020)."""

    name: Literal["zero1"] = key("zero1", "optimizer states sharded")
    reshard_after_forward: Literal[False] = key(False, "zero1 keeps gathered weights for the step; to free them write strategy=zero3")
    reduce_each_micro_batch: Literal[False] = key(False, "zero1 keeps whole gradients for the step; to shard them write strategy=zero2")


@dataclass(frozen=True)
class Zero2(Sharded):
    """Optimizer states and gradients sharded; weights whole from first use in a step to last."""

    name: Literal["zero2"] = key("zero2", "optimizer states and gradients sharded")
    reshard_after_forward: Literal[False] = key(False, "zero2 keeps gathered weights for the step; to free them write strategy=zero3")


@dataclass(frozen=True)
class Zero3(Sharded):
    """Weights, gradients and optimizer states sharded: another name for fsdp."""

    name: Literal["zero3"] = key("zero3", "weights, gradients and optimizer states sharded")


@dataclass(frozen=True)
class Foreign:
    """An engine of another package, which owns the reduction and the update; see `paratrain/backends`."""


@dataclass(frozen=True)
class DeepSpeed(Foreign):
    """What the DeepSpeed strategies have in common. Its JSON is generated: `python -m paratrain config strategy=deepspeed_zero2 --deepspeed 8`."""

    offload_optimizer: Literal["none", "cpu", "nvme"] = key("none", "where masters and optimizer states live, and where the update runs")
    nvme_path: str | None = key(None, "directory on a local NVMe drive, for offload to nvme")
    pin_memory: bool = key(False, "pinned host memory for what is offloaded")
    reduce_bucket_size: int = key(500_000_000, "elements that are reduced at once", minimum=1)
    allgather_bucket_size: int = key(500_000_000, "elements that are gathered at once", minimum=1)
    elementwise_optimizer: bool = key(
        False, "promise that an optimizer unknown to paratrain treats each element by itself: ZeRO hands it flat pieces of parameters"
    )
    ds_config: dict = key({}, "more of DeepSpeed's own JSON; a value that contradicts this configuration is an error")


@dataclass(frozen=True)
class DeepSpeedZero1(DeepSpeed):
    """Optimizer states sharded by DeepSpeed."""

    name: Literal["deepspeed_zero1"] = key("deepspeed_zero1", "DeepSpeed ZeRO-1")


@dataclass(frozen=True)
class DeepSpeedZero2(DeepSpeed):
    """Optimizer states and gradients sharded by DeepSpeed."""

    name: Literal["deepspeed_zero2"] = key("deepspeed_zero2", "DeepSpeed ZeRO-2")
    overlap_comm: bool = key(False, "reduce gradients while the backward runs")


@dataclass(frozen=True)
class DeepSpeedZero3(DeepSpeed):
    """Weights, gradients and optimizer states sharded by DeepSpeed."""

    name: Literal["deepspeed_zero3"] = key("deepspeed_zero3", "DeepSpeed ZeRO-3")
    offload_param: Literal["none", "cpu", "nvme"] = key("none", "where shards of weights live")
    prefetch_bucket_size: int = key(50_000_000, "elements gathered ahead of their use", minimum=0)
    param_persistence_threshold: int = key(100_000, "parameters with fewer elements stay whole", minimum=0)
    max_live_parameters: int = key(1_000_000_000, "elements that are whole at a time", minimum=0)
    max_reuse_distance: int = key(1_000_000_000, "elements between two uses under which a parameter stays whole", minimum=0)
    hpz_partition_size: int = key(1, "ZeRO++: ranks of a node that keep a second copy of the shards, to gather from in backward", minimum=1)
    quantized_weights: bool = key(False, "ZeRO++: gather weights in 8 bits (changes the result)")
    quantized_gradients: bool = key(False, "ZeRO++: reduce gradients in 4 bits (changes the result)")
    mics_shard_size: int | None = key(
        None, "MiCS, which DeepSpeed removed: refused, with the native twin (strategy=hsdp); null: off", minimum=1
    )


@dataclass(frozen=True)
class FairScale(Foreign):
    """What the FairScale strategies have in common: an archived package, each of whose parts has a native successor."""


@dataclass(frozen=True)
class FairScaleOSS(FairScale):
    """Optimizer states sharded by whole parameters; gradients all-reduced (DistributedDataParallel). Native: strategy=zero1."""

    name: Literal["fairscale_oss"] = key("fairscale_oss", "FairScale OSS")


@dataclass(frozen=True)
class FairScaleSDDP(FairScale):
    """OSS, and each gradient reduced to the rank that owns it. Native: strategy=zero2."""

    name: Literal["fairscale_sddp"] = key("fairscale_sddp", "FairScale OSS and ShardedDataParallel")


@dataclass(frozen=True)
class FairScaleFSDP(FairScale):
    """FairScale's FullyShardedDataParallel: refused, with the reason. Native: strategy=fsdp."""

    name: Literal["fairscale_fsdp"] = key("fairscale_fsdp", "FairScale FullyShardedDataParallel")


@dataclass(frozen=True)
class Memory:
    """What is traded for memory, and how the first weights get where they belong."""

    blocks: list[str] | None = key(
        None, "globs on module or class names: the units that are sharded, recomputed and compiled; null: found from the structure"
    )
    recompute: Literal["none", "full", "selective", "auto"] = key(
        "none",
        "recompute activations in backward: of whole blocks; selective: all but the results of matrix products and attention; auto: of as "
        "few blocks as keep within `budget_gib`",
    )
    recompute_every: int = key(1, "recompute every k-th block", minimum=1)
    budget_gib: float | None = key(None, "of recompute=auto: GiB a rank may hold of the activations of its blocks", minimum=0.0)
    activations: Literal["keep", "offload"] = key(
        "keep", "offload: what backward needs of a block (where it is recomputed, its inputs) waits in host memory"
    )
    offload: Literal["none", "params", "optimizer"] = key(
        "none",
        "params: keep shards of weights, gradients and optimizer states in host memory; optimizer: its states, which visit the device "
        "one parameter at a time",
    )
    init: Literal["constructor", "meta"] = key(
        "constructor",
        "constructor: values that model_fn gives in one process, sent shard by shard; meta: no rank ever holds the model, and each module "
        "draws its values in reset_parameters or _init_weights, seeded by (seed, module name)",
    )
    pretrained: str | None = key(None, "weights to start from: a .safetensors file, or a directory with one or with an index of several")


@dataclass(frozen=True)
class EMA:
    """An exponential moving average of the weights: average = decay * average + (1 - decay) * weights."""

    decay: float = key(0.999, "weight of the past, below 1", minimum=0.0)
    every: int = key(1, "updates of the weights between two of the average", minimum=1)
    evaluate: bool = key(True, "evaluate the average instead of the weights that are trained")


@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al., 2018)."""

    init: float = key(65536.0, "first scale", minimum=1e-8)
    growth_factor: float = key(2.0, "factor after `growth_interval` good steps in a row", minimum=1.0)
    backoff_factor: float = key(0.5, "factor after an overflow")
    growth_interval: int = key(2000, "good steps in a row before the scale grows", minimum=1)
    min: float = key(1.0, "floor; an overflow at the floor is an error", minimum=0.0)
    max: float = key(2.0**24, "ceiling", minimum=1.0)
    dynamic: bool = key(True, "false: the scale stays at `init`, and steps that overflow are skipped")
    hysteresis: int = key(1, "overflows, without growth in between, before the scale shrinks", minimum=1)


@dataclass(frozen=True)
class Fallback:
    """Modules that leave float16 where it fails, and return to it when it can (see docs/precision.md)."""

    policy: Literal["off", "monitor", "module", "global"] = key(
        "off",
        "monitor only measures; module moves the modules that fail, and the whole model after `max_moved`; global always the whole model",
    )
    to: Literal["fp32", "bf16"] = key("fp32", "compute dtype of what leaves half")
    every: int = key(20, "steps between readings; the step after an overflow is read too", minimum=1)
    high: float = key(0.5, "a module leaves half when its activations exceed this fraction of float16's largest number", minimum=0.0)
    low: float = key(0.125, "it may return once they stay below this fraction", minimum=0.0)
    calm: int = key(500, "steps before a module tries half again; doubles with each relapse", minimum=1)
    max_underflow: float = key(0.5, "fraction of a module's gradients below float16's normal numbers that is too much", minimum=0.0)
    patience: int = key(3, "readings in a row with such underflow before the floor of the loss scale is raised", minimum=1)
    max_moved: float = key(0.5, "fraction of the modules out of half after which the whole model leaves it", minimum=0.0)


@dataclass(frozen=True)
class Float8:
    """Products of linear layers in float8 (see docs/precision.md)."""

    recipe: Literal["tensorwise", "rowwise"] = key("tensorwise", "one scale a tensor, or one a row: more exact, a little slower")
    include: list[str] = key(["*"], "globs on names of linear layers")
    exclude: list[str] = key([], "globs on names of linear layers that stay in bfloat16")
    all_gather: bool = key(
        False,
        "sharded strategies send the weights of these layers in float8, a quarter of the traffic, to the same products; tensorwise only",
    )
    emulate: bool = key(False, "round as float8 does and multiply in the compute dtype: for tests, on any device")


@dataclass(frozen=True)
class Precision:
    name: Literal["32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed"] = key("32-true", "dtype of weights and of compute")
    loss_scale: LossScale | None = key(None, "dynamic loss scaling; only for 16-mixed, where it is required")
    reduce_dtype: Literal["fp32", "grad"] = key("fp32", "dtype in which low-precision gradients are reduced over ranks")
    accumulate_dtype: Literal["grad", "fp32"] = key(
        "grad",
        "sum gradients over micro-batches in the dtype of the weights, or in float32 with one rounding, for the update: only for bf16-true "
        "(gradients of float32 weights are float32), twice the memory of gradients",
    )
    fp8: Float8 | None = key(None, "products of linear layers in float8; only with bf16-mixed; null: none")
    fallback: Fallback = key(Fallback(), "what half precision does where it fails; only for 16-mixed")


@dataclass(frozen=True)
class Data:
    """What every data source has in common."""

    global_batch: int = key(16, "samples a step over all ranks: the unit of training, whatever the layout", minimum=1)
    micro_batch_size: int | Literal["auto"] | None = key(
        None, "samples a rank runs at once; auto: as many as fit, found by trying; null: its whole part of the global batch", minimum=1
    )
    workers: int = key(0, "loader processes a rank", minimum=0)
    shuffle: bool = key(True, "a new order every epoch, a function of (seed, epoch) alone")


@dataclass(frozen=True)
class TextSource(Data):
    """Token sequences packed from text."""

    seq_len: int = key(128, "tokens in a sample", minimum=1)
    tokenizer: Literal["byte", "bpe"] = key("byte", "bytes, or a byte-level BPE trained on this text and cached")
    vocab_size: int = key(256, "tokens in the vocabulary; 256 for bytes", minimum=256)
    eval_fraction: float = key(0.05, "fraction of the documents held out for evaluation", minimum=0.0)
    cache_dir: str | None = key(None, "where tokens are cached; null: the user's cache directory")


@dataclass(frozen=True)
class StdlibData(TextSource):
    """The source text of this Python's standard library: real text on every machine."""

    source: Literal["stdlib"] = key("stdlib", "source text of the Python standard library")


@dataclass(frozen=True)
class TextData(TextSource):
    """The user's own files."""

    source: Literal["text"] = key("text", "files of your own")
    path: str | list[str] | None = key(None, "required: file, directory or glob, or a list of them: .txt .md .py .jsonl .parquet ...")
    text_field: str = key("text", "field of a .jsonl record or column of a .parquet file that holds the text")


@dataclass(frozen=True)
class HFData(TextSource):
    """A Hugging Face data set, through `datasets`."""

    source: Literal["hf"] = key("hf", "a Hugging Face data set")
    name: str | None = key(None, "required: path of a data set directory, or its name on the hub")
    config: str | None = key(None, "configuration of the data set")
    split: str = key("train", "split to train on")
    eval_split: str | None = key(None, "split to evaluate on; null: `eval_fraction` of the training split")
    text_field: str = key("text", "column that holds the text")


@dataclass(frozen=True)
class SyntheticData(Data):
    """Random tokens, for benchmarks."""

    source: Literal["synthetic"] = key("synthetic", "random tokens")
    seq_len: int = key(128, "tokens in a sample", minimum=1)
    vocab_size: int = key(256, "tokens in the vocabulary", minimum=2)
    samples: int = key(1024, "samples in an epoch", minimum=1)
    eval_samples: int = key(64, "samples held out for evaluation", minimum=0)


@dataclass(frozen=True)
class CustomData(Data):
    """A data set of the user's own."""

    source: Literal["custom"] = key("custom", "an object of your own")
    train: Target | None = key(None, "required: `_target_` of a map-style data set of (inputs, targets) samples")
    eval: Target | None = key(None, "`_target_` of the data set to evaluate on")


@dataclass(frozen=True)
class ParamGroup:
    match: str | list[str] = key(REQUIRED, "glob, or list of globs, on parameter names; the first group that matches wins")
    options: dict = key(
        {}, "every further key overrides the optimizer's for these parameters; `_target_` gives them an optimizer of their own", rest=True
    )


@dataclass(frozen=True)
class Optimizer:
    target: str = key("torch.optim.AdamW", "class of the optimizer, as a dotted path", alias="_target_")
    lr: float = key(1e-3, "learning rate before the schedule", minimum=0.0)
    weight_decay: float = key(0.01, "decay of the parameters that `no_decay` does not exempt", minimum=0.0)
    no_decay: Literal["norm_and_bias", "none"] = key("norm_and_bias", "what is never decayed: norms, biases and vectors; or nothing")
    args: dict = key({}, "every further key is an argument of the class, checked against its signature", rest=True)
    fused: bool | None = key(None, "the fused kernel; null: wherever torch has one")
    groups: list[ParamGroup] = key([], "parameter groups by name; a pattern that matches nothing is an error")
    others: dict = key(
        {},
        "of an optimizer of matrices (Muon, SOAP, Shampoo): options for vectors, embeddings and the output layer, AdamW's unless it has a `_target_`",
    )


@dataclass(frozen=True)
class Scheduler:
    """Factor on every learning rate, a pure function of the step (see `optim/schedules.py`)."""

    name: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = key("constant", "shape after the warmup")
    warmup_steps: int = key(0, "steps of linear warmup", minimum=0)
    total_steps: int | None = key(None, "step at which the schedule ends; null: the last step of training", minimum=1)
    decay_steps: int | None = key(None, "wsd: steps of the final decay; null: a tenth of the total", minimum=0)
    min_ratio: float = key(0.0, "learning rate at the end as a fraction of the peak", minimum=0.0)


@dataclass(frozen=True)
class Spike:
    """A loss far above those before it: training goes back to the checkpoint before and leaves that batch out."""

    window: int = key(128, "losses it is compared with", minimum=4)
    sigmas: float = key(8.0, "robust standard deviations above their median that are too many", minimum=1.0)
    min_steps: int = key(32, "losses to see before judging", minimum=4)


@dataclass(frozen=True)
class NoiseScale:
    """The gradient noise scale (McCandlish et al., 2018), from the gradients of the micro-batches of a step."""

    every: int = key(10, "steps between readings, each of which takes a norm of every gradient of every micro-batch", minimum=1)
    decay: float = key(0.95, "of the running averages of noise and gradient, whose ratio is logged", minimum=0.0)


@dataclass(frozen=True)
class Trainer:
    max_steps: int | None = key(None, "stop after this many steps", minimum=0)
    max_epochs: float | None = key(None, "stop after this many epochs", minimum=0)
    max_tokens: float | None = key(None, "stop after this many tokens (or samples, where the loss counts samples)", minimum=0)
    max_time: Time | None = key(None, "stop after this long: 90s, 30min, 12h, 2d")
    clip_norm: float | None = key(None, "clip the global gradient norm to this; null: do not clip", minimum=0.0)
    clip_value: float | None = key(None, "clip every element of the gradient to this, last; null: do not", minimum=0.0)
    clip_adaptive: float | None = key(
        None, "clip the gradient of each row to this fraction of the norm of its weights (AGC), after clip_norm; null: do not", minimum=0.0
    )
    loss_count: Literal["auto", "samples", "targets"] = key(
        "auto",
        "what a loss that is a plain mean is a mean over: samples, target elements (those equal to -100 excluded), or auto: "
        "target elements for integer targets, samples otherwise",
    )
    loss_weights: dict[str, float] | None = key(
        None,
        "loss_fn returns several losses, a dict of these names, and the loss is the sum of weight x mean; the first counts the tokens: "
        "{ce: 1.0, z: 1e-4}; null: it returns one",
    )
    loss_check: bool = key(
        True,
        "compare the loss of samples with that of parts of them in the first steps, and refuse a loss that would depend on the layout; false accepts it",
    )
    batch_norm: Literal["sync", "local"] = key(
        "sync", "BatchNorm statistics over the global batch, or over each rank's own micro-batches (spectral norm likewise)"
    )
    forward_state: dict[str, Literal["step", "mean", "sum", "rank0", "local"]] = key(
        {},
        "what becomes of state that forward moves (counters, moving averages, queues), by globs on its names: step, once a step and the same on "
        "every rank; mean, over samples of all micro-batches and ranks; sum, of the changes of all; rank0, as rank 0's first micro-batch leaves "
        "it; local, each rank's own, moved by each micro-batch. What is not named and would depend on the layout is refused",
    )
    nonfinite: Literal["raise", "skip", "rollback"] = key(
        "raise",
        "a loss or gradient that is not finite (beyond what a loss scale mends): raise ends training; skip leaves the weights as they are; "
        "rollback goes back to the last checkpoint and leaves the batch out. Its samples are written to bad_batches.jsonl",
    )
    spike: Spike | None = key(
        None, "loss spikes: null ignores them; {} or {sigmas: 8} goes back to the last checkpoint and leaves the batch out"
    )
    noise_scale: NoiseScale | None = key(
        None,
        "log train/noise_scale, about the global batch beyond which more samples stop helping, in what the loss counts: {} or {every: 100}; "
        "null: do not measure it",
    )
    step_timeout: Time | None = key(
        "15min",
        "a step after the first that takes longer is a hang: stacks are written to hang/ and the process ends with code 76; null: wait",
    )
    max_stuck_restarts: int = key(3, "restarts by torchrun in a row that may begin at one step before the job gives up", minimum=1)
    update_in_backward: bool = key(
        False,
        "update each weight as soon as backward has its gradient, which is freed at once: for one micro-batch a step, and no clipping",
    )
    prove: Literal["background", "before", "off"] = key(
        "background",
        "prove on the CPU that the layout trains this model as one process does: beside the training, at the lowest priority, or before its "
        "first step; off takes it on trust. The environment variable PARATRAIN_PROVE overrides it",
    )
    log_every: int = key(10, "steps between log lines", minimum=1)
    eval_every: Time | None = key(None, "time between evaluations: 500, 1ep, 10Mtok, 10min; null: only at the end")
    eval_batches: int | None = key(None, "global batches in an evaluation; null: all", minimum=1)
    device: Literal["auto", "cpu", "cuda"] = key("auto", "where to compute; auto: cuda where there is one")
    deterministic: bool = key(False, "refuse operations whose result varies between runs")
    timeout_minutes: float = key(30.0, "how long a collective may wait for its peers", minimum=0.01)

    @property
    def ends(self) -> bool:
        """Whether anything says when training stops."""
        return any(limit is not None for limit in (self.max_steps, self.max_epochs, self.max_tokens, self.max_time))


@dataclass(frozen=True)
class WandB:
    project: str = key("paratrain", "project of the run")
    entity: str | None = key(None, "user or team; null: the default of the account")
    name: str | None = key(None, "name of the run; null: the name of the output directory")
    group: str | None = key(None, "group of the run; null: none")
    mode: Literal["auto", "online", "offline"] = key("auto", "auto: online with a key and a server that answers, otherwise offline")
    tags: list[str] = key([], "tags of the run")
    id: str | None = key(None, "id of the run; null: made once and kept with the output directory, so that a resume continues it")


@dataclass(frozen=True)
class Logger:
    sinks: list[Literal["console", "jsonl", "csv", "tensorboard", "wandb"]] = key(["console", "jsonl"], "where metrics go")
    wandb: WandB = key(WandB(), "Weights & Biases")
    peak_tflops: float | None = key(None, "dense peak TFLOP/s of a device, for MFU; null: the published figure, if any", minimum=0.0)


@dataclass(frozen=True)
class Checkpoint:
    every: Time | None = key(None, "time between checkpoints: 500, 1ep, 10Mtok, 30min; null: only at the end")
    at_end: bool = key(True, "save when training ends or is interrupted")
    keep: int | None = key(3, "newest checkpoints to keep; null: all", minimum=1)
    keep_every: int | None = key(None, "keep those whose step is a multiple of this for ever", minimum=1)
    best: str | None = key(None, "also save whenever this metric of an evaluation is the best so far, and keep that one: eval/loss")
    best_mode: Literal["min", "max"] = key("min", "which value of `best` is the best")
    async_save: bool = key(
        True, "write while training goes on; it waits only for a copy to host memory, which needs as much memory as the rank's state"
    )
    max_failures: int = key(3, "failed saves in a row that stop training", minimum=1)
    remote: str | None = key(
        None, "also copy every checkpoint there, and resume from there where the output directory has none: s3://bucket/run"
    )


@dataclass(frozen=True)
class Verify:
    """`python -m paratrain verify`: is the layout the same function as one process?"""

    steps: int = key(4, "steps to compare", minimum=1)
    ranks: int = key(4, "local CPU processes of the layout", minimum=1)
    dtype: Literal["float64", "configured"] = key(
        "float64", "float64 in place of the precision, so that a difference is an error and not rounding; or the precision as configured"
    )
    layers: int | None = key(
        None, "cut the model to this many layers (it needs an argument layers, num_hidden_layers or n_layer)", minimum=1
    )
    timeout_minutes: float = key(10.0, "how long each of its runs may take", minimum=0.01)


@dataclass(frozen=True)
class Config:
    """Everything a job is told. Build it with `load_config`, or `from_dict` for a dictionary of your own."""

    seed: int = key(0, "decides initial weights, data order and dropout", minimum=0)
    resume: str = key(
        "auto", "auto: from the newest checkpoint in the output directory, if any; none: from no earlier job's; or a checkpoint's path"
    )
    resume_force: list[str] = key(
        [], "globs of keys that may differ from the checkpoint's configuration: [optimizer.lr], [scheduler.*]; [*] for all"
    )
    output_dir: str | None = key(None, "where the job writes; from the command line it is hydra.run.dir; null in Python: runs/<time>")
    parallel: Parallel = key(Parallel(), "degrees of parallelism")
    pipeline: Pipeline = key(Pipeline(), "how parallel.pp ranks share the depth of a model")
    context: Context = key(Context(), "how parallel.cp ranks share a sequence")
    strategy: (
        Single
        | DDP
        | Zero1
        | Zero2
        | Zero3
        | FSDP
        | HSDP
        | DeepSpeedZero1
        | DeepSpeedZero2
        | DeepSpeedZero3
        | FairScaleOSS
        | FairScaleSDDP
        | FairScaleFSDP
    ) = key(DDP(), "how the data-parallel axes are used")
    memory: Memory = key(Memory(), "what is traded for memory")
    compile: bool | str = key(False, "compile each block: true for inductor, or the name of a torch.compile backend")
    compile_fallback: bool = key(False, "run blocks that cannot be compiled as they are, with a warning that names them, instead of ending")
    freeze: list[str] = key(
        [],
        "globs on parameter names: these are not trained; '!' before a glob takes parameters out again: ['*', '!head.*'] trains the head alone",
    )
    ema: EMA | None = key(None, "moving average of the weights, sharded as they are: {} or {decay: 0.9999}; null: none")
    precision: Precision = key(Precision(), "dtypes and loss scaling")
    model: Target | None = key(None, "`_target_` and arguments of the model")
    loss: Target | None = key(None, "`_target_` of loss_fn(outputs, targets) -> (sum, count) or a mean")
    data: StdlibData | TextData | HFData | SyntheticData | CustomData = key(StdlibData(), "what to train on")
    optimizer: Optimizer = key(Optimizer(), "what updates the weights")
    scheduler: Scheduler = key(Scheduler(), "the learning rate over time")
    trainer: Trainer = key(Trainer(), "the loop")
    logger: Logger = key(Logger(), "metrics and where they go")
    checkpoint: Checkpoint = key(Checkpoint(), "when state is saved, and how much is kept")
    verify: Verify = key(Verify(), "what `python -m paratrain verify` compares")
    callbacks: dict[str, Target] = key({}, "name -> `_target_` of a callback")
    app: dict = key({}, "keys of your own application; paratrain does not read them")


def from_dict(data: Mapping[str, Any], *, ignore: Collection[str] = (), targets: bool = False) -> Config:
    """A checked configuration from nested plain data; keys left out have their defaults.

    Args:
        ignore: sections already known to be faulty, left out here.
        targets: also import the classes and functions named by `_target_`, and check the arguments they are given. Never for
            data that was read from a checkpoint: importing runs code.

    Raises:
        ConfigError: every fault, one a line.
    """
    kept = {name: part for name, part in data.items() if name not in ignore} if isinstance(data, Mapping) else data
    cfg, faults = schema.load(Config, kept)
    assert cfg is not None or faults
    if cfg is not None:
        if targets:
            from paratrain.build import check_targets

            faults += check_targets(cfg)
        doubtful = {*ignore, *(fault.key for fault in faults)}
        from paratrain.combinations import faults_of

        for fault, others in faults_of(cfg):
            if not any(_touches(known, part) for known in doubtful for part in (fault.key, *others)):
                faults.append(fault)
    if faults:
        raise ConfigError([str(fault) for fault in faults])
    assert cfg is not None
    return cfg


def check(cfg: Config) -> Config:
    """`cfg` itself checked as if it had been read from files, for configurations built in Python.

    Raises:
        ConfigError: every fault, one a line.
    """
    return from_dict(to_dict(cfg), targets=True)


def _touches(known: str, other: str) -> bool:
    """Whether one key is the other, or a section around it."""
    return known == other or known.startswith(f"{other}.") or other.startswith(f"{known}.")
