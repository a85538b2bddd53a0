"""Save a random two-layer generator and a VQ tokenizer of flat squares, in the formats of the real ones."""

import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.processes import DEMO
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

TEXT_IDS, CODES = 1401, 12


class TinyDecoder(nn.Module):
    """A VQ decoder that does not store its codebook size: each code is a flat square of its own grey."""

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, indices: Tensor) -> Tensor:
        grey = indices.float() / 6.0 - 1.0
        wide = grey.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)
        return wide.unsqueeze(1).repeat(1, 3, 1, 1, 1)


class TinyEncoder(nn.Module):
    """Invert TinyDecoder: a cell's code is the one with the grey nearest to the cell's mean."""

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor
        self.scale = nn.Parameter(torch.tensor(6.0))

    def forward(self, video: Tensor):
        cells = nn.functional.avg_pool2d(video.mean(1), self.factor)  # [B, 1, h, w]
        indices = ((cells + 1) * self.scale).round().clamp(0, 11).int()
        return indices, video, torch.zeros(1)


def save_tiny_generator(folder: Path, saved: dict | None = None, **changes) -> None:
    """Save a random two-layer Qwen2 with the demo's text ids and 12 visual codes; `saved` goes to save_pretrained."""
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": TEXT_IDS + CODES,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    config = Qwen2Config(**(settings | changes))
    Qwen2ForCausalLM(config).to(config.dtype).save_pretrained(folder, **(saved or {}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "generator" / name, folder / name)


def spoil_text_head(folder: Path) -> None:
    """Make one text id's logit NaN: decoding, over visual codes only, still works; the loss over all ids is NaN."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][7] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def save_tiny_vq(folder: Path, factor: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_torchscript(TinyDecoder(factor), folder / "decoder.jit")
    save_torchscript(TinyEncoder(factor), folder / "encoder.jit")


def save_torchscript(module: nn.Module, file: Path) -> None:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        torch.jit.save(torch.jit.script(module), file)


def save_tiny_models(folder: Path) -> None:
    save_tiny_generator(folder / "generator")
    save_tiny_vq(folder / "vq")


def tiny_arguments(folder: Path) -> tuple[str, ...]:
    """Return arguments for the tiny models in `folder`: 16 tokens, and 3 steps unless a later --num-steps says more."""
    models = ("--model-path", str(folder / "generator"), "--vq-model-ckpt", str(folder / "vq"))
    return (*models, "--device", "cpu", "--image-size", "16", "--num-steps", "3")
