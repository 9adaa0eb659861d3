"""Copies in a store: complete or not counted, kept as the local ones are, verified on the way back."""

import os
import shutil
import threading
import uuid

import pytest
import torch

from paratrain import checkpoint
from paratrain.checkpoint import remote
from paratrain.config import Checkpoint
from paratrain.errors import UserError

fsspec = pytest.importorskip("fsspec")


def exercise(url, tmp_path):
    options = Checkpoint(keep=2, keep_every=10)
    for step in (10, 11, 12, 13):
        path = checkpoint.step_path(tmp_path / "local", step)
        checkpoint.save(path, {"w": torch.full((5000,), float(step))}, {"step": step})
        remote.upload(path, url, options)
    assert remote.steps(url) == [10, 12, 13]
    fs, root = fsspec.core.url_to_fs(url)
    assert not fs.exists(f"{root}/step-000011")
    with fs.open(f"{root}/step-000013/rank-00000.safetensors", "rb") as file:
        content = bytearray(file.read())
    content[-3] ^= 1
    with fs.open(f"{root}/step-000013/rank-00000.safetensors", "wb") as file:
        file.write(bytes(content))
    path = remote.download(url, tmp_path / "elsewhere")
    assert path == tmp_path / "elsewhere" / "step-000012"
    back = {"w": torch.zeros(5000)}
    assert checkpoint.load(path, back)[0] == {"step": 12}
    assert (back["w"] == 12).all()
    fs.rm(f"{root}/step-000012/manifest.json")
    shutil.rmtree(path)
    assert remote.download(url, tmp_path / "elsewhere").name == "step-000010"
    assert os.listdir(tmp_path / "elsewhere") == ["step-000010"]
    assert remote.download(f"{url}/nothing", tmp_path / "other") is None


def test_a_store_in_memory(tmp_path):
    exercise(f"memory://{uuid.uuid4().hex}/run", tmp_path)


@pytest.mark.slow
def test_an_s3_server(tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("ENDPOINT_URL", f"http://{host}:{port}")):
            monkeypatch.setenv(f"AWS_{name}", value)
        fsspec.filesystem("s3").mkdir("bucket")
        exercise("s3://bucket/run", tmp_path)
    finally:
        server.stop()


def test_a_store_that_nobody_knows_is_named(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.remote=nosuch://x"):
        remote.steps("nosuch://x")


def test_a_job_on_a_bare_machine_goes_on_from_the_store(tmp_path):
    """The output directory is lost; the same command finds the newest copy, and saves in the background go there too."""
    from test_trainer import config, fit, lines

    url = f"memory://{uuid.uuid4().hex}"
    for mode, name in ((True, "a"), (False, "b")):
        cfg = config(tmp_path / name, checkpoint=Checkpoint(every="2", keep=2, remote=f"{url}/{name}", async_save=mode))
        whole = fit(cfg)
        assert remote.steps(f"{url}/{name}") == [8, 9]
        fsspec.filesystem("memory").rm(f"{url.removeprefix('memory://')}/{name}/step-000009", recursive=True)
        shutil.rmtree(tmp_path / name)
        again = fit(cfg)
        assert all(torch.equal(again[key], value) for key, value in whole.items())
        assert [line["step"] for line in lines(tmp_path / name)] == [9]
    assert not [thread for thread in threading.enumerate() if thread.name == "paratrain-save"]
