"""What the tests share: the demo model, a tiny random model of the same formats, and the script as a process."""

import os
import shutil
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
    """A VQ decoder of factor 4 without any state about its codebook: each code is a flat square of its own grey."""

    def forward(self, indices: Tensor) -> Tensor:
        grey = indices.float() / 6.0 - 1.0
        return grey.repeat_interleave(4, 2).repeat_interleave(4, 3).unsqueeze(1).repeat(1, 3, 1, 1, 1)


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


def save_tiny_vq(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.jit.save(torch.jit.script(TinyDecoder()), folder / "decoder.jit")


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


def script_runner(folder: Path):
    """Runs the script as a process in `folder`, away from any W&B or hub account; gives its code and output."""

    def run(*arguments, env: dict[str, str] | None = None, timeout: float = 240) -> SimpleNamespace:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HF_"))}
        clean |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "HOME": str(folder)}
        command = [sys.executable, str(ROOT / "verify_proto_tokens.py"), *map(str, arguments)]
        process = subprocess.run(
            command, cwd=folder, env=clean | (env or {}), capture_output=True, text=True, timeout=timeout
        )
        return SimpleNamespace(code=process.returncode, out=process.stdout, err=process.stderr)

    return run


@pytest.fixture
def run_script(tmp_path):
    return script_runner(tmp_path)


@pytest.fixture
def model_folders(tmp_path):
    """Copies of the tiny models to break."""
    save_tiny_generator(tmp_path / "generator")
    save_tiny_vq(tmp_path / "vq")
    return tmp_path / "generator", tmp_path / "vq"


@pytest.fixture
def run_tiny(run_script, model_folders):
    generator, vq = model_folders

    def run(*arguments, env=None):
        tiny = ("--model-path", generator, "--vq-model-ckpt", vq, "--device", "cpu", "--image-size", 16)
        return run_script(*tiny, "--num-steps", 3, *arguments, env=env)

    return run
