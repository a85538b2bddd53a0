"""What the tests share: the demo model, a tiny random model of the same formats, and the script as a process."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import verify_proto_tokens as vpt  # noqa: E402

DEMO = ROOT / "tests" / "demo_model"
TINY_CODEBOOK = 12


class TinyDecoder(nn.Module):
    """A VQ decoder without any state about its codebook: each code is a flat square of its own grey."""

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, indices: Tensor) -> Tensor:
        grey = indices.float() / 6.0 - 1.0
        wide = grey.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)
        return wide.unsqueeze(1).repeat(1, 3, 1, 1, 1)


class TinyEncoder(nn.Module):
    """Undoes TinyDecoder: the code of each cell is that of the nearest grey to its mean."""

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor
        self.scale = nn.Parameter(torch.tensor(6.0))

    def forward(self, video: Tensor):
        cells = nn.functional.avg_pool2d(video.mean(1), self.factor)  # [B, 1, h, w]
        indices = ((cells + 1) * self.scale).round().clamp(0, 11).int()
        return indices, video, torch.zeros(1)


def save_tiny_generator(folder: Path, **changes) -> None:
    """A random two-layer Qwen2 over the demo's text vocabulary and 12 visual codes."""
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings |= {"intermediate_size": 64, "vocab_size": 1400 + TINY_CODEBOOK, "tie_word_embeddings": False}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**(settings | changes))).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "generator" / name, folder / name)


def spoil_text_head(folder: Path) -> None:
    """Makes one text id's logit not a number: the reference, of visual ids, still decodes; the full loss does not."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][7] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def save_tiny_vq(folder: Path, factor: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.jit.save(torch.jit.script(TinyDecoder(factor)), folder / "decoder.jit")
    torch.jit.save(torch.jit.script(TinyEncoder(factor)), folder / "encoder.jit")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_generator(folder / "generator")
    save_tiny_vq(folder / "vq")
    return folder


@pytest.fixture
def make_args(tiny_folder, tmp_path):
    """Builds the script's arguments for the tiny model: 16 tokens (16 px), a save directory of the test's own."""

    def build(*arguments: str):
        tiny = ["--model-path", tiny_folder / "generator", "--vq-model-ckpt", tiny_folder / "vq", "--device", "cpu"]
        return vpt.parse_args(list(map(str, [*tiny, "--image-size", 16, "--save-dir", tmp_path / "out", *arguments])))

    return build


@pytest.fixture
def tiny_models(make_args) -> vpt.Models:
    return vpt.load_models(make_args())


def clean_environment(folder: Path) -> dict[str, str]:
    """Away from any W&B or hub account, and from the network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HF_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "HOME": str(folder)}


def start_script(folder: Path, *arguments, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
    """Starts the script as a process in `folder`."""
    command = [sys.executable, str(ROOT / "verify_proto_tokens.py"), *map(str, arguments)]
    environment = clean_environment(folder) | (env or {})
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes, **options)


def ended(process: subprocess.Popen, timeout: float = 240) -> SimpleNamespace:
    """Waits for a process; its exit code and output."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def script_runner(folder: Path):
    """Runs the script as a process in `folder` to its end."""

    def run(*arguments, env: dict[str, str] | None = None, timeout: float = 240) -> SimpleNamespace:
        return ended(start_script(folder, *arguments, env=env), timeout)

    return run


@pytest.fixture
def run_script(tmp_path):
    return script_runner(tmp_path)


@pytest.fixture
def call_script(tmp_path, monkeypatch, capfd):
    """Runs the script's `main` in this process, for tests of what it says and leaves: no three seconds of imports."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments) -> SimpleNamespace:
        capfd.readouterr()
        code = 0
        try:
            vpt.main(vpt.parse_args([str(argument) for argument in arguments]))
        except SystemExit as exit:
            code = exit.code
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def model_folders(tmp_path):
    """Copies of the tiny models to break."""
    save_tiny_generator(tmp_path / "generator")
    save_tiny_vq(tmp_path / "vq")
    return tmp_path / "generator", tmp_path / "vq"


@pytest.fixture
def tiny_arguments(model_folders):
    """The command line's part that names the tiny models, 16 tokens, and 3 steps unless more are asked for."""
    generator, vq = model_folders
    tiny = ("--model-path", generator, "--vq-model-ckpt", vq, "--device", "cpu", "--image-size", 16)
    return (*tiny, "--num-steps", 3)


@pytest.fixture
def run_tiny(run_script, tiny_arguments):
    def run(*arguments, env=None):
        return run_script(*tiny_arguments, *arguments, env=env)

    return run


@pytest.fixture
def call_tiny(call_script, tiny_arguments):
    def call(*arguments):
        return call_script(*tiny_arguments, *arguments)

    return call
