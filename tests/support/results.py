"""Read the results that runs leave, so that tests can compare them."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import load_file


def results_of(folder: Path) -> tuple[dict, str, dict]:
    """Return a run's tensors, history and summary, without measured times."""
    summary = {
        name: value
        for name, value in summary_in(folder).items()
        if not any(word in name for word in ("seconds", "speedup"))
    }
    tensors = {name: tensor.tolist() for name, tensor in tensors_in(folder).items()}
    return tensors, (folder / "history.csv").read_text(), summary


def tensors_in(folder: Path) -> dict:
    return load_file(folder / "proto_tokens.safetensors")


def summary_in(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def config_in(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def rows_of(file: Path) -> list[dict]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


def steps_in(folder: Path) -> list[int]:
    return [int(row["step"]) for row in rows_of(folder / "history.csv")]


def refused(result: SimpleNamespace, *words: str) -> None:
    """Assert exit code 2 and a single line of error on stderr, which contains all `words`."""
    assert result.code == 2, (result.out, result.err)
    lines = [
        line
        for line in result.err.splitlines()
        if line and not line.startswith(("reference:", "proto-tokens:", "pictures:", "bits:", "wandb:"))
    ]
    assert len(lines) == 1 and lines[0].startswith("verify_proto_tokens.py: error:"), result.err
    for word in words:
        assert word in lines[0]
