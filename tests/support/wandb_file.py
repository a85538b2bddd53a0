"""Read what an offline W&B run wrote: a 7-byte header, then LevelDB log records of protobuf messages."""

import json
import struct
from pathlib import Path
from types import SimpleNamespace

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32 * 1024
HEADER = 7


def records(file: Path):
    """Yield every Record of a `.wandb` file."""
    data, position, parts = file.read_bytes(), HEADER, []
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # a block's tail too short for a header is padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        parts.append(data[position + HEADER : position + HEADER + length])
        position += HEADER + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield Record.FromString(b"".join(parts))
            parts = []


def read(folder: Path) -> SimpleNamespace:
    """Return the only run below `folder`: settings, history rows, summary, artifacts, exit code, axes of its curves."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    run = SimpleNamespace(folder=file.parent, history=[], summary={}, config={}, artifacts=[], run=None, exit_code=None)
    run.axes = {}  # from a metric's name, or a pattern of names, to its x axis

    def key(item) -> str:
        return item.key or "/".join(item.nested_key)

    for record in records(file):
        if record.HasField("run"):
            run.run = record.run
            run.config |= {key(item): json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            run.history.append({key(item): json.loads(item.value_json) for item in record.history.item})
        if record.HasField("summary"):
            run.summary |= {key(item): json.loads(item.value_json) for item in record.summary.update}
        if record.HasField("metric"):
            run.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        if record.HasField("artifact"):
            run.artifacts.append(record.artifact)
        if record.HasField("exit"):
            run.exit_code = record.exit.exit_code
    return run
