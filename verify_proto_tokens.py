"""Can a frozen autoregressive image generator emit a whole image in one forward pass from two learned embeddings?

The script generates a reference image from a prompt with SimpleAR (a Qwen2 decoder over the visual tokens of NVIDIA's
Cosmos tokenizer), freezes the generator, and optimises two proto-token embeddings, e_t and m, with cross-entropy until
one forward pass over [e_t, m, ..., m] predicts all N tokens of that image. It then decodes what the two embeddings
reconstruct and reports how close it comes.

    python verify_proto_tokens.py --demo        # a small real model kept in the repository: no GPU, no network

The method is Mezentsev & Oseledets, "Exploring the Latent Capacity of LLMs for One-Step Text Generation"
(arXiv 2505.21189), applied to image tokens. Shapes in comments: B = targets optimised together (1 here), N = tokens,
D = hidden size, V = vocabulary, K = codebook size.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# ----------------------------------------------------------------------------------------------------------------------
# Arguments

DEFAULT_MODEL = "Daniel0724/SimpleAR-1.5B-RL"
DEFAULT_VQ_MODEL = "nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"
DEMO_FOLDER = Path(__file__).resolve().parent / "tests" / "demo_model"
CACHE_FOLDER = "reference_cache"


class UserError(Exception):
    """Something the user can put right: `main` prints it as one line and exits with code 2."""


def number(kind: type, minimum: float, maximum: float = math.inf, open_minimum: bool = False) -> Callable:
    """An argparse type: a finite number of `kind` in [minimum, maximum], or in (minimum, maximum]."""
    what = {int: "a whole number", float: "a number"}[kind]
    limits = f"above {minimum:g}" if open_minimum else f"of at least {minimum:g}"
    if maximum < math.inf:
        limits += f" and at most {maximum:g}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {what} {limits}, not {text!r}") from None
        # Not a number fails every comparison.
        if not minimum <= value <= maximum or value in (math.inf, minimum if open_minimum else None):
            raise argparse.ArgumentTypeError(f"must be {what} {limits}, not {text}")
        return value

    return parse


def prompt_text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: describe the picture in a few words")
    return text.strip()


def run_name(text: str) -> str:
    """A W&B run name that can also be the name of a folder inside the save directory."""
    if re.search(r"[/\\\x00-\x1f]", text) or text.strip() in ("", ".", "..", CACHE_FOLDER) or len(text.encode()) > 128:
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot name a folder: at most 128 bytes, no slashes, not '.', '..' or {CACHE_FOLDER!r}"
        )
    return text.strip()


def tags(text: str) -> list[str]:
    found = [tag.strip() for tag in text.split(",") if tag.strip()]
    if any(len(tag) > 64 for tag in found):
        raise argparse.ArgumentTypeError("has a tag of more than 64 characters, which W&B does not take")
    return found


def folder_path(text: str) -> Path:
    return Path(text).expanduser()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="verify_proto_tokens.py",
        usage="%(prog)s [--demo] [--prompt TEXT] [--use-wandb] [other options]",
        description="Learn two embeddings from which a frozen image generator emits a whole image in one forward pass.",
        epilog="Every option may also be written with underscores (--num_steps), as W&B sweep agents do.",
        allow_abbrev=False,
    )

    add = parser.add_argument_group("models").add_argument
    add(
        "--model-path",
        metavar="PATH",
        help=f"SimpleAR generator: a local folder or a Hugging Face hub id (default: {DEFAULT_MODEL})",
    )
    add(
        "--vq-model-ckpt",
        metavar="PATH",
        help=f"VQ tokenizer: a local folder with decoder.jit, or a hub id (default: {DEFAULT_VQ_MODEL}); TorchScript "
        "is code, so take it only from someone you trust",
    )
    add("--demo", action="store_true", help="use the small demo model kept in the repository; needs no network")
    add(
        "--codebook-size",
        type=number(int, 1),
        metavar="K",
        help="number of visual codes (default: the product of the decoder's FSQ levels where it carries them, else the "
        "embedding rows beyond the text vocabulary)",
    )
    add("--device", help="torch device (default: cuda:0 where there is one, else mps, else cpu)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision of the generator; the proto-tokens are always float32 (default: auto, that is bfloat16 on "
        "CUDA and float32 elsewhere)",
    )

    add = parser.add_argument_group("reference image").add_argument
    add(
        "--prompt",
        type=prompt_text,
        default="a red apple on a wooden table",
        metavar="TEXT",
        help="what the reference image shows (default: %(default)s)",
    )
    add(
        "--image-size",
        type=number(int, 1),
        default=256,
        metavar="PIXELS",
        help="width and height; a multiple of the tokenizer's downsampling factor (default: %(default)s)",
    )
    add(
        "--cfg-scale",
        type=number(float, 0, 1000),
        default=6.0,
        metavar="S",
        help="classifier-free guidance: 1 is none, more follows the prompt more closely (default: %(default)s)",
    )
    add(
        "--temperature",
        type=number(float, 0, open_minimum=True),
        default=1.0,
        metavar="T",
        help="of sampling the reference (default: %(default)s)",
    )
    add(
        "--top-k",
        type=number(int, 1),
        metavar="K",
        help="sample among the K likeliest codes; 1 is greedy decoding (default: the whole codebook)",
    )
    add(
        "--top-p",
        type=number(float, 0, 1, open_minimum=True),
        default=1.0,
        metavar="P",
        help="sample among the likeliest codes that hold a share P of the probability (default: %(default)s)",
    )
    add("--force-generate", action="store_true", help="generate the reference even if it is cached with these settings")
    add(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=42,
        help="of the reference and of the initial proto-tokens (default: %(default)s)",
    )

    add = parser.add_argument_group("optimisation of the proto-tokens").add_argument
    add("--num-steps", type=number(int, 1), default=1000, metavar="STEPS", help="at most (default: %(default)s)")
    add(
        "--learning-rate",
        type=number(float, 0, 1e37, open_minimum=True),
        default=0.1,
        metavar="RATE",
        help="peak rate of AdamW; the reference recipe has 0.01 (default: %(default)s)",
    )
    add(
        "--grad-clip",
        type=number(float, 0),
        default=0.0,
        metavar="NORM",
        help="clip the joint gradient of e_t and m to this norm; 0 is off (default: %(default)s)",
    )
    add(
        "--vocabulary",
        choices=("full", "visual"),
        default="full",
        help="the ids that compete in softmax and argmax: every id of the model, text included (the strict claim), or "
        "the visual codes alone (default: %(default)s)",
    )
    add(
        "--target-accuracy",
        type=number(float, 0, 100),
        default=100.0,
        metavar="PERCENT",
        help="stop as soon as this token accuracy is reached; 0 is never (default: %(default)s)",
    )
    add(
        "--log-every",
        type=number(int, 1),
        default=1,
        metavar="STEPS",
        help="steps between two rows of history.csv and of W&B's history (default: %(default)s)",
    )

    add = parser.add_argument_group("output").add_argument
    add(
        "--save-dir",
        type=folder_path,
        default=Path("./proto_tokens_exp"),
        metavar="FOLDER",
        help="results go to FOLDER/<run name>/, generated references are cached beside them (default: %(default)s)",
    )

    add = parser.add_argument_group("Weights & Biases").add_argument
    add("--use-wandb", action="store_true", help="log to W&B; a run started by a sweep agent does so without this flag")
    add("--wandb-project", default="simplear-proto-tokens", metavar="NAME", help="(default: %(default)s)")
    add("--wandb-entity", metavar="NAME", help="user or team (default: W&B's own default)")
    add(
        "--wandb-run-name",
        type=run_name,
        metavar="NAME",
        help="name of the run and of its folder (default: from the settings, as proto_256px_steps1000_lr01_seed42)",
    )
    add(
        "--wandb-tags",
        type=tags,
        default=["proto-tokens"],
        metavar="TAG,TAG",
        help="separated by commas (default: proto-tokens)",
    )
    add("--wandb-group", metavar="NAME", help="group that the run belongs to")
    add(
        "--wandb-mode",
        choices=("online", "offline", "disabled"),
        help="offline writes a local run to sync later (default: WANDB_MODE of the environment, else online)",
    )
    return parser


def with_hyphens(argument: str) -> str:
    """`--num_steps=50` -> `--num-steps=50`; values keep their underscores."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; a mistake ends the process with one line on stderr and exit code 2."""
    parser = build_parser()
    parser.error = exit_with_error
    args = parser.parse_args([with_hyphens(argument) for argument in (sys.argv[1:] if argv is None else argv)])
    if args.demo and (args.model_path or args.vq_model_ckpt):
        parser.error("--demo names both models already: leave out --model-path and --vq-model-ckpt")
    args.model_path = args.model_path or (str(DEMO_FOLDER / "generator") if args.demo else DEFAULT_MODEL)
    args.vq_model_ckpt = args.vq_model_ckpt or (str(DEMO_FOLDER / "vq") if args.demo else DEFAULT_VQ_MODEL)
    args.wandb_run_name = args.wandb_run_name or default_run_name(args)
    return args


