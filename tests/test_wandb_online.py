"""Test Weights & Biases: the real client and command-line tools against a server of its protocol on 127.0.0.1."""

import json
import pwd
import random
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image
from support.contract import HISTORY, MEDIA, STATE, SUMMARY
from support.processes import (
    ROOT,
    ended,
    kill,
    let_go_on,
    run_script_in,
    start_code,
    start_pausing,
    wait_for,
    wandb_tool,
)
from support.results import config_in, refused, summary_in
from support.tiny_model import save_tiny_generator, save_tiny_vq, tiny_arguments
from support.wandb_server import API_KEY, WandbServer

TWENTY_STEPS = ("--num-steps", 20, "--save-every", 5, "--target-accuracy", 0, "--wandb-run-name", "run", "--use-wandb")


@pytest.fixture
def server(tmp_path):
    with WandbServer(tmp_path / "server") as server:
        yield server


@pytest.fixture
def tracked_run(call_tiny, server):
    """Return a function that runs the script on the tiny models, tracked on the server."""

    def run(*arguments, **env):
        return call_tiny("--use-wandb", "--save-dir", "out", *arguments, env=server.environment | env)

    return run


def logged_keys(run) -> set[str]:
    return {key for row in run.history for key in row}


# ----------------------------------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def online(tiny_folder, tmp_path_factory):
    """Make one run with everything switched on, for all tests that only look at what arrived."""
    folder = tmp_path_factory.mktemp("online")
    with WandbServer(folder / "server") as server:
        arguments = (
            *tiny_arguments(tiny_folder),
            *("--num-steps", 12, "--target-accuracy", 0, "--image-every", 5, "--use-wandb"),
            *("--wandb-project", "my-project", "--wandb-run-name", "my run", "--wandb-tags", "one,two"),
            *("--wandb-group", "mine"),
        )
        result = run_script_in(folder, *arguments, env=server.environment)
        assert result.code == 0, result.err
        (run,) = server.runs.values()
        yield run, server, folder


def test_every_metric_arrives_at_every_step(online):
    run, *_ = online
    rows = [row for row in run.history if "train/loss" in row]
    assert [row["_step"] for row in rows] == [row["optimisation_step"] for row in rows] == list(range(1, 13))
    assert all(row.keys() >= {*HISTORY} | {"best_accuracy"} for row in rows)


def test_the_summary_arrives_with_the_sweeps_metric_as_a_plain_number(online):
    run, *_ = online
    assert run.summary.keys() >= SUMMARY
    assert isinstance(run.summary["best_accuracy"], (int, float))


def test_pictures_arrive_as_files_that_open(online):
    run, *_ = online
    for name in MEDIA:
        (row,) = [row for row in run.history if name in row]
        Image.open(run.files[row[name]["path"]]).verify()


def test_progress_pictures_arrive_every_few_steps(online):
    run, *_ = online
    rows = [row for row in run.history if "progress/reconstruction" in row]
    assert [row["_step"] for row in rows] == [5, 10, 12]
    assert all(row["progress/reconstruction"]["path"] in run.files for row in rows)


def test_names_tags_settings_and_versions_arrive(online):
    run, *_ = online
    assert (run.project, run.display_name, run.group, run.tags) == ("my-project", "my run", "mine", ["one", "two"])
    assert run.config["num_steps"] == 12 and run.config["optimizer"] == "lbfgs" and run.config["versions"]["torch"]


def test_the_proto_tokens_arrive_as_an_artifact(online):
    run, _, folder = online
    (artifact,) = [artifact for artifact in run.artifacts if artifact["type"] == "proto-tokens"]
    local = folder / "proto_tokens_exp" / "my run" / "proto_tokens.safetensors"
    assert artifact["files"]["proto_tokens.safetensors"].read_bytes() == local.read_bytes()


def test_curves_have_the_optimisation_step_as_their_x_axis(online):
    run, *_ = online
    metrics = json.loads(run.sent_config)["_wandb"]["value"]["m"]
    text = json.dumps(metrics)
    assert all(name in text for name in ("train/*", "embeddings/*", "gradients/*", "optimisation_step"))


