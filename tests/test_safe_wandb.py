"""A server of W&B that goes in the middle of an online run: training goes on, the log says so, and no row is lost."""

from __future__ import annotations

import gzip
import json
import logging
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torch import nn

import paratrain as pt
from paratrain.metrics import weights_biases

BUCKET = {
    "id": "x", "name": "r", "displayName": "r", "historyLineCount": 0, "logLineCount": 0, "eventsLineCount": 0, "historyTail": "[]",
    "eventsTail": "[]", "summaryMetrics": "{}", "tags": [], "wandbConfig": "{}", "project": {"id": "p", "name": "mine", "entity": {"id": "e", "name": "me"}},
}  # fmt: skip
ANSWER = {"data": {"serverInfo": None, "viewer": None, "upsertBucket": {"bucket": BUCKET, "inserted": True}, "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}}  # fmt: skip


class Server:
    """Answers as W&B does, as far as a run needs it, and keeps the steps of the rows that it gets."""

    def __init__(self):
        self.steps: set[int] = set()
        self.port = 0

    def up(self) -> None:
        steps = self.steps

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
                if "file_stream" in self.path:
                    lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
                    steps.update(json.loads(line)["step"] for line in lines)
                answer = json.dumps(ANSWER if "graphql" in self.path else {}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PUT = do_POST

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def down(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Outage(pt.Callback):
    def __init__(self, server, until):
        self.server, self.until = server, until

    def on_step_end(self, trainer, result):
        step = trainer.engine.global_step
        if step == 3:
            deadline = time.monotonic() + 60
            while not self.server.steps and time.monotonic() < deadline:  # until W&B has a row, so that the run is an online one
                time.sleep(0.1)
            self.server.down()
        if step == self.until:
            self.server.up()
        time.sleep(0.3)


def fit(directory, *overrides, callbacks=()):
    cfg = pt.load_config([
        "trainer.max_steps=8", "data.global_batch=4", "trainer.device=cpu", "trainer.log_every=1", "trainer.prove=off", f"output_dir={directory}",
        *overrides,
    ])  # fmt: skip
    data = [(torch.full((3,), float(i)) / 8, torch.ones(1)) for i in range(32)]
    trainer = pt.Trainer(cfg, lambda: nn.Linear(3, 1), nn.functional.mse_loss, data, callbacks=list(callbacks))
    trainer.fit()
    return trainer.engine.full_state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("back", [True, False])
def test_a_server_that_goes_in_the_middle_of_a_run(tmp_path, monkeypatch, caplog, back):
    pytest.importorskip("wandb")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr(weights_biases, "_LOOK_SECONDS", 0.2)
    if not back:
        monkeypatch.setattr(weights_biases, "_FINISH_SECONDS", 15)
    caplog.set_level(logging.INFO, "paratrain")
    server = Server()
    server.up()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.port}")
    try:
        found = fit(
            tmp_path / "hurt", "logger.sinks=[jsonl,wandb]", "logger.wandb.mode=online", callbacks=[Outage(server, 6 if back else None)]
        )
    finally:
        sys.modules["wandb"].teardown()
        if back:
            server.down()
    expected = fit(tmp_path / "undisturbed", "logger.sinks=[jsonl]")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    rows = [json.loads(line)["step"] for line in (tmp_path / "hurt" / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 9))
    assert (
        len(re.findall(r"W&B does not answer \(http://127.0.0.1:\d+: .*\); training goes on, and the metrics are kept in", caplog.text))
        == 1
    )
    assert ("W&B answers again" in caplog.text) == back
    if back:
        assert server.steps == set(range(1, 9))
    else:
        assert "upload the rest of" in caplog.text
        assert len(list((tmp_path / "hurt" / "wandb").glob("run-*/run-*.wandb"))) == 1