def exit_with_error(message: str) -> None:
    one_line = " ".join(str(message).split())
    print(f"verify_proto_tokens.py: error: {one_line}", file=sys.stderr)
    raise SystemExit(2)


def default_run_name(args: argparse.Namespace) -> str:
    rate = f"{args.learning_rate:g}".replace(".", "")
    name = f"proto_{args.image_size}px_steps{args.num_steps}_lr{rate}_seed{args.seed}"
    # The runs of a sweep differ in settings that the name may not show: each keeps to a folder of its own.
    return f"{name}_{os.environ['WANDB_RUN_ID']}" if in_sweep() and os.environ.get("WANDB_RUN_ID") else name


def in_sweep() -> bool:
    """Whether a W&B sweep agent started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


if __name__ == "__main__":
    # `main` parses for real; this is only so that --help and a mistyped option answer before the heavy imports.
    parse_args()

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM

# ----------------------------------------------------------------------------------------------------------------------
# Models

CONFIGURATION_FILES = ("*.json", "merges.txt")
GENERATOR_FILES = (*CONFIGURATION_FILES, "*.safetensors")
VQ_FILES = ("decoder.jit",)
TEXT_TO_IMAGE, START_OF_IMAGE = "<|t2i|>", "<|soi|>"
REAL_SIZE = 100e6  # parameters from which a run on a CPU deserves a word about its duration


@dataclass(frozen=True)
class Models:
    """The frozen generator with its text tokenizer, the VQ decoder, and how their vocabularies fit together.

    Visual code k (0 .. codebook_size - 1) is token id visual_offset + k of the generator.
    """

    generator: Qwen2ForCausalLM
    text_tokenizer: PreTrainedTokenizerBase
    vq_decoder: torch.jit.ScriptModule
    visual_offset: int
    codebook_size: int
    factor: int  # pixels a latent cell spans, in each direction
    fingerprint: str  # of the generator's files
    vq_fingerprint: str

    @property
    def device(self) -> torch.device:
        return self.generator.device

    @property
    def hidden_size(self) -> int:
        return self.generator.config.hidden_size


def load_models(args: argparse.Namespace) -> Models:
    """Loads everything that stays frozen, the cheap and telling parts first. Raises UserError."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    generator_folder = local_folder(args.model_path, CONFIGURATION_FILES, "--model-path")
    vocabulary_rows = read_vocabulary_rows(generator_folder)
    text_tokenizer = load_text_tokenizer(generator_folder)
    vq_folder = local_folder(args.vq_model_ckpt, VQ_FILES, "--vq-model-ckpt")
    vq_decoder = load_vq_decoder(vq_folder, device)
    factor = downsampling_factor(vq_decoder, device)
    if args.image_size % factor:
        below = args.image_size // factor * factor
        nearest = f"{below} or {below + factor}" if below else f"{factor}"
        raise UserError(
            f"--image-size {args.image_size} is no multiple of the tokenizer's {factor} pixels: try {nearest}"
        )
    visual_offset = len(text_tokenizer)
    codebook_size = args.codebook_size or fsq_codebook_size(vq_decoder) or vocabulary_rows - visual_offset
    if codebook_size < 1 or vocabulary_rows < visual_offset + codebook_size:
        raise UserError(
            f"--model-path {args.model_path} has {vocabulary_rows} embedding rows, too few for {visual_offset} text "
            f"tokens and a codebook of {codebook_size}: it is no SimpleAR checkpoint for this VQ tokenizer"
        )
    generator_folder = local_folder(args.model_path, GENERATOR_FILES, "--model-path")
    generator = load_generator(generator_folder, dtype, device)
    print(
        f"generator: {sum(p.numel() for p in generator.parameters()) / 1e6:,.1f} M parameters, "
        f"{str(dtype).removeprefix('torch.')} on {device}; {visual_offset} text ids + {codebook_size} visual codes"
    )
    return Models(
        generator,
        text_tokenizer,
        vq_decoder,
        visual_offset,
        codebook_size,
        factor,
        fingerprint=fingerprint_of(generator_folder, GENERATOR_FILES),
        vq_fingerprint=fingerprint_of(vq_folder, VQ_FILES),
    )