def test_the_run_succeeds_and_the_server_knows_every_request(online):
    run, server, _ = online
    assert run.exit_code == 0 and not server.unknown


def test_no_secret_lands_in_a_file_a_log_or_an_artifact(online):
    run, _, folder = online
    assert API_KEY not in json.dumps([run.config, run.summary, run.history], default=str)
    for file in folder.rglob("*"):
        assert not file.is_file() or API_KEY.encode() not in file.read_bytes(), file


def test_log_every_thins_what_is_sent(tracked_run, server):
    bytes_sent = []
    for every in (1, 10):
        before = server.received["history"]
        assert tracked_run("--num-steps", 200, "--target-accuracy", 0, "--log-every", every).code == 0
        bytes_sent.append(server.received["history"] - before)
    assert bytes_sent[1] < bytes_sent[0] / 3


# ----------------------------------------------------------------------------------------------------------------------
# Offline, and trouble with the server


def offline_runs(folder: Path) -> list[Path]:
    return list(folder.glob("wandb/offline-run-*/*.wandb"))


def assert_whole(result, folder: Path) -> None:
    """Assert that the run succeeded, left its main files, and printed one line about W&B's trouble."""
    assert result.code == 0 and "Traceback" not in result.err, result.err
    (run,) = (each for each in (folder / "out").iterdir() if each.name != "reference_cache")
    assert {"summary.json", "history.csv", "proto_tokens.safetensors", "comparison.png"} <= {
        f.name for f in run.iterdir()
    }
    assert len([line for line in result.err.splitlines() if line.startswith("W&B: ")]) == 1, result.err


def test_the_sync_command_that_an_offline_run_prints_uploads_the_same_keys(online, tracked_run, server, tmp_path):
    arguments = ("--num-steps", 12, "--target-accuracy", 0, "--image-every", 5, "--wandb-mode", "offline")
    result = tracked_run(*arguments, WANDB_MODE="online")
    assert result.code == 0 and not server.runs
    (command,) = [line.split("to W&B later")[1].split() for line in result.out.splitlines() if "to W&B later" in line]
    assert command[:2] == ["wandb", "sync"]
    assert ended(wandb_tool(tmp_path, *command[1:], **server.environment), 60).code == 0
    (synced,) = server.runs.values()
    run, *_ = online
    assert logged_keys(synced) == logged_keys(run) and synced.summary.keys() == run.summary.keys()
    assert synced.config.keys() == run.config.keys()
    assert [a["type"] for a in synced.artifacts] == [a["type"] for a in run.artifacts]


def test_wandb_mode_disabled_sends_and_keeps_nothing(tracked_run, server, tmp_path):
    assert tracked_run("--wandb-mode", "disabled").code == 0
    assert not server.runs and not offline_runs(tmp_path)


def test_without_a_key_the_run_goes_on_offline(call_tiny, tmp_path):
    assert_whole(call_tiny("--use-wandb", "--save-dir", "out"), tmp_path)
    assert offline_runs(tmp_path)


@pytest.mark.parametrize(("mode", "kept"), [("offline", 1), ("disabled", 0)])
def test_a_folders_wandb_settings_apply_unless_an_option_overrides_them(tracked_run, server, tmp_path, mode, kept):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text(f"[default]\nmode = {mode}\n")  # what `wandb offline` writes
    assert tracked_run().code == 0
    assert not server.runs and len(offline_runs(tmp_path)) == kept
    assert tracked_run("--wandb-mode", "online").code == 0
    assert len(server.runs) == 1


def test_the_variable_wandb_disabled_switches_wandb_off_unless_an_option_overrides_it(tracked_run, server, tmp_path):
    assert tracked_run(WANDB_DISABLED="true").code == 0
    assert not server.runs and not offline_runs(tmp_path)
    assert tracked_run("--wandb-mode", "online", WANDB_DISABLED="true").code == 0
    assert len(server.runs) == 1


