"""Test the search for the capacity: which prefixes of the target it tries, how it is resumed, and what it writes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import wandb_file
from support.results import config_in, rows_of, summary_in
from support.tiny_model import spoil_text_head

import verify_proto_tokens as vpt


@given(st.integers(1, 300), st.data())
def test_the_search_ends_at_the_capacity_in_few_trials(longest, data):
    shortest = data.draw(st.integers(1, longest))
    capacity = data.draw(st.sampled_from([0, *range(shortest, longest + 1)]))
    trials = []
    while num_tokens := vpt.next_prefix(trials, shortest, longest):
        assert shortest <= num_tokens <= longest and num_tokens not in [trial["num_tokens"] for trial in trials]
        trials.append({"num_tokens": num_tokens, "reached": num_tokens <= capacity})
    assert max((trial["num_tokens"] for trial in trials if trial["reached"]), default=0) == capacity
    assert len(trials) <= 2 * math.log2(longest) + 2


def test_the_search_doubles_the_length_then_bisects():
    trials, tried = [], []
    while num_tokens := vpt.next_prefix(trials, 1, 100):
        tried.append(num_tokens)
        trials.append({"num_tokens": num_tokens, "reached": num_tokens <= 21})
    assert tried == [1, 2, 4, 8, 16, 32, 24, 20, 22, 21]


SEARCH = ("--capacity", "--num-steps", 30, "--save-dir", "out", "--wandb-run-name", "run")


def trials_in(folder) -> list[tuple]:
    names = ("num_tokens", "best_accuracy", "steps", "reached")
    return [tuple(row[name] for name in names) for row in rows_of(folder / "capacity.csv")]


def test_a_search_writes_a_table_of_its_trials_a_picture_and_a_summary(call_tiny, tmp_path):
    result = call_tiny(*SEARCH)
    assert result.code == 0, result.err
    folder = tmp_path / "out" / "run"
    assert {f.name for f in folder.iterdir()} == {
        "capacity.csv", "capacity.png", "config.json", "reference_image.png", "summary.json"
    }  # fmt: skip
    summary, trials = summary_in(folder), trials_in(folder)
    reached = [int(num_tokens) for num_tokens, *_, reached in trials if reached == "True"]
    assert summary["capacity_tokens"] == max(reached) and summary["trials"] == len(trials)
    assert f"{max(reached)} of 16 tokens" in result.out
    Image.open(folder / "capacity.png").verify()
    assert config_in(folder)["target_accuracy"] == 99


@pytest.mark.parametrize("cut_at", [3, 40, 55])
def test_an_interrupted_search_goes_on_with_the_trial_it_was_in(call_tiny, tmp_path, monkeypatch, cut_at):
    assert call_tiny(*SEARCH).code == 0
    whole = trials_in(tmp_path / "out" / "run")
    really_step, steps = vpt.Recorder.keep_step, iter(range(1, 10**6))

    def cut(recorder, row, learning):
        really_step(recorder, row, learning)
        if next(steps) == cut_at:
            raise vpt.UserError("cut on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(vpt.Recorder, "keep_step", cut)
        assert call_tiny(*SEARCH).code == 2
    assert call_tiny(*SEARCH, "--resume").code == 0
    assert trials_in(tmp_path / "out" / "run") == whole
    assert "finished" in call_tiny(*SEARCH, "--resume").out


def test_a_killed_search_keeps_its_finished_trials(call_tiny, tmp_path, monkeypatch):
    assert call_tiny(*SEARCH).code == 0
    whole, trials = trials_in(tmp_path / "out" / "run"), []

    class Killed(BaseException):
        pass

    def killed(learning, record):
        trials.append(learning.codes.shape[1])
        if len(trials) == 4:
            raise Killed
        really_learn(learning, record)

    really_learn = vpt.learn_batch
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(vpt, "learn_batch", killed)
        call_tiny(*SEARCH)
    assert not (tmp_path / "out" / "run" / "summary.json").exists()
    result = call_tiny(*SEARCH, "--resume")
    assert result.code == 0 and f"capacity: trying {trials[0]} tokens" not in result.out.splitlines()
    assert trials_in(tmp_path / "out" / "run") == whole


def test_a_search_killed_in_a_trial_of_several_batches_can_be_resumed(call_tiny, tmp_path, monkeypatch):
    arguments = (*SEARCH, "--prompt", "a", "--prompt", "b", "--prompt", "c", "--m", "own")
    monkeypatch.setattr(vpt, "targets_at_once", lambda models, num_tokens: 1)
    assert call_tiny(*arguments).code == 0
    whole = trials_in(tmp_path / "out" / "run")

    class Killed(BaseException):
        pass

    def keep_targets(recorder, learning):
        really_end(recorder, learning)
        if not learning.finished and next(ended) == 4:  # two of each trial's three batches are counted
            raise Killed

    really_end, ended = vpt.Recorder.keep_targets, iter(range(10**6))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(vpt.Recorder, "keep_targets", keep_targets)
        call_tiny(*arguments)
    assert call_tiny(*arguments, "--resume").code == 0
    assert trials_in(tmp_path / "out" / "run") == whole


def test_a_trial_that_diverges_has_not_reached_the_accuracy(call_tiny, model_folders, tmp_path):
    spoil_text_head(model_folders[0])
    assert call_tiny(*SEARCH).code == 0
    assert trials_in(tmp_path / "out" / "run") == [("1", "0.0", "1", "False")]
    assert summary_in(tmp_path / "out" / "run")["capacity_tokens"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_trial_and_its_reconstruction_have_the_same_accuracy(call_tiny, tmp_path, monkeypatch, dtype):
    really_learn, found = vpt.learn, []

    def learn(models, codes, given_m, record):
        learning = really_learn(models, codes, given_m, record)
        reconstruction = vpt.reconstruct(models, learning.best, learning.codes, learning.predictions)
        num_correct = reconstruction.predictions.num_correct.min().item()
        found.append((str(codes.shape[1]), str(100 * num_correct / codes.shape[1])))
        return learning

    monkeypatch.setattr(vpt, "learn", learn)
    assert call_tiny(*SEARCH, "--dtype", dtype).code == 0
    assert [trial[:2] for trial in trials_in(tmp_path / "out" / "run")] == found


def test_wandb_gets_a_row_for_each_trial_and_a_table(call_tiny, tmp_path):
    result = call_tiny(*SEARCH, "--use-wandb", env={"WANDB_MODE": "offline"})
    assert result.code == 0, result.err
    run, trials = wandb_file.read(tmp_path), trials_in(tmp_path / "out" / "run")
    rows = [row for row in run.history if "capacity/num_tokens" in row]
    assert [str(row["capacity/num_tokens"]) for row in rows] == [num_tokens for num_tokens, *_ in trials]
    assert run.summary["capacity_tokens"] > 0
    assert any(row.get("trials/_type") == "table-file" for row in run.history)
