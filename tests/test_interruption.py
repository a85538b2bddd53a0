"""Test interrupted runs: what a kill, a signal, a full disk or a second run leaves, and that resuming loses nothing."""

import builtins
import contextlib
import io
import itertools
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.builders import Rows, learn_all, take_step
from support.contract import COLUMNS, STATE
from support.processes import ended, kill, let_go_on, start_code, start_pausing, start_script, wait_for
from support.results import refused, results_of, rows_of, steps_in, summary_in
from support.tiny_model import save_tiny_generator, tiny_arguments

import verify_proto_tokens as vpt

TWENTY_STEPS = ("--num-steps", 20, "--save-every", 5, "--target-accuracy", 0, "--wandb-run-name", "run")


@pytest.fixture(scope="module")
def interrupted_once(tiny_folder, tmp_path_factory):
    """Stop a run by SIGTERM after step 7; return its arguments, its exit code and output, and its save directory."""
    folder = tmp_path_factory.mktemp("interrupted")
    arguments = (*tiny_arguments(tiny_folder), *TWENTY_STEPS)
    process = start_pausing(folder, 7, *arguments, "--save-dir", "out")
    process.send_signal(signal.SIGTERM)
    let_go_on(folder)
    return arguments, ended(process, 10), folder / "out"


@pytest.fixture
def interrupted(interrupted_once, tmp_path):
    """Copy the save directory of `interrupted_once`, so that a test can change it."""
    arguments, end, save_dir = interrupted_once
    shutil.copytree(save_dir, tmp_path / "out")
    return (*arguments, "--save-dir", tmp_path / "out"), end, tmp_path / "out" / "run"


def interrupted_after(steps: int, first: vpt.Optimisation, second: vpt.Optimisation) -> tuple[list, vpt.Optimisation]:
    """Take `steps` steps with `first`; return their rows, and `second` with the state of `first`."""
    rows = [take_step(first) for _ in range(steps)]
    state = io.BytesIO()
    torch.save(first.state_dict(), state)
    state.seek(0)
    second.load_state_dict(torch.load(state, weights_only=True))
    return rows, second


