"""DeepSpeed's own checkpoints, read and written without DeepSpeed; nothing in them is executed.

Read: what `engine.save_checkpoint` writes under ZeRO-1, 2 and 3, and the universal form that DeepSpeed's `ds_to_universal` makes of any
other. Each rank's file has flat pieces of the float32 masters and of every optimizer state, rank 0's model file the names and shapes in
their order. Stages 1 and 2 cut the whole group into equal pieces, stage 3 every parameter.

Written: the universal form, which names no rank and no stage: `zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from paratrain.checkpoint import state
from paratrain.checkpoint.manifest import CheckpointError
from paratrain.checkpoint.sources import PREFIX, unpickled

_SHARD = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_VERSION = "0.19.8"  # of the form that is written


class Run(NamedTuple):
    """What a DeepSpeed checkpoint tells of a run.

    Attributes:
        tensors: `model/<name>`, float32 where floating, and `optimizer/<parameter>/<key>`.
        steps, skipped: steps taken, and those of them that changed nothing.
        loss_scale: of float16; 1 otherwise.
    """

    tensors: dict[str, torch.Tensor]
    steps: int
    skipped: int
    loss_scale: float


class _Record:
    """Stands for a class of DeepSpeed's in its files: takes the attributes, has no code."""


_KNOWN = [
    (_Record, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Record, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Record, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def find(path: Path) -> Path | None:
    """The directory with the files of the checkpoint that `path` names: itself, or what its `latest` says. None: it is none."""
    if any(_MODEL.fullmatch(entry.name) for entry in _entries(path)):
        return path
    for name in ("latest", "latest_universal"):
        if (path / name).is_file():
            tag = (path / name).read_text().strip()
            inside = path / tag
            if Path(tag).name == tag and any(_MODEL.fullmatch(entry.name) for entry in _entries(inside)):
                return inside
    return None


def read(path: Path) -> Run:
    """The weights, optimizer states and counters of a checkpoint that `find` finds.

    Raises:
        CheckpointError: it is damaged, incomplete, split over more than data parallel ranks, or only running its code could read it.
    """
    directory = find(path)
    assert directory is not None
    try:
        return _read(directory)
    except CheckpointError:
        raise
    except Exception as error:  # a hostile pickle may hold anything where a number or tensor is expected
        raise CheckpointError(f"{directory}: not readable as a checkpoint of DeepSpeed ({type(error).__name__}: {error})") from None


def _read(directory: Path) -> Run:
    universal = (directory / "zero").is_dir()
    models, shards = _files(directory, _MODEL), _files(directory, _SHARD)
    if not universal and (any(mp for _, mp in (*models, *shards)) or any(directory.glob("layer_*"))):
        raise CheckpointError(
            f"{directory}: tensor- or pipeline-parallel ranks wrote it; merge them first: python -m deepspeed.checkpoint.ds_to_universal "
            "--input_folder ... --output_folder ..., and convert that"
        )
    model = unpickled(models[min(models)])
    tensors = {f"{PREFIX}{name}": _float(value) for name, value in model["module"].items() if isinstance(value, torch.Tensor)}
    scale = 1.0
    if universal:
        tensors |= _universal(directory / "zero")
    elif shards:
        ranks = [unpickled(shards[key], _KNOWN)["optimizer_state_dict"] for key in sorted(shards)]
        counts = ranks[0]["partition_count"]
        expected = max(counts) if isinstance(counts, list) else counts
        if sorted(rank for rank, _ in shards) != list(range(expected)):
            raise CheckpointError(f"{directory}: {expected} ranks wrote it, and there are {len(shards)} *_optim_states.pt files")
        scale = float(getattr(ranks[0]["loss_scaler"], "cur_scale", 1.0))
        tensors |= _stage_3(model, ranks, models) if int(ranks[0]["zero_stage"]) == 3 else _stages_1_and_2(model, ranks)
    for name, twin in (model.get("shared_params") or {}).items():
        tensors[f"{PREFIX}{name}"] = tensors[f"{PREFIX}{twin}"]
    return Run(tensors, int(model["global_steps"]), int(model["skipped_steps"]), scale)


def _stages_1_and_2(model: Mapping[str, Any], ranks: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    groups = [rank["single_partition_of_fp32_groups"] for rank in ranks]
    paddings = ranks[0].get("param_alignment_paddings")
    for number, shapes in enumerate(model["param_shapes"]):
        padding = paddings[number] if paddings else [0] * len(shapes)
        for key, parts in _fields(groups, [rank["base_optimizer_state"] for rank in ranks], number):
            whole, start = torch.cat([part.flatten() for part in parts]), 0
            for (name, shape), unused in zip(shapes.items(), padding, strict=True):
                found[key.format(name)] = whole.narrow(0, start, math.prod(shape)).view(tuple(shape)).float()
                start += math.prod(shape) + unused
        found |= _numbers(ranks[0]["base_optimizer_state"], number, shapes)
    return found


def _stage_3(model: Mapping[str, Any], ranks: list[Mapping[str, Any]], models: Mapping[tuple[int, int], Path]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    groups = [rank["fp32_flat_groups"] for rank in ranks]
    for number, shapes in enumerate(model["param_shapes"]):
        for key, parts in _fields(groups, [rank["optimizer_state_dict"] for rank in ranks], number):
            start = 0
            for name, shape in shapes.items():
                size = -(-math.prod(shape) // len(ranks))
                found[key.format(name)] = _joined([part.flatten().narrow(0, start, size) for part in parts], shape)
                start += size
        found |= _numbers(ranks[0]["optimizer_state_dict"], number, shapes)
    if frozen := model.get("frozen_param_shapes"):
        pieces = [unpickled(models[rank, 0])["frozen_param_fragments"] for rank in range(len(ranks))]
        found |= {f"{PREFIX}{name}": _joined([piece[name].flatten() for piece in pieces], shape) for name, shape in frozen.items()}
    return found


def _fields(groups: list[Any], states: list[Any], number: int) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """(the name of a tensor with {} for its parameter's, the flat piece of each rank) of the group `number`."""
    flat = [group[number] for group in groups]
    yield PREFIX + "{}", flat
    own = [_state(rank, number) for rank in states]
    for key, value in own[0].items():
        if isinstance(value, torch.Tensor) and value.ndim:
            if value.numel() < flat[0].numel():
                raise CheckpointError(f"the optimizer keeps {key!r} in another shape than the weights': it cannot be cut by parameter")
            yield f"{state.PREFIX}{{}}/{key}", [rank[key] for rank in own]


def _numbers(states: Any, number: int, shapes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What the optimizer counts for the whole group, for each of its parameters; some keep it in the group."""
    group = next(group for group in states["param_groups"] if _order(states)[number] in group["params"])
    own = _state(states, number)
    values = {key: value for key, value in own.items() if not isinstance(value, torch.Tensor) or not value.ndim}
    if own and "step" not in own and "step" in group:
        values["step"] = group["step"]
    return {
        f"{state.PREFIX}{name}/{key}": torch.tensor(float(value), dtype=torch.float32) for name in shapes for key, value in values.items()
    }


def _state(states: Any, number: int) -> dict[str, Any]:
    if not isinstance(states, dict):
        raise CheckpointError(
            "its optimizer states are in the elastic form, which DeepSpeed gave up; save again without elastic_checkpoint"
        )
    return states["state"].get(_order(states)[number], {})


def _order(states: Any) -> list[int]:
    return [index for group in states["param_groups"] for index in group["params"]]


def _joined(parts: list[torch.Tensor], shape: Any) -> torch.Tensor:
    return torch.cat(parts).narrow(0, 0, math.prod(shape)).view(tuple(shape)).float()


def _universal(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for folder in sorted(entry for entry in directory.iterdir() if entry.is_dir()):
        for file in sorted(folder.glob("*.pt")):
            saved = unpickled(file)
            value = saved["param"] if isinstance(saved, dict) else torch.tensor(float(saved), dtype=torch.float32)
            name = PREFIX + folder.name if file.stem == "fp32" else f"{state.PREFIX}{folder.name}/{file.stem}"
            found[name] = value.float()
    return found


def write(directory: Path, tensors: Mapping[str, torch.Tensor], steps: int, skipped: int) -> None:
    """Write a universal checkpoint of DeepSpeed's for any stage and number of ranks.

    Options of the optimizer's groups are left out, so that the program that loads it keeps its own.

    Args:
        tensors: as of `Run`.

    Raises:
        CheckpointError: there are no optimizer states, by which parameters are told from buffers.
    """
    weights = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(state.PREFIX):
            parameter, _, key = name.removeprefix(state.PREFIX).rpartition("/")
            states.setdefault(parameter, {})[key.partition("#")[0]] = value
    if not states:
        raise CheckpointError(
            "it has no optimizer states, which DeepSpeed asks for; write --to torch, and load_state_dict() before initialize()"
        )
    if odd := next((name for name in states if Path(name).name != name or name not in weights), None):
        raise CheckpointError(f"{odd!r} cannot be the name of a directory, or is no parameter of the model")
    tag = directory / f"global_step{steps}_universal"
    for parameter, kept in states.items():
        folder = tag / "zero" / parameter
        folder.mkdir(parents=True)
        torch.save({"param": _float(weights[parameter]), "cat_dim": 0}, folder / "fp32.pt")
        for key, value in kept.items():
            if value.ndim:
                torch.save({"param": _float(value), "cat_dim": 0}, folder / f"{key}.pt")
            else:
                torch.save(value, folder / f"{key}.pt")
    step = next(iter(states.values())).get("step", torch.tensor(float(steps - skipped)))
    options: list[dict[str, Any]] = [{} for _ in states]  # at least as many as there can be groups
    torch.save(
        {
            "ds_version": _VERSION,
            "param_groups": options,
            "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": options},  # what stage 3 looks at
        },
        tag / "zero" / "optimizer_state.pt",
    )
    model = {
        "module": weights,
        "buffer_names": [],
        "param_shapes": [{name: weights[name].shape for name in states}],
        "shared_params": {},
        "lr_scheduler": None,
        "global_steps": steps,
        "skipped_steps": skipped,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": _VERSION,
    }
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):  # stages 1 and 2 look for one, 3 for the other
        torch.save(model, tag / name)
    (directory / "latest_universal").write_text(tag.name)


def _float(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value


def _files(directory: Path, pattern: re.Pattern) -> dict[tuple[int, int], Path]:
    """(data parallel rank, model parallel rank) -> file."""
    matches = {entry: pattern.fullmatch(entry.name) for entry in _entries(directory)}
    return {(int(match[1] or 0), int(match[2])): entry for entry, match in matches.items() if match}


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []
