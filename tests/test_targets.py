"""Several targets, a given m, controls, and the moving picture, as whole runs: what they write and what they refuse."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from support import wandb_file
from support.contract import FILES
from support.results import config_in, refused, results_of, summary_in
from support.results import tensors_in as stored
from support.tiny_model import save_tiny_generator

import verify_proto_tokens as vpt

TWO = ("--prompt", "a cat", "--prompt", "a dog")


@pytest.fixture
def run_into(call_tiny, tmp_path):
    """Runs the script on the tiny model into a folder of this name; gives the folder."""

    def run(name, *arguments):
        result = call_tiny("--save-dir", "out", "--wandb-run-name", name, *arguments)
        assert result.code == 0, result.err
        return tmp_path / "out" / name

    return run


def test_several_targets_leave_the_files_of_one_with_an_e_t_each(run_into):
    folder = run_into("two", *TWO)
    assert {file.name for file in folder.iterdir()} == FILES
    tensors = stored(folder)
    assert tensors["e_t"].shape == (2, 1, 32) and tensors["m"].shape == (1, 32)
    assert tensors["target_ids"].shape == tensors["predicted_ids"].shape == (2, 16)
    summary = summary_in(folder)
    assert summary["total_params"] == 3 * 32 and summary["num_targets"] == 2
    assert summary["num_errors"] == int((tensors["target_ids"] != tensors["predicted_ids"]).sum())
    assert config_in(folder)["prompt"] == ["a cat", "a dog"]
    assert Image.open(folder / "reference_image.png").size == (32, 16)  # side by side


def test_targets_of_their_own_m_have_one_each(run_into):
    folder = run_into("own", *TWO, "--m", "own", "--num-e-tokens", 3)
    assert stored(folder)["m"].shape == (2, 32) and stored(folder)["e_t"].shape == (2, 3, 32)
    assert summary_in(folder)["total_params"] == 2 * (3 + 1) * 32


def test_an_m_from_an_earlier_run_is_kept_and_not_counted_as_learned(run_into):
    first = run_into("first", *TWO)
    second = run_into("second", "--prompt", "a fox", "--m-from", first / "proto_tokens.safetensors")
    assert torch.equal(stored(second)["m"], stored(first)["m"])
    assert summary_in(second)["total_params"] == 32


def test_an_m_that_does_not_fit_is_refused(run_into, call_tiny, model_folders, tmp_path):
    own = run_into("own", *TWO, "--m", "own") / "proto_tokens.safetensors"
    refused(call_tiny("--m-from", own), "--m-from", "one for each target")
    refused(call_tiny("--m-from", tmp_path / "nowhere"), "--m-from", "no such file")
    (tmp_path / "text").write_text("no tensors")
    refused(call_tiny("--m-from", tmp_path / "text"), "--m-from", "damaged")
    shared = run_into("shared") / "proto_tokens.safetensors"
    save_tiny_generator(model_folders[0], hidden_size=64)
    refused(call_tiny("--m-from", shared), "--m-from", "another model (hidden_size 32, not 64)")


def test_an_m_learned_for_an_untrained_generator_is_refused_for_the_trained_one(run_into, call_tiny):
    file = run_into("control", "--control", "untrained") / "proto_tokens.safetensors"
    refused(call_tiny("--m-from", file), "--m-from", "untrained control seed 42, not none")
    refused(call_tiny("--m-from", file, "--control", "untrained", "--seed", 7), "seed 42, not seed 7")
    assert run_into("again", "--m-from", file, "--control", "untrained")


@pytest.mark.parametrize("option", ["--m-from", "--from-proto-tokens"])
def test_a_run_does_not_replace_its_own_input(run_into, call_tiny, option):
    file = run_into("mine") / "proto_tokens.safetensors"
    before = file.read_bytes()
    refused(call_tiny("--save-dir", "out", "--wandb-run-name", "mine", option, file), option, "own folder")
    assert file.read_bytes() == before


def misfit(tensors: dict, settings: dict, change: str) -> None:
    if change == "flat ids":
        tensors["target_ids"] = tensors["target_ids"][0]
    elif change == "ids that are no ids":
        tensors["target_ids"] = tensors["target_ids"].float()
    elif change == "ids beyond the codebook":
        tensors["target_ids"] = tensors["target_ids"] + 1000
    elif change == "no square":
        tensors["target_ids"] = tensors["target_ids"][:, :15]
    elif change == "narrow m":
        tensors["m"], tensors["e_t"] = tensors["m"][:, :8], tensors["e_t"][..., :8]
    elif change == "not a number":
        tensors["e_t"] = tensors["e_t"] * torch.nan
    elif change == "prompts":
        settings["prompt"] = ["a", "b"]
    elif change == "no settings":
        settings.clear()


MISFITS = ["flat ids", "ids that are no ids", "ids beyond the codebook", "no square", "narrow m", "not a number"]


@pytest.mark.parametrize("option", ["--m-from", "--from-proto-tokens"])
@pytest.mark.parametrize("change", [*MISFITS, "prompts", "no settings"])
def test_proto_tokens_that_do_not_fit_their_own_settings_are_refused(run_into, call_tiny, tmp_path, option, change):
    file = run_into("mine") / "proto_tokens.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in ("e_t", "m", "target_ids")}
        settings = json.loads(opened.metadata()["settings"])
    misfit(tensors, settings, change)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, tmp_path / "odd.safetensors", {"settings": json.dumps(settings)})
    refused(call_tiny("--save-dir", "other", option, tmp_path / "odd.safetensors"), option, "damaged")


def test_more_e_tokens_than_positions_are_refused(call_tiny):
    refused(call_tiny("--num-e-tokens", 17), "--num-e-tokens 17", "16 tokens")


def test_stored_proto_tokens_of_several_targets_give_all_their_pictures_again(run_into):
    first = run_into("first", *TWO, "--num-e-tokens", 2)
    again = run_into("again", "--from-proto-tokens", first / "proto_tokens.safetensors")
    for name in ("reconstructed_image.png", "reference_image.png", "comparison.png"):
        assert (again / name).read_bytes() == (first / name).read_bytes()
    assert summary_in(again)["targets/1/best_accuracy"] == summary_in(first)["targets/1/best_accuracy"]


def test_a_control_keeps_everything_but_its_target(run_into):
    plain, random, shuffled = (
        run_into("plain"),
        run_into("r", "--control", "random"),
        run_into("s", "--control=shuffled"),
    )
    ids = [stored(folder)["target_ids"] for folder in (plain, random, shuffled)]
    assert torch.equal(ids[0].sort().values, ids[2].sort().values) and not torch.equal(ids[0], ids[2])
    assert not torch.equal(ids[0].sort().values, ids[1].sort().values)


def test_stored_proto_tokens_of_shuffled_codes_are_judged_by_the_codes_they_learned(run_into):
    control = run_into("control", "--control", "shuffled", "--num-steps", 20)
    again = run_into("again", "--from-proto-tokens", control / "proto_tokens.safetensors")
    assert torch.equal(stored(again)["target_ids"], stored(control)["target_ids"])
    assert summary_in(again)["num_errors"] == summary_in(control)["num_errors"]


def test_the_untrained_control_keeps_the_target_and_can_be_reconstructed(run_into):
    plain, control = run_into("plain"), run_into("control", "--control", "untrained")
    assert torch.equal(stored(plain)["target_ids"], stored(control)["target_ids"])
    assert not torch.equal(stored(plain)["e_t"], stored(control)["e_t"])
    again = run_into("again", "--from-proto-tokens", control / "proto_tokens.safetensors")
    assert torch.equal(stored(again)["predicted_ids"], stored(control)["predicted_ids"])


def test_the_moving_picture_has_a_frame_every_so_many_steps_also_after_an_interruption(run_into, call_tiny, tmp_path):
    arguments = ("--num-steps", 12, "--target-accuracy", 0, "--image-every", 3)
    whole = run_into("whole", *arguments)
    assert Image.open(whole / "progress.gif").n_frames == 4
    assert [file.name for file in sorted((whole / "progress").iterdir())] == [
        f"step_{step:06}.png" for step in (3, 6, 9, 12)
    ]
    with pytest.MonkeyPatch.context() as patch:

        def fail(recorder, learning):
            really_keep(recorder, learning)
            if learning.step == 9:
                raise vpt.UserError("stopped on purpose")

        really_keep = vpt.Recorder.keep_frame
        patch.setattr(vpt.Recorder, "keep_frame", fail)
        assert call_tiny("--save-dir", "out", "--wandb-run-name", "cut", *arguments, "--save-every", 7).code == 2
    cut = run_into("cut", *arguments, "--resume")
    assert (cut / "progress.gif").read_bytes() == (whole / "progress.gif").read_bytes()
    assert results_of(cut) == results_of(whole)


def test_wandb_gets_each_targets_own_figures_and_a_table(call_tiny, tmp_path):
    result = call_tiny(*TWO, "--use-wandb", env={"WANDB_MODE": "offline"})
    assert result.code == 0, result.err
    run = wandb_file.read(tmp_path)
    assert run.summary.keys() >= {"targets/0/best_accuracy", "targets/1/best_accuracy", "information_gain_bits"}
    rows = [row for row in run.history if "train/loss" in row]
    assert all({"targets/0/accuracy", "targets/1/loss"} <= row.keys() for row in rows)
    (table,) = [row for row in run.history if row.get("targets/_type") == "table-file"]
    content = json.loads((run.folder / "files" / table["targets/path"]).read_text())
    assert content["columns"] == ["prompt", "reference", "reconstruction", "error_map", "accuracy"]
    assert [row[0] for row in content["data"]] == ["a cat", "a dog"]