@pytest.mark.parametrize("options", [(), ("--m", "own"), ("--num-e-tokens", "2"), "given m"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_restored_state_continues_bit_for_bit(tiny_models, make_args, batch, options):
    given_m = torch.full((1, 32), 0.2) if options == "given m" else None
    args = make_args("--num-steps", "12", *(() if options == "given m" else options))
    codes = torch.arange(16 * batch).view(batch, 16) % 12

    def optimisation() -> vpt.Optimisation:
        return vpt.Optimisation(tiny_models, codes, args, given_m)

    whole, rows = optimisation(), Rows()
    learn_all(whole, rows)
    for interruption in (1, 5, 11):
        before, second = interrupted_after(interruption, optimisation(), optimisation())
        after = Rows()
        learn_all(second, after)
        assert before + after == rows
        assert torch.equal(second.best.points, whole.best.points)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adamw"])
def test_a_state_saved_after_some_targets_ended_continues_bit_for_bit(tiny_models, make_args, optimizer):
    """Save the state also after all targets have ended; the last two end in the same step."""
    args = make_args("--m", "own", "--optimizer", optimizer, "--num-steps", 12, "--target-accuracy", 40)
    codes = torch.stack([torch.zeros(16, dtype=torch.long), torch.arange(16) % 12, torch.arange(16) % 11])

    def optimisation() -> vpt.Optimisation:
        return vpt.Optimisation(tiny_models, codes, args)

    whole, rows = optimisation(), Rows()
    learn_all(whole, rows)
    first_end, *ends = whole.targets["steps"].tolist()
    assert first_end < 11 and ends == [12, 12]
    for interruption in (first_end, 11, 12):
        before, second = interrupted_after(interruption, optimisation(), optimisation())
        after = Rows()
        if not second.finished:
            learn_all(second, after)
        assert before + after == rows
        assert torch.equal(second.best.points, whole.best.points)


def test_a_signal_in_the_last_step_loses_nothing(model_folders, call_script, tmp_path):
    arguments = (*tiny_arguments(tmp_path), *TWENTY_STEPS, "--log-every", 7, "--save-dir", "out")
    process = start_pausing(tmp_path, 20, *arguments)
    process.send_signal(signal.SIGTERM)
    let_go_on(tmp_path)
    assert ended(process).code == 143 and steps_in(tmp_path / "out" / "run") == [1, 7, 14, 20]
    assert "resumed after step 20" in call_script(*arguments, "--resume").out
    assert steps_in(tmp_path / "out" / "run") == [1, 7, 14, 20]


def test_a_run_killed_three_times_and_resumed_ends_as_if_nothing_had_happened(model_folders, call_script, tmp_path):
    arguments = (*tiny_arguments(tmp_path), *TWENTY_STEPS)
    assert call_script(*arguments, "--save-dir", "whole").code == 0
    killed = (*arguments, "--save-dir", "killed", "--resume")
    for last_step in (7, 12, 19):  # beyond the states saved after steps 5, 10 and 15
        process = start_pausing(tmp_path, last_step, *killed)
        rows = rows_of(tmp_path / "killed" / "run" / "history.csv")  # which can be followed while the run goes on
        assert list(rows[0]) == COLUMNS and rows[-1]["step"] == str(last_step)
        kill(process)
        assert steps_in(tmp_path / "killed" / "run") == list(range(1, last_step + 1))
    result = call_script(*killed)
    assert result.code == 0 and "resumed after step 15" in result.out
    assert results_of(tmp_path / "killed" / "run") == results_of(tmp_path / "whole" / "run")
    names = {file.name for file in (tmp_path / "killed" / "run").iterdir() if not file.name.endswith(".partial")}
    assert names == {file.name for file in (tmp_path / "whole" / "run").iterdir()}


@pytest.mark.parametrize("options", [(), ("--prompt", "a", "--prompt", "b", "--m", "own")])
def test_a_run_killed_while_its_results_are_made_takes_no_further_step(call_tiny, tmp_path, monkeypatch, options):
    """Reach the target accuracy early: the resumed run must not use the steps that are left."""
    arguments = ("--num-steps", 40, "--target-accuracy", 20, *options, "--wandb-run-name", "run")
    assert call_tiny(*arguments, "--save-dir", "whole").code == 0
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(vpt, "reconstruct", lambda *_: 1 / 0)
        call_tiny(*arguments, "--save-dir", "cut")
    assert call_tiny(*arguments, "--save-dir", "cut", "--resume").code == 0
    assert results_of(tmp_path / "cut" / "run") == results_of(tmp_path / "whole" / "run")
    assert summary_in(tmp_path / "cut" / "run")["steps"] < 40


def test_resuming_a_run_killed_after_its_summary_removes_its_unfinished_files(call_tiny, tmp_path, monkeypatch):
    arguments = ("--save-dir", "out", "--wandb-run-name", "run")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(vpt, "remove_unfinished", lambda folder: (folder / "summary.json").exists() and 1 / 0)
        call_tiny(*arguments)
    assert "finished" in call_tiny(*arguments, "--resume").out
    assert not (tmp_path / "out" / "run" / STATE).exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("step;loss\r\n1;2\r\n")])
def test_a_deleted_or_damaged_history_is_written_again(interrupted, call_script, damage):
    arguments, _, folder = interrupted
    damage(folder / "history.csv")
    result = call_script(*arguments, "--resume")
    assert "resumed after step 7" in result.out and steps_in(folder) == list(range(1, 21))


def test_sigterm_saves_the_state_and_ends_with_143_and_one_line(interrupted):
    _, end, folder = interrupted
    assert end.code == 143
    assert "SIGTERM" in end.err.splitlines()[-1] and "--resume" in end.err and "Traceback" not in end.err
    assert (folder / STATE).exists() and not (folder / "summary.json").exists()


def test_ctrl_c_before_the_first_step_ends_the_process_without_a_traceback(model_folders, tmp_path):
    process = start_script(
        tmp_path, *tiny_arguments(tmp_path), *TWENTY_STEPS, "--num-steps", 10**6, "--save-dir", "out"
    )
    wait_for((tmp_path / "out" / "run").exists, process)
    process.send_signal(signal.SIGINT)
    end = ended(process, 20)
    assert end.code in (-signal.SIGINT, 130) and "Traceback" not in end.err