def pick_device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here ({first_line(error)}): try --device cpu") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def last_line(error: BaseException) -> str:
    """Where TorchScript's own errors say what happened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")


def local_folder(name: str, patterns: tuple[str, ...], option: str) -> Path:
    """The folder itself, or the local snapshot of a hub repository, downloaded where needed. Raises UserError."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{option} {name} is a file: name the folder that holds it")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise UserError(f"{option} {name}: there is no such folder (and this is no hub id such as {DEFAULT_MODEL})")
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except GatedRepoError:
        raise UserError(
            f"{option} {name} is gated: accept its licence at https://huggingface.co/{name}, then run `hf auth login`; "
            "or name a local folder, or try --demo"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{option} {name}: there is no such folder, and no such repository on the Hugging Face hub that you may "
            "read (a private one needs `hf auth login`); name a local folder, or try --demo"
        ) from None
    except Exception as error:  # of the hub client, its HTTP library or the disk: no common class
        raise UserError(
            f"{option} {name}: there is no such folder, and it cannot be fetched from the Hugging Face hub "
            f"({first_line(error.__cause__ or error)[:120]}); name a local folder, or try --demo (no network)"
        ) from None


def read_vocabulary_rows(folder: Path) -> int:
    """The embedding rows that the checkpoint's config.json promises. Raises UserError where it is no Qwen2 model."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"--model-path {folder} holds no config.json: it is no model folder")
    try:
        config = json.loads(file.read_text())
        kind, rows = config["model_type"], int(config["vocab_size"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged or no model configuration: download it again") from None
    if kind != "qwen2":
        raise UserError(f"--model-path {folder} is a {kind!r} model: SimpleAR generators are 'qwen2'")
    return rows


def load_text_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        text_tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise UserError(f"the text tokenizer in {folder} does not load: {first_line(error)}") from None
    missing = [token for token in (TEXT_TO_IMAGE, START_OF_IMAGE) if token not in text_tokenizer.get_vocab()]
    if missing:
        raise UserError(f"the text tokenizer in {folder} lacks {' and '.join(missing)}: it is not SimpleAR's")
    return text_tokenizer


def load_generator(folder: Path, dtype: torch.dtype, device: torch.device) -> Qwen2ForCausalLM:
    """The generator, frozen: no parameter has requires_grad. Raises UserError."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        # By class: config.json may name SimpleAR's own class, which no library ships; its weights are plain Qwen2.
        generator, report = Qwen2ForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the weights in {folder} do not load as a Qwen2 model: {first_line(error)}") from None
    if report["missing_keys"] or report["mismatched_keys"]:
        raise UserError(
            f"the weights in {folder} lack {len(report['missing_keys'])} of the model's tensors and have "
            f"{len(report['mismatched_keys'])} of another shape: the download is incomplete or of another model"
        )
    return generator.to(device).eval().requires_grad_(False)


def load_vq_decoder(folder: Path, device: torch.device) -> torch.jit.ScriptModule:
    """The VQ decoder as TorchScript, in its own precision (casts are traced in as constants). Raises UserError."""
    file = folder / "decoder.jit"
    if not file.is_file():
        raise UserError(f"--vq-model-ckpt {folder} holds no decoder.jit: it is no Cosmos-style VQ tokenizer")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(file, map_location=device).eval()
    except (RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{file} is no TorchScript file, or a damaged one: {first_line(error)}") from None


def downsampling_factor(vq_decoder: torch.jit.ScriptModule, device: torch.device) -> int:
    """Pixels per latent cell, learnt by decoding one cell. Raises UserError."""
    try:
        return decode_codes(vq_decoder, torch.zeros(1, 1, dtype=torch.long, device=device)).shape[-1]
    except Exception as error:  # whatever foreign TorchScript may raise
        raise UserError(
            f"--vq-model-ckpt: decoder.jit does not decode one code to a picture on {device} ({last_line(error)}): it "
            "is no Cosmos-style discrete decoder, or its operations do not exist there (then try --device cpu)"
        ) from None


def fsq_codebook_size(vq_decoder: torch.jit.ScriptModule) -> int | None:
    """The product of the FSQ levels that a Cosmos decoder carries in its state; None where it carries none."""
    for name, buffer in vq_decoder.named_buffers():
        if name.endswith("quantizer._levels"):
            return int(buffer.prod())
    return None


@torch.inference_mode()
def decode_codes(vq_decoder: torch.jit.ScriptModule, codes: Tensor) -> Tensor:
    """Visual codes [B, N] of square images in raster order -> pixels [B, 3, H, W], float32 in [0, 1], on the CPU."""
    side = math.isqrt(codes.shape[1])
    video = vq_decoder(codes.view(-1, 1, side, side))  # [B, 3, 1, H, W], about [-1, 1]
    return ((video[:, :, 0].float().cpu() + 1) / 2).clamp(0, 1)


def fingerprint_of(folder: Path, patterns: tuple[str, ...]) -> str:
    """Identifies a model by its commit where it is a hub snapshot, else by the content of its files."""
    if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name):
        return folder.name
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def warn_if_slow(models: Models, num_tokens: int, num_steps: int) -> None:
    """One line about how long a real-size model takes on a CPU, from timing one pass of each kind."""
    parameters = sum(p.numel() for p in models.generator.parameters())
    if models.device.type != "cpu" or parameters < REAL_SIZE:
        return

    def seconds_of(batch: int, length: int) -> float:
        ids = torch.zeros(batch, length, dtype=torch.long)
        started = time.perf_counter()
        with torch.inference_mode():
            models.generator(input_ids=ids, use_cache=False)
        return time.perf_counter() - started

    probe = min(num_tokens, 256)
    seconds_of(2, 1)  # the first pass pays for reading the weights from disk
    reference = seconds_of(2, 1) * num_tokens
    optimisation = 2 * seconds_of(1, probe) * num_tokens / probe * num_steps  # backward costs about one more forward
    print(
        f"note: {parameters / 1e9:.1f} B parameters on a CPU: expect about {duration(reference)} for a new reference "
        f"and {duration(optimisation)} for {num_steps} steps; a GPU, --dtype bfloat16 or fewer --num-steps shorten this"
    )


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ----------------------------------------------------------------------------------------------------------------------
# Reference image

