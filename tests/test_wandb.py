"""Test Weights & Biases with a real offline run, read back from its `.wandb` file."""

import fnmatch
import json
import subprocess
import sys

import pytest
from PIL import Image
from support import wandb_file
from support.contract import HISTORY, MEDIA, SUMMARY
from support.processes import ended, let_go_on, start_code, start_pausing
from support.results import refused
from support.tiny_model import spoil_text_head, tiny_arguments


@pytest.fixture(scope="module")
def offline_run(demo_run):
    return wandb_file.read(demo_run.folder.parents[1])


def test_every_metric_of_the_contract_is_logged_at_every_step(offline_run):
    rows = [row for row in offline_run.history if "train/loss" in row]
    assert [row["_step"] for row in rows] == list(range(1, 41))
    assert all(row.keys() >= set(HISTORY) for row in rows)


def test_every_metric_is_drawn_over_the_optimisation_step(offline_run):
    for name in HISTORY:
        axes = [axis for pattern, axis in offline_run.axes.items() if fnmatch.fnmatchcase(name, pattern)]
        assert set(axes) == {"optimisation_step"}, name


def test_every_medium_of_the_contract_is_logged_as_an_image_that_opens(offline_run):
    logged = {key: value for row in offline_run.history for key, value in row.items()}
    for name in MEDIA:
        assert logged[f"{name}/_type"] == "image-file"
        Image.open(offline_run.folder / "files" / logged[f"{name}/path"]).verify()


def test_every_key_of_the_contract_is_in_the_summary(offline_run):
    assert offline_run.summary.keys() >= SUMMARY
    assert offline_run.summary["total_params"] == 1024


def test_name_project_group_tags_and_config_arrive(offline_run):
    assert offline_run.run.display_name == "proto_256px_steps40_lr02_seed42_demo"
    assert offline_run.run.project == "my-project"
    assert offline_run.run.run_group == "mine" and list(offline_run.run.tags) == ["one", "two"]
    assert offline_run.config["num_steps"] == 40 and offline_run.config["prompt"] == "a red apple on a wooden table"
    assert "torch" in json.dumps(offline_run.config["versions"])


def test_the_proto_tokens_are_an_artifact(offline_run):
    (artifact,) = [a for a in offline_run.artifacts if a.type == "proto-tokens"]
    assert [entry.path for entry in artifact.manifest.contents] == ["proto_tokens.safetensors"]


def test_the_run_ends_as_a_success(offline_run):
    assert offline_run.exit_code == 0


def test_the_flag_wins_over_the_environments_mode(call_tiny, tmp_path):
    assert call_tiny("--use-wandb", "--wandb-mode", "disabled", env={"WANDB_MODE": "offline"}).code == 0
    assert not list(tmp_path.glob("wandb/offline-run-*"))


def test_a_run_under_a_sweep_agent_logs_without_the_flag(call_tiny, tmp_path):
    env = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "run1", "WANDB_MODE": "offline"}
    result = call_tiny("--num_steps=2", "--save_dir=out", env=env)
    assert result.code == 0, result.err
    assert "best_accuracy" in wandb_file.read(tmp_path).summary
    assert len(list((tmp_path / "out").glob("*_run1"))) == 1


def test_a_run_id_that_is_no_valid_artifact_name_is_adapted(call_tiny, tmp_path):
    assert call_tiny("--use-wandb", env={"WANDB_MODE": "offline", "WANDB_RUN_ID": "exp\u00e9 1" + "x" * 120}).code == 0
    (artifact,) = [a for a in wandb_file.read(tmp_path).artifacts if a.type == "proto-tokens"]
    assert artifact.name.startswith("proto_tokens_exp__1xxx") and len(artifact.name) == 128


@pytest.mark.parametrize("mode", [("--wandb-mode", "offline"), ()])  # the second: offline for lack of a key
def test_a_folder_that_wandb_cannot_write_is_reported_in_one_line(call_tiny, tmp_path, mode):
    (tmp_path / "wandb").write_text("a file")
    result = call_tiny("--use-wandb", *mode)
    (line,) = [line for line in result.err.splitlines() if "error:" in line]
    assert result.code == 2 and "Traceback" not in result.err and "W&B cannot start" in line and "WANDB_DIR" in line


@pytest.mark.parametrize("resume", ["allow", None])
def test_settings_of_wandb_that_contradict_one_another_are_refused_in_one_line(call_tiny, resume):
    environment = {"WANDB_FORK_FROM": "abc?_step=1", "WANDB_RESUME": resume, "WANDB_MODE": "offline"}
    refused(call_tiny("--use-wandb", env=environment), "W&B", "fork_from")


def test_a_missing_wandb_is_refused_in_one_line_that_says_how_to_install_it(call_tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(call_tiny("--use-wandb"), "--use-wandb", "pip install")


def test_a_run_goes_on_if_the_wandb_service_does_not_start(model_folders, tmp_path):
    code = "import sys, verify_proto_tokens as vpt; vpt.main(vpt.parse_args(sys.argv[1:]))"
    env = {"WANDB_X_SERVICE_WAIT": "0.001", "WANDB_MODE": "offline"}
    result = ended(start_code(code, tmp_path, *tiny_arguments(tmp_path), "--use-wandb", env=env))
    assert result.code == 0 and "W&B cannot start" in result.err and "goes on without it" in result.err


def test_a_run_goes_on_if_the_wandb_client_dies(model_folders, tmp_path):
    arguments = (*tiny_arguments(tmp_path), "--num-steps", 9, "--target-accuracy", 0, "--save-dir", "out")
    process = start_pausing(tmp_path, 4, *arguments, "--use-wandb", env={"WANDB_MODE": "offline"})
    subprocess.run(["pkill", "-KILL", "-P", str(process.pid), "wandb-core"], check=True)
    let_go_on(tmp_path)
    end = ended(process)
    assert end.code == 0 and "the run goes on without it" in end.err and "Traceback" not in end.err
    (summary,) = (tmp_path / "out").glob("*/summary.json")
    assert json.loads(summary.read_text())["steps"] == 9


def test_a_diverged_run_ends_as_failed_with_one_line_and_no_traceback(call_tiny, model_folders, tmp_path):
    spoil_text_head(model_folders[0])
    result = call_tiny("--use-wandb", env={"WANDB_MODE": "offline"})
    assert result.code == 2 and "Traceback" not in result.err and "finite" in result.err
    assert wandb_file.read(tmp_path).exit_code == 1
