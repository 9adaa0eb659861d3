"""Values of a configuration that are each fine and do not go together: every rule between keys, by subject.

A rule yields the fault and the other keys that take part, so that nothing is said about keys that are faulty by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

from paratrain.config import (
    DDP,
    Config,
    CustomData,
    DeepSpeed,
    DeepSpeedZero1,
    DeepSpeedZero3,
    FairScale,
    Foreign,
    HFData,
    Pipeline,
    Sharded,
    Single,
    TextData,
    TextSource,
)
from paratrain.durations import parse_duration
from paratrain.schema import Fault

Faults = Iterator[tuple[Fault, tuple[str, ...]]]


def faults_of(cfg: Config) -> Faults:
    """Values that are each fine and do not go together, with the other keys that take part."""
    for rules in (_parallel, _memory, _precision, _data, _schedule, _foreign):
        yield from rules(cfg)
    if cfg.seed >= 2**63:
        yield Fault("seed", f"must be below 2^63, which is as far as torch's generators go; got {cfg.seed}"), ()
    if cfg.trainer.clip_norm == 0:
        yield Fault("trainer.clip_norm", "0 makes every gradient zero, so nothing would be trained; write null for no clipping"), ()
    if cfg.trainer.step_timeout is not None and parse_duration(cfg.trainer.step_timeout).unit != "seconds":
        yield Fault("trainer.step_timeout", f"{cfg.trainer.step_timeout!r} is no span of time; write 90s or 15min, or null to wait"), ()
    if cfg.trainer.max_time is not None and parse_duration(cfg.trainer.max_time).unit != "seconds":
        yield Fault("trainer.max_time", f"{cfg.trainer.max_time!r} is no span of time; write 90s, 30min, 12h or 2d"), ()


def _pipeline(cfg: Config) -> Faults:
    options, strategy = cfg.pipeline, cfg.strategy
    if cfg.parallel.pp == 1:
        for name in ("schedule", "stages_per_rank", "cuts", "micro_batches", "place"):
            if getattr(options, name) != getattr(Pipeline(), name):
                yield Fault(f"pipeline.{name}", "is read under parallel.pp only; write parallel.pp=2, or leave it out"), ("parallel.pp",)
        return
    if options.micro_batches is not None and cfg.data.micro_batch_size is not None:
        reason = "and data.micro_batch_size say the same in two ways; leave one of them out"
        yield Fault("pipeline.micro_batches", reason), ("data.micro_batch_size",)
    if options.schedule in ("interleaved_zero_bubble", "zbv", "dualpipev"):
        if isinstance(strategy, Sharded) and strategy.reshard_after_forward is not False:
            reason = (
                f"{options.schedule} computes gradients of weights after those of inputs, when they are no longer gathered; write false"
            )
            yield Fault("strategy.reshard_after_forward", reason), ("pipeline.schedule",)
        if cfg.compile is not False:
            reason = f"compiled blocks cannot put off the gradients of their weights, as {options.schedule} does; write compile=false"
            yield Fault("compile", reason), ("pipeline.schedule",)
    if isinstance(strategy, DDP) and strategy.comm_hook != "none":
        reason = f"{strategy.comm_hook}, but gradients of stages are reduced once a step without hooks; write strategy.comm_hook=none"
        yield Fault("strategy.comm_hook", reason), ("parallel.pp",)


def _experts(cfg: Config) -> Faults:
    ep, strategy = cfg.parallel.ep, cfg.strategy
    if ep == 1:
        if cfg.parallel.ep_plan != "auto":
            yield Fault("parallel.ep_plan", "is read under expert parallelism only; write parallel.ep=2"), ("parallel.ep",)
        return
    if isinstance(strategy, Single):
        yield Fault("parallel.ep", f"{ep}, but strategy=single is one process; write strategy=ddp"), ("strategy",)
    if isinstance(strategy, DDP) and (strategy.comm_hook != "none" or strategy.static_graph):
        option = "comm_hook" if strategy.comm_hook != "none" else "static_graph"
        reason = "belongs to DistributedDataParallel, which does not know experts on several ranks; leave it out"
        yield Fault(f"strategy.{option}", reason), ("parallel.ep",)
    if cfg.memory.recompute in ("selective", "auto"):
        why = "decides on each rank alone" if cfg.memory.recompute == "auto" else "cannot replay the collectives inside a block"
        reason = f"{cfg.memory.recompute} {why}, but all ranks must exchange rows together; write full or none"
        yield Fault("memory.recompute", reason), ("parallel.ep",)
    if cfg.compile is not False:
        reason = "how many rows an expert gets is known while running only, which compiled blocks cannot wait for yet; write compile=false"
        yield Fault("compile", reason), ("parallel.ep",)


def _parallel(cfg: Config) -> Faults:
    parallel, strategy = cfg.parallel, cfg.strategy
    yield from _pipeline(cfg)
    yield from _experts(cfg)
    if parallel.tp == 1 and (parallel.sp or parallel.tp_plan != "auto"):
        yield (
            Fault("parallel.sp" if parallel.sp else "parallel.tp_plan", "is read under tensor parallelism only; write parallel.tp=2"),
            ("parallel.tp",),
        )
    if parallel.tp > 1 and isinstance(strategy, Single):
        yield Fault("parallel.tp", f"{parallel.tp}, but strategy=single is one process; write strategy=ddp"), ("strategy",)
    if parallel.tp > 1 and isinstance(strategy, DDP) and (strategy.comm_hook != "none" or strategy.static_graph):
        option = "comm_hook" if strategy.comm_hook != "none" else "static_graph"
        yield (
            Fault(f"strategy.{option}", "belongs to DistributedDataParallel, which does not know split weights; leave it out"),
            ("parallel.tp",),
        )
    if parallel.tp > 1 and cfg.compile is not False:
        yield (
            Fault(
                "compile", "the compiler cannot trace the rules by which split tensors are followed; write compile=false or parallel.tp=1"
            ),
            ("parallel.tp",),
        )
    for axis in ("dp_replicate", "dp_shard"):
        degree = getattr(parallel, axis)
        if degree == 0:
            yield Fault(f"parallel.{axis}", f"0 ranks cannot train; write 1 or more, or parallel.{axis}=-1 to fill"), ()
        elif degree not in (None, 1) and isinstance(strategy, Single):
            reason = f"{degree}, but strategy=single is one process; write strategy=ddp or parallel.{axis}=1"
            yield Fault(f"parallel.{axis}", reason), ("strategy",)
        elif degree not in (None, 1) and axis == "dp_shard" and isinstance(strategy, DDP):
            reason = f"{degree}, but strategy=ddp shards nothing; write parallel.dp_replicate={degree}, or strategy=fsdp"
            yield Fault(f"parallel.{axis}", reason), ("strategy",)
    if cfg.memory.offload == "params" and not isinstance(strategy, Sharded):
        reason = f"{cfg.memory.offload}, but strategy={strategy.name} keeps whole weights on the device; write strategy=fsdp, or memory.offload=none"
        yield Fault("memory.offload", reason), ("strategy",)
    if cfg.memory.recompute_every > 1 and cfg.memory.recompute == "none":
        yield Fault("memory.recompute_every", "nothing is recomputed; write memory.recompute=full"), ("memory.recompute",)
    if isinstance(strategy, Sharded) and strategy.param_dtype == "compute" and cfg.precision.name not in ("bf16-mixed", "16-mixed"):
        reason = f"compute, but under precision.name={cfg.precision.name} weights are stored in the compute dtype; leave it out"
        yield Fault("strategy.param_dtype", reason), ("precision.name",)
    if isinstance(strategy, DDP) and strategy.comm_hook != "powersgd":
        for name in ("powersgd_rank", "powersgd_start_step"):
            if getattr(strategy, name) != getattr(DDP(), name):
                reason = f"is read by PowerSGD only; write strategy.comm_hook=powersgd, or leave it out (comm_hook={strategy.comm_hook})"
                yield Fault(f"strategy.{name}", reason), ("strategy.comm_hook",)


def _memory(cfg: Config) -> Faults:
    """What is traded for memory, and the moving average of weights."""
    memory, foreign = cfg.memory, isinstance(cfg.strategy, Foreign)
    if cfg.ema is not None and not cfg.ema.decay < 1:
        yield Fault("ema.decay", f"is the weight of the past, so below 1; got {cfg.ema.decay:g}"), ()
    if cfg.ema is not None and foreign:
        yield Fault("ema", f"the weights are in the hands of strategy={cfg.strategy.name}; write strategy=fsdp, or ema=null"), ("strategy",)
    if memory.offload == "optimizer" and foreign:
        yield Fault("memory.offload", f"optimizer, but strategy={cfg.strategy.name} owns its states; write strategy=zero1"), ("strategy",)
    if memory.recompute == "auto" and not memory.budget_gib:
        yield (
            Fault("memory.budget_gib", "required by memory.recompute=auto: GiB that activations may take on a rank"),
            ("memory.recompute",),
        )
    if memory.recompute == "auto" and memory.recompute_every > 1:
        yield Fault("memory.recompute_every", "auto decides which blocks are recomputed; leave it out"), ("memory.recompute",)
    if memory.recompute != "auto" and memory.budget_gib is not None:
        yield Fault("memory.budget_gib", f"is read by memory.recompute=auto only (it is {memory.recompute})"), ("memory.recompute",)
    if memory.recompute == "auto" and cfg.parallel.pp > 1:
        reason = "auto cannot count the micro-batches that a pipeline has in flight; write full or selective"
        yield Fault("memory.recompute", reason), ("parallel.pp",)
    if memory.recompute == "auto" and cfg.compile is not False:
        yield Fault("memory.recompute", "auto changes its mind while running, compiled code cannot; write full or selective"), ("compile",)
    if memory.activations == "offload" and memory.recompute in ("selective", "auto"):
        reason = f"offload, but memory.recompute={memory.recompute} keeps what is not forgotten on the device; write memory.recompute=full or none"
        yield Fault("memory.activations", reason), ("memory.recompute",)
    if cfg.trainer.update_in_backward:
        yield from _update_in_backward(cfg)
    if cfg.trainer.noise_scale is not None:
        yield from _noise_scale(cfg)
    if cfg.compile_fallback and cfg.compile is False:
        yield Fault("compile_fallback", "nothing is compiled; write compile=true, or leave it out"), ("compile",)


def _update_in_backward(cfg: Config) -> Faults:
    """What has to see all gradients before the first weight changes."""
    clips = [name for name in ("clip_norm", "clip_value", "clip_adaptive") if getattr(cfg.trainer, name) is not None]
    axis = next((axis for axis in ("pp", "tp", "cp", "ep") if getattr(cfg.parallel, axis) > 1), None)
    reasons = {
        **{f"trainer.{name}": f"clips by all gradients together; write trainer.{name}=null" for name in clips},
        "trainer.nonfinite": cfg.trainer.nonfinite != "raise" and f"{cfg.trainer.nonfinite} comes too late for the weights; write raise",
        "precision.name": cfg.precision.name == "16-mixed" and "float16 skips steps whose gradients overflow; write precision=bf16",
        "data.micro_batch_size": cfg.data.micro_batch_size == "auto" and "auto may need several micro-batches a step; write null",
        "memory.offload": cfg.memory.offload == "params" and "params update on the host; write none or optimizer",
        "strategy": isinstance(cfg.strategy, Foreign) and f"{cfg.strategy.name} updates the weights itself; write strategy=fsdp",
        f"parallel.{axis}": axis is not None and f"reduces gradients after backward; write parallel.{axis}=1",
    }
    for name, reason in reasons.items():
        if reason:
            yield Fault("trainer.update_in_backward", f"{name} {reason}, or trainer.update_in_backward=false"), (name,)


def _noise_scale(cfg: Config) -> Faults:
    """Where no rank has the whole gradient of a micro-batch."""
    options = cfg.trainer.noise_scale
    assert options is not None
    reasons: dict[str, str | bool] = {
        f"parallel.{axis}": getattr(cfg.parallel, axis) > 1 and f"parallel.{axis} shares a micro-batch out among ranks; write 1"
        for axis in ("tp", "cp", "pp", "ep")
    }
    reasons["strategy"] = isinstance(cfg.strategy, Foreign) and f"strategy={cfg.strategy.name} reduces gradients by itself; write fsdp"
    reasons["trainer.update_in_backward"] = cfg.trainer.update_in_backward and "trainer.update_in_backward frees gradients; write false"
    for key, reason in reasons.items():
        if reason:
            yield Fault("trainer.noise_scale", f"compares gradients of micro-batches, but {reason}, or trainer.noise_scale=null"), (key,)
    if not options.decay < 1:
        yield Fault("trainer.noise_scale.decay", f"is the weight of the past, so below 1; got {options.decay:g}"), ()


def _foreign(cfg: Config) -> Faults:
    """What the engines of other packages cannot do. Which of it depends on the device is found in `backends`."""
    strategy = cfg.strategy
    if not isinstance(strategy, Foreign):
        return
    name = cfg.strategy.name
    if cfg.parallel.pp > 1 and isinstance(strategy, DeepSpeed):
        if not isinstance(strategy, DeepSpeedZero1):
            reason = (
                f"{cfg.parallel.pp}, but DeepSpeed says 'ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism'; "
                f"write strategy=deepspeed_zero1 with it, or strategy=zero{name[-1]}, which shards under pp too"
            )
            yield Fault("parallel.pp", reason), ("strategy",)
        if cfg.pipeline.schedule != "1f1b":
            reason = f"{cfg.pipeline.schedule}, but strategy={name} runs DeepSpeed's own, which is 1f1b; write that, or strategy=zero1"
            yield Fault("pipeline.schedule", reason), ("strategy",)
    for axis in ("dp_replicate", "cp", "tp", "ep", *(["pp"] if isinstance(strategy, FairScale) else [])):
        if getattr(cfg.parallel, axis) not in (None, 1):
            reason = f"{getattr(cfg.parallel, axis)}, but strategy={name} has no such axis; write strategy=fsdp, or leave it out"
            yield Fault(f"parallel.{axis}", reason), ("strategy",)
    if cfg.precision.name == "64-true" and isinstance(strategy, DeepSpeed):
        reason = f"64-true, but strategy={name} keeps its master weights in float32; write precision=fp32, or strategy=zero{name[-1]}"
        yield Fault("precision.name", reason), ("strategy",)
    if cfg.data.micro_batch_size == "auto":
        reason = f"auto tries sizes by running steps that count for nothing, which strategy={name} cannot take back; write a number"
        yield Fault("data.micro_batch_size", reason), ("strategy",)
    if cfg.memory.init == "meta" and isinstance(strategy, DeepSpeedZero3):
        reason = f"meta, but strategy={name} takes weights from rank 0; write memory.init=constructor, or strategy=fsdp"
        yield Fault("memory.init", reason), ("strategy",)
    if cfg.memory.pretrained is not None and isinstance(strategy, DeepSpeedZero3):
        reason = f"strategy={name} does not read it; load the weights in the function that builds the model, or write strategy=fsdp"
        yield Fault("memory.pretrained", reason), ("strategy",)
    if cfg.trainer.loss_weights is not None:
        reason = f"strategy={name} was not taught several losses; write strategy=fsdp, or return one loss"
        yield Fault("trainer.loss_weights", reason), ("strategy",)
    for key in ("clip_value", "clip_adaptive"):
        if getattr(cfg.trainer, key) is not None:
            reason = f"strategy={name} clips by norm only; write trainer.clip_norm=..., or strategy=fsdp"
            yield Fault(f"trainer.{key}", reason), ("strategy",)
    if cfg.precision.fallback.policy != "off":
        reason = f"strategy={name} scales losses by itself; write precision.fallback.policy=off, or strategy=fsdp"
        yield Fault("precision.fallback.policy", reason), ("strategy",)
    if isinstance(strategy, DeepSpeed):
        places = {key: getattr(strategy, key, "none") for key in ("offload_optimizer", "offload_param")}
        for key, place in places.items():
            if place == "nvme" and strategy.nvme_path is None:
                yield Fault("strategy.nvme_path", f"required by strategy.{key}=nvme: a directory on a local drive"), (f"strategy.{key}",)
        mics = getattr(strategy, "mics_shard_size", None)
        if mics is not None:
            reason = (
                "DeepSpeed has no MiCS any more ('MiCS ZeRO-3 sharding has been removed'); "
                f"write strategy=hsdp parallel.dp_shard={mics}, which shards the same way"
            )
            yield Fault("strategy.mics_shard_size", reason), ()
        if places["offload_param"] != "none" and places["offload_optimizer"] == "none":
            reason = f"{places['offload_param']} needs the optimizer states there too; write strategy.offload_optimizer={places['offload_param']}"
            yield Fault("strategy.offload_param", reason), ("strategy.offload_optimizer",)


def _precision(cfg: Config) -> Faults:
    name, scale, fallback = cfg.precision.name, cfg.precision.loss_scale, cfg.precision.fallback
    if cfg.precision.fp8 is not None:
        if name != "bf16-mixed":
            reason = f"computes the rest in bfloat16, but precision.name={name}; write precision=fp8, or leave it out"
            yield Fault("precision.fp8", reason), ("precision.name",)
        if cfg.memory.init == "meta":
            reason = "replaces linear layers, whose own way to draw their values would be lost; write memory.init=constructor"
            yield Fault("precision.fp8", reason), ("memory.init",)
        if cfg.precision.fp8.all_gather:
            if not isinstance(cfg.strategy, Sharded) or cfg.memory.offload == "params" or cfg.parallel.pp > 1:
                reason = "gathers float8 weights, which sharded strategies do without memory.offload=params and parallel.pp; write strategy=fsdp, or false"
                yield Fault("precision.fp8.all_gather", reason), ("strategy", "memory.offload", "parallel.pp")
            if cfg.precision.fp8.recipe != "tensorwise":
                reason = f"one scale has to fit the whole weight, but precision.fp8.recipe={cfg.precision.fp8.recipe}; write tensorwise, or false"
                yield Fault("precision.fp8.all_gather", reason), ("precision.fp8.recipe",)
        if cfg.parallel.tp > 1:
            yield Fault("precision.fp8", "cannot be split over parallel.tp yet; write parallel.tp=1"), ("parallel.tp",)
    if cfg.precision.accumulate_dtype == "fp32":
        yield from _accumulate(cfg)
    if fallback.policy != "off":
        if name != "16-mixed":
            reason = (
                f"{fallback.policy}, but precision.name={name} has float32's range, or is float32; write precision=fp16, or leave it out"
            )
            yield Fault("precision.fallback.policy", reason), ("precision.name",)
        if cfg.parallel.pp > 1:
            yield Fault("precision.fallback.policy", "stages of a pipeline have other modules each; write parallel.pp=1"), ("parallel.pp",)
        if cfg.parallel.ep > 1:
            yield Fault("precision.fallback.policy", "ranks of ep have other experts each; write parallel.ep=1"), ("parallel.ep",)
        if fallback.policy != "monitor" and isinstance(cfg.strategy, Sharded) and cfg.strategy.param_dtype == "compute":
            reason = "modules that leave half need weights in float32, which strategy.param_dtype=compute does not gather; write master"
            yield Fault("precision.fallback.policy", reason), ("strategy.param_dtype",)
        if not fallback.low < fallback.high:
            yield Fault("precision.fallback.low", f"must be below high={fallback.high:g}, or modules would go to and fro"), ()
    if scale is None:
        if name == "16-mixed":
            reason = "required with 16-mixed, whose small gradients vanish without it; write precision=fp16"
            yield Fault("precision.loss_scale", reason), ("precision.name",)
        return
    if name != "16-mixed":
        reason = f"scales the loss for float16 compute, but precision.name={name}; leave it out, or write precision=fp16"
        yield Fault("precision.loss_scale", reason), ("precision.name",)
    if not 0 < scale.backoff_factor < 1:
        reason = f"must be between 0 and 1, to shrink the scale after an overflow; got {scale.backoff_factor:g}"
        yield Fault("precision.loss_scale.backoff_factor", reason), ()
    if not scale.min <= scale.init <= scale.max:
        reason = f"must lie between min={scale.min:g} and max={scale.max:g}; got {scale.init:g}"
        yield Fault("precision.loss_scale.init", reason), ("precision.loss_scale.min", "precision.loss_scale.max")


def _accumulate(cfg: Config) -> Faults:
    """Where gradients cannot have more bits than their weights, or need not."""
    strategy = cfg.strategy
    reasons = {
        "precision.name": cfg.precision.name != "bf16-true" and f"gradients of {cfg.precision.name} have 32 bits or more already",
        "precision.reduce_dtype": cfg.precision.reduce_dtype == "grad" and "grad would round them between micro-batches; write fp32",
        "strategy": isinstance(strategy, Foreign) and f"strategy={strategy.name} sums gradients by itself; write strategy=fsdp",
        "strategy.comm_hook": isinstance(strategy, DDP)
        and strategy.comm_hook != "none"
        and "hooks want gradients of the weights' dtype; write none",
        "parallel.ep": cfg.parallel.ep > 1 and "experts are reduced by themselves, which was not tried with it; write parallel.ep=1",
        "trainer.update_in_backward": cfg.trainer.update_in_backward and "there is one micro-batch a step, and nothing to add to",
    }
    for key, reason in reasons.items():
        if reason:
            yield Fault("precision.accumulate_dtype", f"fp32, but {reason}; or leave it out"), (key,)


def _data(cfg: Config) -> Faults:
    data = cfg.data
    if data.micro_batch_size == "auto":
        split = next((axis for axis in ("tp", "cp", "pp", "ep") if getattr(cfg.parallel, axis) > 1), None)
        if split:
            reason = f"auto tries sizes on each rank alone, which parallel.{split} does not allow; write a number"
            yield Fault("data.micro_batch_size", reason), (f"parallel.{split}",)
        if isinstance(cfg.strategy, Foreign):
            yield (
                Fault("data.micro_batch_size", f"auto, but strategy={cfg.strategy.name} is told it beforehand; write a number"),
                ("strategy",),
            )
        if isinstance(cfg.strategy, DDP) and cfg.strategy.static_graph:
            yield Fault("data.micro_batch_size", "auto changes the graph; write a number, or strategy.static_graph=false"), ("strategy",)
    elif data.micro_batch_size is not None and data.micro_batch_size > data.global_batch:
        reason = f"{data.micro_batch_size} samples cannot be taken from a global batch of {data.global_batch}; write at most that"
        yield Fault("data.micro_batch_size", reason), ("data.global_batch",)
    if isinstance(data, TextSource):
        if data.tokenizer == "byte" and data.vocab_size != 256:
            reason = f"{data.vocab_size}, but there are 256 bytes; write data.vocab_size=256 or data.tokenizer=bpe"
            yield Fault("data.vocab_size", reason), ("data.tokenizer",)
        if data.eval_fraction >= 1:
            yield Fault("data.eval_fraction", f"{data.eval_fraction:g} of the documents leaves none to train on; write less than 1"), ()
    if isinstance(data, TextData) and data.path in (None, "", []):
        yield Fault("data.path", "required: write data.path=FILE, a directory, a glob such as 'data/*.txt', or a list of them"), ()
    if isinstance(data, HFData) and not data.name:
        yield Fault("data.name", "required: write data.name=DIRECTORY, or the name of a data set on the hub"), ()
    if isinstance(data, CustomData) and data.train is None:
        yield Fault("data.train", "required: write data.train._target_=my_package.MyDataset and its arguments"), ()


def _schedule(cfg: Config) -> Faults:
    schedule, trainer = cfg.scheduler, cfg.trainer
    lengths = ("max_steps", "max_epochs", "max_tokens")
    stops = tuple(f"trainer.{name}" for name in lengths)
    total = schedule.total_steps if schedule.total_steps is not None else trainer.max_steps
    if schedule.name in ("linear", "cosine", "wsd") and total is None and all(getattr(trainer, name) is None for name in lengths):
        reason = (
            f"{schedule.name} needs to know where it ends; write scheduler.total_steps=..., or how long to train in steps, epochs "
            "or tokens (trainer.max_steps=...)"
        )
        yield Fault("scheduler.total_steps", reason), ("scheduler.name", *stops)
    if schedule.decay_steps is not None and schedule.name != "wsd":
        reason = f"is read by wsd only; write scheduler=wsd, or leave it out (scheduler.name={schedule.name})"
        yield Fault("scheduler.decay_steps", reason), ("scheduler.name",)
    if schedule.min_ratio > 1:
        yield Fault("scheduler.min_ratio", f"is a fraction of the peak learning rate, so at most 1; got {schedule.min_ratio:g}"), ()
    if total:
        where = "scheduler.total_steps" if schedule.total_steps is not None else "trainer.max_steps"
        decay = schedule.decay_steps or 0 if schedule.name == "wsd" else 0
        if schedule.warmup_steps > total:
            yield Fault("scheduler.warmup_steps", f"{schedule.warmup_steps} steps are more than {where}={total}"), (where,)
        elif schedule.warmup_steps + decay > total:
            reason = f"{decay} steps after {schedule.warmup_steps} of warmup are more than {where}={total}"
            yield Fault("scheduler.decay_steps", reason), ("scheduler.warmup_steps", where)