def test_names_come_from_the_environment_unless_options_give_others(tracked_run, server):
    names = {"PROJECT": "p1", "NAME": "n1", "TAGS": "t1,t2", "RUN_GROUP": "g1", "JOB_TYPE": "j1", "NOTES": "words"}
    environment = {f"WANDB_{name}": value for name, value in names.items()}
    assert tracked_run(**environment).code == 0
    (run,) = server.runs.values()
    assert (run.project, run.display_name, run.tags, run.group) == ("p1", "n1", ["t1", "t2"], "g1")
    assert (run.job_type, run.notes) == ("j1", "words")
    given = ("--wandb-project", "p2", "--wandb-run-name", "n2", "--wandb-tags", "t3", "--wandb-group", "g2")
    assert tracked_run(*given, **environment).code == 0
    *_, run = server.runs.values()
    assert (run.project, run.display_name, run.tags, run.group) == ("p2", "n2", ["t3"], "g2")


def test_a_second_run_with_the_id_of_a_first_is_refused_and_leaves_the_first_unchanged(tracked_run, server):
    environment = {"WANDB_RUN_ID": "twice", "WANDB_RESUME": "allow"}
    assert tracked_run("--num-steps", 5, "--target-accuracy", 0, **environment).code == 0
    (run,) = server.runs.values()
    before = list(run.history)
    refused(tracked_run("--num-steps", 5, "--target-accuracy", 0, "--seed", 1, **environment), "twice", "--resume")
    assert run.history == before and run.exit_code == 0 and len(server.runs) == 1


@pytest.mark.parametrize("home", ["/dev/null/nobody", "", None])
def test_without_a_home_the_proto_tokens_arrive_all_the_same(tracked_run, server, monkeypatch, home):
    def nobody(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)  # a container's user without a passwd entry
    result = tracked_run(HOME=home)
    assert result.code == 0, result.err
    (run,) = server.runs.values()
    assert run.exit_code == 0 and run.summary.keys() >= SUMMARY
    assert "proto_tokens.safetensors" in run.files or run.artifacts


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_BASE_URL", "localhost:8080"),
        ("WANDB_RESUME", "sometimes"),
        ("WANDB_MODE", "disable"),
        ("WANDB_HTTP_TIMEOUT", "soon"),
        ("WANDB_CONSOLE", "loud"),
        ("WANDB_TAGS", "x" * 70),
        ("WANDB_PROJECT", "a/b"),
        ("WANDB_INIT_TIMEOUT", "never"),
    ],
)
def test_a_value_that_wandb_does_not_know_is_refused_before_the_models_load(tracked_run, name, value):
    result = tracked_run(**{name: value})
    refused(result, value[:20], "WANDB_")
    assert "generator:" not in result.out


def test_a_project_that_wandb_does_not_take_is_refused_before_the_models_load(tracked_run):
    result = tracked_run("--wandb-project", "a/b")
    refused(result, "a/b")
    assert "generator:" not in result.out