def test_a_run_stopped_by_a_signal_goes_on_where_it_stood(interrupted, call_script):
    arguments, _, folder = interrupted
    result = call_script(*arguments, "--resume")
    assert result.code == 0 and "resumed after step 7" in result.out
    assert steps_in(folder) == list(range(1, 21))
    assert not (folder / STATE).exists()


def test_a_resumed_run_keeps_a_target_that_could_not_be_generated_again(interrupted, call_script, monkeypatch):
    """Resume as if on another device or torch version, with other random numbers and another cache entry."""
    arguments, _, folder = interrupted
    monkeypatch.setattr(vpt.torch, "__version__", "2.13.0+another")
    monkeypatch.setattr(vpt, "generate_visual_codes", None)
    assert call_script(*arguments, "--resume").code == 0
    assert steps_in(folder) == list(range(1, 21))


def test_resuming_with_other_settings_is_refused_and_names_them(interrupted, call_script):
    arguments, _, folder = interrupted
    before = (folder / STATE).read_bytes()
    result = call_script(*arguments, "--resume", "--learning-rate", 0.05, "--seed", 43)
    assert result.code == 2 and len(result.err.strip().splitlines()) == 1
    assert "learning_rate (0.2, now 0.05)" in result.err and "seed (42, now 43)" in result.err
    assert (folder / STATE).read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "one bit"])
