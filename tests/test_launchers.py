"""Test processes that torchrun or srun starts: each takes its own shard of the prompts."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from support.processes import PAUSING, ended, let_go_on, start, wait_for
from support.results import refused, tensors_in
from support.tiny_model import tiny_arguments

import verify_proto_tokens as vpt

TWO = ("--prompt", "a cat", "--prompt", "a dog")
TORCHRUN = ("RANK", "WORLD_SIZE")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


@pytest.mark.parametrize("names", [TORCHRUN, SRUN])
def test_each_rank_of_a_launcher_takes_its_shard(monkeypatch, names):
    words = ["--demo", "--m", "own", *(word for prompt in "abcde" for word in ("--prompt", prompt))]
    plain = vpt.parse_args(words)
    for rank, prompts in enumerate(["ad", "be", "c"]):
        monkeypatch.setenv(names[0], str(rank))
        monkeypatch.setenv(names[1], "3")
        args = vpt.parse_args(words)
        assert args.prompts == list(prompts) and args.shard == (rank + 1, 3)
        assert args.wandb_run_name != plain.wandb_run_name
    monkeypatch.setenv(names[0], "0")
    monkeypatch.setenv(names[1], "1")
    assert vpt.parse_args(words).shard is None


def test_a_rank_without_a_prompt_ends_with_exit_code_0(call_tiny):
    result = call_tiny(*TWO, "--m", "own", env={"RANK": "2", "WORLD_SIZE": "3"})
    assert result.code == 0 and "no prompt left for process 3 of 3" in result.out


@pytest.mark.parametrize("options", [("--prompt", "a"), (*TWO, "--m", "own", "--shard", "1/2"), TWO])
def test_a_run_that_cannot_be_shared_among_ranks_is_refused(call_tiny, options):
    refused(call_tiny(*options, env={"RANK": "0", "WORLD_SIZE": "3"}), "split the")


def test_a_launch_is_resumed_after_one_of_its_ranks_was_killed(call_tiny, model_folders, tmp_path):
    """Launch with torchrun itself, which stops the other ranks when one is killed."""
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\ne")
    (tmp_path / "script.py").write_text(PAUSING.replace("sys.argv.pop(1)", "2"))
    arguments = ("--prompts-file", "prompts.txt", "--m", "own", "--save-every", 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--", "script.py"]
    command += [*tiny_arguments(tmp_path), *arguments, "--save-dir", "launched", "--resume"]
    process = start(command, tmp_path)
    wait_for((tmp_path / "paused").exists, process)
    wait_for(lambda: pid_of_rank(1, tmp_path), process)
    os.kill(pid_of_rank(1, tmp_path), signal.SIGKILL)
    let_go_on(tmp_path)
    assert ended(process).code == 1
    assert ended(start(command, tmp_path)).code == 0
    assert call_tiny(*arguments, "--wandb-run-name", "whole", "--save-dir", "out").code == 0
    whole = tensors_in(tmp_path / "out" / "whole")
    for rank in range(2):
        (folder,) = (tmp_path / "launched").glob(f"*shard-{rank + 1}-2*")
        shard = tensors_in(folder)
        assert all(torch.equal(shard[name], whole[name][rank::2]) for name in whole)


def pid_of_rank(rank: int, folder: Path) -> int | None:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (process / "environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environment and os.readlink(process / "cwd") == str(folder):
                return int(process.name)
    return None
