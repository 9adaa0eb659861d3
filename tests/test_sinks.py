"""Every sink writes and is read back; resuming drops what will be logged again; nothing that fails reaches the loop."""

import csv
import dataclasses
import importlib.machinery
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import wandb_file
import yaml

from paratrain.config import Logger, WandB
from paratrain.errors import UserError
from paratrain.metrics import console, sinks, weights_biases
from paratrain.redact import redact

CONFIG = {"model": {"dim": 8, "hf_token": "hunter2"}, "data": {"tokenizer": "byte"}}


def row(step, **more):
    return {"tokens": step * 100, "train/loss": 1 / step, "throughput/tokens_per_sec": 5000.0 + step, **more}


def start(names, run_dir, resume=False, step=0, **options):
    built = sinks.build(Logger(sinks=names, wandb=WandB(**options)), run_dir, resume)
    for sink in built:
        sink.start(sinks.run_info(CONFIG, run_dir, world_size=2, step=step, max_steps=100))
    return built


def run(names, run_dir, steps, **options):
    built = start(names, run_dir, **options)
    for step in steps:
        for sink in built:
            sink.log(step, row(step))
    for sink in built:
        sink.finish(0)


def jsonl(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def table(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class TestFiles:
    def test_jsonl_reads_back(self, tmp_path):
        run(["jsonl"], tmp_path, [1, 2])
        assert jsonl(tmp_path) == [{"step": s, **row(s)} for s in (1, 2)]

    def test_jsonl_is_complete_after_every_call(self, tmp_path):
        [sink] = start(["jsonl"], tmp_path)
        sink.log(1, row(1))
        assert len(jsonl(tmp_path)) == 1

    def test_jsonl_is_strict_json_whatever_the_value(self, tmp_path):
        [sink] = start(["jsonl"], tmp_path)
        sink.log(1, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "tokens": 10**18})
        text = (tmp_path / "metrics.jsonl").read_text()

        def refuse(name):
            raise AssertionError(name)

        assert json.loads(text, parse_constant=refuse) == {"step": 1, "train/loss": None, "train/grad_norm": None, "tokens": 10**18}

    @pytest.mark.parametrize("read", [jsonl, table])
    def test_resume_drops_later_rows_and_a_torn_one(self, tmp_path, read):
        run(["jsonl", "csv"], tmp_path, range(1, 6))
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "train/lo')
        with (tmp_path / "metrics.csv").open("a") as file:
            file.write("\x00")
        run(["jsonl", "csv"], tmp_path, [4, 9], resume=True, step=3)
        found = read(tmp_path)
        assert [int(r["step"]) for r in found] == [1, 2, 3, 4, 9]
        assert float(found[1]["train/loss"]) == 0.5
        assert not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize("read", [jsonl, table])
    def test_a_new_run_begins_anew(self, tmp_path, read):
        run(["jsonl", "csv"], tmp_path, [1, 2, 3])
        run(["jsonl", "csv"], tmp_path, [1])
        assert [int(r["step"]) for r in read(tmp_path)] == [1]

    def test_resume_without_files_starts_them(self, tmp_path):
        run(["jsonl", "csv"], tmp_path, [5], resume=True, step=4)
        assert [r["step"] for r in jsonl(tmp_path)] == [5]

    def test_csv_takes_new_columns(self, tmp_path):
        [sink] = start(["csv"], tmp_path)
        sink.log(1, {"train/loss": 2.5})
        sink.log(1, {"eval/loss": 3.5})
        sink.log(2, {"train/loss": 1.5})
        assert table(tmp_path) == [
            {"step": "1", "train/loss": "2.5", "eval/loss": ""},
            {"step": "1", "train/loss": "", "eval/loss": "3.5"},
            {"step": "2", "train/loss": "1.5", "eval/loss": ""},
        ]

    def test_tensorboard_reads_back_and_purges_on_resume(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        def read():
            events = EventAccumulator(str(tmp_path / "tensorboard"))
            events.Reload()
            text = events.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
            return [(e.step, round(e.value, 4)) for e in events.Scalars("train/loss")], text

        run(["tensorboard"], tmp_path, [1, 2, 4])
        scalars, text = read()
        assert scalars == [(1, 1.0), (2, 0.5), (4, 0.25)]
        assert '"world_size": 2' in text
        assert "hunter2" not in text
        run(["tensorboard"], tmp_path, [3], resume=True, step=2)
        assert read()[0] == [(1, 1.0), (2, 0.5), (3, 0.3333)]
        run(["tensorboard"], tmp_path, [1])
        assert read()[0] == [(1, 1.0)]


class TestBuild:
    def test_only_rank_0_has_sinks(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        assert sinks.build(Logger(sinks=["console", "jsonl", "csv"]), tmp_path, resume=False) == []
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("rank", ["0", "1"])
    def test_missing_package_is_the_users_to_know_on_every_rank(self, tmp_path, monkeypatch, rank):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"logger\.sinks.*wandb is not installed; pip install"):
            sinks.build(Logger(sinks=["console", "wandb"]), tmp_path, resume=False)

    @pytest.mark.parametrize("name", ["jsonl", "csv"])
    def test_unwritable_directory_is_a_users_mistake(self, tmp_path, name):
        (tmp_path / f"metrics.{name}").mkdir()
        with pytest.raises(UserError, match=r"output_dir=.*cannot be written"):
            start([name], tmp_path)

    def test_a_failing_sink_is_said_once_and_training_goes_on(self, tmp_path, monkeypatch, caplog):
        def full(self, step, metrics):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(sinks.Jsonl, "log", full)
        run(["jsonl", "csv"], tmp_path, range(1, 6))
        assert [r.message.count("No space left") for r in caplog.records] == [1]
        assert len(table(tmp_path)) == 5

    def test_yaml_holds_the_defaults(self):
        directory = Path(__file__).parents[1] / "conf" / "logger"
        assert yaml.safe_load((directory / "default.yaml").read_text()) == dataclasses.asdict(Logger())
        for name in ("wandb", "tensorboard"):
            assert name in yaml.safe_load((directory / f"{name}.yaml").read_text())["sinks"]


class TestRedaction:
    def test_secrets_go_and_names_that_only_look_alike_stay(self):
        found = redact(
            {
                "api_key": "a", "hfToken": "b", "password1": "c", "auth": {"client_secret": ["d", "e"], "keys": {"inner": "f"}},
                "tokenizer": "byte", "max_tokens": 1e6, "num_key_value_heads": 4, "seq_len": 8, "empty_token": "", "monkeys": {"n": 3},
                "url": "https://me:pw@host/x", "paths": ["s3://id:key@bucket", "plain"],
            }
        )  # fmt: skip
        hidden = "[redacted]"
        assert found == {
            "api_key": hidden, "hfToken": hidden, "password1": hidden, "auth": {"client_secret": [hidden, hidden], "keys": {"inner": hidden}},
            "tokenizer": "byte", "max_tokens": 1e6, "num_key_value_heads": 4, "seq_len": 8, "empty_token": "", "monkeys": {"n": 3},
            "url": f"https://{hidden}@host/x", "paths": [f"s3://{hidden}@bucket", "plain"],
        }  # fmt: skip


class TestConsole:
    METRICS = {  # noqa: RUF012
        "train/loss": 2.34567, "train/lr": 3e-4, "train/grad_norm": 1.2345, "throughput/tokens_per_sec": 12345.6,
        "throughput/samples_per_sec": 96.0, "time/step": 0.045, "tokens": 100, "memory/peak_gib": 1.0, "train/skipped_steps": 2,
    }  # fmt: skip

    def test_line(self):
        assert console.format_line(20, self.METRICS, 1000) == (
            "step   20/1000  loss 2.3457  lr 3.00e-04  norm 1.23  12.3k tok/s  45.0 ms/step  skipped 2  eta 0:00:44"
        )
        scaled = {"train/loss": 2.0, "train/loss_scale": 65536.0, "train/loss_scale_changes": 1.0, "epoch": 0.0234}
        assert console.format_line(5, scaled) == "step 5  loss 2.0000  epoch 0.02"
        assert console.format_line(20, {"eval/loss": 2.31, "eval/accuracy": 0.5}) == "step 20  eval loss 2.31  eval accuracy 0.5"
        assert console.format_line(3, {"throughput/samples_per_sec": 96.0, "time/step": 2.5}) == "step 3  96.0 samples/s  2.50 s/step"

    def test_plain_lines_in_a_file(self):
        stream = io.StringIO()
        sink = console.Console(stream)
        sink.start({"step": 0, "max_steps": 50})
        sink.log(10, self.METRICS)
        sink.log(20, self.METRICS)
        sink.finish(0)
        assert [line[:11] for line in stream.getvalue().splitlines()] == ["step 10/50 ", "step 20/50 "]
        assert "\x1b" not in stream.getvalue()

    def test_bar_in_a_terminal_keeps_the_lines(self):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        stream = Terminal()
        sink = console.Console(stream)
        sink.start({"step": 0, "max_steps": 50})
        sink.log(10, self.METRICS)
        sink.finish(0)
        assert "step 10/50  loss 2.3457" in stream.getvalue()
        assert "10/50" in stream.getvalue().split("eta")[1]

    def test_stdout_at_the_start_is_used(self, capsys):
        run(["console"], Path("."), [1])
        assert capsys.readouterr().out.startswith("step   1/100  loss 1.0000")


@pytest.fixture
def no_account(monkeypatch, tmp_path_factory):
    """No key, no netrc, no settings of the person who runs the tests."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    yield monkeypatch
    if isinstance(sys.modules.get("wandb"), types.ModuleType):
        sys.modules["wandb"].teardown()


def read_runs(run_dir, newest=0):
    import wandb

    wandb.teardown()
    files = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.parent.stat().st_ctime_ns)
    return [wandb_file.read(file) for file in files[-newest:]]


class FakeRun:
    def __init__(self, fails_at=(), gate=None):
        self.rows, self.metrics, self.fails_at, self.gate, self.exit_code = [], [], set(fails_at), gate, None

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, row):
        if self.gate:
            self.gate.wait()
        if row["step"] in self.fails_at:
            raise ConnectionResetError("service died")
        self.rows.append(row["step"])

    def finish(self, exit_code):
        self.exit_code = exit_code


def fake_wandb(monkeypatch, *outcomes):
    """A `wandb` whose `init` gives, call after call, these runs or raises these errors; returns the arguments of each call."""
    calls, left = [], list(outcomes)

    def init(**arguments):
        calls.append(arguments)
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init, module.Settings, module.teardown = init, types.SimpleNamespace, lambda exit_code=None: None
    module.setup = lambda settings=None: types.SimpleNamespace(settings=types.SimpleNamespace(base_url="http://127.0.0.1:9"))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


class TestWandB:
    def test_offline_run_holds_the_series_and_a_resume_continues_it(self, tmp_path, no_account, caplog):
        no_account.setattr(sinks, "git_commit", lambda directory: "c0ffee")
        run(["wandb"], tmp_path, range(1, 6), group="job", tags=["a"], project="mine")
        run(["wandb"], tmp_path, [4, 5, 6], resume=True, step=3)
        first, second = read_runs(tmp_path)
        assert [(h["step"], h["tokens"], h["throughput/tokens_per_sec"]) for h in first["history"]] == [
            (s, s * 100, 5000 + s) for s in range(1, 6)
        ]
        assert [h["step"] for h in second["history"]] == [4, 5, 6]
        assert first["metrics"] == {"step": "", "tokens": "", "*": "step"}
        assert first["exit_code"] == second["exit_code"] == 0
        assert first["config"]["model"] == {"dim": 8, "hf_token": "[redacted]"}
        assert first["config"]["world_size"] == 2
        assert first["config"]["git_commit"] == "c0ffee"
        assert (first["run"].project, first["run"].run_group, list(first["run"].tags)) == ("mine", "job", ["a"])
        assert first["run"].display_name == tmp_path.name
        assert first["run"].run_id == second["run"].run_id == (tmp_path / "wandb_id").read_text()
        ours = [r.message for r in caplog.records if r.name.startswith("paratrain")]
        assert ["no API key" in message for message in ours] == [True, True]  # once a run

    def test_a_new_run_has_a_new_id_and_the_users_own_wins(self, tmp_path, no_account):
        ids = []
        for options in ({}, {"resume": True}, {}, {"id": "own"}):
            calls = fake_wandb(no_account, FakeRun())
            run(["wandb"], tmp_path, [1], mode="offline", **options)
            ids.append(calls[0]["id"])
        assert ids[0] == ids[1] != ids[2]
        assert ids[3] == "own"

    def test_dead_service_loses_nothing(self, tmp_path, no_account, caplog):
        [sink] = start(["wandb"], tmp_path, mode="offline")
        for step in range(1, 21):
            sink.log(step, row(step))
        while not sink.sink.recent:
            threading.Event().wait(0.05)
        children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True).stdout
        [core] = [int(line.split()[0]) for line in children.splitlines() if "wandb-core" in line]
        os.kill(core, signal.SIGKILL)
        for step in range(21, 41):
            sink.log(step, row(step))
        sink.finish(0)
        assert caplog.text.count("W&B failed") == 1
        assert [h["step"] for h in read_runs(tmp_path, newest=1)[0]["history"]] == list(range(1, 41))

    def test_server_that_does_not_answer(self, tmp_path, no_account, caplog):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        no_account.setenv("WANDB_API_KEY", "0" * 40)
        no_account.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        run(["wandb"], tmp_path, [1, 2])
        assert "does not answer" in caplog.text
        assert [h["step"] for h in read_runs(tmp_path)[0]["history"]] == [1, 2]

    def test_init_that_raises_goes_offline(self, tmp_path, no_account, caplog):
        no_account.setenv("WANDB_API_KEY", "0" * 40)
        offline = FakeRun()
        calls = fake_wandb(no_account, ConnectionError("refused"), offline)
        run(["wandb"], tmp_path, [1, 2, 3], mode="online")
        assert [call["mode"] for call in calls] == ["online", "offline"]
        assert calls[0]["id"] == calls[1]["id"]
        assert offline.rows == [1, 2, 3]
        assert offline.exit_code == 0
        assert caplog.text.count("W&B failed") == 1

    def test_log_that_raises_goes_offline_with_what_came_before(self, tmp_path, no_account):
        offline = FakeRun()
        fake_wandb(no_account, FakeRun(fails_at=[3]), offline)
        run(["wandb"], tmp_path, range(1, 6), mode="offline")
        assert offline.rows == [1, 2, 3, 4, 5]

    def test_all_attempts_fail(self, tmp_path, no_account, caplog):
        fake_wandb(no_account, RuntimeError("one"), RuntimeError("two"))
        run(["wandb", "jsonl"], tmp_path, range(1, 6), mode="offline")
        assert len(jsonl(tmp_path)) == 5
        assert len([r for r in caplog.records if "W&B" in r.message]) == 2

    def test_package_that_does_not_import(self, tmp_path, no_account, caplog):
        no_account.setitem(sys.modules, "wandb", None)
        no_account.setattr(sinks.importlib.util, "find_spec", lambda name: object())
        run(["wandb"], tmp_path, [1])
        assert "cannot be imported" in caplog.text

    def test_log_that_blocks_does_not_block_training(self, tmp_path, no_account, caplog):
        gate = threading.Event()
        slow = FakeRun(gate=gate)
        fake_wandb(no_account, slow)
        no_account.setattr(weights_biases, "_QUEUE_ROWS", 10)
        [sink] = start(["wandb"], tmp_path, mode="offline")
        for step in range(1, 101):
            sink.log(step, row(step))
        assert slow.rows == []  # the loop is through and the first row is not
        gate.set()
        sink.finish(3)
        assert 10 <= len(slow.rows) <= 12
        assert slow.exit_code == 3
        assert caplog.text.count("rows are dropped") == 1

    @pytest.mark.parametrize(
        ("asked", "environment", "mode"),
        [
            ("auto", {}, "offline"),
            ("online", {}, "offline"),
            ("auto", {"WANDB_API_KEY": "0" * 40}, "offline"),
            ("online", {"WANDB_API_KEY": "0" * 40}, "online"),
            ("offline", {"WANDB_API_KEY": "0" * 40}, "offline"),
            ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ],
    )
    def test_mode(self, no_account, asked, environment, mode):
        fake_wandb(no_account)
        for name, value in environment.items():
            no_account.setenv(name, value)
        assert weights_biases.choose_mode(sys.modules["wandb"], asked)[0] == mode

    def test_online_with_a_key_and_a_server_directly_or_through_a_proxy(self, no_account, tmp_path):
        (tmp_path / "netrc").write_text("machine metrics.invalid:81 login user password secret\n")
        no_account.setenv("NETRC", str(tmp_path / "netrc"))
        assert weights_biases._has_key("http://metrics.invalid:81")
        assert not weights_biases._has_key("http://other.invalid")
        for name in ("no_proxy", "NO_PROXY"):
            no_account.delenv(name, raising=False)
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            weights_biases._connect(f"http://{address}")
            no_account.setenv("http_proxy", f"http://{address}")
            weights_biases._connect("http://metrics.invalid:81")
