"""The schema: what is accepted, what each fault says, and that all of them are said at once."""

from __future__ import annotations

import dataclasses

import pytest

from paratrain import config, schema
from paratrain.config import Config, check, from_dict
from paratrain.durations import parse_duration
from paratrain.errors import ConfigError, UserError


def problems(data: dict, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_dict(data, **kwargs)
    return caught.value.problems


def test_nothing_gives_the_defaults():
    assert from_dict({}) == Config()


@pytest.mark.parametrize(
    ("section", "key", "given", "stored"),
    [
        ("trainer", "max_steps", 1e3, 1000),
        ("trainer", "max_steps", "1e3", 1000),
        ("optimizer", "lr", "1e-3", 1e-3),
        ("optimizer", "lr", 1, 1.0),
        ("trainer", "eval_every", 500, "500"),
        ("trainer", "eval_every", "10Mtok", "10Mtok"),
        ("trainer", "clip_norm", None, None),
        ("data", "cache_dir", 2024, "2024"),
    ],
)
def test_values_are_converted_only_where_nothing_is_lost(section, key, given, stored):
    value = getattr(getattr(from_dict({section: {key: given}}), section), key)
    assert value == stored
    assert type(value) is type(stored)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"seed": 1.5}, "seed: expected int; got 1.5 (float)"),
        ({"seed": True}, "seed: expected int; got true"),
        ({"seed": "5"}, "seed: expected int; got '5' (str)"),
        ({"seed": None}, "seed: expected int; got null"),
        ({"seed": -1}, "seed: must be at least 0; got -1"),
        ({"seed": "???"}, "seed: required: write seed=..."),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr: expected float; got nan (float)"),
        ({"trainer": {"deterministic": 1}}, "trainer.deterministic: expected true or false; got 1 (int)"),
        ({"trainer": {"deterministic": "true"}}, "trainer.deterministic: expected true or false; got 'true' (str)"),
        ({"trainer": None}, "trainer: expected a section of keys; got null"),
        ({"trainer": {"clip_norm": "a"}}, "trainer.clip_norm: expected float; got 'a' (str)"),
        ({"trainer": {"max_setps": 1}}, "trainer.max_setps: unknown key; did you mean 'max_steps'?"),
        ({"trainer": {"eval_every": "10Mtk"}}, "trainer.eval_every: '10Mtk' has the unknown unit 'Mtk'; did you mean 'Mtok'?"),
        ({"trainer": {"max_time": 90}}, "trainer.max_time: '90' is no span of time; write 90s"),
        ({"strategi": {}}, "strategi: unknown key; did you mean 'strategy'?"),
        ({"strategy": {"name": "dpd"}}, "strategy.name: expected one of single, ddp"),
        ({"strategy": {"name": "single", "bucket_cap_mb": 5}}, "strategy.bucket_cap_mb: no key of name=single; it belongs to"),
        ({"data": {"source": "text", "path": [1.5]}}, "data.path.0: expected str; got 1.5 (float)"),
        ({"logger": {"sinks": ["consol"]}}, "logger.sinks.0: expected one of console, jsonl, csv, tensorboard, wandb"),
        ({"optimizer": {"groups": [{"lr": 1}]}}, "optimizer.groups.0.match: required: write optimizer.groups.0.match=..."),
        ({"callbacks": {"mine": {"x": 1}}}, "callbacks.mine._target_: required: the dotted path"),
        ({"model": {"_target_": "a.B", "dim": "???"}}, "model.dim: required: write model.dim=..."),
        ({"parallel": {"sp": True}}, "parallel.sp: is read under tensor parallelism only; write parallel.tp=2"),
        ({"parallel": {"dp_replicate": 0}}, "parallel.dp_replicate: 0 ranks cannot train"),
        ({"parallel": {"dp_shard": 2}}, "parallel.dp_shard: 2, but strategy=ddp shards nothing"),
        ({"strategy": {"name": "single"}, "parallel": {"dp_replicate": 2}}, "parallel.dp_replicate: 2, but strategy=single is one process"),
        ({"strategy": {"powersgd_rank": 4}}, "strategy.powersgd_rank: is read by PowerSGD only"),
        ({"precision": {"name": "16-mixed"}}, "precision.loss_scale: required with 16-mixed"),
        ({"precision": {"loss_scale": {}}}, "precision.loss_scale: scales the loss for float16 compute, but precision.name=32-true"),
        ({"precision": {"name": "16-mixed", "loss_scale": {"init": 0.5}}}, "precision.loss_scale.init: must lie between min=1"),
        ({"precision": {"name": "16-mixed", "loss_scale": {"backoff_factor": 2}}}, "precision.loss_scale.backoff_factor: must be between"),
        ({"data": {"global_batch": 2, "micro_batch_size": 4}}, "data.micro_batch_size: 4 samples cannot be taken from a global batch of 2"),
        ({"data": {"vocab_size": 300}}, "data.vocab_size: 300, but there are 256 bytes"),
        ({"data": {"source": "text"}}, "data.path: required"),
        ({"data": {"source": "hf"}}, "data.name: required"),
        ({"data": {"source": "custom"}}, "data.train: required"),
        ({"scheduler": {"name": "cosine"}}, "scheduler.total_steps: cosine needs to know where it ends"),
        ({"scheduler": {"name": "wsd"}, "trainer": {"max_time": "1h"}}, "scheduler.total_steps: wsd needs to know where it ends"),
        ({"scheduler": {"warmup_steps": 20}, "trainer": {"max_steps": 10}}, "scheduler.warmup_steps: 20 steps are more than trainer.max_steps=10"),
        ({"scheduler": {"decay_steps": 2}}, "scheduler.decay_steps: is read by wsd only"),
        (
            {"scheduler": {"name": "wsd", "warmup_steps": 5, "decay_steps": 6, "total_steps": 10}},
            "scheduler.decay_steps: 6 steps after 5 of warmup are more than scheduler.total_steps=10",
        ),
    ],
)  # fmt: skip
def test_a_fault_names_its_key_value_and_reason(data, said):
    found = problems(data)
    assert len(found) == 1, found
    assert found[0].startswith(said)


