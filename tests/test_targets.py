"""Test whole runs with several targets, a given m, controls and the moving picture: what they write and refuse."""

import json
import math

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from support import wandb_file
from support.builders import memory_for, optimise, random_codes
from support.contract import FILES
from support.results import config_in, refused, results_of, rows_of, steps_in, summary_in
from support.results import tensors_in as stored
from support.tiny_model import save_tiny_generator, spoil_text_head

import verify_proto_tokens as vpt

TWO = ("--prompt", "a cat", "--prompt", "a dog")


@pytest.fixture
def run_into(call_tiny, tmp_path):
    """Return a function that runs the script on the tiny models into the folder `name`, and returns the folder."""

    def run(name, *arguments):
        result = call_tiny("--save-dir", "out", "--wandb-run-name", name, *arguments)
        assert result.code == 0, result.err
        return tmp_path / "out" / name

    return run


def test_several_targets_leave_the_usual_files_and_have_an_e_t_each(run_into):
    folder = run_into("two", *TWO)
    assert {file.name for file in folder.iterdir()} == FILES | {"targets.csv"}
    tensors = stored(folder)
    assert tensors["e_t"].shape == (2, 1, 32) and tensors["m"].shape == (1, 32)
    assert tensors["target_ids"].shape == tensors["predicted_ids"].shape == (2, 16)
    summary = summary_in(folder)
    assert summary["total_params"] == 3 * 32 and summary["num_targets"] == 2
    assert summary["num_errors"] == int((tensors["target_ids"] != tensors["predicted_ids"]).sum())
    assert config_in(folder)["prompt"] == ["a cat", "a dog"]
    assert Image.open(folder / "reference_image.png").size == (32, 16)  # side by side


def test_targets_that_do_not_share_m_have_one_m_each(run_into):
    folder = run_into("own", *TWO, "--m", "own", "--num-e-tokens", 3)
    assert stored(folder)["m"].shape == (2, 32) and stored(folder)["e_t"].shape == (2, 3, 32)
    assert summary_in(folder)["total_params"] == 2 * (3 + 1) * 32


def test_an_m_from_an_earlier_run_is_kept_and_not_counted_as_learned(run_into):
    first = run_into("first", *TWO)
    second = run_into("second", "--prompt", "a fox", "--m-from", first / "proto_tokens.safetensors")
    assert torch.equal(stored(second)["m"], stored(first)["m"])
    assert summary_in(second)["total_params"] == 32


@pytest.mark.parametrize("option", ["--m-from", "--from-proto-tokens"])
def test_an_earlier_run_may_be_named_by_its_folder(run_into, call_tiny, tmp_path, option):
    first = run_into("first")
    assert torch.equal(stored(run_into("second", option, first))["m"], stored(first)["m"])
    (tmp_path / "empty").mkdir()
    refused(call_tiny(option, "empty"), f"{option} empty/proto_tokens.safetensors is missing")


def test_an_m_that_does_not_fit_is_refused(run_into, call_tiny, model_folders, tmp_path):
    own = run_into("own", *TWO, "--m", "own") / "proto_tokens.safetensors"
    refused(call_tiny("--m-from", own), "--m-from", "one for each target")
    refused(call_tiny("--m-from", tmp_path / "nowhere"), "--m-from", "is missing")
    (tmp_path / "text").write_text("no tensors")
    refused(call_tiny("--m-from", tmp_path / "text"), "--m-from", "damaged")
    shared = run_into("shared") / "proto_tokens.safetensors"
    save_tiny_generator(model_folders[0], hidden_size=64)
    refused(call_tiny("--m-from", shared), "--m-from", "another model (hidden_size 32, not 64)")


def test_an_m_learned_for_an_untrained_generator_is_refused_for_the_trained_one(run_into, call_tiny):
    file = run_into("control", "--control", "untrained") / "proto_tokens.safetensors"
    refused(call_tiny("--m-from", file), "--m-from", "control untrained, not None")
    refused(call_tiny("--m-from", file, "--control", "untrained", "--seed", 7), "seed 42, not 7")
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
    elif change == "size in words":
        settings["image_size"] = "256"
    elif change == "no settings":
        settings.clear()


MISFITS = ["flat ids", "ids that are no ids", "ids beyond the codebook", "no square", "narrow m", "not a number"]


@pytest.mark.parametrize("option", ["--m-from", "--from-proto-tokens"])
@pytest.mark.parametrize("change", [*MISFITS, "prompts", "size in words", "no settings"])
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