CACHE_FORMAT = 1
NEGATIVE_PROMPT = (
    "An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion"
)


@dataclass(frozen=True)
class Reference:
    """The target: visual codes [B, N], the seconds that their autoregressive decoding took, their pixels."""

    codes: Tensor
    autoregressive_seconds: float
    pixels: Tensor  # [B, 3, H, W] in [0, 1]


def conditional_prompt(prompt: str) -> str:
    """SimpleAR's template, word for word."""
    return f"{TEXT_TO_IMAGE}A highly realistic image of {prompt}{START_OF_IMAGE}"


def unconditional_prompt() -> str:
    return f"{TEXT_TO_IMAGE}{NEGATIVE_PROMPT}{START_OF_IMAGE}"


def make_reference(models: Models, args: argparse.Namespace) -> Reference:
    """Takes the reference from the cache where these very settings made it before; else decodes and caches it."""
    num_tokens = (args.image_size // models.factor) ** 2
    settings = reference_settings(models, args, num_tokens)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    cache_file = args.save_dir / CACHE_FOLDER / f"{key[:32]}.safetensors"
    cached = None if args.force_generate else read_cached_codes(cache_file, key, num_tokens, models.codebook_size)
    if cached:
        codes, seconds = cached
        print(f"reference: {num_tokens} tokens, reused from {cache_file}")
    else:
        codes, seconds = generate_visual_codes(models, [args.prompt], num_tokens, args)
        write_cached_codes(cache_file, codes, seconds, key)
        print(f"reference: {num_tokens} tokens in {duration(seconds)} ({num_tokens / seconds:.1f} tokens/s)")
    codes = codes.to(models.device)
    return Reference(codes, seconds, decode_codes(models.vq_decoder, codes))


def reference_settings(models: Models, args: argparse.Namespace, num_tokens: int) -> dict:
    """Everything that determines the reference's tokens."""
    names = ("prompt", "cfg_scale", "temperature", "top_k", "top_p", "seed")
    return {
        "format": CACHE_FORMAT,
        "generator": models.fingerprint,
        "visual_offset": models.visual_offset,
        "codebook_size": models.codebook_size,
        "num_tokens": num_tokens,
        "dtype": str(models.generator.dtype),
        "device": models.device.type,
        "torch": torch.__version__,
        "templates": [conditional_prompt(""), unconditional_prompt()],
    } | {name: getattr(args, name) for name in names}


def read_cached_codes(file: Path, key: str, num_tokens: int, codebook_size: int) -> tuple[Tensor, float] | None:
    """The cached codes [B, N] and their decoding time; None where there are none, with a warning if damaged."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stored:
            codes, metadata = stored.get_tensor("codes"), stored.metadata() or {}
        seconds = float(metadata["autoregressive_seconds"])
        whole = metadata["key"] == key and codes.dtype == torch.int64 and codes.shape == (1, num_tokens)
        in_range = bool(((codes >= 0) & (codes < codebook_size)).all())
        if whole and in_range and 0 < seconds < math.inf:
            return codes, seconds
    except (SafetensorError, OSError, KeyError, ValueError):
        pass
    print(f"warning: {file} is damaged or foreign; generating the reference anew", file=sys.stderr)
    return None


def write_cached_codes(file: Path, codes: Tensor, seconds: float, key: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as partial:
        metadata = {"key": key, "autoregressive_seconds": repr(seconds)}
        partial.write_bytes(to_safetensors({"codes": codes.cpu()}, metadata))


@torch.inference_mode()
def generate_visual_codes(
    models: Models, prompts: list[str], num_tokens: int, args: argparse.Namespace
) -> tuple[Tensor, float]:
    """Samples visual codes [B, N] with classifier-free guidance, one per step; returns them and the seconds taken.

    The conditional and the unconditional prompt of every target run as one left-padded batch [2B, L] over one
    key/value cache, and only the visual rows of the head are computed: text ids can never be sampled.
    """
    texts = [conditional_prompt(prompt) for prompt in prompts] + [unconditional_prompt()] * len(prompts)
    prompt_ids = [models.text_tokenizer(text)["input_ids"] for text in texts]
    input_ids, attention_mask = left_pad(prompt_ids, models.device)  # [2B, L]
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    visual_rows = slice(models.visual_offset, models.visual_offset + models.codebook_size)
    visual_head = models.generator.lm_head.weight[visual_rows]  # [K, D]
    rng = torch.Generator(models.device).manual_seed(args.seed)
    cache, codes = transformers.DynamicCache(config=models.generator.config), []
    models.generator.model(input_ids=input_ids[:, -1:], use_cache=False)  # the clock is not to pay for the warm-up
    synchronise(models.device)
    started = time.perf_counter()
    for _ in progress_bar(range(num_tokens), "reference", "tokens"):
        hidden_states = models.generator.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]  # [2B, D]
        scores = guided_scores(*(hidden_states @ visual_head.T).float().chunk(2), args.cfg_scale)  # [B, K]
        if not codes and not scores.isfinite().all():
            raise UserError(
                "the generator's logits are not finite: try --dtype float32 or bfloat16; else its weights are damaged"
            )
        codes.append(sample(scores, args.temperature, args.top_k, args.top_p, rng))  # [B]
        input_ids = (codes[-1] + models.visual_offset).repeat(2)[:, None]  # both prompts are fed the same token
        attention_mask = F.pad(attention_mask, (0, 1), value=1)
        position_ids = position_ids[:, -1:] + 1
    codes = torch.stack(codes, dim=1)
    synchronise(models.device)
    return codes, time.perf_counter() - started


def left_pad(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids of unequal lengths -> ids and mask, both [len(sequences), L], with the padding in front."""
    length = max(map(len, sequences))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in sequences], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in sequences], device=device)
    return ids, mask


