"""DeepSpeed's JSON from our configuration, and the user's own on top of it, without contradictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paratrain.config import Config, DeepSpeed, DeepSpeedZero2, DeepSpeedZero3
from paratrain.errors import ConfigError
from paratrain.parallel.pipeline_schedule import micro_batch_size

_OURS = {  # DeepSpeed's key -> ours that says the same
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.micro_batch_size",
    "gradient_accumulation_steps": "data.micro_batch_size and data.global_batch",
    "gradient_clipping": "trainer.clip_norm",
    "communication_data_type": "precision.reduce_dtype",
    "fp16": "precision",
    "bf16": "precision",
    "torch_autocast": "precision",
    "zero_optimization.stage": "strategy",
    "zero_optimization.reduce_bucket_size": "strategy.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size": "strategy.allgather_bucket_size",
    "zero_optimization.overlap_comm": "strategy.overlap_comm",
    "zero_optimization.offload_optimizer": "strategy.offload_optimizer",
    "zero_optimization.offload_param": "strategy.offload_param",
    "zero_optimization.stage3_prefetch_bucket_size": "strategy.prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold": "strategy.param_persistence_threshold",
    "zero_optimization.stage3_max_live_parameters": "strategy.max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance": "strategy.max_reuse_distance",
    "zero_optimization.zero_hpz_partition_size": "strategy.hpz_partition_size",
    "zero_optimization.zero_quantized_weights": "strategy.quantized_weights",
    "zero_optimization.zero_quantized_gradients": "strategy.quantized_gradients",
    "zero_optimization.mics_shard_size": "strategy.mics_shard_size",
}
_ELSEWHERE = {  # what DeepSpeed can be told to do and we do
    "optimizer": "optimizer=...",
    "scheduler": "scheduler=...",
    "activation_checkpointing": "memory.recompute=...",
    "tensorboard": "logger.sinks=[tensorboard]",
    "wandb": "logger.sinks=[wandb]",
    "csv_monitor": "logger.sinks=[csv]",
    "data_efficiency": "data=...",
    "curriculum_learning": "data=...",
    "pipeline": "parallel.pp=...",
    "tensor_parallel": "parallel.tp=...",
    "checkpoint": "checkpoint.*",
}


_WRONG = {  # what DeepSpeed accepts and then gets wrong
    "zero_optimization.round_robin_gradients": "DeepSpeed 0.19.8 then gathers parameters from the wrong places, so checkpoints would be wrong"
}


def generate(cfg: Config, ranks: int) -> dict[str, Any]:
    """The JSON that `deepspeed.initialize` gets for `cfg` on `ranks` processes.

    Raises:
        ConfigError: `strategy.ds_config` contradicts the configuration; names both sides of each contradiction.
    """
    options = cfg.strategy
    if not isinstance(options, DeepSpeed):
        raise ConfigError([f"strategy: {options.name} is not DeepSpeed's; write strategy=deepspeed_zero1, 2 or 3"])
    made = _generated(cfg, options, ranks)
    faults = list(_conflicts(made, options.ds_config, ""))
    if faults:
        raise ConfigError(faults)
    return _merged(made, options.ds_config)


def _generated(cfg: Config, options: DeepSpeed, ranks: int) -> dict[str, Any]:
    stages = cfg.parallel.pp
    ranks //= stages  # of data
    share = -(-cfg.data.global_batch // ranks)
    asked = cfg.data.micro_batch_size
    if stages > 1 and asked is None:
        asked = micro_batch_size(cfg, share)
    micro = min(asked, share) if isinstance(asked, int) else share
    accumulation = -(-share // micro)
    name = cfg.precision.name
    made: dict[str, Any] = {
        # DeepSpeed reads these for its own reports only: accumulation, the division by the count and the loss scale are the engine's
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * ranks,
        "managed_gradient_accumulation": stages > 1,  # its pipeline insists
        "gradient_clipping": cfg.trainer.clip_norm or 0.0,
        "zero_optimization": _zero(options),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if name == "bf16-true":
        made["bf16"] = {"enabled": True, "check_grad_overflow": True}
    elif name == "16-mixed":
        made["fp16"] = {"enabled": True, "loss_scale": 1.0}
    elif name == "bf16-mixed":
        made["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if name in ("bf16-true", "16-mixed") and cfg.precision.reduce_dtype == "fp32":
        made["communication_data_type"] = "fp32"
    return made


def _zero(options: DeepSpeed) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": int(options.name[-1]),  # type: ignore[attr-defined]
        "contiguous_gradients": True,
        "reduce_bucket_size": options.reduce_bucket_size,
        "allgather_bucket_size": options.allgather_bucket_size,
        "overlap_comm": isinstance(options, DeepSpeedZero2) and options.overlap_comm,
    }
    if options.offload_optimizer != "none":
        zero["offload_optimizer"] = _place(options.offload_optimizer, options)
    if isinstance(options, DeepSpeedZero3):
        if options.offload_param != "none":
            zero["offload_param"] = _place(options.offload_param, options)
        zero |= {
            "stage3_prefetch_bucket_size": options.prefetch_bucket_size,
            "stage3_param_persistence_threshold": options.param_persistence_threshold,
            "stage3_max_live_parameters": options.max_live_parameters,
            "stage3_max_reuse_distance": options.max_reuse_distance,
            "zero_hpz_partition_size": options.hpz_partition_size,
            "zero_quantized_weights": options.quantized_weights,
            "zero_quantized_gradients": options.quantized_gradients,
        }
    return zero


def _place(where: str, options: DeepSpeed) -> dict[str, Any]:
    return {"device": where, "pin_memory": options.pin_memory} | ({"nvme_path": options.nvme_path} if where == "nvme" else {})


def _conflicts(made: Mapping[str, Any], asked: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in asked.items():
        path = f"{prefix}{key}"
        mine = made.get(key)
        ours = _OURS.get(path)
        if not prefix and key in _ELSEWHERE:
            yield f"strategy.ds_config.{path}: is the engine's here; leave it out, and write {_ELSEWHERE[key]}"
        elif path in _WRONG and value:
            yield f"strategy.ds_config.{path}: {value}: {_WRONG[path]}; leave it out"
        elif isinstance(mine, Mapping) and isinstance(value, Mapping):
            yield from _conflicts(mine, value, f"{path}.")
        elif value == "auto" or (key in made and mine == value):
            continue
        elif key in made and ours:
            yield f"strategy.ds_config.{path}: {value}, but {ours} makes it {mine}; leave it out of ds_config, or change {ours}"
        elif key in made:
            yield f"strategy.ds_config.{path}: {value}, but paratrain's engine needs {mine}; leave it out"
        elif ours and value not in (None, False, {"enabled": False}):
            yield f"strategy.ds_config.{path}: {value}, but {ours} leaves it out; leave it out of ds_config, or change {ours}"


def _merged(made: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(made)
    for key, value in asked.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merged(result[key], value)
        elif not (value == "auto" and key in result):
            result[key] = value
    return {key: value for key, value in result.items() if value != "auto"}
