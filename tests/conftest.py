"""Provide fixtures: the tiny models, and the script, called in this process or run as a process."""

import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import huggingface_hub.constants
import pytest
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from support.hub import Hub  # noqa: E402
from support.processes import clean_environment, run_script_in  # noqa: E402
from support.tiny_model import save_tiny_models, tiny_arguments  # noqa: E402

import verify_proto_tokens as vpt  # noqa: E402

# Fixtures of runs that several tests share: one worker gets all tests of such a run, so that it is made only once.
SHARED_RUNS = ("demo_run", "online", "troubled", "troubled_at_the_start", "interrupted_once", "elsewhere", "hostile")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:Glyph .* missing from font")  # as in the script
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else background jobs and their children ignore it


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in SHARED_RUNS:
            if name in item.fixturenames:
                item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """Save the tiny models in a folder that no test may change."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_models(folder)
    return folder


@pytest.fixture
def make_args(tiny_folder, tmp_path):
    """Return a function that parses arguments for the tiny models and the test's own save directory."""

    def build(*arguments: object):
        words = (*tiny_arguments(tiny_folder), "--num-steps", 1000, "--save-dir", tmp_path / "out", *arguments)
        return vpt.parse_args([str(word) for word in words])

    return build


@pytest.fixture
def tiny_models(make_args) -> vpt.Models:
    return vpt.load_models(make_args())


@pytest.fixture
def model_folders(tiny_folder, tmp_path):
    """Copy the tiny models, so that a test can damage them."""
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    return tmp_path / "generator", tmp_path / "vq"


@pytest.fixture
def call_script(tmp_path, monkeypatch, capfd):
    """Return a function that runs the script's `main` in this process, which saves the seconds of its imports.

    Figures are blank: they take longer than all the rest, and have tests of their own.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(vpt, "render", lambda figure: Image.new("RGB", (8, 8), "white"))

    def call(*arguments, env: dict[str, str | None] | None = None) -> SimpleNamespace:
        capfd.readouterr()
        code = 0
        variables = clean_environment(tmp_path) | (env or {})  # None removes a variable
        variables = {name: value for name, value in variables.items() if value is not None}
        with mock.patch.dict(os.environ, variables, clear=True):
            try:
                vpt.main(vpt.parse_args([str(argument) for argument in arguments]))
            except SystemExit as exit:
                code = exit.code
            if sys.modules.get("wandb"):
                sys.modules["wandb"].teardown()  # its service keeps the environment that it was started in
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture
def hub(call_script, monkeypatch, tmp_path):
    """Start a hub that `call_script` uses; the test sets its answer."""
    hub = Hub(monkeypatch, tmp_path / "hf" / "hub")
    yield hub
    hub.stop()


@pytest.fixture
def call_tiny(call_script, model_folders, tmp_path):
    def call(*arguments, env: dict[str, str] | None = None) -> SimpleNamespace:
        return call_script(*tiny_arguments(tmp_path), *arguments, env=env)

    return call


@pytest.fixture
def run_script(tmp_path):
    """Return a function that runs the script as a process in the test's folder."""

    def run(*arguments, env=None) -> SimpleNamespace:
        return run_script_in(tmp_path, *arguments, env=env)

    return run


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """Make one short demo run with W&B offline, for all tests that only read its results."""
    folder = tmp_path_factory.mktemp("demo")
    arguments = ["--demo", "--device", "cpu", "--num_steps=40", "--save-dir", "exp", "--use-wandb"]
    arguments += ["--wandb-tags", "one,two", "--wandb-project", "my-project", "--wandb-group", "mine"]
    result = run_script_in(folder, *arguments, env={"WANDB_MODE": "offline"})
    assert result.code == 0, result.err
    result.folder = folder / "exp" / "proto_256px_steps40_lr02_seed42_demo"
    return result
