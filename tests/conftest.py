"""Fixtures: the tiny model, and the script called in this process or started as one of its own."""

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

# Runs that several tests look at: these tests stay together, so that one worker makes the run, once.
SHARED_RUNS = ("demo_run", "online", "troubled", "troubled_at_the_start", "interrupted_once", "elsewhere", "hostile")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:Glyph .* missing from font")  # as the script has it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and what it starts


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in SHARED_RUNS:
            if name in item.fixturenames:
                item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The tiny models, not to be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_models(folder)
    return folder


@pytest.fixture
def make_args(tiny_folder, tmp_path):
    """Builds the script's arguments for the tiny model and a save directory of the test's own."""

    def build(*arguments: object):
        words = (*tiny_arguments(tiny_folder), "--num-steps", 1000, "--save-dir", tmp_path / "out", *arguments)
        return vpt.parse_args([str(word) for word in words])

    return build


@pytest.fixture
def tiny_models(make_args) -> vpt.Models:
    return vpt.load_models(make_args())


@pytest.fixture
def model_folders(tiny_folder, tmp_path):
    """Copies of the tiny models to break."""
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    return tmp_path / "generator", tmp_path / "vq"


@pytest.fixture
def call_script(tmp_path, monkeypatch, capfd):
    """Runs the script's `main` in this process, for tests of what it says and leaves: no seconds of imports.

    Figures, which take longer than all else and have tests of their own, are blank.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(vpt, "render", lambda figure: Image.new("RGB", (8, 8), "white"))

    def call(*arguments, env: dict[str, str | None] | None = None) -> SimpleNamespace:
        capfd.readouterr()
        code = 0
        variables = clean_environment(tmp_path) | (env or {})  # None takes one away
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
    """A hub for `call_script` that answers as the test says."""
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
    """Runs the script as a process in the test's folder."""

    def run(*arguments, env=None) -> SimpleNamespace:
        return run_script_in(tmp_path, *arguments, env=env)

    return run


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """One short demo run, kept for W&B offline; shared by the tests that only look at it."""
    folder = tmp_path_factory.mktemp("demo")
    arguments = ["--demo", "--device", "cpu", "--num_steps=40", "--save-dir", "exp", "--use-wandb"]
    arguments += ["--wandb-tags", "one,two", "--wandb-project", "my-project", "--wandb-group", "mine"]
    result = run_script_in(folder, *arguments, env={"WANDB_MODE": "offline"})
    assert result.code == 0, result.err
    result.folder = folder / "exp" / "proto_256px_steps40_lr02_seed42_demo"
    return result