def test_proto_tokens_keep_the_settings_that_they_were_learned_with(run_into):
    first = run_into("first", "--learning-rate", 0.1)
    again = run_into("again", "--from-proto-tokens", first)
    third = run_into("third", "--from-proto-tokens", again)
    assert config_in(third)["learned_with"] == config_in(again)["learned_with"]
    assert config_in(third)["learned_with"]["learning_rate"] == 0.1


def test_stored_proto_tokens_keep_their_own_size_and_vocabulary(run_into):
    first = run_into("first", "--image-size", 24, "--vocabulary", "visual")
    again = run_into("again", "--from-proto-tokens", first / "proto_tokens.safetensors", "--image-size", 16)
    assert config_in(again)["image_size"] == 24 and config_in(again)["vocabulary"] == "visual"
    assert torch.equal(stored(again)["predicted_ids"], stored(first)["predicted_ids"])


def test_the_table_has_bits_and_psnr_of_each_target_at_the_end(run_into):
    folder = run_into("two", *TWO)
    for k, row in enumerate(rows_of(folder / "targets.csv")):
        for name in ("proto_bits", "information_gain_bits", "psnr"):
            assert float(row[name]) == pytest.approx(summary_in(folder)[f"targets/{k}/{name}"])


def test_controls_learn_shuffled_or_random_codes(run_into):
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


def test_the_moving_picture_has_a_frame_every_few_steps_even_after_an_interruption(run_into, call_tiny, tmp_path):
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


def test_files_beside_the_frames_of_a_moving_picture_are_left_alone(run_into, tmp_path):
    arguments = ("--num-steps", 3, "--target-accuracy", 0, "--image-every", 3)
    copy = run_into("run", *arguments) / "progress" / "step_000003 copy.png"
    copy.write_bytes(b"mine")
    run_into("run", *arguments)
    assert copy.read_bytes() == b"mine" and len(list(copy.parent.iterdir())) == 2


def test_wandb_gets_each_targets_own_figures_and_a_table(call_tiny, tmp_path):
    result = call_tiny(*TWO, "--use-wandb", env={"WANDB_MODE": "offline"})
    assert result.code == 0, result.err
    run = wandb_file.read(tmp_path)
    assert run.summary.keys() >= {"targets/0/best_accuracy", "targets/1/best_accuracy", "information_gain_bits"}
    rows = [row for row in run.history if "train/loss" in row]
    assert all({"targets/0/accuracy", "targets/1/loss"} <= row.keys() for row in rows)
    (table,) = [row for row in run.history if row.get("targets/_type") == "table-file"]
    content = json.loads((run.folder / "files" / table["targets/path"]).read_text())
    assert {"reference", "reconstruction", "error_map", "best_accuracy", "steps"} <= set(content["columns"])
    assert [row[content["columns"].index("prompt")] for row in content["data"]] == ["a cat", "a dog"]


# ----------------------------------------------------------------------------------------------------------------------
# Many targets


ALONE = ("--m", "own", "--control", "random", "--num-steps", 30, "--target-accuracy", 25)


@pytest.fixture
def four_at_once(monkeypatch):
    """Limit batches to four targets; the tiny model would take all in one batch."""
    monkeypatch.setattr(vpt, "targets_at_once", lambda models, num_tokens: 4)


