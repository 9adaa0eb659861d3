"""Reads a W&B transaction log: a header, then protobuf records framed like a LevelDB log (32 KiB blocks, checksummed chunks)."""

import json
import struct
import time
import zlib
from pathlib import Path

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_HEADER = b":W&B"


def records(path: Path) -> list:
    data = path.read_bytes()
    assert data[:4] == _HEADER, data[:8]
    found, partial, at = [], b"", 7
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:  # too little room for a chunk: padding
            at += _BLOCK - at % _BLOCK
            continue
        checksum, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            break
        chunk = data[at + 7 : at + 7 + size]
        if len(chunk) < size:
            break
        assert checksum == zlib.crc32(bytes([kind]) + chunk), f"checksum at byte {at}"
        at += 7 + size
        partial = chunk if kind in (1, 2) else partial + chunk
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(partial))
    return found


def read(path: Path, seconds: float = 20) -> dict:
    """The run in a `.wandb` file, once its exit record is there: history, config, metrics, run, exit_code."""
    deadline = time.monotonic() + seconds
    found = records(path)
    while not any(r.HasField("exit") for r in found) and time.monotonic() < deadline:
        time.sleep(0.1)
        found = records(path)
    run: dict = {"history": [], "config": {}, "metrics": {}, "exit_code": None}
    for record in found:
        if record.HasField("history"):
            run["history"].append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
        elif record.HasField("run"):
            run["run"] = record.run
            run["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record.HasField("metric"):
            run["metrics"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif record.HasField("exit"):
            run["exit_code"] = record.exit.exit_code
    return run
