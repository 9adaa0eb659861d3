"""Composition: the YAML files agree with the schema, a user's directory extends them, and every fault is in one report."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
import yaml
from hydra._internal.utils import get_args_parser

from paratrain import config, schema
from paratrain._hydra import load_config
from paratrain._hydra.app import _arguments
from paratrain.errors import ConfigError, UserError

CONF = Path(__file__).parent.parent / "conf"
SECTIONS = {name for name, kind in schema.kinds(config.Config).items() if schema.variants(kind)}
DELIBERATE = {
    "strategy/deepspeed_zero1_offload": {"offload_optimizer"},
    "strategy/deepspeed_zero2_offload": {"offload_optimizer"},
    "strategy/deepspeed_zero3_offload": {"offload_optimizer", "offload_param"},
}  # what the choice is for


def files() -> list[str]:
    return sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.glob("*/*.yaml"))


def problems(overrides, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides, **kwargs)
    return caught.value.problems


def write(directory: Path, **texts: str) -> str:
    for name, text in texts.items():
        path = directory / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(directory)


def test_the_root_lists_every_key_of_the_top_level_and_every_group():
    root = yaml.safe_load((CONF / "paratrain.yaml").read_text())
    assert root["defaults"][-2:] == ["_self_", {"optional experiment": None}]  # an experiment may change what the root says
    groups = {name for entry in root.pop("defaults")[:-2] if isinstance(entry, dict) for name in entry}
    root.pop("hydra")
    assert groups == {path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("experiment", "__pycache__")}
    assert groups | set(root) == {field.name for field in dataclasses.fields(config.Config)}
    defaults = schema.to_dict(config.Config())
    assert root == {name: defaults[name] for name in root}


@pytest.mark.parametrize("name", [name for name in files() if name.split("/")[0] in SECTIONS])
def test_a_file_lists_every_key_with_its_default(name):
    given = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    if "defaults" in given:  # it says only what differs from the file it extends
        return
    group, choice = name.split("/")
    kinds = schema.variants(schema.kinds(config.Config)[group])
    tagged = {marker: kind for kind in kinds if (marker := schema.tag(kind))}
    cls = next((kind for (field, value), kind in tagged.items() if given[field] == value), kinds[0])
    defaults = schema.to_dict(cls())
    assert set(defaults) <= set(given)
    if tagged or choice == "default":  # the others are there to differ
        free = DELIBERATE.get(name, set())
        assert {key: given[key] for key in given if key not in free} == {key: defaults[key] for key in defaults if key not in free}


def test_float16_scales_with_the_defaults_of_the_schema():
    assert load_config(["precision=fp16"]).precision.loss_scale == config.LossScale()


@pytest.mark.parametrize("name", files())
def test_every_choice_composes(name):
    group, choice = name.split("/")
    needs = {
        **{f"scheduler/{name}": ["trainer.max_steps=10"] for name in ("cosine", "linear", "wsd")},
        "data/text": ["data.path=x"],
        "data/hf": ["data.name=x"],
        "data/custom": ["data.train._target_=builtins.list", "model.vocab_size=2", "model.seq_len=2"],
    }
    try:
        load_config([f"{group}={choice}", *needs.get(name, [])])
    except ConfigError as error:
        if all("which is not installed" in problem for problem in error.problems):
            pytest.skip(str(error))
        raise


def test_short_and_full_precision_names_are_the_same():
    for short, full in {"fp32": "32-true", "fp64": "64-true", "bf16": "bf16-mixed", "bf16_true": "bf16-true", "fp16": "16-mixed"}.items():
        cfg = load_config([f"precision={short}"])
        assert cfg.precision.name == full
        assert load_config([f"precision={full}"]) == cfg


def test_overrides_reach_keys_that_no_file_mentions():
    cfg = load_config(["optimizer.betas=[0.8,0.9]", "app.mine.depth=3", "callbacks.sum._target_=builtins.list", "strategy=single"])
    assert cfg.optimizer.args == {"betas": [0.8, 0.9]}
    assert cfg.app == {"mine": {"depth": 3}}
    assert cfg.callbacks == {"sum": {"_target_": "builtins.list"}}
    assert load_config(["~seed", "++trainer.max_steps=7"]).trainer.max_steps == 7


def test_every_kind_of_typo_in_one_report():
    found = problems(
        [
            "strategi=ddp",
            "strategy=dpd",
            "strategy.bucket=1",
            "precision=bf17",
            "trainer.max_setps=3",
            "seed=x",
            "foo",
            "~sed",
            "logger=null",
        ]
    )
    assert len(found) == 8
    report = "\n".join(found)
    for said in (
        "foo: no override, which is written key=value or group=choice",
        "strategi: there is no group and no key of that name; did you mean 'strategy'?",
        "strategy: there is no choice 'dpd'; did you mean 'ddp'?",
        "precision: there is no choice 'bf17'; did you mean 'bf16'?",
        "logger: there is no choice null (choices: default, tensorboard, wandb)",
        "sed: there is no group and no key of that name; did you mean 'seed'?",
        "trainer.max_setps: unknown key; did you mean 'max_steps'?",
        "seed: expected int; got 'x' (str)",
    ):
        assert said in report
    assert "hydra" not in report.lower()


def test_what_hydra_refuses_is_one_fault_among_others():
    found = problems(["+seed=4", "trainer.log_every=0", "~trainer.nothing", "seed=1,2"])
    assert [line.split(":")[0] for line in found] == ["+seed=4", "~trainer.nothing", "++seed=1,2", "trainer.log_every"]
    assert problems(["app.x=${nowhere}"])[0].startswith("app.x: Interpolation key 'nowhere' not found")


def test_a_directory_of_the_users_extends_every_group(tmp_path):
    directory = write(
        tmp_path,
        mine="defaults:\n  - strategy: quick\n  - model: tiny\n  - _self_\n  - optional experiment: null\nseed: 5\n",
        strategy__quick="defaults: [ddp]\nbucket_cap_mb: 1.5\n",
        model__tiny="_target_: torch.nn.Linear\nin_features: 2\nout_features: 3\n",
        experiment__big="# @package _global_\ndefaults:\n  - override /strategy: single\nseed: 6\n",
    )
    cfg = load_config([], "mine", directory)
    assert cfg.strategy == config.DDP(bucket_cap_mb=1.5)
    assert (cfg.seed, cfg.model) == (5, {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3})
    assert cfg.trainer == config.Trainer()  # sections that the root leaves out have their defaults
    cfg = load_config(["precision=fp16", "optimizer=sgd", "experiment=big"], "mine", directory)
    assert (cfg.precision.name, cfg.optimizer.args, cfg.strategy, cfg.seed) == ("16-mixed", {"momentum": 0.9}, config.Single(), 6)
    assert load_config(["strategy=quick"], config_dir=directory).strategy == config.DDP(bucket_cap_mb=1.5)  # the library's root
    assert "did you mean 'quick'?" in problems(["strategy=quik"], config_dir=directory)[0]


def test_a_file_named_like_the_librarys_file_that_it_extends(tmp_path):
    directory = write(tmp_path, strategy__ddp="defaults: [ddp]\nbucket_cap_mb: 1.0\n")
    found = problems(["strategy=ddp"], config_dir=directory)
    assert found == [
        "a configuration file includes itself; a file must not have the name of the library's file that it extends: strategy/ddp.yaml"
    ]


def test_an_override_that_hydra_would_drop_without_a_word_is_refused(tmp_path):
    directory = write(
        tmp_path,
        mine="defaults:\n  - paratrain\n  - override strategy: single\n  - _self_\n",
        experiment__big="# @package _global_\ndefaults:\n  - override /strategy: ddp\n",
    )
    assert load_config([], "mine", directory).strategy == config.Single()
    (found,) = problems(["experiment=big"], config_name="mine", config_dir=directory)
    assert found.startswith("strategy: overridden in two files")
    assert "mine: single" in found
    assert "experiment/big: ddp" in found
    assert load_config(["experiment=big", "strategy=ddp"], "mine", directory).strategy == config.DDP()


def test_a_root_or_directory_that_does_not_exist(tmp_path):
    directory = write(tmp_path, mine="seed: 1\n")
    assert "config_name: there is no mime.yaml; did you mean 'mine'?" in problems([], config_name="mime", config_dir=directory)[0]
    with pytest.raises(UserError, match="there is no such directory"):
        load_config([], config_dir=str(tmp_path / "nowhere"))


def test_hydras_own_values_can_be_used_and_its_state_is_left_alone(tmp_path):
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    directory = write(tmp_path, mine="logger: {wandb: {name: '${hydra:runtime.output_dir}'}}\nhydra: {run: {dir: some/where}}\n")
    assert load_config([], "mine", directory).logger.wandb.name == str(Path("some/where").absolute())
    assert HydraConfig.instance().cfg is None
    assert not GlobalHydra.instance().is_initialized()


def test_hydras_flags_are_understood_by_python_314s_argparse(monkeypatch):
    """It formats every help text as it is declared, and Hydra 1.3 declares one that is no text."""
    if not hasattr(argparse.ArgumentParser, "_check_help"):
        declare = argparse.ArgumentParser._add_action

        def check_help(parser, action):
            parser._get_formatter()._expand_help(action) if action.help else None

        def check_and_declare(parser, action):
            parser._check_help(action)
            return declare(parser, action)

        monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check_help, raising=False)
        monkeypatch.setattr(argparse.ArgumentParser, "_add_action", check_and_declare)
        with pytest.raises(TypeError):
            get_args_parser()
    assert _arguments().parse_intermixed_args(["a=1", "-m", "b=2"]).overrides == ["a=1", "b=2"]
