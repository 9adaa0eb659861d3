"""`python -m paratrain convert SRC DST --to FORMAT` and `inspect PATH`: weights between formats, and what a checkpoint holds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from paratrain.checkpoint import deepspeed, sources, state
from paratrain.checkpoint.directory import beside, check, read
from paratrain.checkpoint.manifest import DTYPE_NAMES, CheckpointError
from paratrain.checkpoint.storage import load, save
from paratrain.errors import UserError

FORMATS = ("safetensors", "safetensors-sharded", "hf", "torch", "dcp")
RUNS = ("paratrain", "deepspeed")
"""Formats that keep optimizer states and counters too, each made from the other."""
_SHARD = 5 << 30
_HF_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def convert(
    source: Path,
    target: Path,
    to: str,
    dtype: torch.dtype | None = None,
    hf_config: Path | None = None,
    shard_bytes: int = _SHARD,
) -> list[str]:
    """Write the weights of `source` to `target`, which must not exist; returns their names.

    Args:
        source: see `sources.kind`.
        to: one of `FORMATS`: `safetensors` and `torch` make a file, the others a directory.
        dtype: convert floating-point tensors to it; None keeps theirs.
        hf_config: config.json of the model, or the directory of it, where `source` has none.
        shard_bytes: most bytes in a file of `safetensors-sharded` and `hf`.

    Raises:
        UserError, CheckpointError: `source` cannot be read, or `target` not be written; names the file and the reason.
    """
    if os.path.lexists(target):
        raise UserError(f"{target} exists: it will not be replaced; delete it, or write elsewhere")
    tensors, config = sources.weights(source)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    temporary = beside(target, "tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if to == "hf":
            _write_hf(tensors, temporary, source, hf_config, config, shard_bytes)
        elif to == "safetensors-sharded":
            _write_sharded(tensors, temporary, shard_bytes)
        elif to == "safetensors":
            _write_file(tensors, temporary)
        elif to == "torch":
            torch.save(tensors, temporary)
        else:
            from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

            from paratrain.compat import dcp_save

            dcp_save(dict(tensors), FileSystemWriter(temporary), DefaultSavePlanner(), None)
        os.rename(temporary, target)
    except OSError as error:
        raise CheckpointError(f"{target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)
    return list(tensors)


def convert_run(source: Path, target: Path, to: str) -> list[str]:
    """Write the weights, optimizer states and counters of `source` to the directory `target`, which must not exist; returns the names.

    What the other program does not know stays behind: the data position, generators, averages of the weights, options of the optimizer.

    Args:
        source: a checkpoint of DeepSpeed's, or with `to=deepspeed` one of paratrain's.
        to: one of `RUNS`.

    Raises:
        UserError, CheckpointError: as `convert`.
    """
    if os.path.lexists(target):
        raise UserError(f"{target} exists: it will not be replaced; delete it, or write elsewhere")
    found = sources.kind(source)
    if found == to or found not in RUNS:
        raise UserError(
            f"{source}: holds {found}, and --to {to} takes a checkpoint of {next(run for run in RUNS if run != to)}, optimizer states included; "
            f"weights alone go to {', '.join(FORMATS)}"
        )
    if to == "paratrain":
        return _from_deepspeed(source, target)
    return _to_deepspeed(sources.own_directory(source), target)


def _from_deepspeed(source: Path, target: Path) -> list[str]:
    run = deepspeed.read(source)
    if not any(name.startswith(state.PREFIX) for name in run.tensors):
        raise CheckpointError(
            f"{source}: it has no optimizer states that could be read (stage 0 keeps them in another form); start from its weights instead: "
            "--to safetensors, then memory.pretrained=..."
        )
    counters: dict[str, Any] = {
        "global_step": run.steps,
        "updates": run.steps - run.skipped,
        "counted": 0.0,
        "unit": None,
        "scaler": {"scale": run.loss_scale, "good_steps": 0, "skipped": run.skipped},
        "fallback": None,
        "optimizers": [],
    }
    save(target, run.tensors, {"seed": None, "engine": counters, "extra": {}})
    return list(run.tensors)


def _to_deepspeed(source: Path, target: Path) -> list[str]:
    manifest = read(source)
    counters = manifest.meta.get("engine")
    if not isinstance(counters, dict) or not all(type(counters.get(key)) is int for key in ("global_step", "updates")):
        raise CheckpointError(f"{source}: it holds tensors, but not the state of a training run")
    tensors = {name: torch.empty(saved.shape, dtype=saved.dtype) for name, saved in manifest.tensors.items()}
    load(source, tensors)
    temporary = beside(target, "tmp")
    try:
        deepspeed.write(temporary, tensors, counters["global_step"], counters["global_step"] - counters["updates"])
        os.rename(temporary, target)
    except OSError as error:
        raise CheckpointError(f"{target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return list(tensors)


def _write_file(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode  # what the umask gives; safetensors makes files that only their owner can read
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(mode)


def _write_sharded(tensors: Mapping[str, torch.Tensor], directory: Path, shard_bytes: int) -> None:
    """model.safetensors, or model-00001-of-0000N.safetensors and an index, as Hugging Face names them."""
    directory.mkdir()
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return _write_file(tensors, directory / "model.safetensors")
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(shard, directory / file)
        placed |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return None


def _write_hf(
    tensors: Mapping[str, torch.Tensor], directory: Path, source: Path, given: Path | None, config: dict[str, Any] | None, shard_bytes: int
) -> None:
    if given is not None:
        config = sources._json(given / "config.json" if given.is_dir() else given)
    if config is None:
        raise UserError(
            f"{source}: it does not tell which Hugging Face model these weights are of; name its config.json: --hf-config FILE_OR_DIRECTORY"
        )
    adapters = [name for name in tensors if ".lora_" in name or name.startswith("base_model.model.")]
    if adapters:
        raise UserError(
            f"{source}: it holds adapters ({adapters[0]}), whose names no Hugging Face model has, so that one loaded from them would have random weights; "
            "merge them first (peft: merge_and_unload), or write --to safetensors and load them with peft.set_peft_model_state_dict"
        )
    _write_sharded(tensors, directory, shard_bytes)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for folder in (given, source):
        for name in _HF_FILES if folder is not None and folder.is_dir() else ():
            if (folder / name).is_file() and not (directory / name).exists():  # type: ignore[operator]
                shutil.copyfile(folder / name, directory / name)  # type: ignore[operator]


def describe(path: Path, verify: bool = True) -> tuple[str, bool]:
    """(what a checkpoint or file of weights holds, whether it is sound).

    Args:
        verify: read and verify every byte of a checkpoint of paratrain.
    """
    found = sources.kind(path)
    if found != "paratrain":
        tensors, _ = sources.weights(path)
        return f"{path}: weights ({found})\n{_table({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})}", True
    path = sources.own_directory(path)
    manifest = read(path)
    faults = check(path) if verify else []
    engine, extra, config = (manifest.meta.get(name) for name in ("engine", "extra", "config"))
    lines = [
        f"{path}: checkpoint of paratrain, {sum(file.size for file in manifest.files) / 2**20:.1f} MiB in {len(manifest.files)} data files"
    ]
    if isinstance(engine, dict):
        lines.append(f"step {engine.get('global_step')}, {engine.get('updates')} updates, {engine.get('counted')} tokens or samples, by "
                     f"{len(manifest.rank_meta)} ranks, seed {manifest.meta.get('seed')}")  # fmt: skip
    if isinstance(extra, dict) and isinstance(extra.get("metrics"), dict) and extra["metrics"]:
        lines.append(", ".join(f"{name} {value}" for name, value in extra["metrics"].items()))
    if isinstance(config, dict):
        chosen = {name: config[name].get("name") or config[name].get("_target_") for name in ("strategy", "precision", "optimizer", "model")
                  if isinstance(config.get(name), dict)}  # fmt: skip
        lines.append(", ".join(f"{name} {value}" for name, value in chosen.items()))
    lines.append(_table({name: (saved.shape, saved.dtype) for name, saved in manifest.tensors.items()}))
    lines += [f"DAMAGED {fault}" for fault in faults]
    if verify and not faults:
        lines.append("every byte is as it was written")
    return "\n".join(lines), not faults


def _table(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    rows = [f"  {name:60} {DTYPE_NAMES.get(dtype, str(dtype)):>9} {list(shape)}" for name, (shape, dtype) in tensors.items()]
    return "\n".join([f"{len(rows)} tensors", *rows])