def guided_scores(cond_logits: Tensor, uncond_logits: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance on log-probabilities, as SimpleAR has it: uncond + cfg_scale * (cond - uncond)."""
    cond, uncond = cond_logits.log_softmax(-1), uncond_logits.log_softmax(-1)
    return uncond + cfg_scale * (cond - uncond)


def sample(scores: Tensor, temperature: float, top_k: int | None, top_p: float, rng: torch.Generator) -> Tensor:
    """Draws one index per row of scores [B, K] -> [B]; ties with the k-th largest score stay in."""
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature  # the largest stays 0 at any temperature
    if top_k is not None and top_k < scores.shape[-1]:
        kth_largest = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < kth_largest, -math.inf)
    if top_p < 1:
        ordered, order = scores.sort(descending=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability  # the share that the likelier codes hold already
        beyond = before >= top_p  # in the order of likelihood
        scores = scores.masked_fill(torch.empty_like(beyond).scatter(-1, order, beyond), -math.inf)
    return torch.multinomial(scores.softmax(-1), 1, generator=rng).squeeze(-1)


# ----------------------------------------------------------------------------------------------------------------------
# Proto-tokens

INITIAL_SCALE = 0.5  # standard deviation of the initial values
BETAS = (0.9, 0.9)  # a short second-moment memory: the largest single gain over the reference recipe
WARMUP_STEPS = 20
FINAL_RATE = 1e-5


@dataclass(frozen=True)
class ProtoTokens:
    """The two learned embeddings, float32 whatever the model's precision: e_t [B, D] and m [D]."""

    e_t: Tensor
    m: Tensor

    def copy(self) -> ProtoTokens:
        return ProtoTokens(self.e_t.detach().clone(), self.m.detach().clone())


@dataclass(frozen=True)
class Optimisation:
    """What the optimisation found: the best embeddings, where, how long it took, and its logged rows."""

    best: ProtoTokens
    best_step: int
    steps: int
    seconds: float
    history: list[dict[str, float]]
    diverged: bool


def initial_proto_tokens(batch: int, hidden_size: int, seed: int, device: torch.device) -> ProtoTokens:
    """Normal values from a random stream of their own: the same on every device and for any number of steps."""
    rng = torch.Generator().manual_seed(seed)
    m = torch.randn(hidden_size, generator=rng) * INITIAL_SCALE
    e_t = torch.randn(batch, hidden_size, generator=rng) * INITIAL_SCALE
    return ProtoTokens(e_t.to(device).requires_grad_(), m.to(device).requires_grad_())


def one_pass_hidden_states(generator: Qwen2ForCausalLM, proto_tokens: ProtoTokens, num_tokens: int) -> Tensor:
    """One forward pass over [e_t, m, ..., m] -> hidden states [B, N, D]; position i speaks for token i."""
    batch, hidden_size = proto_tokens.e_t.shape
    filler = proto_tokens.m.expand(batch, num_tokens - 1, hidden_size)
    inputs_embeds = torch.cat((proto_tokens.e_t[:, None], filler), dim=1).to(generator.dtype)  # [B, N, D]
    return generator.model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state


def competing_head(models: Models, vocabulary: str) -> tuple[Tensor, int]:
    """The head's rows [V, D] whose ids compete, and the row at which visual code 0 lies."""
    weight = models.generator.lm_head.weight
    if vocabulary == "full":
        return weight, models.visual_offset
    return weight[models.visual_offset : models.visual_offset + models.codebook_size], 0


def token_metrics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Counts over logits [B, N, V] and target [B, N]: positions whose argmax is the target, and whose top 5 hold it.

    Only strictly larger logits keep a target out of the top 5, which may hold more than five where a low precision
    makes ties.
    """
    target_logits = logits.gather(-1, target[..., None])
    correct = (logits.argmax(-1) == target).sum()
    in_top5 = ((logits > target_logits).sum(-1) < 5).sum()
    return correct, in_top5


def rate_at(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine from `peak` to FINAL_RATE over the remaining steps; `step` counts from 1."""
    warmup = min(WARMUP_STEPS, num_steps // 10)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup - 1) / max(1, num_steps - warmup - 1)
    final = min(FINAL_RATE, peak)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def optimise_proto_tokens(
    models: Models, codes: Tensor, args: argparse.Namespace, log_step: Callable[[dict[str, float]], None]
) -> Optimisation:
    """Minimises the mean cross-entropy of one pass over [e_t, m, ..., m] against `codes` [B, N].

    A row's numbers belong to the embeddings before that step's update; the best are those with the highest accuracy,
    and among equals the lowest loss. `log_step` gets every logged row. Ends early at --target-accuracy, or where the
    loss or its gradient is no longer finite (`diverged`).
    """
    batch, num_tokens = codes.shape
    proto_tokens = initial_proto_tokens(batch, models.hidden_size, args.seed, models.device)
    parameters = [proto_tokens.e_t, proto_tokens.m]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=BETAS, weight_decay=0.0)
    head, first_code = competing_head(models, args.vocabulary)
    target = codes + first_code  # [B, N]
    best, best_step, best_score = proto_tokens.copy(), 0, (-1.0, -math.inf)
    history, diverged = [], False
    started = time.perf_counter()
    with progress_bar(range(1, args.num_steps + 1), "proto-tokens", "steps") as steps:
        for step in steps:
            rate = rate_at(step, args.num_steps, args.learning_rate)
            optimizer.param_groups[0]["lr"] = rate
            logits = (one_pass_hidden_states(models.generator, proto_tokens, num_tokens) @ head.T).float()  # [B, N, V]
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
            optimizer.zero_grad()
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf)
            with torch.no_grad():
                correct, in_top5 = token_metrics(logits, target)
                norms = (proto_tokens.e_t.norm(dim=-1).mean(), proto_tokens.m.norm())
                measured = torch.stack((loss, correct, in_top5, *norms, grad_norm)).tolist()  # the step's one host sync
            loss_value, correct_count, top5_count, e_t_norm, m_norm, grad_norm_value = measured
            if not math.isfinite(loss_value + grad_norm_value):
                diverged = True
                break
            accuracy = 100 * correct_count / codes.numel()
            if (accuracy, -loss_value) > best_score:
                best, best_step, best_score = proto_tokens.copy(), step, (accuracy, -loss_value)
            reached = 0 < args.target_accuracy <= accuracy
            if step % args.log_every == 0 or step in (1, args.num_steps) or reached:
                row = {
                    "step": step,
                    "train/loss": loss_value,
                    "train/accuracy": accuracy,
                    "train/top5_accuracy": 100 * top5_count / codes.numel(),
                    "train/correct_tokens": int(correct_count),
                    "train/best_accuracy": best_score[0],
                    "train/learning_rate": rate,
                    "embeddings/e_t_norm": e_t_norm,
                    "embeddings/m_norm": m_norm,
                    "gradients/grad_norm": grad_norm_value,
                }
                history.append(row)
                log_step(row)
                status = f"loss {loss_value:.3f}, correct {correct_count:.0f}/{codes.numel()} ({accuracy:.1f} %)"
                steps.set_postfix_str(f"{status}, best {best_score[0]:.1f} %", refresh=False)
            if reached:
                break
            optimizer.step()
    return Optimisation(best, best_step, step, time.perf_counter() - started, history, diverged)


