"""`python -m paratrain VERB ...`. Exit code 0: good; 1: a fault was found; 2: the user's mistake."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from paratrain.errors import UserError
from paratrain.suggest import did_you_mean


def _train(arguments: list[str]) -> int:
    """train what the configuration describes; for several processes: torchrun --nproc_per_node=N -m paratrain.train"""
    from paratrain.train import train

    sys.argv = ["paratrain train", *arguments]
    train()
    return 0


def _launch(arguments: list[str]) -> int:
    """torchrun, where a mistake ends with its message and exit code 2: launch --nproc_per_node=2 -m paratrain.train ..."""
    import signal

    from paratrain.faults import INTERRUPTED

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # until torchrun, whose import takes seconds, has handlers of its own
        signal.signal(number, lambda *_: os._exit(INTERRUPTED))
    from paratrain.launch import launch

    return launch(arguments)


def _sweep(arguments: list[str]) -> int:
    """a job for every combination: sweep --nproc_per_node=2 -m paratrain.train optimizer.lr=1e-3,3e-3"""
    from paratrain.launch import sweep

    return sweep(arguments)


def _config(arguments: list[str]) -> int:
    """print the checked configuration that overrides give, defaults included"""
    parser = argparse.ArgumentParser(prog="paratrain config", description=_config.__doc__)
    parser.add_argument("overrides", nargs="*", help="group=choice, key=value")
    parser.add_argument("--config-dir", help="a directory of your own configuration")
    parser.add_argument("--config-name", default="paratrain", help="root file in it")
    parser.add_argument("--deepspeed", type=int, metavar="RANKS", help="print DeepSpeed's JSON instead, for that many processes")
    asked = parser.parse_intermixed_args(arguments)
    import yaml

    from paratrain._hydra import load_config
    from paratrain.redact import redact
    from paratrain.schema import to_dict

    cfg = load_config(asked.overrides, asked.config_name, asked.config_dir)
    if asked.deepspeed is not None:
        import json

        from paratrain.backends.deepspeed_config import generate

        print(json.dumps(generate(cfg, asked.deepspeed), indent=2))
        return 0
    print(yaml.safe_dump(redact(to_dict(cfg)), sort_keys=False), end="")
    return 0


def _env(arguments: list[str]) -> int:
    """versions, devices and settings, for a bug report"""
    from paratrain.metrics import env

    argparse.ArgumentParser(prog="paratrain env", description=_env.__doc__).parse_args(arguments)
    print(env.text())
    return 0


def _verify(arguments: list[str]) -> int:
    """is the layout the same function as one process? verify strategy=ddp verify.ranks=4 ... (exit code 1: it is not)"""
    from paratrain.verify.cli import verify_main

    return verify_main(arguments)


def _convert(arguments: list[str]) -> int:
    """a checkpoint in another format: convert SRC DST --to safetensors|safetensors-sharded|hf|torch|dcp (weights), paratrain|deepspeed (all)"""
    from pathlib import Path

    import torch

    from paratrain.checkpoint.convert import FORMATS, RUNS, convert, convert_run

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    parser = argparse.ArgumentParser(prog="paratrain convert", description=_convert.__doc__)
    parser.add_argument(
        "source", type=Path, help="a checkpoint, a run, .safetensors, .pt, or a directory of Hugging Face, torch DCP or DeepSpeed"
    )
    parser.add_argument("target", type=Path, help="file or directory to write; it must not exist")
    parser.add_argument("--to", choices=(*FORMATS, *RUNS), required=True)
    parser.add_argument("--dtype", choices=dtypes, help="convert floating-point weights to this")
    parser.add_argument("--hf-config", type=Path, help="config.json of the Hugging Face model, where the source has none")
    asked = parser.parse_args(arguments)
    if asked.to in RUNS:
        if asked.dtype or asked.hf_config:
            parser.error(f"--dtype and --hf-config are for weights alone, --to {asked.to} keeps all of a run")
        names = convert_run(asked.source, asked.target, asked.to)
    else:
        names = convert(asked.source, asked.target, asked.to, dtypes.get(asked.dtype), asked.hf_config)
    print(f"{asked.target}: {len(names)} tensors")
    return 0


def _inspect(arguments: list[str]) -> int:
    """what a checkpoint holds, and whether it is damaged: inspect PATH [--quick]; or the blocks and experts of a model: inspect model=gpt"""
    from pathlib import Path

    parser = argparse.ArgumentParser(prog="paratrain inspect", description=_inspect.__doc__)
    parser.add_argument("subject", nargs="+", metavar="PATH|OVERRIDE", help="one checkpoint or file of weights; or group=choice, key=value")
    parser.add_argument("--quick", action="store_true", help="do not read and verify the data")
    parser.add_argument("--config-dir", help="a directory of your own configuration")
    parser.add_argument("--config-name", default="paratrain", help="root file in it")
    asked = parser.parse_intermixed_args(arguments)
    if all("=" in word and not Path(word).exists() for word in asked.subject):
        print(_blocks(asked.subject, asked.config_name, asked.config_dir))
        return 0
    from paratrain.checkpoint.convert import describe

    if len(asked.subject) > 1:
        raise UserError(f"inspect: one PATH at a time, got {' '.join(asked.subject)}")
    text, sound = describe(Path(asked.subject[0]), verify=not asked.quick)
    print(text)
    return 0 if sound else 1


def _blocks(overrides: list[str], config_name: str, config_dir: str | None) -> str:
    import torch

    from paratrain import build
    from paratrain._hydra import load_config
    from paratrain.metrics.flops import on_meta
    from paratrain.parallel import blocks, experts, freeze, materialise, pipeline, tensor

    cfg = load_config(overrides, config_name, config_dir)
    model = materialise.on_meta_if_possible(build.model_fn(cfg), cfg.seed, torch.device("cpu"))[0]
    freeze.apply(model, cfg.freeze)
    parts = [blocks.describe(model, cfg.memory.blocks)]
    if max(cfg.parallel.ep, cfg.parallel.tp) > 1:
        model = on_meta(model)  # what is shared stays shared
    if cfg.parallel.ep > 1:
        parts.append(experts.describe(model, cfg))
    if cfg.parallel.pp > 1:
        parts.append(pipeline.describe(model, cfg))
    if (plan := tensor.planned(model, cfg)) is not None:
        parts.append(tensor.describe(plan))
    return "\n".join(parts)


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "launch": _launch,
    "sweep": _sweep,
    "verify": _verify,
    "config": _config,
    "env": _env,
    "convert": _convert,
    "inspect": _inspect,
}


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("--help", "-h", "help"):
        print("usage: python -m paratrain VERB ...\n")
        for name, function in VERBS.items():
            print(f"  {name:8}{function.__doc__}")
        print("\npython -m paratrain VERB --help says more")
        return 0
    if verb not in VERBS:
        print(f"error: there is no verb {verb!r}{did_you_mean(verb, VERBS)} (verbs: {', '.join(VERBS)})", file=sys.stderr)
        return 2
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the console script, unlike `python -m`, does not look for the user's modules here
    try:
        return VERBS[verb](rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
