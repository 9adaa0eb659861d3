"""`python -m paratrain verify [--json] [--html FILE] [group=choice ...] [key=value ...]`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from paratrain.config import Config
from paratrain.errors import UserError
from paratrain.schema import Target

_DEPTH = ("layers", "num_hidden_layers", "n_layer", "num_layers")


def verify_main(arguments: list[str]) -> int:
    """is the layout the same function as one process? verify strategy=ddp model=gpt data=synthetic verify.ranks=4"""
    parser = argparse.ArgumentParser(prog="paratrain verify", description=verify_main.__doc__)
    parser.add_argument("overrides", nargs="*", help="group=choice, key=value; verify.ranks, verify.steps, verify.dtype, verify.layers")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--html", metavar="FILE", help="write the report as a page, too")
    parser.add_argument("--config-dir", help="a directory of your own configuration")
    parser.add_argument("--config-name", default="paratrain", help="root file in it")
    asked = parser.parse_intermixed_args(arguments)
    from paratrain import build, data
    from paratrain._hydra import load_config
    from paratrain.verify.core import verify

    cfg = cut(load_config(asked.overrides, asked.config_name, asked.config_dir))
    report = verify(build.model_fn(cfg), build.loss_fn(cfg), lambda: data.build(cfg.data, cfg.seed)[0], cfg)
    if asked.html:
        try:
            Path(asked.html).write_text(report.to_html(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--html {asked.html}: cannot write there ({error.strerror})") from None
    print(report.to_json() if asked.json else report.text())
    return 3 if report.unproven else 0 if report.ok else 1


def cut(cfg: Config) -> Config:
    """`cfg` with its model cut to `verify.layers` layers.

    Raises:
        UserError: the model section has no argument that says how many layers there are.
    """
    layers = cfg.verify.layers
    if layers is None:
        return cfg
    model = cfg.model or Target()
    named = next((name for name in _DEPTH if name in model), None)
    if named is None:
        raise UserError(
            f"verify.layers={layers}: the model section has none of the arguments {', '.join(_DEPTH)}, so its depth cannot be cut; "
            "leave verify.layers out, or give the model's own argument for its depth on the command line"
        )
    return dataclasses.replace(
        cfg, model=Target({**model, named: min(layers, model[named])}), verify=dataclasses.replace(cfg.verify, layers=None)
    )
