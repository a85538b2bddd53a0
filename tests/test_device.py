"""Test the script on a pretend device, which computes on the CPU but needs the same care as a GPU."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.processes import ROOT, ended, start
from support.results import tensors_in
from support.tiny_model import tiny_arguments

ELSEWHERE = ("--save-dir", "elsewhere")
SEVERAL = ("--prompt", "a", "--prompt", "b", "--prompt", "c", "--m", "own")
PLAIN = ("--num-steps", 6, "--wandb-run-name", "plain")


def run_elsewhere(folder: Path, tiny: Path, *runs: tuple) -> list[dict]:
    """Run the script on the pretend device once for each of `runs`; return what support/pretend_device.py prints."""
    words = [[str(word) for word in (*tiny_arguments(tiny), *ELSEWHERE, *run)] for run in runs]
    commands = folder / "runs.json"
    commands.write_text(json.dumps(words))
    with commands.open() as stdin:
        result = ended(start([sys.executable, ROOT / "tests/support/pretend_device.py"], folder, stdin=stdin))
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


@pytest.fixture(scope="module")
def elsewhere(tiny_folder, tmp_path_factory) -> SimpleNamespace:
    """Make a plain run, a stopped and resumed run of several targets, both also on the CPU, and a run of each kind."""
    folder = tmp_path_factory.mktemp("device")
    several = (*SEVERAL, "--num-steps", 6, "--wandb-run-name", "several")
    on_cpu = ("on the CPU", "--save-dir", "cpu")
    runs = (PLAIN, (*several, "stopping"), (*several, "--resume"), (*PLAIN, *on_cpu), (*several, *on_cpu))
    kinds = each_kind(folder / "elsewhere" / "plain")
    plain, stopped, resumed, _, _, *others = run_elsewhere(folder, tiny_folder, *runs, *kinds)
    return SimpleNamespace(folder=folder, plain=plain, stopped=stopped, resumed=resumed, kinds=kinds, others=others)


def each_kind(plain: Path) -> list[tuple]:
    """Return the options of a run for each kind of target and of learning; some use the results of the plain run."""
    learned = plain / "proto_tokens.safetensors"
    return [
        ("--image", plain / "reference_image.png"),
        ("--control", "untrained", "--optimizer", "adamw", "--image-every", 2),
        ("--control", "random", "--num-e-tokens", 2, "--vocabulary", "visual"),
        ("--prompt", "a", "--prompt", "b", "--m-from", learned),
        ("--from-proto-tokens", learned),
        ("--capacity", "--target-accuracy", 20),
        ("--dtype", "bfloat16", "--top-p", 0.9),
    ]


@pytest.mark.parametrize("name", ["plain", "several"])
def test_a_run_learns_on_another_device_what_it_learns_on_the_cpu(elsewhere, name):
    here, there = (tensors_in(elsewhere.folder / place / name) for place in ("cpu", "elsewhere"))
    for ids in ("target_ids", "predicted_ids"):
        assert torch.equal(there.pop(ids), here.pop(ids))
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4)  # attention repeats the shared heads there


def test_a_run_on_another_device_is_stopped_and_resumed(elsewhere):
    steps = [len(run["waits_by_step"]) for run in (elsewhere.stopped, elsewhere.resumed)]
    assert elsewhere.stopped["exit_code"] == 143 and steps == [2, 10]  # the first two targets' 6, then the third's 6


def test_the_host_waits_for_the_device_once_a_step(elsewhere):
    waits = elsewhere.plain["waits_by_step"]
    assert [after - before for before, after in itertools.pairwise(waits)] == [1, 1, 1, 1, 1]


def test_the_host_does_not_wait_for_each_decoded_token(elsewhere):
    assert elsewhere.plain["waits_of_decoding"] == 2  # at the first and the last token: are the logits finite?


def test_each_kind_of_target_and_of_learning_keeps_to_one_device(elsewhere):
    assert len(elsewhere.others) == len(elsewhere.kinds)