SHORT_WAITS = """
import sys
import verify_proto_tokens as vpt
vpt.WANDB_ANSWER_SECONDS, vpt.WANDB_START_SECONDS = 3, 6
vpt.main(vpt.parse_args(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def troubled_at_the_start(tiny_folder, tmp_path_factory):
    """Start two runs, with an unreachable server and with one that answers 500; yield the folder and end of each."""
    runs = {}
    for trouble in ("unreachable", "answers 500"):
        folder = tmp_path_factory.mktemp("troubled_at_the_start")
        server = WandbServer(folder / "server").__enter__()
        if trouble == "unreachable":
            server.stop()
        server.failing = 500
        arguments = (*tiny_arguments(tiny_folder), "--use-wandb", "--save-dir", "out")
        runs[trouble] = folder, server, start_code(SHORT_WAITS, folder, *arguments, env=server.environment)
    yield {trouble: (folder, ended(process, 90)) for trouble, (folder, _, process) in runs.items()}
    runs["answers 500"][1].stop()


@pytest.mark.parametrize("trouble", ["unreachable", "answers 500"])
def test_a_server_that_fails_at_the_start_costs_nothing_but_a_wait(troubled_at_the_start, trouble):
    folder, result = troubled_at_the_start[trouble]
    assert_whole(result, folder)
    assert offline_runs(folder)


@pytest.fixture(scope="module")
def troubled(tiny_folder, tmp_path_factory):
    """Start two runs; in the middle, one server dies and the other answers 500. Yield the folder and end of each."""
    runs = {}
    for trouble in ("dies", "answers 500"):
        folder = tmp_path_factory.mktemp("troubled")
        server = WandbServer(folder / "server").__enter__()
        arguments = (*tiny_arguments(tiny_folder), *TWENTY_STEPS, "--save-dir", "out")
        runs[trouble] = folder, server, start_pausing(folder, 7, *arguments, env=server.environment)
    for trouble, (folder, server, _) in runs.items():
        if trouble == "dies":
            server.stop()
        server.failing = 500
        let_go_on(folder)
    yield {trouble: (folder, ended(process, 120)) for trouble, (folder, _, process) in runs.items()}
    runs["answers 500"][1].stop()


@pytest.mark.parametrize("trouble", ["dies", "answers 500"])
def test_a_server_that_fails_in_the_middle_loses_nothing(troubled, trouble):
    folder, result = troubled[trouble]
    assert_whole(result, folder)
    (line,) = [line for line in result.err.splitlines() if line.startswith("W&B: ")]
    command = shlex.split(line.split("wandb ")[1])
    with WandbServer(folder / "later") as later:
        assert ended(wandb_tool(folder, *command, **later.environment), 60).code == 0
        (run,) = later.runs.values()
        assert [row["_step"] for row in run.history if "train/loss" in row] == list(range(1, 21))
        assert run.summary.keys() >= SUMMARY and run.exit_code == 0
        # As a file: wandb cannot record an artifact without asking the server.
        assert "proto_tokens.safetensors" in run.files


# ----------------------------------------------------------------------------------------------------------------------
# Resuming


def test_a_killed_and_resumed_run_is_one_run_without_repeated_or_missing_steps(
    model_folders, server, call_script, tmp_path
):
    arguments = (*tiny_arguments(tmp_path), *TWENTY_STEPS, "--save-dir", "out", "--resume")
    kill(start_pausing(tmp_path, 8, *arguments, env=server.environment))
    result = call_script(*arguments, env=server.environment)
    assert result.code == 0, result.err
    (run,) = server.runs.values()
    assert run.starts == 2 and run.exit_code == 0
    assert [row["_step"] for row in run.history if "train/loss" in row] == list(range(1, 21))


STOPPED_WHILE_PUBLISHING = """
import os
import signal
import sys
import verify_proto_tokens as v
v.draw_results = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
v.main(v.parse_args(sys.argv[1:]))
"""


def test_a_run_stopped_after_its_last_step_sends_its_pictures_when_resumed(
    model_folders, server, call_script, tmp_path
):
    arguments = (*tiny_arguments(tmp_path), "--num-steps", 4, "--target-accuracy", 0, "--use-wandb")
    process = start_code(STOPPED_WHILE_PUBLISHING, tmp_path, *arguments, env=server.environment)
    assert ended(process).code == -signal.SIGTERM  # outside of the loop, the signal itself ends the process
    (run,) = server.runs.values()
    assert run.exit_code == 143  # the W&B run was closed before
    result = call_script(*arguments, "--resume", env=server.environment)
    assert result.code == 0, result.err
    assert [row["_step"] for row in run.history if "train/loss" in row] == [1, 2, 3, 4]
    assert logged_keys(run) >= MEDIA and run.summary.keys() >= SUMMARY


# ----------------------------------------------------------------------------------------------------------------------
# Sweeps


@pytest.fixture
def workplace(tmp_path):
    """Make a folder with the script, its sweep, and a hub cache with tiny models under the default models' names."""
    for name in ("verify_proto_tokens.py", "sweep_config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    hub = tmp_path / "hf" / "hub"
    for name, save in (
        ("Daniel0724--SimpleAR-1.5B-RL", save_tiny_generator),
        ("nvidia--Cosmos-1.0-Tokenizer-DV8x16x16", lambda folder: save_tiny_vq(folder, factor=64)),
    ):
        repository = hub / f"models--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("a" * 40)
        (repository / "snapshots" / ("a" * 40)).mkdir(parents=True)
        save(repository / "snapshots" / ("a" * 40))
    return tmp_path


def make_sweep(folder: Path, server: WandbServer, file: Path) -> str:
    """Create a sweep; return its id for `wandb agent`, as `wandb sweep` prints it."""
    end = ended(wandb_tool(folder, "sweep", file, **server.environment), 60)
    assert end.code == 0, end.out
    return re.search(r"wandb agent (\S+)", end.out)[1]


def test_sweep_config_yaml_runs_unchanged_with_two_agents_at_once(workplace, server):
    sweep = make_sweep(workplace, server, Path("sweep_config.yaml"))
    sweep_on_server = server.sweeps[sweep.split("/")[-1]]
    sweep_on_server.max_runs = 2
    sweep_on_server.source = random.Random(32)  # draws both sizes, and 500 steps twice
    agents = [wandb_tool(workplace, "agent", sweep, **server.environment) for _ in range(2)]
    output = [ended(agent, 200).out for agent in agents]
    assert len(server.runs) == 2, output
    for run in server.runs.values():
        assert run.exit_code == 0 and run.sweep and run.project == "simplear-proto-tokens"
        assert isinstance(run.summary["best_accuracy"], (int, float)) and run.summary.keys() >= SUMMARY
        (folder,) = (workplace / "proto_tokens_exp").glob(f"*_{run.id}")
        used = config_in(folder)
        for name in ("num_steps", "learning_rate", "image_size"):
            assert used[name] == run.config[name]
        assert used["num_steps"] in (500, 1000, 2000) and 0.001 <= used["learning_rate"] <= 0.1
        assert summary_in(folder)["best_accuracy"] == run.summary["best_accuracy"]
    sizes = {run.config["image_size"] for run in server.runs.values()}
    references = list((workplace / "proto_tokens_exp" / "reference_cache").iterdir())
    assert len(references) == len(sizes)  # one picture for each size, shared by its runs


def test_a_run_that_its_agent_stops_saves_its_state_and_ends(workplace, server):
    config = {"program": "verify_proto_tokens.py", "method": "grid", "run_cap": 1}
    endless = {"num_steps": 10**6, "target_accuracy": 0, "save_every": 10**6}
    config["parameters"] = {name: {"value": value} for name, value in endless.items()}
    (workplace / "long.yaml").write_text(json.dumps(config))
    agent = wandb_tool(workplace, "agent", make_sweep(workplace, server, Path("long.yaml")), **server.environment)
    wait_for(lambda: list(workplace.glob("proto_tokens_exp/*/history.csv")), agent)
    (run,) = server.runs.values()
    server.stop_run(run.id)
    wait_for(lambda: run.exit_code is not None, seconds=40)
    assert run.exit_code == 143 and list(workplace.glob(f"proto_tokens_exp/*/{STATE}"))
    ended(agent, 60)


def test_sigterm_ends_a_tracked_run_within_ten_seconds_and_closes_it(model_folders, server, tmp_path):
    arguments = (*tiny_arguments(tmp_path), *TWENTY_STEPS, "--save-dir", "out")
    process = start_pausing(tmp_path, 6, *arguments, env=server.environment)
    process.send_signal(signal.SIGTERM)
    let_go_on(tmp_path)
    assert ended(process, 10).code == 143
    (run,) = server.runs.values()
    assert run.exit_code == 143


def test_an_artifact_fetched_from_wandb_reconstructs_its_picture(online, call_script, tiny_folder, tmp_path):
    run, *_ = online
    (artifact,) = [artifact for artifact in run.artifacts if artifact["type"] == "proto-tokens"]
    shutil.copy(artifact["files"]["proto_tokens.safetensors"], tmp_path / "fetched.safetensors")
    assert call_script("--from-proto-tokens", "fetched.safetensors", *tiny_arguments(tiny_folder)).code == 0
    (logged,) = [row for row in run.history if "reconstructed_image" in row]
    local = next(tmp_path.glob("proto_tokens_exp/reconstructed*/reconstructed_image.png"))
    assert Image.open(local).tobytes() == Image.open(run.files[logged["reconstructed_image"]["path"]]).tobytes()