def test_all_faults_come_in_one_report():
    found = problems(
        {"seed": "x", "trainer": {"max_setps": 1, "log_every": 0}, "precision": {"name": "16-mixed"}, "data": {"source": "text"}}
    )
    assert [line.split(":")[0] for line in found] == ["seed", "trainer.max_setps", "trainer.log_every", "precision.loss_scale", "data.path"]


def test_a_faulty_value_draws_no_second_complaint_from_the_combinations():
    """total_steps could not be read, so nobody knows that the schedule has no end."""
    assert len(problems({"scheduler": {"name": "cosine", "total_steps": "many"}})) == 1
    assert len(problems({"precision": {"name": "fp17", "loss_scale": {}}})) == 1


@pytest.mark.parametrize("trainer", [{"max_steps": 10}, {"max_epochs": 0.5}, {"max_tokens": 1e6}])
def test_a_schedule_may_end_with_training(trainer):
    from_dict({"scheduler": {"name": "cosine"}, "trainer": trainer})


def test_imported_targets_are_checked_with_their_arguments():
    data = {
        "model": {"_target_": "torch.nn.Linear", "in_feature": 3, "out_features": 2, "bias": {"_target_": "collections.OrderedDic"}},
        "optimizer": {"_target_": "torch.optim.SGD", "momentun": 0.9, "groups": [{"match": "*", "_target_": "torch.optim.Adamm", "lr": 1}]},
        "loss": {"_target_": "torch.nn.functional.cross_entropy", "label_smoothin": 0.1},
        "callbacks": {"mine": {"_target_": "nowhere_at_all.Mine"}},
    }
    from_dict(data)  # nothing is imported unless asked
    found = "\n".join(problems(data, targets=True))
    for said in (
        "model.in_feature: torch.nn.Linear takes no such argument; did you mean 'in_features'?",
        "model.in_features: required by torch.nn.Linear",
        "model.bias._target_: 'collections.OrderedDic': collections has no 'OrderedDic'; did you mean 'OrderedDict'?",
        "optimizer.momentun: torch.optim.SGD takes no such argument; did you mean 'momentum'?",
        "optimizer.groups.0._target_: 'torch.optim.Adamm': torch.optim has no 'Adamm'; did you mean 'Adam'?",
        "loss.label_smoothin: torch.nn.functional.cross_entropy takes no such argument; did you mean 'label_smoothing'?",
        "callbacks.mine._target_: 'nowhere_at_all.Mine': there is no module 'nowhere_at_all'",
    ):
        assert said in found
    assert len(found.splitlines()) == 7


def test_a_configuration_built_in_python_is_checked_alike():
    assert check(Config(optimizer=config.Optimizer(lr=1, args={"betas": [0.8, 0.9]}))).optimizer.lr == 1.0
    faulty = Config(trainer=config.Trainer(log_every=0, max_steps="many"), parallel=config.Parallel(sp=True))
    with pytest.raises(ConfigError, match=r"3 problems") as caught:
        check(faulty)
    assert [line.split(":")[0] for line in caught.value.problems] == ["trainer.max_steps", "trainer.log_every", "parallel.sp"]


def test_to_dict_and_from_dict_are_inverse():
    cfg = from_dict(
        {
            "strategy": {"name": "single"},
            "precision": {"name": "16-mixed", "loss_scale": {"init": 4}},
            "data": {"source": "text", "path": ["a", "b"]},
            "optimizer": {"_target_": "my.Opt", "betas": [1, {"deep": 2}], "groups": [{"match": ["*.bias"], "lr": 2, "eps": 1}]},
            "model": {"_target_": "my.Net", "inner": {"_target_": "my.Block", "n": 1}},
            "app": {"anything": [1, {"x": None}]},
        }
    )
    data = schema.to_dict(cfg)
    assert from_dict(data) == cfg
    assert data["optimizer"]["_target_"] == "my.Opt"
    assert data["optimizer"]["betas"] == [1, {"deep": 2}]
    assert data["optimizer"]["groups"][0] == {"match": ["*.bias"], "lr": 2, "eps": 1}


def test_no_default_is_shared_between_configurations():
    assert from_dict({}).logger.sinks is not from_dict({}).logger.sinks
    given = {"app": {"list": []}}
    assert from_dict(given).app["list"] is not given["app"]["list"]


def test_every_key_is_documented():
    def undocumented(cls, prefix):
        for field in dataclasses.fields(cls):
            if not field.metadata.get("doc"):
                yield f"{prefix}{field.name}"
            for section in schema.variants(schema.kinds(cls)[field.name]):
                yield from undocumented(section, f"{prefix}{field.name}.")

    assert list(undocumented(Config, "")) == []


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [("500", 500, "steps"), ("1e3", 1000, "steps"), ("1.5ep", 1.5, "epochs"), ("10Mtok", 10_000_000, "tokens"), ("1 ktok", 1000, "tokens"),
     ("10min", 600, "seconds"), ("12h", 43200, "seconds"), ("2d", 172800, "seconds"), ("1_000steps", 1000, "steps")],
)  # fmt: skip
def test_durations(text, value, unit):
    assert parse_duration(text) == (value, unit)


@pytest.mark.parametrize("text", ["", "ten", "0", "-5", "1.5", "5 weeks", "1.0000001tok", "1e400s"])
def test_what_is_no_duration(text):
    with pytest.raises(UserError):
        parse_duration(text)