# ----------------------------------------------------------------------------------------------------------------------
# Reconstruction

SUCCESS, PARTIAL_SUCCESS = 99.0, 80.0  # percent of tokens


@dataclass(frozen=True)
class Reconstruction:
    """What one forward pass over the best proto-tokens emits."""

    predicted_ids: Tensor  # [B, N], ids of the competing vocabulary's argmax, as generator token ids
    target_rank: Tensor  # [B, N], 0 where the target is the prediction, else the ids that beat it (1 = runner-up)
    pixels: Tensor  # [B, 3, H, W] in [0, 1]
    one_pass_seconds: float

    @property
    def wrong(self) -> Tensor:
        return self.target_rank > 0  # [B, N]


@torch.inference_mode()
def reconstruct(models: Models, proto_tokens: ProtoTokens, codes: Tensor, vocabulary: str) -> Reconstruction:
    """One forward pass, argmax, VQ decode; the pass is timed too (median of five, after one to warm up).

    A position whose argmax is a text id counts as wrong; the picture shows its likeliest visual code.
    """
    head, first_code = competing_head(models, vocabulary)
    seconds = []
    for _ in range(6):
        synchronise(models.device)
        started = time.perf_counter()
        logits = one_pass_hidden_states(models.generator, proto_tokens, codes.shape[1]) @ head.T  # [B, N, V]
        predicted = logits.argmax(-1)  # [B, N]
        synchronise(models.device)
        seconds.append(time.perf_counter() - started)
    target = codes + first_code
    ahead = (logits > logits.gather(-1, target[..., None])).sum(-1)
    target_rank = torch.where(predicted == target, 0, ahead.clamp(min=1))
    predicted_codes = logits[..., first_code : first_code + models.codebook_size].argmax(-1)
    pixels = decode_codes(models.vq_decoder, predicted_codes)
    predicted_ids = predicted - first_code + models.visual_offset
    return Reconstruction(predicted_ids, target_rank, pixels, sorted(seconds[1:])[2])


def psnr(pixels: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images [B, 3, H, W] in [0, 1], over all pixels; infinite where equal."""
    error = F.mse_loss(pixels, reference).item()
    return math.inf if error == 0 else -10 * math.log10(error)


def status_of(best_accuracy: float) -> str:
    if best_accuracy >= SUCCESS:
        return "success"
    return "partial_success" if best_accuracy >= PARTIAL_SUCCESS else "need_improvement"


def summarise(reference: Reference, result: Optimisation, reconstruction: Reconstruction) -> dict:
    """The summary of a run: W&B's keys, then what else a reader asks for. Percentages are 0 .. 100, times seconds."""
    last = result.history[-1]
    num_errors = int(reconstruction.wrong.sum())
    num_tokens = reference.codes.numel()
    best_accuracy = 100 * (num_tokens - num_errors) / num_tokens  # of the embeddings as stored
    return {
        "final_accuracy": last["train/accuracy"],
        "best_accuracy": best_accuracy,
        "final_top5_accuracy": last["train/top5_accuracy"],
        "final_loss": last["train/loss"],
        "num_errors": num_errors,
        "error_rate": 100 * num_errors / num_tokens,
        "total_params": result.best.e_t.numel() + result.best.m.numel(),
        "status": status_of(best_accuracy),
        "num_tokens": num_tokens,
        "best_step": result.best_step,
        "steps": result.steps,
        "optimisation_seconds": result.seconds,
        "one_pass_seconds": reconstruction.one_pass_seconds,
        "autoregressive_seconds": reference.autoregressive_seconds,
        "speedup": reference.autoregressive_seconds / reconstruction.one_pass_seconds,
        "psnr": psnr(reconstruction.pixels, reference.pixels),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Figures

INK, FAINT, BLUE, ORANGE, RED, GREEN = "#1f2430", "#8a8f99", "#2f6fde", "#f0a202", "#d7263d", "#2a9d6f"


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels [3, H, W] in [0, 1] -> picture."""
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def render(figure: Figure) -> Image.Image:
    """Draws a figure; letters that the font lacks (emoji in a prompt, say) become boxes without a warning each."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def caption_of(prompt: str) -> str:
    """The prompt as a figure's heading: one line of at most 72 characters."""
    one_line = " ".join(prompt.split())
    return one_line if len(one_line) <= 72 else one_line[:71] + "…"


def draw_comparison(prompt: str, reference: Image.Image, reconstruction: Image.Image, summary: dict) -> Image.Image:
    """Reference and reconstruction side by side, with accuracy and PSNR."""
    figure = Figure(figsize=(8.4, 5.1), dpi=150, facecolor="white")
    axes = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06, "left": 0.03, "right": 0.97, "top": 0.83, "bottom": 0.07})
    total, correct = summary["num_tokens"], summary["num_tokens"] - summary["num_errors"]
    accuracy = f"{correct}/{total} tokens ({100 * correct / total:.1f} %)"
    likeness = f"PSNR {summary['psnr']:.1f} dB" if math.isfinite(summary["psnr"]) else "identical picture"
    captions = (
        (reference, "reference", f"{total} tokens, one after another"),
        (reconstruction, "one forward pass over two embeddings", f"{accuracy}, {likeness}"),
    )
    for axis, (image, title, detail) in zip(axes, captions, strict=True):
        axis.imshow(image, interpolation="antialiased")
        axis.set_title(title, fontsize=11, color=INK)
        axis.set_xlabel(detail, fontsize=10, color=INK, labelpad=6)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.suptitle(caption_of(prompt), fontsize=13, fontweight="bold", color=INK, y=0.965, parse_math=False)
    return render(figure)