@pytest.fixture
def prompts_file(tmp_path):
    """Write prompts for more targets than figures show."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"a cat number {k}" for k in range(27)))
    return file


@pytest.fixture
def ten_prompts(tmp_path):
    """Write prompts for three batches of targets."""
    file = tmp_path / "ten_prompts.txt"
    file.write_text("\n".join(f"a cat number {k}" for k in range(10)))
    return file


def test_prompts_come_from_several_files_and_only_newlines_separate_them(tmp_path):
    (tmp_path / "a.txt").write_bytes("a red\u2028apple\r\n\r\nb\x85c\r\n".encode())
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthe last")
    args = vpt.parse_args(["--prompts-file", str(tmp_path / "a.txt"), "--prompts-file", str(tmp_path / "b.txt")])
    assert args.prompts == ["a red\u2028apple", "b\x85c", "the last"]


@pytest.mark.usefixtures("four_at_once")
def test_many_targets_learn_a_batch_at_a_time_and_each_gets_a_row_of_the_table(run_into, prompts_file):
    folder = run_into("many", "--prompts-file", prompts_file, *ALONE)
    rows, history = rows_of(folder / "targets.csv"), rows_of(folder / "history.csv")
    assert [row["prompt"] for row in rows] == prompts_file.read_text().splitlines()
    for row in rows:
        assert float(row["best_accuracy"]) >= 25 or int(row["steps"]) == 30
        assert 0 < int(row["best_step"]) <= int(row["steps"])
    assert len({row["steps"] for row in rows}) > 1
    assert stored(folder)["e_t"].shape == (27, 1, 32) and stored(folder)["m"].shape == (27, 32)
    assert stored(folder)["steps"].tolist() == [int(row["steps"]) for row in rows]
    assert stored(folder)["best_accuracy"].tolist() == [float(row["best_accuracy"]) for row in rows]
    assert not any(name.startswith("targets/0") for name in history[0])
    assert max(int(row["targets/in_flight"]) for row in history) == 4 and history[-1]["targets/ended"] == "27"
    spread = [float(history[-1][f"targets/best_p{percent}"]) for percent in (10, 50, 90)]
    assert spread == sorted(spread)
    steps, best = [int(row["step"]) for row in history], [float(row["train/best_accuracy"]) for row in history]
    assert best == sorted(best) and best[-1] == pytest.approx(summary_in(folder)["best_accuracy"])
    assert min(float(row["train/loss"]) for row in history) > 0
    assert len(steps) <= steps[-1] / 7 + 2  # seven batches: a row every seven steps
    assert (folder / "worst_targets.png").exists()
    assert summary_in(folder)["lowest_accuracy"] == min(float(row["best_accuracy"]) for row in rows)


def test_a_target_in_a_batch_ends_as_it_would_alone(tiny_models, make_args, monkeypatch):
    monkeypatch.setattr(vpt, "targets_at_once", lambda models, num_tokens: 3)
    codes = torch.randint(12, (7, 16), generator=torch.Generator().manual_seed(2))
    for options in ((), ("--optimizer", "adamw")):
        args = make_args("--m", "own", "--num-steps", 25, "--target-accuracy", 40, *options)
        in_batches, _ = optimise(tiny_models, args, codes)
        for k in range(7):
            alone, _ = optimise(tiny_models, args, codes[k : k + 1])
            best = in_batches.targets["best_accuracy"][k], alone.targets["best_accuracy"][0]
            assert best[0] == pytest.approx(best[1], abs=100 / 16)
            assert in_batches.targets["steps"][k] == pytest.approx(alone.step, abs=1)
            assert torch.allclose(in_batches.best.e_t[k], alone.best.e_t[0], atol=0.05)


def test_a_target_that_has_not_begun_has_no_numbers(tiny_models, make_args, monkeypatch):
    monkeypatch.setattr(vpt, "targets_at_once", lambda models, num_tokens: 1)
    args = make_args("--m", "own", "--num-steps", 4, "--target-accuracy", 0)
    _, rows = optimise(tiny_models, args, random_codes(tiny_models, batch=2))
    assert [row["targets/1/loss"] is None for row in rows] == [True] * 4 + [False] * 4
    assert rows[3]["train/loss"] == rows[3]["targets/0/loss"]
    assert rows[5]["train/loss"] == (rows[5]["targets/0/loss"] + rows[5]["targets/1/loss"]) / 2


def test_only_targets_that_still_learn_are_computed(tiny_models, make_args, monkeypatch):
    monkeypatch.setattr(vpt, "targets_at_once", lambda models, num_tokens: 3)
    args = make_args("--m", "own", "--num-steps", 30, "--target-accuracy", 40)
    with memory_for(tiny_models) as passes:
        learning, _ = optimise(
            tiny_models, args, torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(2))
        )
    assert sum(passes) == learning.targets["steps"].sum() and max(passes) == 3 and min(passes) < 3


def test_only_the_target_with_a_loss_that_is_not_finite_ends(tiny_models, make_args):
    def spoil_the_second(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state.clone()
        if len(output.last_hidden_state) > 2:
            output.last_hidden_state[1] *= torch.nan
        return output

    hook = tiny_models.generator.model.register_forward_hook(spoil_the_second)
    args = make_args("--m", "own", "--num-steps", 5, "--target-accuracy", 0)
    learning, rows = optimise(tiny_models, args, torch.zeros(3, 16, dtype=torch.long))
    hook.remove()
    assert learning.targets.diverged.tolist() == [False, True, False]
    assert learning.targets["steps"].tolist() == [5, 0, 5]
    assert all(math.isfinite(row["train/loss"]) for row in rows)


def test_the_last_step_is_logged_even_if_a_target_diverged_in_it(call_tiny, tmp_path, monkeypatch):
    passes, really_learn = [], vpt.loss_and_gradient

    def diverge_at_last(*arguments):
        passes.append(arguments)
        predictions = really_learn(*arguments)
        return predictions._replace(losses=predictions.losses * math.nan) if len(passes) == 9 else predictions

    monkeypatch.setattr(vpt, "loss_and_gradient", diverge_at_last)
    monkeypatch.setattr(vpt, "targets_at_once", lambda models, num_tokens: 1)
    options = ("--target-accuracy", 0, "--log-every", 10, "--image-every", 10, "--wandb-run-name", "lost")
    options += ("--m", "own", "--optimizer", "adamw", "--num-steps", 6, "--save-dir", "out")
    result = call_tiny(*TWO, *options)
    folder = tmp_path / "out" / "lost"
    assert result.code == 0 and "1 of 2 targets ended" in result.out
    assert steps_in(folder) == [1, 9] and summary_in(folder)["steps"] == 9
    assert (folder / "progress" / "step_000009.png").exists()


@pytest.mark.usefixtures("four_at_once")
@pytest.mark.parametrize("at_step", [7, 37, 70])
def test_an_interrupted_run_of_many_targets_goes_on_with_its_batch(
    run_into, call_tiny, ten_prompts, tmp_path, monkeypatch, at_step
):
    arguments = ("--prompts-file", ten_prompts, *ALONE, "--save-every", 5)
    whole = run_into("whole", *arguments)
    with monkeypatch.context() as patch:

        def kill(recorder, row, learning):
            really_step(recorder, row, learning)
            if learning.step == at_step:
                raise KeyboardInterrupt  # no state is saved after this error

        really_step = vpt.Recorder.keep_step
        patch.setattr(vpt.Recorder, "keep_step", kill)
        with pytest.raises(KeyboardInterrupt):
            call_tiny("--save-dir", "out", "--wandb-run-name", "cut", *arguments)
    folder = tmp_path / "out" / "cut"
    saved = vpt.read_state(folder)["learning"]
    done = rows_of(folder / "targets.csv") if saved["first"] else []
    assert len(done) == saved["first"] and at_step - 5 < saved["step"] <= at_step
    monkeypatch.setattr(vpt, "targets_at_once", lambda models, num_tokens: 7)  # as on another machine
    result = call_tiny("--save-dir", "out", "--wandb-run-name", "cut", *arguments, "--resume")
    assert result.code == 0 and f"resumed after step {saved['step']}" in result.out
    assert results_of(folder) == results_of(whole)
    assert {file.name for file in folder.iterdir()} == {file.name for file in whole.iterdir()}


@pytest.mark.usefixtures("four_at_once")
@pytest.mark.parametrize("optimizer", ["lbfgs", "adamw"])
def test_a_run_killed_as_a_batch_begins_goes_on_as_if_nothing_had_happened(
    run_into, call_tiny, ten_prompts, tmp_path, monkeypatch, optimizer
):
    arguments = ("--prompts-file", ten_prompts, *ALONE, "--optimizer", optimizer)
    whole = run_into("whole", *arguments)
    with monkeypatch.context() as patch:

        def kill(learning, first):
            really_begin(learning, first)
            if first > 0:
                raise KeyboardInterrupt

        really_begin = vpt.Optimisation.begin_batch
        patch.setattr(vpt.Optimisation, "begin_batch", kill)
        with pytest.raises(KeyboardInterrupt):
            call_tiny("--save-dir", "out", "--wandb-run-name", "cut", *arguments)
    assert results_of(run_into("cut", *arguments, "--resume")) == results_of(whole)


def test_many_targets_that_all_diverge_in_step_1_are_refused_in_one_line(call_tiny, model_folders, prompts_file):
    spoil_text_head(model_folders[0])
    refused(call_tiny("--prompts-file", prompts_file, "--m", "own", "--control", "random"), "finite at step 1")


def test_the_shards_of_a_run_together_give_the_results_of_the_whole(run_into, tmp_path, monkeypatch):
    monkeypatch.setattr(vpt, "targets_at_once", lambda models, num_tokens: 1)
    (tmp_path / "five.txt").write_text("a\nb\nc\nd\ne")
    arguments = ("--prompts-file", tmp_path / "five.txt", *ALONE)
    whole = stored(run_into("whole", *arguments))
    for k in (1, 2):
        shard = stored(run_into(f"shard{k}", *arguments, "--shard", f"{k}/2"))
        assert all(torch.equal(shard[name], whole[name][k - 1 :: 2]) for name in whole)


def test_targets_that_share_a_learned_m_cannot_be_split_into_shards(call_tiny):
    refused(call_tiny(*TWO, "--shard", "1/2"), "--shard", "add --m own")


def test_a_shard_beyond_the_prompts_is_refused(call_tiny):
    refused(call_tiny(*TWO, "--m", "own", "--shard", "3/4"), "--shard 3/4", "only 2 given")