def test_a_damaged_state_is_refused_in_one_line(interrupted, call_script, damage):
    arguments, _, folder = interrupted
    whole = (folder / STATE).read_bytes()
    numbers = vpt.read_state(folder)["learning"]["points"].numpy().tobytes()
    if damage == "cut":
        (folder / STATE).write_bytes(whole[: len(whole) // 2])
    else:
        changed = bytes([numbers[0] ^ 1]) + numbers[1:]
        assert whole.count(numbers) == 1
        (folder / STATE).write_bytes(whole.replace(numbers, changed))
    refused(call_script(*arguments, "--resume"), STATE, "leave out --resume")


def test_replacing_an_interrupted_or_a_finished_run_prints_a_note(interrupted, call_script):
    arguments, _, _ = interrupted
    for kind in ("interrupted", "finished"):
        result = call_script(*arguments)
        assert result.code == 0 and "note: this replaces the run in" in result.out, kind


def test_the_error_about_other_settings_shortens_long_values(interrupted, call_script):
    arguments, _, _ = interrupted
    prompts = [word for number in range(300) for word in ("--prompt", f"thing number {number}")]
    result = call_script(*arguments, "--resume", *prompts)
    refused(result, "prompt (", "...")
    assert len(result.err) < 1000


def test_resume_starts_a_new_run_and_leaves_a_finished_run_unchanged(call_tiny, tmp_path):
    arguments = ("--resume", "--save-dir", "out", "--wandb-run-name", "run")
    assert call_tiny(*arguments).code == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out" / "run").iterdir()}
    again = call_tiny(*arguments)
    assert again.code == 0 and "finished" in again.out
    assert {file.name: file.read_bytes() for file in (tmp_path / "out" / "run").iterdir()} == before
    other = call_tiny(*arguments, "--seed", 7)
    assert other.code == 2 and "seed (42, now 7)" in other.err


def test_a_run_locks_its_folder_until_a_second_signal_ends_it_at_once(model_folders, call_script, tmp_path):
    arguments = (*tiny_arguments(tmp_path), *TWENTY_STEPS, "--save-dir", "out")
    first = start_pausing(tmp_path, 6, *arguments)
    second = call_script(*arguments)
    assert second.code == 2 and "another run is at work" in second.err
    first.send_signal(signal.SIGSTOP)  # so that both signals are pending before it can handle one
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGCONT)
    assert ended(first, 10).code in (130, 143)
    assert call_script(*arguments, "--resume").code == 0  # it left no lock


def test_a_run_that_fails_before_its_first_result_leaves_nothing(call_tiny, tmp_path):
    result = call_tiny("--image-size", 17, "--save-dir", tmp_path / "new" / "out")
    assert result.code == 2
    assert not (tmp_path / "new").exists()


def test_log_every_thins_the_history_and_changes_nothing_else(call_tiny, tmp_path):
    for every in (1, 10):
        assert call_tiny("--num-steps", 25, "--log-every", every, "--save-dir", tmp_path / str(every)).code == 0
    (one,), (ten,) = (list((tmp_path / str(every)).glob("proto_*")) for every in (1, 10))
    rows = (one / "history.csv").read_text().splitlines()
    assert (ten / "history.csv").read_text().splitlines() == [rows[line] for line in (0, 1, 10, 20, 25)]
    assert results_of(one)[0] == results_of(ten)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Writes that fail


@contextlib.contextmanager
def full_disk_at(write: int):
    """Put the `write`-th file that is opened for writing on a full device; yield the names of all such files."""
    count, really_open = itertools.count(1), builtins.open
    opened = []

    def open_(file, mode="r", *rest, **options):
        if str(file).endswith((".partial", "history.csv")) and "r" not in mode.replace("+", ""):
            opened.append(Path(file).name)
            if next(count) == write:
                file = "/dev/full"
        return really_open(file, mode, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", open_)
        patch.setattr(builtins, "open", open_)
        yield opened


def assert_every_file_is_whole(save_dir: Path) -> None:
    """Assert that no temporary file is left and that every file can be read."""
    for file in (file for file in save_dir.rglob("*") if file.is_file()):
        assert ".partial" not in file.name
        if file.suffix == ".png":
            Image.open(file).verify()
        elif file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            load_file(file)
        elif file.suffix == ".pt":
            vpt.read_state(file.parent)
        else:
            assert file.name == "history.csv" and file.read_text()[-1:] in ("", "\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here that is always full")
def test_any_failed_write_is_reported_in_one_line_and_the_run_can_be_resumed(call_tiny, tmp_path):
    arguments = ("--num-steps", 5, "--save-every", 4, "--target-accuracy", 0, "--wandb-run-name", "run")
    with full_disk_at(0) as opened:
        assert call_tiny(*arguments, "--save-dir", "whole").code == 0
    assert len(opened) == 17, opened  # each of them fails in turn
    for write in range(1, len(opened) + 1):
        folder = tmp_path / f"failed{write}"
        with full_disk_at(write):
            result = call_tiny(*arguments, "--save-dir", folder)
        assert "cannot write" in result.err and "No space left" in result.err and "Traceback" not in result.err
        if write == 1:  # the cached reference, which this run does not need
            assert result.code == 0 and "not kept for later runs" in result.err
            continue
        assert result.code == 2
        assert not (folder / "run" / "summary.json").exists()
        assert_every_file_is_whole(folder)
        assert call_tiny(*arguments, "--save-dir", folder, "--resume").code == 0
        assert results_of(folder / "run") == results_of(tmp_path / "whole" / "run")


def test_the_next_run_of_the_same_name_removes_temporary_files_of_a_killed_run(call_tiny, tmp_path):
    (tmp_path / "out/run").mkdir(parents=True)
    (tmp_path / "out/run/history.csv.7.partial").write_text("half")
    (tmp_path / "out/run/my.partial").write_text("a user's own")
    assert call_tiny("--save-dir", "out", "--wandb-run-name", "run").code == 0
    assert {file.name for file in (tmp_path / "out").rglob("*.partial")} == {"my.partial"}


# ----------------------------------------------------------------------------------------------------------------------
# Out of memory

HUNGRY = """
import resource
import sys
import verify_proto_tokens as v
load = v.load_models
def load_models(args):
    models = load(args)
    held = 1024 * int(next(row.split()[1] for row in open("/proc/self/status") if row.startswith("VmSize")))
    resource.setrlimit(resource.RLIMIT_AS, (held + 100 * 2**20,) * 2)
    return models
v.load_models = load_models
v.main(v.parse_args(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no such limit here")
@pytest.mark.parametrize("choice", ["auto", "off"])
def test_out_of_memory_in_a_step_recomputes_layers_or_names_remedies(model_folders, tmp_path, choice):
    """Leave 100 MiB: a step keeps about 240 MB for eight such wide layers, or 30 MB if it recomputes them."""
    save_tiny_generator(model_folders[0], intermediate_size=30_000, num_hidden_layers=8)
    hungry = (*tiny_arguments(tmp_path), "--save-dir", "out", "--image-size", 32, "--num-steps", 2)
    end = ended(start_code(HUNGRY, tmp_path, *hungry, "--gradient-checkpointing", choice))
    if choice == "auto":
        assert end.code == 0 and "note: out of memory for a step: going on with" in end.out, end.err
        return
    (line,) = [row for row in end.err.splitlines() if "error" in row]
    assert end.code == 2 and "out of memory" in line
    assert "--gradient-checkpointing" in line and "--image-size" in line
    (folder,) = (tmp_path / "out").glob("proto_*")
    assert vpt.read_state(folder)["learning"]["points"].isfinite().all()


def test_a_run_that_failed_in_its_first_step_is_resumed_and_draws_its_curves(call_tiny, tmp_path, monkeypatch):
    arguments = ("--num-steps", 2, "--save-dir", "out", "--use-wandb", "--wandb-mode", "offline")
    with monkeypatch.context() as patch:

        def step(*_):
            raise MemoryError("Unable to allocate 13.5 MiB for an array")

        patch.setattr(vpt, "loss_and_gradient", step)
        refused(call_tiny(*arguments), "out of memory")
    result = call_tiny(*arguments, "--resume")
    assert result.code == 0 and "resumed after step 0" in result.out, result.err
    assert list((tmp_path / "out").glob("*/training_curves.png"))


def test_out_of_memory_while_drawing_is_reported_in_one_line_and_loses_no_step(call_tiny, tmp_path, monkeypatch):
    arguments = ("--num-steps", 5, "--save-dir", "out", "--wandb-run-name", "run")
    with monkeypatch.context() as patch:

        def draw(*_):
            raise MemoryError("Unable to allocate 13.5 MiB for an array")

        patch.setattr(vpt, "draw_results", draw)
        refused(call_tiny(*arguments), "out of memory")
    assert "resumed after step 5" in call_tiny(*arguments, "--resume").out
    assert summary_in(tmp_path / "out" / "run")["steps"] == 5


# ----------------------------------------------------------------------------------------------------------------------
# An earlier run's proto-tokens


@pytest.fixture
def stored(call_tiny, tmp_path):
    assert call_tiny("--save-dir", "out", "--wandb-run-name", "run").code == 0
    return tmp_path / "out" / "run"


def test_proto_tokens_of_an_earlier_run_reconstruct_its_picture_without_optimising(stored, call_tiny, tmp_path):
    file = stored / "proto_tokens.safetensors"
    result = call_tiny("--from-proto-tokens", file, "--save-dir", "again")
    assert result.code == 0, result.err
    (folder,) = (folder for folder in (tmp_path / "again").iterdir() if folder.name != "reference_cache")
    for name in ("reconstructed_image.png", "reference_image.png", "token_error_map.png"):
        assert (folder / name).read_bytes() == (stored / name).read_bytes()
    assert not (folder / "history.csv").exists()
    earlier, summary = summary_in(stored), summary_in(folder)
    assert summary["best_accuracy"] == earlier["best_accuracy"] and "steps" not in summary


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_proto_tokens_file_that_does_not_load_is_refused_in_one_line(stored, call_tiny, damage):
    file = stored / "proto_tokens.safetensors"
    whole = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    result = call_tiny("--from-proto-tokens", file)
    assert result.code == 2 and file.name in result.err and len(result.err.strip().splitlines()) == 1


def test_proto_tokens_of_another_model_are_refused(stored, call_tiny, model_folders):
    save_tiny_generator(model_folders[0], hidden_size=64)
    result = call_tiny("--from-proto-tokens", stored / "proto_tokens.safetensors")
    assert result.code == 2 and "another model (hidden_size 32, not 64)" in result.err