def draw_token_error_map(reference: Image.Image, target_rank: Tensor) -> Image.Image:
    """The latent grid over a faint reference; wrong tokens marked by how near the target came. target_rank: [N]."""
    side = math.isqrt(target_rank.numel())
    rank = target_rank.view(side, side).cpu().numpy()
    level = np.where(rank == 0, 0, np.where(rank < 5, 1, 2))
    num_errors = int((level > 0).sum())
    figure = Figure(figsize=(5.6, 6.1), dpi=150, facecolor="white")
    axis = figure.add_axes((0.04, 0.1, 0.92, 0.8))
    whitened = Image.blend(reference, Image.new("RGB", reference.size, "white"), 0.55)
    axis.imshow(whitened, extent=(0, side, side, 0), interpolation="antialiased")
    colours = ListedColormap([(0, 0, 0, 0), ORANGE, RED])
    axis.imshow(level, extent=(0, side, side, 0), cmap=colours, vmin=0, vmax=2, alpha=0.7, interpolation="nearest")
    axis.set_xticks(range(side + 1), labels=[])
    axis.set_yticks(range(side + 1), labels=[])
    axis.tick_params(length=0)
    axis.grid(color="white", linewidth=max(0.15, 6.4 / side), alpha=0.9)
    axis.spines[:].set_visible(False)
    axis.set_title(
        f"{num_errors} of {rank.size} tokens wrong ({100 * num_errors / rank.size:.1f} %)",
        fontsize=13,
        fontweight="bold",
        color=INK,
        pad=10,
    )
    for x, colour, label in (
        (0.06, ORANGE, f"{int((level == 1).sum())} with the target among the top 5"),
        (0.6, RED, f"{int((level == 2).sum())} farther off"),
    ):
        figure.text(x, 0.045, "■", color=colour, fontsize=14, va="center")
        figure.text(x + 0.045, 0.045, label, color=INK, fontsize=10, va="center")
    return render(figure)


def draw_training_curves(history: list[dict[str, float]]) -> Image.Image:
    """Loss, accuracies, norms, gradient norm and learning rate over the steps, in one figure."""
    steps = [row["step"] for row in history]
    figure = Figure(figsize=(11, 6.6), dpi=130, facecolor="white", layout="constrained")
    axes = figure.subplot_mosaic("AAABBB;CCDDEE")

    def panel(name: str, title: str, lines: list[tuple[str, str, str]], log: bool = False) -> None:
        axis = axes[name]
        # A single row has no line to draw: it gets a dot.
        marker = "o" if len(steps) == 1 else None
        for key, label, colour in lines:
            axis.plot(steps, [row[key] for row in history], color=colour, linewidth=1.4, label=label, marker=marker)
        axis.set_title(title, fontsize=11, color=INK, loc="left")
        axis.set_yscale("log" if log else "linear")
        axis.grid(color=FAINT, alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=8, colors=INK)
        if len(lines) > 1:
            axis.legend(frameon=False, fontsize=9)

    panel("A", "cross-entropy (nats per token)", [("train/loss", "loss", BLUE)], log=True)
    accuracies = [
        ("top5_accuracy", "top-5", GREEN),
        ("accuracy", "top-1", BLUE),
        ("best_accuracy", "best top-1", ORANGE),
    ]
    panel("B", "token accuracy (%)", [(f"train/{key}", label, colour) for key, label, colour in accuracies])
    axes["B"].set_ylim(-2, 102)
    panel("C", "embedding norms (L2)", [("embeddings/e_t_norm", "e_t", BLUE), ("embeddings/m_norm", "m", ORANGE)])
    panel("D", "gradient norm before clipping", [("gradients/grad_norm", "gradient", BLUE)], log=True)
    panel("E", "learning rate", [("train/learning_rate", "rate", BLUE)])
    for name in "CDE":
        axes[name].set_xlabel("step", fontsize=9, color=INK)
    return render(figure)


