"""What cannot work is refused before the first step; what can, starts; and what was trained is what the records say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import LENGTH, VOCAB, Tiny, token_loss
from torch import nn

import paratrain as pt
from paratrain.callbacks import Callback, SampleText
from paratrain.checkpoint.convert import convert
from paratrain.config import Checkpoint, Config, Logger, Optimizer, Precision, Scheduler, SyntheticData
from paratrain.config import Trainer as TrainerConfig
from paratrain.errors import UserError
from paratrain.trainer import Trainer


class Tokens:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        tokens = torch.arange(LENGTH + 1) * (index + 1) % VOCAB
        return tokens[:-1], tokens[1:]


def config(directory: Path, trainer=None, **sections) -> Config:
    base = Config(
        output_dir=str(directory),
        precision=Precision("64-true"),
        data=SyntheticData(global_batch=4),
        trainer=TrainerConfig(**{"max_steps": 2, "log_every": 1, "device": "cpu", **(trainer or {})}),
        logger=Logger(sinks=["jsonl", "csv"]),
    )
    return replace(base, **sections)


def job(directory: Path, *, eval_data=None, callbacks=(), model=Tiny, **sections) -> Trainer:
    return Trainer(config(directory, **sections), model, token_loss, Tokens(), eval_data, callbacks)


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
def test_schedules_end_with_the_last_epoch(shape, tmp_path):
    metrics = job(tmp_path, trainer={"max_steps": None, "max_epochs": 2}, scheduler=Scheduler(shape)).fit()
    rates = [json.loads(line)["train/lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rates) == 4
    assert rates[0] > rates[3] >= 0
    assert metrics["train/lr"] == rates[3]


def test_a_schedule_without_an_end_is_refused():
    cfg = replace(config(Path("."), trainer={"max_steps": None}), scheduler=Scheduler("cosine"))
    engine = pt.setup(Tiny, token_loss, cfg)
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    with pytest.raises(UserError, match=r"scheduler=cosine decays to the end of training, .* scheduler.total_steps"):
        engine.train_step(engine.local((tokens, tokens)))


def test_what_needs_evaluation_data(tmp_path):
    with pytest.raises(UserError, match=r"trainer.eval_every=1 without evaluation data; pass eval_data"):
        job(tmp_path, trainer={"eval_every": "1"})
    with pytest.raises(UserError, match=r"checkpoint.best=eval/loss without evaluation data"):
        job(tmp_path, checkpoint=Checkpoint(best="eval/loss"))


def test_a_callback_that_cannot_work_says_so_before_the_first_step(tmp_path):
    trainer = job(tmp_path, callbacks=[SampleText()])
    with pytest.raises(UserError, match=r"SampleText needs text, but data.source=synthetic has no tokenizer"):
        trainer.fit()
    assert trainer.engine.global_step == 0


def test_a_run_that_is_over_returns_its_metrics(tmp_path):
    first = job(tmp_path, eval_data=Tokens()).fit()
    again = job(tmp_path, eval_data=Tokens(), resume="auto").fit()
    assert again == {name: value for name, value in first.items() if name in again}
    assert {"train/loss", "eval/loss", "train/lr"} <= set(again)


class Logs(Callback):
    def on_log(self, trainer, metrics):
        metrics["mine/one"] = torch.tensor(1.5)
        metrics["mine/text"] = "a text"
        metrics["mine/histogram"] = torch.arange(3.0)


def test_what_is_no_number_does_not_take_the_row_with_it(tmp_path):
    job(tmp_path, callbacks=[Logs()]).fit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["mine/one"] for row in rows] == [1.5, 1.5]
    assert all("train/loss" in row and "mine/text" not in row for row in rows)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


def test_records_name_what_python_gave(tmp_path):
    record = job(tmp_path)._record
    assert record["model"] == {"_target_": "reference.Tiny"}
    assert record["loss"] == {"_target_": "reference.token_loss"}
    assert record["data"]["train"] == {"_target_": f"{__name__}.Tokens"}
    assert "seq_len" not in record["data"]


class NeedsRate(torch.optim.SGD):
    def __init__(self, params, lr, gain):
        super().__init__(params, lr=lr * gain)


def test_an_optimizer_whose_rate_is_required(tmp_path):
    optimizer = Optimizer(target=f"{__name__}.NeedsRate", lr=0.5, args={"gain": 1.0})
    trainer = job(tmp_path, optimizer=optimizer)
    assert trainer.fit()["train/lr"] == 0.5


# ---------------------------------------------------------------- Hugging Face


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    sizes = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def adapted():
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    return peft.get_peft_model(llama(), options)


def logits_loss(outputs, targets):
    return token_loss(outputs.logits, targets)


def test_adapters_around_pretrained_weights(tmp_path):
    base = llama()
    with torch.no_grad():
        for param in base.parameters():
            param.add_(1.0)
    base.save_pretrained(tmp_path / "base")
    cfg = replace(config(tmp_path), memory=replace(Config().memory, pretrained=str(tmp_path / "base")))
    engine = pt.setup(adapted, logits_loss, cfg)
    state, plain = engine.full_state_dict(), base.state_dict()
    name = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(state[f"base_model.model.{name}.base_layer.weight"].float(), plain[f"{name}.weight"])
    torch.testing.assert_close(state["base_model.model.lm_head.modules_to_save.default.weight"].float(), plain["lm_head.weight"])
    assert not torch.equal(state[f"base_model.model.{name}.lora_B.default.weight"], torch.zeros(16, 2, dtype=torch.float64))


def test_adapters_are_not_converted_into_a_random_model(tmp_path):
    engine = pt.setup(adapted, logits_loss, config(tmp_path))
    engine.save(tmp_path / "saved")
    with pytest.raises(UserError, match=r"it holds adapters \(.*merge_and_unload"):
        convert(tmp_path / "saved", tmp_path / "out", "hf")


def test_the_class_is_the_users_own_under_sharding(tmp_path):
    from paratrain.spawn import run
    from paratrain.state import _hf_config

    def body():
        engine = pt.setup(llama, logits_loss, replace(config(tmp_path), strategy=pt.load_config(["strategy=fsdp"]).strategy))
        return _hf_config(engine.model)["architectures"]

    assert run(body, 2)[0] == ["LlamaForCausalLM"]


def test_a_module_of_ones_own_class():
    from paratrain.compat import own_class

    class Mine(nn.Linear):
        pass

    assert own_class(Mine(1, 1)) is Mine