def draw_figures(
    prompt: str, reference: Reference, reconstruction: Reconstruction, summary: dict, history: list[dict[str, float]]
) -> dict[str, Image.Image]:
    """Every picture of a run, by its W&B name; its file is that name with `.png`."""
    reference_image, reconstructed_image = to_image(reference.pixels[0]), to_image(reconstruction.pixels[0])
    return {
        "reference_image": reference_image,
        "reconstructed_image": reconstructed_image,
        "comparison": draw_comparison(prompt, reference_image, reconstructed_image, summary),
        "training_curves": draw_training_curves(history),
        "token_error_map": draw_token_error_map(reference_image, reconstruction.target_rank[0]),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Files

VERSIONED = ("torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "wandb")
VERSIONED += ("numpy", "pillow", "matplotlib", "tqdm")
IMAGES = ("reference_image", "reconstructed_image", "comparison", "training_curves", "token_error_map")
PROTO_TOKENS_FILE = "proto_tokens.safetensors"


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Yields a temporary path that takes the file's place when the block ends well: the old file or the new, whole."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def open_run_folder(args: argparse.Namespace) -> Path:
    """Makes <save-dir>/<run-name> and tries that it can be written. Raises UserError."""
    folder = args.save_dir / args.wandb_run_name
    try:
        for each in (folder, args.save_dir / CACHE_FOLDER):
            each.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=each):
                pass
    except OSError as error:
        raise UserError(f"--save-dir {args.save_dir} cannot be written: {error.strerror} ({error.filename})") from None
    if (folder / "summary.json").exists():
        print(f"note: the results of an earlier run in {folder} will be replaced; --wandb-run-name keeps runs apart")
    return folder


def describe_run(args: argparse.Namespace, models: Models) -> dict:
    """All settings, what they resolved to, and the versions: everything needed to run it again."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    resolved = {
        "device": str(models.device),
        "dtype": str(models.generator.dtype).removeprefix("torch."),
        "codebook_size": models.codebook_size,
        "visual_offset": models.visual_offset,
        "factor": models.factor,
        "num_tokens": (args.image_size // models.factor) ** 2,
        "hidden_size": models.hidden_size,
        "generator_fingerprint": models.fingerprint,
        "vq_fingerprint": models.vq_fingerprint,
        "initial_scale": INITIAL_SCALE,
        "betas": list(BETAS),
        "warmup_steps": WARMUP_STEPS,
        "final_learning_rate": FINAL_RATE,
    }
    versions = {"python": platform.python_version()} | {name: version_of(name) for name in VERSIONED}
    return settings | resolved | {"versions": versions}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_text(file: Path, text: str) -> None:
    with written_whole(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: Path, content: dict) -> None:
    """Strict JSON: a number that JSON has no word for (an infinite PSNR) becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
    write_text(file, json.dumps(finite, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_history(file: Path, history: list[dict[str, float]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, list(history[0]) if history else ["step"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(file, table.getvalue())


def write_images(folder: Path, images: dict[str, Image.Image]) -> None:
    for name, image in images.items():
        with written_whole(folder / f"{name}.png") as partial:
            image.save(partial, format="PNG")


def write_proto_tokens(
    file: Path, proto_tokens: ProtoTokens, target_ids: Tensor, predicted_ids: Tensor | None, settings: dict
) -> None:
    """e_t [B, D], m [D], target and predicted token ids [B, N]; the settings as JSON in the metadata."""
    tensors = {"e_t": proto_tokens.e_t, "m": proto_tokens.m, "target_ids": target_ids}
    if predicted_ids is not None:
        tensors["predicted_ids"] = predicted_ids
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with written_whole(file) as partial:
        partial.write_bytes(to_safetensors(stored, {"settings": json.dumps(settings)}))


def remove_earlier_results(folder: Path) -> None:
    """Results of an earlier run of the same name go before the first new one comes: never a mixture of two runs."""
    for name in (*(f"{image}.png" for image in IMAGES), "history.csv", "summary.json", PROTO_TOKENS_FILE):
        (folder / name).unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# Tracking: the only place that touches Weights & Biases


@contextlib.contextmanager
def tracked(args: argparse.Namespace, settings: dict) -> Iterator[object | None]:
    """Yields a W&B run that ends with the block, as failed if the block raises; None where W&B is not asked for."""
    if not (args.use_wandb or in_sweep()):
        yield None
        return
    import wandb

    try:
        run = wandb.init(
            project=None if in_sweep() else args.wandb_project,  # a sweep's runs belong to the sweep's project
            entity=args.wandb_entity,
            name=args.wandb_run_name,
            group=args.wandb_group,
            tags=args.wandb_tags,
            mode=args.wandb_mode,
            config=settings,
        )
    except (wandb.Error, ValueError) as error:
        raise UserError(
            f"W&B does not start ({first_line(error)}): run `wandb login`, or take --wandb-mode offline, or leave out "
            "--use-wandb"
        ) from None
    # Not `with run`: that prints a traceback of what is only a clear line to the user.
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def log_step(run: object | None, row: dict[str, float]) -> None:
    if run:
        run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def log_results(run: object | None, images: dict[str, Image.Image], summary: dict, proto_tokens_file: Path) -> None:
    """The pictures as media of the last step, the summary, and the proto-tokens as an artifact."""
    if not run:
        return
    import wandb

    run.log({name: wandb.Image(image) for name, image in images.items()}, step=summary["steps"])
    run.summary.update({name: value for name, value in summary.items() if value != math.inf})
    artifact = wandb.Artifact(f"proto_tokens_{run.id}", type="proto-tokens", metadata={"status": summary["status"]})
    artifact.add_file(str(proto_tokens_file))
    run.log_artifact(artifact)


# ----------------------------------------------------------------------------------------------------------------------
# Main


def synchronise(device: torch.device) -> None:
    """Waits for the device, so that a clock read next measures finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def progress_bar(iterable, label: str, unit: str) -> tqdm:
    """Lively on a terminal, a line a half-minute in a log file."""
    lively = sys.stderr.isatty()
    return tqdm(iterable, label, unit=f" {unit}", dynamic_ncols=lively, mininterval=0.1 if lively else 30)


def print_results(args: argparse.Namespace, summary: dict, folder: Path) -> None:
    errors, total = summary["num_errors"], summary["num_tokens"]
    likeness = f"{summary['psnr']:.1f} dB" if math.isfinite(summary["psnr"]) else "identical picture"
    rows = {
        "status": summary["status"],
        "best accuracy": f"{summary['best_accuracy']:.1f} % at step {summary['best_step']}",
        "wrong tokens": f"{errors} of {total}",
        "PSNR": likeness,
        "parameters": f"{summary['total_params']} for {total} tokens",
        "optimisation": f"{summary['steps']} steps in {duration(summary['optimisation_seconds'])}",
        "one pass": f"{1000 * summary['one_pass_seconds']:.1f} ms instead of "
        f"{duration(summary['autoregressive_seconds'])}: {summary['speedup']:.0f} x faster",
        "files": f"{folder}/",
    }
    print("\n" + "\n".join(f"  {label:<14} {value}" for label, value in rows.items()))


def run_experiment(args: argparse.Namespace) -> None:
    """The whole experiment. Raises UserError for what the user can put right."""
    folder = open_run_folder(args)
    models = load_models(args)
    settings = describe_run(args, models)
    warn_if_slow(models, settings["num_tokens"], args.num_steps)
    with tracked(args, settings) as run:
        reference = make_reference(models, args)
        target_ids = reference.codes + models.visual_offset
        remove_earlier_results(folder)
        write_json(folder / "config.json", settings)
        write_images(folder, {"reference_image": to_image(reference.pixels[0])})

        result = optimise_proto_tokens(models, reference.codes, args, lambda row: log_step(run, row))
        write_history(folder / "history.csv", result.history)
        write_proto_tokens(folder / PROTO_TOKENS_FILE, result.best, target_ids, None, settings)
        if result.diverged:
            raise UserError(
                f"the loss or its gradient is no longer finite at step {result.steps}: lower --learning-rate or set "
                f"--grad-clip 1; the best proto-tokens so far are in {folder / PROTO_TOKENS_FILE}"
            )
        reconstruction = reconstruct(models, result.best, reference.codes, args.vocabulary)
        summary = summarise(reference, result, reconstruction)
        images = draw_figures(args.prompt, reference, reconstruction, summary, result.history)
        write_images(folder, images)
        write_proto_tokens(folder / PROTO_TOKENS_FILE, result.best, target_ids, reconstruction.predicted_ids, settings)
        write_json(folder / "summary.json", summary)
        log_results(run, images, summary, folder / PROTO_TOKENS_FILE)
    print_results(args, summary, folder)


def main() -> None:
    try:
        run_experiment(parse_args())
    except UserError as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
