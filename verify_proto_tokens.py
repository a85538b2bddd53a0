"""Can a frozen autoregressive image generator emit a whole image in one forward pass from two learned embeddings?

The script generates a reference image from a prompt with SimpleAR (a Qwen2 decoder over the visual tokens of NVIDIA's
Cosmos tokenizer), freezes the generator, and optimises two proto-token embeddings, e_t and m, with cross-entropy until
one forward pass over [e_t, m, ..., m] predicts all N tokens of that image. It then decodes what the two embeddings
reconstruct and reports how close it comes.

    python verify_proto_tokens.py --demo        # a small real model kept in the repository: no GPU, no network

The method is Mezentsev & Oseledets, "Exploring the Latent Capacity of LLMs for One-Step Text Generation"
(arXiv 2505.21189), applied to image tokens. Shapes in comments: B = targets optimised together (1 unless more
are asked for), N = tokens, K = embeddings e_t of a target (1 likewise), D = hidden size, V = vocabulary, C = codes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

# ----------------------------------------------------------------------------------------------------------------------
# Arguments


@dataclass(frozen=True)
class Recipe:
    """How AdamW finds the proto-tokens: all but the number of steps."""

    initial_scale: float  # standard deviation of the initial values
    betas: tuple[float, float]
    warmup_steps: int
    learning_rate: float  # at the peak; from there a cosine to FINAL_RATE
    grad_clip: float  # 0 is off


RECIPES = {
    # A short second-moment memory is the largest single gain over the reference recipe.
    "tuned": Recipe(initial_scale=0.25, betas=(0.9, 0.9), warmup_steps=20, learning_rate=0.2, grad_clip=0.0),
    "reference": Recipe(initial_scale=0.01, betas=(0.9, 0.999), warmup_steps=0, learning_rate=0.01, grad_clip=1.0),
}
TUNED = RECIPES["tuned"]
DEFAULT_PROMPT = "a red apple on a wooden table"
CONTROLS = ("random", "shuffled", "untrained")
DEFAULT_MODEL = "Daniel0724/SimpleAR-1.5B-RL"
DEFAULT_VQ_MODEL = "nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"
DEMO_FOLDER = Path(__file__).resolve().parent / "tests" / "demo_model"
CACHE_FOLDER = "reference_cache"


class UserError(Exception):
    """Something the user can put right: `main` prints it as one line and exits with code 2."""


@contextlib.contextmanager
def enough_memory_for(what: str) -> Iterator[None]:
    """Turns running out of memory, on the device or the host, into a UserError that says during what."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        if not full:
            raise
        raise UserError(
            f"out of memory for {what}: fewer targets, a smaller --image-size, --dtype bfloat16 or "
            "--gradient-checkpointing on needs less"
        ) from None


class Stopped(BaseException):
    """SIGINT or SIGTERM came; like KeyboardInterrupt it passes every `except Exception`."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class StopSwitch:
    """The first SIGINT or SIGTERM raises Stopped, at once or, inside `held_back`, where the block looks for it.

    A second one ends the process at once.
    """

    def __init__(self):
        self.received, self.at_once = None, True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: object) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
        if self.at_once:
            raise Stopped(number)

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        self.at_once = False
        try:
            yield
        finally:
            self.at_once = True


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


def betas(text: str) -> tuple[float, float]:
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two numbers with a comma between, not {text!r}") from None
    if not (0 <= first < 1 and 0 <= second < 1):
        raise argparse.ArgumentTypeError(f"must be two numbers of at least 0 and below 1, not {text}")
    return first, second


def file_path(text: str) -> Path:
    return Path(text).expanduser()


def switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"takes no value, or true or false, not {text!r}")
    return text.lower() == "true"


# Sweep agents write a switch as --demo=True.
SWITCH = {"type": switch, "nargs": "?", "const": True, "default": False, "metavar": "true|false"}


# One row an option, as a table reads best.
# fmt: off
def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="verify_proto_tokens.py",
        usage="%(prog)s [--demo] [--prompt TEXT] [--use-wandb] [other options]",
        description="Learn two embeddings from which a frozen image generator emits a whole image in one forward pass.",
        epilog="Every option may also be written with underscores (--num_steps), as W&B sweep agents do.",
        allow_abbrev=False,
    )

    add = parser.add_argument_group("models").add_argument
    add("--model-path", metavar="PATH",
        help=f"SimpleAR generator: a local folder or a Hugging Face hub id (default: {DEFAULT_MODEL})")
    add("--vq-model-ckpt", metavar="PATH",
        help=f"VQ tokenizer: a local folder with decoder.jit, or a hub id (default: {DEFAULT_VQ_MODEL}); TorchScript "
        "is code, so take it only from someone you trust")
    add("--demo", **SWITCH, help="use the small demo model kept in the repository; needs no network")
    add("--codebook-size", type=number(int, 1), metavar="CODES",
        help="number of visual codes (default: the product of the decoder's FSQ levels where it carries them, else the "
        "embedding rows beyond the text vocabulary)")
    add("--device", help="torch device (default: cuda:0 where there is one, else mps, else cpu)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="precision of the generator; the proto-tokens are always float32 (default: auto, that is bfloat16 on CUDA "
        "and float32 elsewhere)")

    add = parser.add_argument_group("reference image").add_argument
    add("--prompt", type=prompt_text, action="append", metavar="TEXT", dest="prompts",
        help="what the reference image shows; given several times, the targets are optimised together "
        f"(default: {DEFAULT_PROMPT})")
    add("--prompts-file", type=file_path, metavar="FILE", help="further prompts, one a line")
    add("--image", type=file_path, action="append", metavar="FILE", dest="images",
        help="a picture of one's own as the target, cut to its middle square, instead of a generated one; --prompt "
        "then says what it shows (default: its file's name)")
    add("--image-size", type=number(int, 1), default=256, metavar="PIXELS",
        help="width and height; a multiple of the tokenizer's downsampling factor (default: %(default)s)")
    add("--cfg-scale", type=number(float, 0, 1000), default=6.0, metavar="S",
        help="classifier-free guidance: 1 is none, more follows the prompt more closely (default: %(default)s)")
    add("--temperature", type=number(float, 0, open_minimum=True), default=1.0, metavar="T",
        help="of sampling the reference (default: %(default)s)")
    add("--top-k", type=number(int, 1), metavar="K",
        help="sample among the K likeliest codes; 1 is greedy decoding (default: the whole codebook)")
    add("--top-p", type=number(float, 0, 1, open_minimum=True), default=1.0, metavar="P",
        help="sample among the likeliest codes that hold a share P of the probability (default: %(default)s)")
    add("--compile", choices=("auto", "on", "off"), default="auto",
        help="compile the decoding of the reference, on CUDA to CUDA graphs; costs half a minute first, and brings "
        "nothing on a CPU (default: auto, that is on CUDA from 1024 tokens)")
    add("--force-generate", **SWITCH, help="generate the reference even if it is cached with these settings")
    add("--seed", type=number(int, 0, 2**63 - 1), default=42,
        help="of the reference and of the initial proto-tokens (default: %(default)s)")
    add("--control", choices=CONTROLS,
        help="a harder target to compare with: `random` codes, the reference's own codes `shuffled`, or the reference "
        "for an `untrained` generator of the same architecture (default: none)")

    add = parser.add_argument_group("optimisation of the proto-tokens").add_argument
    add("--num-steps", type=number(int, 1), default=1000, metavar="STEPS", help="at most (default: %(default)s)")
    add("--num-e-tokens", type=number(int, 1), default=1, metavar="K",
        help="target-specific embeddings in front: [e_1 .. e_K, m, ..., m], N in all (default: %(default)s)")
    add("--m", choices=("shared", "own"), default="shared",
        help="whether several targets share one m, or each learns its own (default: %(default)s)")
    add("--m-from", type=file_path, metavar="FILE",
        help="take m, frozen, from an earlier run's proto_tokens.safetensors: only e_t learns")
    add("--recipe", choices=tuple(RECIPES), default="tuned",
        help="the defaults of the next five options; `reference` is the usual one: 0.01, no warm-up, betas 0.9 and "
        "0.999, initial values x 0.01, clipping at 1 (default: %(default)s)")
    add("--learning-rate", type=number(float, 0, 1e37, open_minimum=True), metavar="RATE",
        help=f"peak rate of AdamW; from there a cosine (default: {TUNED.learning_rate}, that of the recipe)")
    add("--warmup-steps", type=number(int, 0), metavar="STEPS",
        help=f"steps up to the peak rate, a tenth of all at most (default: {TUNED.warmup_steps}, that of the recipe)")
    add("--betas", type=betas, metavar="B1,B2",
        help="memory of AdamW's first and second moments "
        f"(default: {TUNED.betas[0]},{TUNED.betas[1]}, those of the recipe)")
    add("--initial-scale", type=number(float, 0, 1e6), metavar="STD",
        help=f"standard deviation of the initial values (default: {TUNED.initial_scale}, that of the recipe)")
    add("--grad-clip", type=number(float, 0), metavar="NORM",
        help="clip the joint gradient of e_t and m to this norm; 0 is off "
        f"(default: {TUNED.grad_clip:g}, that of the recipe)")
    add("--vocabulary", choices=("full", "visual"), default="full",
        help="the ids that compete in softmax and argmax: every id of the model, text included (the strict claim), or "
        "the visual codes alone (default: %(default)s)")
    add("--gradient-checkpointing", choices=("auto", "on", "off"), default="auto",
        help="keep only each layer's input and compute the rest again on the way back: far less memory, more time "
        "(default: auto, that is where the device would not hold the step otherwise)")
    add("--target-accuracy", type=number(float, 0, 100), metavar="PERCENT",
        help="stop as soon as this token accuracy is reached; 0 is never (default: 100; with --capacity 99)")
    add("--capacity", **SWITCH,
        help="find the largest beginning of the target that reaches --target-accuracy within --num-steps")
    add("--log-every", type=number(int, 1), default=1, metavar="STEPS",
        help="steps between two rows of history.csv and of W&B's history (default: %(default)s)")
    add("--save-every", type=number(int, 1), default=100, metavar="STEPS",
        help="steps between two saved states, for --resume; Ctrl-C and SIGTERM save one too (default: %(default)s)")
    add("--resume", **SWITCH,
        help="go on with the interrupted run of this name, settings and save directory; starts where there is none")
    add("--from-proto-tokens", type=file_path, metavar="FILE",
        help="learn nothing: reconstruct the picture from an earlier run's proto_tokens.safetensors, whose prompt, "
        "size and vocabulary hold; the models must be that run's")

    add = parser.add_argument_group("output").add_argument
    add("--save-dir", type=file_path, default=Path("./proto_tokens_exp"), metavar="FOLDER",
        help="results go to FOLDER/<run name>/, generated references are cached beside them (default: %(default)s)")

    add = parser.add_argument_group("Weights & Biases").add_argument
    add("--use-wandb", **SWITCH, help="log to W&B; a run started by a sweep agent does so without this flag")
    add("--wandb-project", default="simplear-proto-tokens", metavar="NAME", help="(default: %(default)s)")
    add("--wandb-entity", metavar="NAME", help="user or team (default: W&B's own default)")
    add("--wandb-run-name", type=run_name, metavar="NAME",
        help="name of the run and of its folder (default: from the settings, as proto_256px_steps1000_lr02_seed42)")
    add("--wandb-tags", type=tags, default=["proto-tokens"], metavar="TAG,TAG",
        help="separated by commas (default: proto-tokens)")
    add("--wandb-group", metavar="NAME", help="group that the run belongs to")
    add("--image-every", type=number(int, 1), metavar="STEPS",
        help="also log the reconstruction every so many steps; W&B shows these with a slider (default: never)")
    add("--wandb-mode", choices=("online", "offline", "disabled"),
        help="offline writes a local run to sync later (default: WANDB_MODE of the environment, else online)")
    return parser
# fmt: on


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
    if args.from_proto_tokens and (args.control or args.m_from or args.images):
        parser.error("--from-proto-tokens learns nothing: leave out --control, --m-from and --image")
    if args.target_accuracy is None:
        args.target_accuracy = 99.0 if args.capacity else 100.0
    if args.capacity and (args.from_proto_tokens or args.image_every or not args.target_accuracy):
        parser.error("--capacity needs a --target-accuracy above 0, and no --from-proto-tokens or --image-every")
    if args.m_from and args.m == "own":
        parser.error("--m-from gives all targets one m: leave out --m own")
    try:
        args.prompts = (args.prompts or []) + (read_prompts(args.prompts_file) if args.prompts_file else [])
    except (OSError, ValueError) as error:
        parser.error(f"--prompts-file {args.prompts_file} cannot be read: {getattr(error, 'strerror', None) or error}")
    args.images = args.images or []
    own_prompts = [image.stem.replace("_", " ").strip() or DEFAULT_PROMPT for image in args.images]
    args.prompts = args.prompts or own_prompts or [DEFAULT_PROMPT]
    if args.images and len(args.images) != len(args.prompts):
        parser.error(
            f"--image was given {len(args.images)} times and --prompt {len(args.prompts)} times: give one each"
        )
    for name, value in vars(RECIPES[args.recipe]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.model_path = args.model_path or (str(DEMO_FOLDER / "generator") if args.demo else DEFAULT_MODEL)
    args.vq_model_ckpt = args.vq_model_ckpt or (str(DEMO_FOLDER / "vq") if args.demo else DEFAULT_VQ_MODEL)
    args.wandb_run_name = args.wandb_run_name or default_run_name(args)
    return args


def read_prompts(file: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines do not count. Raises OSError and ValueError."""
    prompts = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not prompts:
        raise ValueError("it holds no prompt")
    return prompts


def exit_with_error(message: str) -> None:
    one_line = " ".join(str(message).split())
    print(f"verify_proto_tokens.py: error: {one_line}", file=sys.stderr)
    raise SystemExit(2)


def default_run_name(args: argparse.Namespace) -> str:
    rate = f"{args.learning_rate:g}".replace(".", "")
    name = f"proto_{args.image_size}px_steps{args.num_steps}_lr{rate}_seed{args.seed}"
    several = len(args.prompts) > 1
    parts = (args.images and "image", several and f"targets{len(args.prompts)}", several and args.m == "own" and "own")
    parts += (
        args.num_e_tokens > 1 and f"e{args.num_e_tokens}",
        args.m_from and "given",
        args.control,
        args.capacity and "capacity",
    )
    name = "_".join([name, *filter(None, parts)])
    if args.from_proto_tokens:
        name = "reconstructed"
    # The runs of a sweep differ in settings that the name may not show: each keeps to a folder of its own.
    return f"{name}_{os.environ['WANDB_RUN_ID']}" if in_sweep() and os.environ.get("WANDB_RUN_ID") else name


def in_sweep() -> bool:
    """Whether a W&B sweep agent started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


if __name__ == "__main__":
    ARGUMENTS = parse_args()  # here, so that --help and a mistyped option answer before the heavy imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during these there is nothing to save, and no traceback to show

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
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
VQ_ENCODER = "encoder.jit"
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
    vq_encoder: torch.jit.ScriptModule | None  # only where there are pictures to encode
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
    vq_files = (*VQ_FILES, VQ_ENCODER) if args.images else VQ_FILES
    vq_folder = local_folder(args.vq_model_ckpt, vq_files, "--vq-model-ckpt")
    vq_decoder = load_torchscript(vq_folder / "decoder.jit", device)
    vq_encoder = load_torchscript(vq_folder / VQ_ENCODER, device) if args.images else None
    factor = downsampling_factor(vq_decoder, device)
    if args.image_size % factor:
        below = args.image_size // factor * factor
        nearest = f"{below} or {below + factor}" if below else f"{factor}"
        raise UserError(
            f"--image-size {args.image_size} is no multiple of the tokenizer's {factor} pixels: try {nearest}"
        )
    num_tokens = (args.image_size // factor) ** 2
    if args.num_e_tokens > num_tokens:
        raise UserError(
            f"--num-e-tokens {args.num_e_tokens} exceeds the {num_tokens} tokens of --image-size {args.image_size}"
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
        vq_encoder,
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
    special = (TEXT_TO_IMAGE, START_OF_IMAGE)
    missing = [token for token in special if token not in text_tokenizer.get_vocab()]
    if missing:
        raise UserError(f"the text tokenizer in {folder} lacks {' and '.join(missing)}: it is not SimpleAR's")
    split = [token for token in special if len(text_tokenizer(token)["input_ids"]) != 1]
    if split:
        raise UserError(f"the text tokenizer in {folder} splits {' and '.join(split)}: its special tokens are damaged")
    return text_tokenizer


def load_generator(folder: Path, dtype: torch.dtype, device: torch.device) -> Qwen2ForCausalLM:
    """The generator, frozen: no parameter has requires_grad. Raises UserError."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        # By class: config.json may name SimpleAR's own class, which no library ships; its weights are plain Qwen2.
        generator, report = Qwen2ForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            attention_dropout=0.0,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the weights in {folder} do not load as a Qwen2 model: {first_line(error)}") from None
    if report["missing_keys"] or report["mismatched_keys"]:
        raise UserError(
            f"the weights in {folder} lack {len(report['missing_keys'])} of the model's tensors and have "
            f"{len(report['mismatched_keys'])} of another shape: the download is incomplete or of another model"
        )
    return frozen(generator.to(device))


def frozen(generator: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """The generator in place: no parameter has requires_grad, and linear layers compute by `product`."""
    for module in generator.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = functools.partial(product, weight=module.weight, bias=module.bias)
    return generator.eval().requires_grad_(False)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] @ weight [O, I].T + bias -> [..., O], as F.linear has it, but faster in float32 on a CPU.

    There F.linear runs on MKL, which holds back on processors that are not Intel's. The same product as a 1x1
    convolution over "pixels" runs on oneDNN; that of one or two rows (decoding) is as fast as the weight can be read
    when the weight stands on the left.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= 2:
        out = (weight @ rows.T).T.contiguous()  # contiguous, since the next product wants its rows so
        out = out if bias is None else out + bias
    else:
        out = Convolution.apply(rows, weight, bias)
    return out.view(*x.shape[:-1], -1)


class Convolution(torch.autograd.Function):
    """The convolution of `product`, with a weight that is frozen: unlike conv2d's own, its way back keeps no input."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return from_pixels(F.conv2d(as_pixels(rows), weight[:, :, None, None], bias))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product_back(gradient.contiguous(), weight), None, None


def product_back(x: Tensor, weight: Tensor) -> Tensor:
    """x [P, O] @ weight [O, I] -> [P, I]: the way back through `product`."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return x @ weight
    return from_pixels(F.conv_transpose2d(as_pixels(x), weight[:, :, None, None]))


def as_pixels(rows: Tensor) -> Tensor:
    """[P, C] -> [1, C, 1, P], which in memory is channels-last and so no copy."""
    return rows[None, None].permute(0, 3, 1, 2)


def from_pixels(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 2, 3, 1)[0, 0]


def load_torchscript(file: Path, device: torch.device) -> torch.jit.ScriptModule:
    """A part of the VQ tokenizer in its own precision (casts are traced in as constants). Raises UserError."""
    if not file.is_file():
        raise UserError(f"--vq-model-ckpt {file.parent} holds no {file.name}: it is no Cosmos-style VQ tokenizer")
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
    # A few at a time: the decoder needs far more memory than its pictures.
    videos = [vq_decoder(some).cpu() for some in codes.view(-1, 1, side, side).split(4)]  # [b, 3, 1, H, W], in [-1, 1]
    return ((torch.cat(videos)[:, :, 0].float() + 1) / 2).clamp(0, 1)


@torch.inference_mode()
def encode_pixels(vq_encoder: torch.jit.ScriptModule, pixels: Tensor, num_tokens: int, codebook_size: int) -> Tensor:
    """Pixels [B, 3, H, W] in [0, 1] -> visual codes [B, N] in raster order. Raises UserError."""
    try:
        weight = next(vq_encoder.parameters())
        video = (2 * pixels - 1)[:, :, None].to(weight.device, weight.dtype)
        codes = torch.cat([vq_encoder(each)[0].flatten(1).long() for each in video.split(1)])  # each [1, 1, h, w]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever foreign TorchScript may raise
        raise UserError(
            f"--image: encoder.jit cannot run here ({last_line(error)}): the bfloat16 encoder of Cosmos needs a GPU; "
            "or it is no Cosmos-style encoder"
        ) from None
    if codes.shape[1] != num_tokens or not ((codes >= 0) & (codes < codebook_size)).all():
        raise UserError("--image: encoder.jit does not belong to decoder.jit: its codes are others, or more or fewer")
    return codes


def fingerprint_of(folder: Path, patterns: tuple[str, ...]) -> str:
    """Identifies a model by its commit where it is a hub snapshot, else by the content of its files."""
    if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name):
        return folder.name
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def warn_if_slow(models: Models, num_tokens: int, num_steps: int, batch: int = 1) -> None:
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
    reference = seconds_of(2, 1) * num_tokens  # in a batch, further ones cost little
    optimisation = (
        2 * seconds_of(1, probe) * num_tokens / probe * num_steps * batch
    )  # backward costs about one more forward
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

CACHE_FORMAT = 3
PROMPTS_AT_ONCE = 16  # decoded in one batch, whose key/value cache must fit
COMPILED_FROM = 1024  # tokens, whose decoding takes longer than compiling does
NEGATIVE_PROMPT = (
    "An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion"
)


@dataclass(frozen=True)
class Reference:
    """The targets: visual codes [B, N], their pixels and prompts."""

    codes: Tensor
    autoregressive_seconds: float | None  # of decoding them one after another, where they were
    pixels: Tensor  # [B, 3, H, W] in [0, 1]
    prompts: list[str]


def conditional_prompt(prompt: str) -> str:
    """SimpleAR's template, word for word."""
    return f"{TEXT_TO_IMAGE}A highly realistic image of {prompt}{START_OF_IMAGE}"


def unconditional_prompt() -> str:
    return f"{TEXT_TO_IMAGE}{NEGATIVE_PROMPT}{START_OF_IMAGE}"


def make_reference(models: Models, args: argparse.Namespace) -> Reference:
    """The targets of a run: pictures encoded, or prompts' pictures generated; then what a control makes of them."""
    if args.images:
        pixels = torch.stack([read_picture(file, args.image_size) for file in args.images])
        num_tokens = (args.image_size // models.factor) ** 2
        codes, seconds = encode_pixels(models.vq_encoder, pixels, num_tokens, models.codebook_size).cpu(), None
    else:
        codes, seconds = generated_codes(models, args)
    if args.control in ("random", "shuffled"):
        seconds = None  # such codes were never decoded one after another
    codes = controlled(codes, args.control, models.codebook_size, args.seed).to(models.device)
    return Reference(codes, seconds, decode_codes(models.vq_decoder, codes), args.prompts)


def read_picture(file: Path, size: int) -> Tensor:
    """A picture's middle square as pixels [3, size, size] in [0, 1]. Raises UserError.

    Scaled as in SimpleAR's data preparation: halved by box averages while twice too large, then bicubic.
    Turned as its EXIF orientation says; transparent parts are white.
    """
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode == "F":
                raise UserError(f"--image {file} has pixels of floating point: convert it to 8 or 16 bits")
            if image.mode.startswith("I"):  # of 16 bits a pixel; Pillow would clip them
                values = np.asarray(image).clip(0, 65535)
                image = Image.fromarray((values / (257 if values.max() > 255 else 1)).round().astype(np.uint8))
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).convert("RGBA")
    except FileNotFoundError:
        raise UserError(f"--image {file}: there is no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"--image {file} cannot be read as a picture: {first_line(error)}") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    while image.width >= 2 * size:
        image = image.resize((image.width // 2,) * 2, Image.Resampling.BOX)
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def generated_codes(models: Models, args: argparse.Namespace) -> tuple[Tensor, float]:
    """Takes each prompt's codes from the cache where these very settings made them; decodes the others together.

    Returns codes [B, N] and the seconds that decoding them took, whenever that was.
    """
    num_tokens = (args.image_size // models.factor) ** 2
    keys = [reference_key(models, args, prompt, num_tokens) for prompt in args.prompts]
    files = [args.save_dir / CACHE_FOLDER / f"{key[:32]}.safetensors" for key in keys]
    found = {}  # by key: codes [1, N] and seconds
    for key, file in () if args.force_generate else zip(keys, files, strict=True):
        if cached := read_cached_codes(file, key, num_tokens, models.codebook_size):
            found[key] = cached
            print(f"reference: {num_tokens} tokens, reused from {file}")
    missing = {key: (file, prompt) for key, file, prompt in zip(keys, files, args.prompts, strict=True)}
    missing = {key: value for key, value in missing.items() if key not in found}
    for some in parts(len(missing), PROMPTS_AT_ONCE):
        together = list(missing)[some]
        prompts = [missing[key][1] for key in together]
        codes, seconds = generate_visual_codes(models, prompts, num_tokens, args)
        print(f"reference: {codes.numel()} tokens in {duration(seconds)} ({codes.numel() / seconds:.1f} tokens/s)")
        for key, row in zip(together, codes.split(1), strict=True):
            found[key] = row.cpu(), seconds / len(together)
            write_cached_codes(missing[key][0], *found[key], key)
    return torch.cat([found[key][0] for key in keys]), sum(seconds for _, seconds in found.values())


def controlled(codes: Tensor, control: str | None, codebook_size: int, seed: int) -> Tensor:
    """The targets [B, N] of a control: as many codes by chance, or the same ones in other places; else themselves."""
    rng = torch.Generator().manual_seed(seed)
    if control == "random":
        return torch.randint(codebook_size, codes.shape, generator=rng)
    if control == "shuffled":
        return codes[:, torch.randperm(codes.shape[1], generator=rng)]
    return codes


def untrained(models: Models, seed: int) -> Models:
    """The same architecture with fresh weights, drawn as before any training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Qwen2ForCausalLM(models.generator.config)
    return dataclasses.replace(models, generator=frozen(generator.to(models.device, models.generator.dtype)))


def reference_key(models: Models, args: argparse.Namespace, prompt: str, num_tokens: int) -> str:
    """Stands for everything that determines the reference's tokens."""
    names = ("cfg_scale", "temperature", "top_k", "top_p", "seed")
    settings = {
        "format": CACHE_FORMAT,
        "generator": models.fingerprint,
        "visual_offset": models.visual_offset,
        "codebook_size": models.codebook_size,
        "num_tokens": num_tokens,
        "dtype": str(models.generator.dtype),
        "device": models.device.type,
        "torch": torch.__version__,
        "templates": [conditional_prompt(""), unconditional_prompt()],
        "prompt": prompt,
        "compiled": compiles(models, num_tokens, args.compile),
    } | {name: getattr(args, name) for name in names}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


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


def compiles(models: Models, num_tokens: int, choice: str) -> bool:
    return choice == "on" or (choice == "auto" and models.device.type == "cuda" and num_tokens >= COMPILED_FROM)


def decoding_step(models: Models, num_tokens: int, choice: str) -> Callable:
    """The generator's layers for one more token: as they are, or compiled as --compile has it."""
    if not compiles(models, num_tokens, choice):
        return models.generator.model
    torch._dynamo.config.suppress_errors = True  # what does not compile here runs as it is
    mode = "reduce-overhead" if models.device.type == "cuda" else "default"
    return torch.compile(models.generator.model, dynamic=False, mode=mode)


@torch.no_grad()
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
    longest = models.generator.config.max_position_embeddings
    if input_ids.shape[1] + num_tokens > longest:
        raise UserError(
            f"--prompt has {input_ids.shape[1]} tokens, and the image {num_tokens}: together they must stay within the "
            f"model's {longest}; shorten the prompt"
        )
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    attention_mask = F.pad(attention_mask, (0, num_tokens), value=1)  # [2B, L + N]; causality hides what is to come
    visual_rows = slice(models.visual_offset, models.visual_offset + models.codebook_size)
    visual_head = models.generator.lm_head.weight[visual_rows]  # [C, D]
    # A stream for each target: its picture does not depend on the others'.
    rngs = [torch.Generator(models.device).manual_seed(args.seed) for _ in prompts]
    cache, codes = transformers.StaticCache(models.generator.config, attention_mask.shape[1]), []
    decode = decoding_step(models, num_tokens, args.compile)

    def last_hidden_states(layers: Callable, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[2B, D] after any number of new tokens [2B, L]; the cache grows by them."""
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}
        return layers(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]

    # The clock is not to pay for first passes, nor for compiling.
    for layers in (models.generator.model, decode, decode):
        last_hidden_states(layers, input_ids[:, -1:], position_ids[:, -1:])
    cache.reset()
    synchronise(models.device)
    started = time.perf_counter()
    for _ in progress_bar(range(num_tokens), "reference", "tokens"):
        hidden_states = last_hidden_states(decode if codes else models.generator.model, input_ids, position_ids)
        scores = guided_scores(*product(hidden_states, visual_head).float().chunk(2), args.cfg_scale)  # [B, C]
        if not codes and not scores.isfinite().all():
            raise UserError(
                "the generator's logits are not finite: try --dtype float32 or bfloat16; else its weights are damaged"
            )
        codes.append(sample(scores, args.temperature, args.top_k, args.top_p, rngs))  # [B]
        input_ids = (codes[-1] + models.visual_offset).repeat(2)[:, None]  # both prompts are fed the same token
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


def sample(scores: Tensor, temperature: float, top_k: int | None, top_p: float, rngs: list[torch.Generator]) -> Tensor:
    """Draws one index per row of scores [B, C] -> [B], each by its own generator; ties with the k-th score stay in."""
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
    probability = scores.softmax(-1)
    return torch.cat([torch.multinomial(row, 1, generator=rng) for row, rng in zip(probability, rngs, strict=True)])


# ----------------------------------------------------------------------------------------------------------------------
# Proto-tokens

FINAL_RATE = 1e-5
# Logits held at a time: few enough to stay in a CPU's cache, many enough to keep a GPU busy (4 MB and 128 MB).
LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**25}
POSITIONS_AT_ONCE = 1024
# Numbers that autograd keeps of a layer for each token, in units of the hidden and the MLP size (measured on a CPU).
KEPT_PER_TOKEN = {"hidden": 6, "mlp": 3}


@dataclass(frozen=True)
class ProtoTokens:
    """The learned embeddings, float32 whatever the model's precision: e_t [B, K, D], K in front of each target's N.

    m is [1, D] where the targets share it, [B, D] where each has its own.
    """

    e_t: Tensor
    m: Tensor

    def copy(self) -> ProtoTokens:
        return ProtoTokens(self.e_t.detach().clone(), self.m.detach().clone())

    def of(self, targets: slice) -> ProtoTokens:
        return ProtoTokens(self.e_t[targets], self.m if len(self.m) == 1 else self.m[targets])

    @property
    def learning(self) -> list[Tensor]:
        return [parameter for parameter in (self.e_t, self.m) if parameter.requires_grad]

    @property
    def groups(self) -> int:
        """How many parts of the targets share nothing that learns: 1 where they learn one m, else B."""
        return 1 if len(self.m) == 1 and self.m.requires_grad else len(self.e_t)


@dataclass
class Optimisation:
    """Where an optimisation stands: all that its next step depends on, and what it has found so far.

    The best are kept for all targets together where they share m, else for each on its own.
    """

    proto_tokens: ProtoTokens  # the masters, which learn
    optimizer: torch.optim.AdamW
    best: ProtoTokens
    best_step: list[int]  # [B], as the next two
    best_accuracy: list[float]  # percent, at the best step
    best_loss: list[float]  # nats, at the best step
    step: int = 0  # steps behind it
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)  # its logged rows
    frames: list[dict] = field(default_factory=list)  # for the moving picture: step, accuracy, codes [B, N]
    trials: list[dict] = field(default_factory=list)  # that a search for the capacity has behind it
    diverged: bool = False

    @property
    def mean_best_accuracy(self) -> float:
        return statistics.fmean(self.best_accuracy)

    def keep_the_best(self, accuracy: list[float], loss: list[float], target_accuracy: float) -> None:
        """Keeps the present embeddings where their accuracy is the highest yet, and among equals their loss lowest.

        A group's best is final once all its targets have reached `target_accuracy`, as the run would end there alone.
        """
        batch, groups = len(accuracy), self.proto_tokens.groups
        for members in parts(batch, batch // groups):
            if min(self.best_accuracy[members]) >= target_accuracy:
                continue
            before = (False, statistics.fmean(self.best_accuracy[members]), -statistics.fmean(self.best_loss[members]))
            reached = min(accuracy[members]) >= target_accuracy
            if (reached, statistics.fmean(accuracy[members]), -statistics.fmean(loss[members])) > before:
                self.best.e_t[members] = self.proto_tokens.e_t.detach()[members]
                if self.proto_tokens.m.requires_grad:
                    self.best.of(members).m.copy_(self.proto_tokens.of(members).m.detach())
                self.best_accuracy[members], self.best_loss[members] = accuracy[members], loss[members]
                self.best_step[members] = [self.step + 1] * len(accuracy[members])


def initial_proto_tokens(
    batch: int, num_e_tokens: int, hidden_size: int, scale: float, seed: int, own_m: bool = False
) -> ProtoTokens:
    """Normal values from a random stream of their own: each target starts as it would alone, on any device."""
    rng = torch.Generator().manual_seed(seed)
    m = torch.randn(1, hidden_size, generator=rng) * scale
    e_t = torch.randn(1, num_e_tokens, hidden_size, generator=rng) * scale
    return ProtoTokens(e_t.repeat(batch, 1, 1), m.repeat(batch if own_m else 1, 1))


def one_pass_hidden_states(generator: Qwen2ForCausalLM, proto_tokens: ProtoTokens, num_tokens: int) -> Tensor:
    """One forward pass over [e_1 .. e_K, m, ..., m] -> hidden states [B, N, D]; position i speaks for token i."""
    batch, num_e_tokens, hidden_size = proto_tokens.e_t.shape
    filler = proto_tokens.m[:, None].expand(batch, num_tokens - num_e_tokens, hidden_size)
    inputs_embeds = torch.cat((proto_tokens.e_t, filler), dim=1).to(generator.dtype)  # [B, N, D]
    return generator.model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state


def competing_head(models: Models, vocabulary: str) -> tuple[Tensor, int]:
    """The head's rows [V, D] whose ids compete, and the row at which visual code 0 lies."""
    weight = models.generator.lm_head.weight
    if vocabulary == "full":
        return weight, models.visual_offset
    return weight[models.visual_offset : models.visual_offset + models.codebook_size], 0


def chunked_cross_entropy(hidden_states: Tensor, head: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of hidden_states [B, N, D] @ head.T [D, V] against target [B, N], never holding [B, N, V] logits.

    Returns the losses [B, N] in nats, the gradient [B, N, D] of each target's mean with respect to hidden_states, and
    each token's rank [B, N]: how many other ids are at least as likely, so 0 where it alone is the likeliest.

    One pass over the vocabulary, a chunk of ids at a time, with the running maximum and rescaled sums of Milakov &
    Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867). The gradient of cross-entropy is
    softmax(logits) @ head - head[target], so its first term is such a sum too.
    """
    budget = LOGITS_AT_ONCE["cuda" if head.is_cuda else "cpu"]
    found = [
        cross_entropy_of_positions(positions, head, targets, max(1, budget // len(positions)))
        for positions, targets in zip(
            hidden_states.flatten(0, 1).split(POSITIONS_AT_ONCE), target.flatten().split(POSITIONS_AT_ONCE), strict=True
        )
    ]
    losses, gradient, ranks = (torch.cat(part) for part in zip(*found, strict=True))
    return losses.view_as(target), (gradient / target.shape[1]).view_as(hidden_states), ranks.view_as(target)


def cross_entropy_of_positions(
    hidden_states: Tensor, head: Tensor, target: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [P], the gradient [P, D] of each one's own loss, and ranks [P] of hidden_states [P, D] and target [P]."""
    # Rounded as the chunks' logits will be, so that they compare.
    target_logits = (
        (hidden_states.float() * head[target].float()).sum(-1, keepdim=True).to(head.dtype).float()
    )  # [P, 1]
    largest, total = target_logits, torch.zeros_like(target_logits)
    weighted_rows = torch.zeros_like(hidden_states, dtype=torch.float32)  # [P, D]
    at_least_as_likely = torch.zeros_like(target)
    for first in range(0, len(head), chunk):
        rows = head[first : first + chunk]  # [chunk, D]
        logits = product(hidden_states, rows).float()  # [P, chunk]
        here = ((target >= first) & (target < first + len(rows)))[:, None]
        column = (target[:, None] - first).clamp(0, len(rows) - 1)
        logits.scatter_(1, column, torch.where(here, target_logits, logits.gather(1, column)))
        at_least_as_likely += (logits >= target_logits).sum(-1)
        new_largest = torch.maximum(largest, logits.amax(-1, keepdim=True))
        rescale = (largest - new_largest).exp()
        weights = logits.sub_(new_largest).exp_()
        total = total * rescale + weights.sum(-1, keepdim=True)
        weighted_rows.mul_(rescale).add_(product_back(weights.to(head.dtype), rows))
        largest = new_largest
    losses = (total.log() + (largest - target_logits))[:, 0]
    return losses, weighted_rows / total - head[target], at_least_as_likely - 1


def rate_at(step: int, num_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine from `peak` to FINAL_RATE over the remaining steps; `step` counts from 1."""
    warmup = min(warmup_steps, num_steps // 10)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup - 1) / max(1, num_steps - warmup - 1)
    final = min(FINAL_RATE, peak)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def new_optimisation(
    models: Models, batch: int, args: argparse.Namespace, given_m: Tensor | None = None
) -> Optimisation:
    """An optimisation before its first step; `given_m` [1, D] stays as it is."""
    start = initial_proto_tokens(
        batch, args.num_e_tokens, models.hidden_size, args.initial_scale, args.seed, args.m == "own"
    )
    m = start.m if given_m is None else given_m
    proto_tokens = ProtoTokens(
        start.e_t.to(models.device).requires_grad_(), m.to(models.device).requires_grad_(given_m is None)
    )
    optimizer = torch.optim.AdamW(proto_tokens.learning, lr=args.learning_rate, betas=args.betas, weight_decay=0.0)
    nothing_yet = {"best_step": [0] * batch, "best_accuracy": [-1.0] * batch, "best_loss": [math.inf] * batch}
    return Optimisation(proto_tokens, optimizer, proto_tokens.copy(), **nothing_yet)


def target_is_reached(state: Optimisation, args: argparse.Namespace) -> bool:
    return 0 < args.target_accuracy <= min(state.best_accuracy)


def step_bytes(models: Models, num_tokens: int, recomputes: bool) -> int:
    """About how much memory a target adds to a step: what autograd keeps of each layer, or of one and all inputs."""
    config = models.generator.config
    kept = KEPT_PER_TOKEN["hidden"] * config.hidden_size + KEPT_PER_TOKEN["mlp"] * config.intermediate_size
    of_all = config.num_hidden_layers * (config.hidden_size if recomputes else kept) + (kept if recomputes else 0)
    return of_all * num_tokens * models.generator.dtype.itemsize


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on the device, where it can be asked; None elsewhere."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    with contextlib.suppress(OSError, ValueError, AttributeError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    return None


def memory_plan(models: Models, batch: int, num_tokens: int, choice: str) -> tuple[bool, int]:
    """Whether --gradient-checkpointing is on (as said, or where not one target fits without); targets at once."""
    free = free_bytes(models.device)
    budget = math.inf if free is None else 0.8 * free
    recomputes = choice == "on" or (choice == "auto" and step_bytes(models, num_tokens, False) > budget)
    fitting = budget / step_bytes(models, num_tokens, recomputes)
    return recomputes, max(1, int(min(batch, fitting)))


def set_gradient_checkpointing(generator: Qwen2ForCausalLM, on: bool) -> None:
    """Per layer. Transformers recomputes only in training mode, whose other effect, dropout, is off since loading."""
    if on:
        generator.model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        generator.model.activation_checkpointing_disable()
    generator.model.train(on)


def gradient_step(
    models: Models, proto_tokens: ProtoTokens, head: Tensor, target: Tensor, at_once: int | None = None
) -> tuple[Tensor, Tensor]:
    """One pass and its gradient, left in the proto-tokens' `.grad`; returns losses and target ranks, both [B, N].

    The gradient is that of the targets' mean losses, added up: a target with an m of its own learns as it would alone.
    """
    for parameter in proto_tokens.learning:
        parameter.grad = None
    found = []
    for targets in parts(len(target), at_once or len(target)):
        hidden_states = one_pass_hidden_states(models.generator, proto_tokens.of(targets), target.shape[1])
        losses, gradient, target_rank = chunked_cross_entropy(hidden_states.detach(), head, target[targets])
        hidden_states.backward(gradient.to(hidden_states.dtype))
        found.append((losses, target_rank))
    losses, target_rank = (torch.cat(each) for each in zip(*found, strict=True))
    return losses, target_rank


def parts(count: int, at_once: int) -> list[slice]:
    return [slice(first, first + at_once) for first in range(0, count, at_once)]


def clip_gradients(proto_tokens: ProtoTokens, limit: float) -> Tensor:
    """Norms of the joint gradient of each group's e_t and m; scales it down to `limit` unless that is 0."""
    groups = proto_tokens.groups
    squares = proto_tokens.e_t.grad.square().flatten(1).sum(1).view(groups, -1).sum(1)
    if proto_tokens.m.grad is not None:
        squares = squares + proto_tokens.m.grad.square().sum(1)
    norms = squares.sqrt()
    if limit:
        factor = (limit / (norms + 1e-6)).clamp(max=1)
        proto_tokens.e_t.grad *= factor.repeat_interleave(len(proto_tokens.e_t) // groups)[:, None, None]
        if proto_tokens.m.grad is not None:
            proto_tokens.m.grad *= factor[:, None]
    return norms


def optimise_proto_tokens(
    models: Models, codes: Tensor, args: argparse.Namespace, state: Optimisation
) -> Iterator[dict[str, float]]:
    """Minimises the mean cross-entropy of one pass over [e_t, m, ..., m] against `codes` [B, N], from where `state` is.

    Yields a row of numbers a step, by its W&B names, when `state` is that after the step. The numbers belong to the
    embeddings before the step's update; the best are those with the highest accuracy, and among equals the lowest
    loss. Ends early at --target-accuracy, or where the loss or its gradient is no longer finite (`state.diverged`).
    """
    proto_tokens, (batch, num_tokens) = state.proto_tokens, codes.shape
    head, first_code = competing_head(models, args.vocabulary)
    recomputes, at_once = memory_plan(models, batch, num_tokens, args.gradient_checkpointing)
    set_gradient_checkpointing(models.generator, recomputes)
    while state.step < args.num_steps and not target_is_reached(state, args):
        started = time.perf_counter()
        rate = rate_at(state.step + 1, args.num_steps, args.warmup_steps, args.learning_rate)
        state.optimizer.param_groups[0]["lr"] = rate
        losses, target_rank = gradient_step(models, proto_tokens, head, codes + first_code, at_once)
        with torch.no_grad():
            grad_norm = clip_gradients(proto_tokens, args.grad_clip).mean()
            norms = (proto_tokens.e_t.norm(dim=-1).mean(), proto_tokens.m.norm(dim=-1).mean(), grad_norm)
            of_targets = (losses.mean(1), (target_rank == 0).sum(1), (target_rank < 5).sum(1))
            measured = torch.cat((*of_targets, torch.stack(norms))).tolist()  # the step's one host sync
        if not math.isfinite(sum(measured)):
            state.diverged = True
            return
        loss, correct, in_top5 = (measured[each] for each in parts(3 * batch, batch))
        accuracy = [100 * count / num_tokens for count in correct]
        state.keep_the_best(accuracy, loss, args.target_accuracy or math.inf)
        state.optimizer.step()
        state.step += 1
        state.seconds += time.perf_counter() - started
        row = {
            "step": state.step,
            "train/loss": statistics.fmean(loss),
            "train/accuracy": statistics.fmean(accuracy),
            "train/top5_accuracy": 100 * sum(in_top5) / codes.numel(),
            "train/correct_tokens": int(sum(correct)),
            "train/best_accuracy": state.mean_best_accuracy,
            "train/learning_rate": rate,
        } | dict(zip(("embeddings/e_t_norm", "embeddings/m_norm", "gradients/grad_norm"), measured[-3:], strict=True))
        for k in range(batch) if batch > 1 else ():
            row |= {f"targets/{k}/loss": loss[k], f"targets/{k}/accuracy": accuracy[k]}
            row |= {f"targets/{k}/best_accuracy": state.best_accuracy[k]}
        yield row


def next_prefix(trials: list[dict], shortest: int, longest: int) -> int | None:
    """How many tokens to try next: twice as many until that fails, then between what held and what failed.

    None where the capacity is known: the largest `num_tokens` of the trials that `reached` the target accuracy, taking
    it that a longer prefix is no easier.
    """
    held = max((trial["num_tokens"] for trial in trials if trial["reached"]), default=0)
    failed = min((trial["num_tokens"] for trial in trials if not trial["reached"]), default=longest + 1)
    if failed - held <= 1 or failed <= shortest:
        return None
    if failed > longest:
        return min(max(2 * held, shortest), longest)
    return max((held + failed) // 2, shortest)


# ----------------------------------------------------------------------------------------------------------------------
# Reconstruction

SUCCESS, PARTIAL_SUCCESS = 99.0, 80.0  # percent of tokens


@dataclass(frozen=True)
class Reconstruction:
    """What one forward pass over the best proto-tokens emits."""

    predicted_ids: Tensor  # [B, N], ids of the competing vocabulary's argmax, as generator token ids
    predicted_codes: Tensor  # [B, N], the likeliest visual codes
    target_rank: Tensor  # [B, N], how many other ids are at least as likely: 0 where the target is the prediction
    losses: Tensor  # [B, N], in nats
    pixels: Tensor  # [B, 3, H, W] in [0, 1]
    one_pass_seconds: float

    @property
    def num_errors(self) -> list[int]:
        return (self.target_rank > 0).sum(1).tolist()  # [B]


@torch.inference_mode()
def reconstruct(
    models: Models, proto_tokens: ProtoTokens, codes: Tensor, vocabulary: str, repeats: int = 6
) -> Reconstruction:
    """One forward pass, argmax, VQ decode; the pass is timed too (median of the repeats after the first).

    A position whose argmax is a text id counts as wrong; the picture shows its likeliest visual code.
    """
    seconds = []
    for _ in range(repeats):
        synchronise(models.device)
        started = time.perf_counter()
        hidden_states = one_pass_hidden_states(models.generator, proto_tokens, codes.shape[1])  # [B, N, D]
        ids, predicted_codes, target_rank = predict(models, hidden_states, codes, vocabulary)
        synchronise(models.device)
        seconds.append(time.perf_counter() - started)
    head, first_code = competing_head(models, vocabulary)
    losses, *_ = chunked_cross_entropy(hidden_states, head, codes + first_code)
    pixels = decode_codes(models.vq_decoder, predicted_codes)
    one_pass_seconds = statistics.median(seconds[1:] or seconds)
    return Reconstruction(ids, predicted_codes, target_rank, losses, pixels, one_pass_seconds)


def predict(models: Models, hidden_states: Tensor, codes: Tensor, vocabulary: str) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest token id, the likeliest visual code, and the rank of the target `codes`, all [B, N]."""
    head, first_code = competing_head(models, vocabulary)
    found = []
    for states, targets in zip(hidden_states.flatten(0, 1).split(256), codes.flatten().split(256), strict=True):
        logits = product(states, head)  # [P, V]
        target_logits = logits.gather(-1, targets[:, None] + first_code)
        visual_logits = logits[:, first_code : first_code + models.codebook_size]
        ids = logits.argmax(-1) - first_code + models.visual_offset
        found.append((ids, visual_logits.argmax(-1), (logits >= target_logits).sum(-1) - 1))
    return tuple(torch.cat(part).view_as(codes) for part in zip(*found, strict=True))


def psnr(pixels: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images [B, 3, H, W] in [0, 1], over all pixels; infinite where equal."""
    error = F.mse_loss(pixels, reference).item()
    return math.inf if error == 0 else -10 * math.log10(error)


@torch.inference_mode()
def teacher_forced_bits(models: Models, text: str, codes: Tensor, vocabulary: str) -> float:
    """Bits that codes [N] cost, one after another behind `text`: -sum of log2 p(code | text, codes before)."""
    prompt_ids = torch.tensor(models.text_tokenizer(text)["input_ids"], device=models.device)
    input_ids = torch.cat((prompt_ids, codes[:-1] + models.visual_offset))[None]
    hidden_states = models.generator.model(input_ids=input_ids, use_cache=False).last_hidden_state
    head, first_code = competing_head(models, vocabulary)
    losses, *_ = chunked_cross_entropy(hidden_states[:, len(prompt_ids) - 1 :], head, codes[None] + first_code)
    return losses.sum().item() / math.log(2)


def information(
    models: Models, reference: Reference, reconstruction: Reconstruction, vocabulary: str
) -> dict[str, list[float]]:
    """What the targets cost in bits, a number each [B], after Kuratov et al. (ACL 2025, hidden_capacity).

    uniform: N log2(codebook size), what any codes would cost. autoregressive and unprompted: teacher-forced under the
    prompt, and under the negative one. proto: what remains under one pass over the learned embeddings. The gain,
    unprompted - proto, is what the embeddings tell the generator of its target.
    """
    under_prompt, unprompted = [], []
    for prompt, codes in zip(reference.prompts, reference.codes, strict=True):
        under_prompt.append(teacher_forced_bits(models, conditional_prompt(prompt), codes, vocabulary))
        unprompted.append(teacher_forced_bits(models, unconditional_prompt(), codes, vocabulary))
    remaining = (reconstruction.losses.sum(1) / math.log(2)).tolist()
    uniform = reference.codes.shape[1] * math.log2(models.codebook_size)
    return {
        "target_bits_uniform": [uniform] * len(remaining),
        "target_bits_autoregressive": under_prompt,
        "target_bits_unprompted": unprompted,
        "proto_bits": remaining,
        "information_gain_bits": [before - after for before, after in zip(unprompted, remaining, strict=True)],
    }


def status_of(best_accuracy: float) -> str:
    if best_accuracy >= SUCCESS:
        return "success"
    return "partial_success" if best_accuracy >= PARTIAL_SUCCESS else "need_improvement"


def summarise(
    reference: Reference,
    state: Optimisation,
    reconstruction: Reconstruction,
    bits: dict[str, list[float]],
    total_params: int,
) -> dict:
    """The summary of a run: W&B's keys, then what else a reader asks for. Percentages are 0 .. 100, times seconds.

    Accuracies and bits are means over the targets, errors sums; of several targets each one's own stand under
    targets/<k>/. What only an optimisation knows is left out where none took place.
    """
    batch, num_tokens = reference.codes.shape
    errors = reconstruction.num_errors
    best_accuracy = [100 * (num_tokens - count) / num_tokens for count in errors]  # of the embeddings as stored
    mean_bits = {name: statistics.fmean(values) for name, values in bits.items()}
    summary = {
        "best_accuracy": statistics.fmean(best_accuracy),
        "num_errors": sum(errors),
        "error_rate": 100 * sum(errors) / (batch * num_tokens),
        "total_params": total_params,
        "status": status_of(statistics.fmean(best_accuracy)),
        "num_tokens": num_tokens,
        "num_targets": batch,
        "num_e_tokens": state.best.e_t.shape[1],
        "one_pass_seconds": reconstruction.one_pass_seconds,
        "psnr": psnr(reconstruction.pixels, reference.pixels),
        **mean_bits,
        "bits_per_parameter": batch * mean_bits["information_gain_bits"] / total_params,
    }
    if state.history:
        last = state.history[-1]
        summary |= {
            "final_accuracy": last["train/accuracy"],
            "final_top5_accuracy": last["train/top5_accuracy"],
            "final_loss": last["train/loss"],
            "best_step": max(state.best_step),
            "steps": state.step,
            "optimisation_seconds": state.seconds,
        }
    if reference.autoregressive_seconds is not None:
        summary["autoregressive_seconds"] = reference.autoregressive_seconds
        summary["speedup"] = reference.autoregressive_seconds / reconstruction.one_pass_seconds
    for k in range(batch) if batch > 1 else ():
        own = {"best_accuracy": best_accuracy[k], "num_errors": errors[k]}
        own["psnr"] = psnr(reconstruction.pixels[k], reference.pixels[k])
        own |= {name: values[k] for name, values in bits.items()}
        summary |= {f"targets/{k}/{name}": value for name, value in own.items()}
    return summary


def likeness(decibels: float) -> str:
    return f"PSNR {decibels:.1f} dB" if math.isfinite(decibels) else "identical picture"


# ----------------------------------------------------------------------------------------------------------------------
# Figures

SHOWN_TARGETS = 24  # of more, the first stand in the figures, all in the numbers
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
    total = summary["num_tokens"]
    correct = total - summary["num_errors"]
    accuracy = f"{correct}/{total} tokens ({100 * correct / total:.1f} %)"
    one_by_one = ", one after another" if "autoregressive_seconds" in summary else ""
    embeddings = "two" if summary["num_e_tokens"] == 1 else summary["num_e_tokens"] + 1
    captions = (
        (reference, "reference", f"{total} tokens{one_by_one}"),
        (reconstruction, f"one forward pass over {embeddings} embeddings", f"{accuracy}, {likeness(summary['psnr'])}"),
    )
    for axis, (image, title, detail) in zip(axes, captions, strict=True):
        axis.imshow(image, interpolation="antialiased")
        axis.set_title(title, fontsize=11, color=INK)
        axis.set_xlabel(detail, fontsize=10, color=INK, labelpad=6)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.suptitle(caption_of(prompt), fontsize=13, fontweight="bold", color=INK, y=0.965, parse_math=False)
    return render(figure)


def paint_errors(axis: Axes, reference: Image.Image, target_rank: Tensor) -> np.ndarray:
    """The latent grid over a faint reference, wrong tokens marked; returns each one's level: 0 right, 1 near, 2 far."""
    side = math.isqrt(target_rank.numel())
    rank = target_rank.view(side, side).cpu().numpy()
    level = np.where(rank == 0, 0, np.where(rank < 5, 1, 2))
    whitened = Image.blend(reference, Image.new("RGB", reference.size, "white"), 0.55)
    axis.imshow(whitened, extent=(0, side, side, 0), interpolation="antialiased")
    colours = ListedColormap([(0, 0, 0, 0), ORANGE, RED])
    axis.imshow(level, extent=(0, side, side, 0), cmap=colours, vmin=0, vmax=2, alpha=0.7, interpolation="nearest")
    axis.set_xticks(range(side + 1), labels=[])
    axis.set_yticks(range(side + 1), labels=[])
    axis.tick_params(length=0)
    axis.grid(color="white", linewidth=max(0.15, 6.4 / side), alpha=0.9)
    axis.spines[:].set_visible(False)
    return level


def draw_token_error_map(reference: Image.Image, target_rank: Tensor) -> Image.Image:
    """The wrong tokens of one target, marked by how near the right ones came. target_rank: [N]."""
    figure = Figure(figsize=(5.6, 6.1), dpi=150, facecolor="white")
    axis = figure.add_axes((0.04, 0.1, 0.92, 0.8))
    level = paint_errors(axis, reference, target_rank)
    num_errors = int((level > 0).sum())
    title = f"{num_errors} of {level.size} tokens wrong ({100 * num_errors / level.size:.1f} %)"
    axis.set_title(title, fontsize=13, fontweight="bold", color=INK, pad=10)
    for x, colour, label in (
        (0.06, ORANGE, f"{int((level == 1).sum())} with the target among the top 5"),
        (0.6, RED, f"{int((level == 2).sum())} farther off"),
    ):
        figure.text(x, 0.045, "■", color=colour, fontsize=14, va="center")
        figure.text(x + 0.045, 0.045, label, color=INK, fontsize=10, va="center")
    return render(figure)


def draw_contact_sheet(targets: list[dict], target_rank: Tensor) -> Image.Image:
    """A row for each target: prompt and accuracy, reference, reconstruction, error map. target_rank: [B, N]."""
    count, targets = len(targets), targets[:SHOWN_TARGETS]
    row_height, width = 2.3, 10.6
    height = row_height * len(targets) + 0.5
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    titles = ("reference", "one forward pass", "wrong tokens")
    if count > len(targets):
        note = f"the first {len(targets)} of {count} targets"
        figure.text(0.02, 1 - 0.25 / height, note, fontsize=11, color=INK, va="center")
    for row, target in enumerate(targets):
        bottom = 1 - (0.45 + row_height * (row + 1)) / height
        size = (row_height - 0.15) / width, (row_height - 0.15) / height
        axes = [figure.add_axes((0.33 + 0.222 * column, bottom, *size)) for column in range(3)]
        for axis, name in zip(axes, ("reference", "reconstruction"), strict=False):
            axis.imshow(target[name], interpolation="antialiased")
            axis.axis("off")
        paint_errors(axes[2], target["reference"], target_rank[row])
        for axis, title in zip(axes, titles, strict=True) if row == 0 else ():
            axis.set_title(title, fontsize=11, color=INK)
        words = textwrap.fill(caption_of(target["prompt"]), 30)
        middle = bottom + size[1] / 2
        figure.text(0.02, middle, words, fontsize=11, color=INK, va="bottom", fontweight="bold", parse_math=False)
        figure.text(0.02, middle - 0.06 / height, f"{target['accuracy']:.1f} %", fontsize=11, color=INK, va="top")
    return render(figure)


def draw_capacity(trials: list[dict], capacity: int, target_accuracy: float) -> Image.Image:
    """Best accuracy of each trial against its number of tokens."""
    figure = Figure(figsize=(7.2, 4.6), dpi=150, facecolor="white", layout="constrained")
    axis = figure.subplots()
    ordered = sorted(trials, key=lambda trial: trial["num_tokens"])
    counts = [trial["num_tokens"] for trial in ordered]
    axis.plot(counts, [trial["best_accuracy"] for trial in ordered], color=FAINT, linewidth=1, zorder=1)
    for reached, colour, label in ((True, GREEN, "reached"), (False, RED, "not reached")):
        dots = [(t["num_tokens"], t["best_accuracy"]) for t in ordered if t["reached"] is reached]
        if dots:
            axis.scatter(*zip(*dots, strict=True), color=colour, s=34, label=label, zorder=2)
    axis.axhline(target_accuracy, color=ORANGE, linewidth=1, linestyle="--", label=f"target {target_accuracy:g} %")
    axis.set_xscale("log", base=2)
    ticks = [2**power for power in range(1 + max(counts).bit_length()) if min(counts) <= 2**power < 2 * max(counts)]
    axis.set_xticks(ticks, labels=map(str, ticks))
    axis.set_ylim(-2, 104)
    axis.set_xlabel("tokens of the target, from its beginning", fontsize=10, color=INK)
    axis.set_ylabel("best token accuracy (%)", fontsize=10, color=INK)
    axis.set_title(f"capacity: {capacity} tokens", fontsize=13, fontweight="bold", color=INK, loc="left")
    axis.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="lower left")
    return render(figure)


def tiled(images: list[Image.Image]) -> Image.Image:
    """Pictures of one size (the first of many), in about as many rows as columns; one alone is itself."""
    images = images[:SHOWN_TARGETS]
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * width, k // columns * height))
    return sheet


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


def draw_targets(reference: Reference, reconstruction: Reconstruction) -> list[dict]:
    """Each target's prompt, pictures and accuracy: a row of the contact sheet and of W&B's table."""
    num_tokens = reference.codes.shape[1]
    targets = []
    for k, prompt in enumerate(reference.prompts):
        picture = to_image(reference.pixels[k])
        targets.append({
            "prompt": prompt,
            "reference": picture,
            "reconstruction": to_image(reconstruction.pixels[k]),
            "error_map": draw_token_error_map(picture, reconstruction.target_rank[k]),
            "accuracy": 100 - 100 * reconstruction.num_errors[k] / num_tokens,
        })  # fmt: skip
    return targets


def draw_figures(
    targets: list[dict], target_rank: Tensor, summary: dict, history: list[dict[str, float]]
) -> dict[str, Image.Image]:
    """Every picture of a run, by its W&B name; its file is that name with `.png`. Several targets are tiled."""
    if len(targets) == 1:
        (only,) = targets
        comparison = draw_comparison(only["prompt"], only["reference"], only["reconstruction"], summary)
    else:
        comparison = draw_contact_sheet(targets, target_rank)
    images = {
        "reference_image": tiled([target["reference"] for target in targets]),
        "reconstructed_image": tiled([target["reconstruction"] for target in targets]),
        "comparison": comparison,
        "token_error_map": tiled([target["error_map"] for target in targets]),
    }
    return images | ({"training_curves": draw_training_curves(history)} if history else {})


def progress_frame(images: list[Image.Image], step: int, accuracy: float) -> Image.Image:
    """The reconstructions at a step, above a line that says which."""
    sheet = tiled(images)
    width = max(256, sheet.width)
    frame = Image.new("RGB", (width, round(sheet.height * width / sheet.width) + 28), "white")
    frame.paste(sheet.resize((width, frame.height - 28), Image.Resampling.NEAREST))
    label = f"step {step}   {accuracy:.1f} %"
    ImageDraw.Draw(frame).text((8, frame.height - 23), label, fill=INK, font=ImageFont.load_default(size=16))
    return frame


# ----------------------------------------------------------------------------------------------------------------------
# Files

VERSIONED = ("torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "wandb")
VERSIONED += ("numpy", "pillow", "matplotlib", "tqdm")
IMAGES = ("reference_image", "reconstructed_image", "comparison", "training_curves", "token_error_map", "capacity")
# Settings of a run that its proto-tokens mean nothing without.
TAKEN_OVER = ("image_size", "vocabulary", "control", "seed", "num_e_tokens", "m", "m_from")
PROTO_TOKENS_FILE = "proto_tokens.safetensors"
STATE_FILE = "interrupted_run.safetensors"
PROGRESS_FILE, TRIALS_FILE = "progress.gif", "capacity.csv"
# All that a run writes; the summary, which says that the others are whole, is the first to go.
RESULTS = ("summary.json", "config.json", "history.csv", TRIALS_FILE, PROTO_TOKENS_FILE, STATE_FILE, PROGRESS_FILE)
RESULTS += tuple(f"{name}.png" for name in IMAGES)
ABANDONED_SECONDS = 3600  # no file takes so long to write
COUNTERS = ("step", "seconds", "best_step", "best_accuracy", "best_loss")


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Yields a temporary path that takes the file's place when the block ends well: the old file or the new, whole.

    Raises UserError where it cannot be written.
    """
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or first_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def run_folder(args: argparse.Namespace) -> Iterator[Path]:
    """Makes <save-dir>/<run-name>, tries that it can be written, and keeps other runs out of it. Raises UserError."""
    folder = args.save_dir / args.wandb_run_name
    needed = (folder, args.save_dir / CACHE_FOLDER, *reversed((args.save_dir, *args.save_dir.parents)))
    made = [each for each in needed if not each.exists()]
    try:
        for each in needed[:2]:
            each.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=each):
                pass
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--save-dir {args.save_dir} cannot be written: {error.strerror} ({error.filename})") from None
    try:
        if fcntl:
            # On the folder itself: the lock ends with the process, however it ends, and leaves no file.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_leftovers(args.save_dir, folder)
        yield folder
    except BlockingIOError:
        raise UserError(f"another run is at work in {folder}: name this one with --wandb-run-name, or wait") from None
    finally:
        os.close(lock)
        for each in (*made[:2], *reversed(made[2:])):
            with contextlib.suppress(OSError):
                each.rmdir()  # only what this run made, and only what stayed empty


def remove_leftovers(save_dir: Path, folder: Path) -> None:
    """Temporary files of killed runs: all in a run's own folder, elsewhere those that nobody writes any more."""
    for file in save_dir.glob("*/*.partial"):
        name = re.sub(r"\.\d+\.partial$", "", file.name)
        with contextlib.suppress(OSError):
            abandoned = file.parent == folder or time.time() - file.stat().st_mtime > ABANDONED_SECONDS
            if abandoned and (name in RESULTS or re.fullmatch(r"[0-9a-f]{32}\.safetensors", name)):
                file.unlink()


def describe_run(args: argparse.Namespace, models: Models) -> dict:
    """All settings, what they resolved to, and the versions: everything needed to run it again."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    prompts = settings.pop("prompts")
    settings["prompt"] = prompts[0] if len(prompts) == 1 else prompts
    settings["images"] = list(map(str, args.images))
    if args.m_from:
        settings["m_from_fingerprint"] = fingerprint_of(Path(args.m_from).parent, (Path(args.m_from).name,))
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
        "final_learning_rate": FINAL_RATE,
    }
    versions = {"python": platform.python_version()} | {name: version_of(name) for name in VERSIONED}
    versions["torch"] = torch.__version__  # says which build it is, too
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


def frame_images(models: Models, frame: dict) -> list[Image.Image]:
    pixels = decode_codes(models.vq_decoder, torch.tensor(frame["codes"], device=models.device))
    return [to_image(each) for each in pixels]


def write_progress(file: Path, models: Models, frames: list[dict]) -> None:
    """The reconstruction forming, as a moving picture that rests on its last frame."""
    pictures = (progress_frame(frame_images(models, each), each["step"], each["accuracy"]) for each in frames)
    durations = [150] * (len(frames) - 1) + [2000]  # milliseconds
    with written_whole(file) as partial:
        next(pictures).save(partial, format="GIF", save_all=True, append_images=pictures, duration=durations, loop=0)


def write_proto_tokens(
    file: Path, proto_tokens: ProtoTokens, target_ids: Tensor, settings: dict, predicted_ids: Tensor | None = None
) -> None:
    """e_t [B, K, D], m [1 or B, D], target and predicted token ids [B, N]; the settings as JSON in the metadata."""
    tensors = {"e_t": proto_tokens.e_t, "m": proto_tokens.m, "target_ids": target_ids}
    if predicted_ids is not None:
        tensors["predicted_ids"] = predicted_ids
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with written_whole(file) as partial:
        partial.write_bytes(to_safetensors(stored, {"settings": json.dumps(settings)}))


def remove_earlier_results(folder: Path) -> None:
    """Results of an earlier run of the same name go before the first new one comes: never a mixture of two runs."""
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)


# What may change between the two halves of an interrupted run: where it reports, and what the fingerprints stand for.
FREE_TO_CHANGE = {"resume", "force_generate", "save_dir", "save_every", "use_wandb", "image_every", "versions"}
FREE_TO_CHANGE |= {"gradient_checkpointing", "compile", "prompts_file", "demo", "model_path", "vq_model_ckpt", "device"}


def refuse_other_settings(folder: Path, earlier: dict, settings: dict) -> None:
    """Raises UserError that names every setting in which the run to go on with differs."""
    settings = json.loads(json.dumps(settings))  # as the earlier ones were stored
    names = [name for name in settings if name not in FREE_TO_CHANGE and not name.startswith("wandb_")]
    changed = [f"{n} ({earlier.get(n)}, now {settings[n]})" for n in names if earlier.get(n) != settings[n]]
    if changed:
        raise UserError(
            f"--resume: the run in {folder} has other settings: {', '.join(changed)}; repeat its settings, or give "
            "this run another --wandb-run-name, or leave out --resume to replace it"
        )


def is_finished(folder: Path, settings: dict) -> bool:
    """Whether the run in `folder` has ended with these settings. Raises UserError where its settings are others."""
    if not (folder / "summary.json").exists():
        return False
    refuse_other_settings(folder, read_json(folder / "config.json"), settings)
    return True


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except (OSError, ValueError):
        pass
    raise UserError(f"{file} is missing or damaged: leave out --resume to run anew")


@dataclass(frozen=True)
class SavedState:
    """What an interrupted run left: tensors by name, numbers, lists, and the id of its W&B run."""

    tensors: dict[str, Tensor]
    numbers: dict[str, float | list[float]]
    history: list[dict[str, float]]
    frames: list[dict]
    trials: list[dict]
    run_id: str | None


def write_state(file: Path, state: Optimisation, codes: Tensor, settings: dict, run_id: str | None) -> None:
    tensors = {"codes": codes, "best.e_t": state.best.e_t, "best.m": state.best.m}
    for name in ("e_t", "m"):
        parameter = getattr(state.proto_tokens, name)
        moments = state.optimizer.state.get(parameter, {})
        tensors |= {name: parameter.detach()} | {f"{name}.{key}": moment for key, moment in moments.items()}
    content = {name: getattr(state, name) for name in COUNTERS}
    record = {"settings": settings, "numbers": content, "run_id": run_id}
    record |= {name: getattr(state, name) for name in ("history", "frames", "trials")}
    # As a tensor of bytes: the metadata of safetensors end at 100 MB.
    tensors["record"] = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
    with written_whole(file) as partial:
        stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        partial.write_bytes(to_safetensors(stored))


def read_state(folder: Path, settings: dict) -> SavedState | None:
    """The state of the interrupted run in `folder`; None where there is none. Raises UserError."""
    file = folder / STATE_FILE
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (it is no mapping)
        record = json.loads(tensors.pop("record").numpy().tobytes())
        earlier = record.pop("settings")
        saved = SavedState(tensors, **record)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{file} is damaged: leave out --resume to run anew") from None
    refuse_other_settings(folder, earlier, settings)
    return saved


def restore_state(state: Optimisation, codes: Tensor, saved: SavedState) -> None:
    """Puts a fresh optimisation where the interrupted one stood. Raises UserError where its target was another."""
    if not torch.equal(saved.tensors["codes"], codes.cpu()):
        raise UserError("--resume: the reference is not the interrupted run's; leave out --resume to run anew")
    moments = {}
    for index, name in enumerate(("e_t", "m")):
        prefix = f"{name}."
        getattr(state.proto_tokens, name).data.copy_(saved.tensors[name])
        getattr(state.best, name).copy_(saved.tensors[f"best.{name}"])
        moments[index] = {k.removeprefix(prefix): v for k, v in saved.tensors.items() if k.startswith(prefix)}
    groups = state.optimizer.state_dict()["param_groups"]
    moments = {index: found for index, found in moments.items() if found}  # none before a step, nor of a given m
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for name in COUNTERS:
        setattr(state, name, saved.numbers[name])
    state.history, state.frames, state.trials = saved.history, saved.frames, saved.trials


# ---- an earlier run's proto-tokens


def read_earlier_run(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Tensor], dict] | None:
    """What --from-proto-tokens names, whose settings then hold here too. Raises UserError."""
    for option, file in (("--from-proto-tokens", args.from_proto_tokens), ("--m-from", args.m_from)):
        if file and file.resolve().parent == folder.resolve():
            raise UserError(f"{option} {file} lies in this run's own folder: name the run with --wandb-run-name")
    if not args.from_proto_tokens:
        return None
    tensors, settings = read_proto_tokens(args.from_proto_tokens, "--from-proto-tokens")
    prompt = settings["prompt"]
    args.prompts = [prompt] if isinstance(prompt, str) else prompt
    for name in TAKEN_OVER:
        setattr(args, name, settings[name])
    return tensors, settings


def read_proto_tokens(file: Path, option: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors and settings of an earlier run's proto_tokens.safetensors. Raises UserError."""
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in ("e_t", "m", "target_ids")}
            settings = json.loads(stored.metadata()["settings"])
        (batch, num_e_tokens, size), (batch_of_ids, num_tokens) = tensors["e_t"].shape, tensors["target_ids"].shape
        prompts = 1 if isinstance(settings["prompt"], str) else len(settings["prompt"])
        whole = tensors["m"].shape in ((1, size), (batch, size)) and batch == batch_of_ids == prompts
        whole &= num_e_tokens <= num_tokens == math.isqrt(num_tokens) ** 2 and settings.keys() >= set(TAKEN_OVER)
        whole &= tensors["target_ids"].dtype == torch.int64 and bool(tensors["e_t"].isfinite().all())
        if whole and bool(tensors["m"].isfinite().all()):
            return tensors, settings
    except FileNotFoundError:
        raise UserError(f"{option} {file}: there is no such file") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError):
        pass
    raise UserError(f"{option} {file} is damaged or no proto_tokens.safetensors of a run")


def refuse_other_models(
    models: Models, args: argparse.Namespace, tensors: dict[str, Tensor], settings: dict, option: str
) -> None:
    """Raises UserError where the proto-tokens of an earlier run were made for another generator."""

    def fresh_weights(control: str | None, seed: int) -> str:
        return f"seed {seed}" if control == "untrained" else "none"

    ours = {"hidden_size": models.hidden_size, "visual_offset": models.visual_offset}
    ours |= {"codebook_size": models.codebook_size, "generator_fingerprint": models.fingerprint}
    theirs = {name: settings.get(name) for name in ours}
    ours["untrained control"] = fresh_weights(args.control, args.seed)
    theirs["untrained control"] = fresh_weights(settings["control"], settings["seed"])
    other = [f"{name} {theirs[name]}, not {value}" for name, value in ours.items() if theirs[name] != value]
    if other:
        raise UserError(f"{option}: the file was made for another model ({other[0]}): name that one")
    codes = tensors["target_ids"] - models.visual_offset
    if tensors["m"].shape[1] != models.hidden_size or not ((codes >= 0) & (codes < models.codebook_size)).all():
        raise UserError(f"{option}: the file is damaged: its tensors do not fit its own settings")


def take_proto_tokens(models: Models, tensors: dict[str, Tensor], prompts: list[str]) -> tuple[Reference, Optimisation]:
    """The stored targets, decoded, and the stored embeddings as a finished optimisation."""
    codes = (tensors["target_ids"] - models.visual_offset).to(models.device)
    reference = Reference(codes, None, decode_codes(models.vq_decoder, codes), prompts)
    best = ProtoTokens(tensors["e_t"].to(models.device), tensors["m"].to(models.device))
    return reference, Optimisation(best, None, best, [], [], [])


def given_m(models: Models, args: argparse.Namespace) -> Tensor | None:
    """The m [1, D] of --m-from. Raises UserError where that run has several, or another model's."""
    if not args.m_from:
        return None
    tensors, settings = read_proto_tokens(args.m_from, "--m-from")
    refuse_other_models(models, args, tensors, settings, "--m-from")
    if len(tensors["m"]) != 1:
        raise UserError(
            f"--m-from {args.m_from} holds {len(tensors['m'])} m, one for each target: name a run that shares one"
        )
    return tensors["m"]


# ----------------------------------------------------------------------------------------------------------------------
# Tracking: the only place that touches Weights & Biases


# Together they keep the time that a run can lose to a dead server under a minute.
WANDB_ANSWER_SECONDS, WANDB_START_SECONDS, WANDB_FINISH_SECONDS = 10, 15, 25


@contextlib.contextmanager
def tracked(args: argparse.Namespace, settings: dict, run_id: str | None) -> Iterator[object | None]:
    """Yields a W&B run that ends with the block, as failed if the block raises; None where W&B is not asked for.

    Trouble with the server never ends the experiment: it is said once, and the run is kept offline, to sync later.
    """
    if not (args.use_wandb or in_sweep()):
        yield None
        return
    run = start_wandb(args, settings, run_id)
    exit_code = 1
    # Not `with run`: that prints a traceback of what is only a clear line to the user.
    try:
        yield run
        exit_code = 0
    except Stopped as stopped:
        exit_code = stopped.exit_code
        raise
    finally:
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            print(
                f"W&B: the server did not take everything in time; send the rest with: {sync_command(run)}",
                file=sys.stderr,
            )


def start_wandb(args: argparse.Namespace, settings: dict, run_id: str | None) -> object:
    """A new W&B run, or the one called `run_id` continued. Raises UserError where W&B refuses a name."""
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", str(WANDB_ANSWER_SECONDS))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # the client's own telemetry would wait on a dead network
    import wandb

    mode = args.wandb_mode or os.environ.get("WANDB_MODE") or "online"
    if mode == "online":
        try:
            wandb.login(verify=True)  # asks for a key on a terminal only
        except wandb.Error as error:
            mode = keep_offline(error)
    options = {"entity": args.wandb_entity, "name": args.wandb_run_name, "group": args.wandb_group}
    options |= {"tags": args.wandb_tags, "config": settings, "id": run_id, "resume": "allow" if run_id else None}
    options["project"] = None if in_sweep() else args.wandb_project  # a sweep's runs belong to the sweep's project
    options["settings"] = wandb.Settings(
        init_timeout=WANDB_START_SECONDS, finish_timeout=WANDB_FINISH_SECONDS, finish_timeout_raises=True
    )
    try:
        try:
            run = wandb.init(mode=mode, **options)
        except wandb.errors.CommError as error:
            wandb.teardown()  # a service that failed once would fail an offline run too
            run = wandb.init(mode=keep_offline(error), **options)
    except (wandb.Error, ValueError) as error:
        raise UserError(f"W&B does not take these settings: {first_line(error)}") from None
    run.define_metric("optimisation_step", hidden=True)
    run.define_metric("capacity/*", step_metric="capacity/num_tokens")
    for names in ("train/*", "targets/*", "embeddings/*", "gradients/*", "progress/*"):
        run.define_metric(names, step_metric="optimisation_step")
    run.define_metric("best_accuracy", step_metric="optimisation_step", summary="max")
    return run


def keep_offline(error: Exception) -> str:
    print(f"W&B: {first_line(error)}; this run is kept offline", file=sys.stderr)
    return "offline"


def sync_command(run: object) -> str:
    """The command that sends what is only here; without the option wandb passes over runs that began online."""
    option = "" if run.offline else "--no-skip-online "
    return f"wandb sync {option}{shlex.quote(str(Path(run.settings.sync_dir)))}"


def log_step(run: object | None, row: dict[str, float]) -> None:
    """A row of the history; `best_accuracy` too, so that a sweep can stop a run early."""
    if run:
        values = {name: value for name, value in row.items() if name != "step"}
        extra = {"best_accuracy": row["train/best_accuracy"], "optimisation_step": row["step"]}
        run.log(values | extra, step=row["step"])


def log_progress(run: object | None, image: Image.Image, step: int) -> None:
    if run:
        import wandb

        run.log({"progress/reconstruction": wandb.Image(image, caption=f"step {step}")}, step=step)


def log_trials(run: object | None, trials: list[dict], first: int) -> None:
    """The trials of a search for the capacity from number `first` on, a row each."""
    for index in range(first, len(trials)) if run else ():
        run.log({f"capacity/{name}": value for name, value in trials[index].items()}, step=index + 1)


def log_missing(run: object | None, models: Models, state: Optimisation) -> None:
    """After a resumption, the rows and pictures that the interrupted run had not sent."""
    rows = {row["step"]: row for row in state.history}
    frames = {frame["step"]: frame for frame in state.frames}
    for step in sorted(rows.keys() | frames.keys()) if run else ():
        if step >= run.starting_step and step in rows:
            log_step(run, rows[step])
        if step >= run.starting_step and step in frames:
            log_progress(run, tiled(frame_images(models, frames[step])), step)


def log_results(
    run: object | None,
    images: dict[str, Image.Image],
    tables: dict[str, list[dict]],
    summary: dict,
    proto_tokens_file: Path | None = None,
) -> None:
    """Pictures and tables as media of the last step, the summary, and the proto-tokens as an artifact."""
    if not run:
        return
    import wandb

    media = {name: wandb.Image(image) for name, image in images.items()}
    for name, content in tables.items():
        rows = [[wandb.Image(v) if isinstance(v, Image.Image) else v for v in row.values()] for row in content]
        media[name] = wandb.Table(columns=list(content[0]), data=rows)
    run.log(media, step=summary.get("steps"))
    run.summary.update({name: value for name, value in summary.items() if value != math.inf})
    if not proto_tokens_file:
        return
    artifact = wandb.Artifact(f"proto_tokens_{run.id}", type="proto-tokens", metadata={"status": summary["status"]})
    artifact.add_file(str(proto_tokens_file))
    try:
        run.log_artifact(artifact)
    except wandb.Error:
        # Unlike all else this asks the server; where that is gone, the file at least is kept with the run, to sync.
        run.save(str(proto_tokens_file), base_path=str(proto_tokens_file.parent), policy="now")


# ----------------------------------------------------------------------------------------------------------------------
# Main


def synchronise(device: torch.device) -> None:
    """Waits for the device, so that a clock read next measures finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def progress_bar(iterable, label: str, unit: str, **options) -> tqdm:
    """Lively on a terminal, a line a half-minute in a log file."""
    lively = sys.stderr.isatty()
    interval = 0.1 if lively else 30
    return tqdm(iterable, label, unit=f" {unit}", dynamic_ncols=lively, mininterval=interval, **options)


def print_results(summary: dict, folder: Path, run: object | None) -> None:
    errors, batch = summary["num_errors"], summary["num_targets"]
    total = summary["num_tokens"] * batch
    at_step = f" at step {summary['best_step']}" if "steps" in summary else ""
    rows = {
        "status": summary["status"],
        "best accuracy": f"{summary['best_accuracy']:.1f} %{at_step}",
        "wrong tokens": f"{errors} of {total}",
        "information": f"{summary['information_gain_bits']:.0f} bits gained of {summary['target_bits_unprompted']:.0f} "
        f"unprompted, {summary['bits_per_parameter']:.2f} a parameter",
        "likeness": likeness(summary["psnr"]),
        "parameters": f"{summary['total_params']} for {total} tokens",
        "one pass": f"{1000 * summary['one_pass_seconds']:.1f} ms",
    }
    if "speedup" in summary:
        rows["one pass"] += (
            f" instead of {duration(summary['autoregressive_seconds'])}: {summary['speedup']:.0f} x faster"
        )
    if "steps" in summary:
        rows["optimisation"] = f"{summary['steps']} steps in {duration(summary['optimisation_seconds'])}"
    if batch > 1:
        own = [summary[f"targets/{k}/best_accuracy"] for k in range(batch)]
        rows["targets"] = f"{batch}, from {min(own):.1f} to {max(own):.1f} %"
    rows["files"] = f"{folder}/"
    if run and run.offline:
        rows["to W&B later"] = sync_command(run)
    print("\n" + "\n".join(f"  {label:<14} {value}" for label, value in rows.items()))


@dataclass(frozen=True)
class Run:
    """Where the results of one run go, and what may stop it."""

    folder: Path
    settings: dict
    wandb: object | None
    stop: StopSwitch


def run_steps(
    models: Models,
    codes: Tensor,
    args: argparse.Namespace,
    state: Optimisation,
    wandb_run: object | None,
    save: Callable,
) -> None:
    """The optimisation with everything around it: progress bar, history, W&B, saved states."""
    with progress_bar(None, "proto-tokens", "steps", total=args.num_steps, initial=state.step) as bar:
        for row in optimise_proto_tokens(models, codes, args, state):
            ended = state.step == args.num_steps or target_is_reached(state, args)
            if state.step == 1 or state.step % args.log_every == 0 or ended:
                state.history.append(row)
                log_step(wandb_run, row)
            if args.image_every and (state.step % args.image_every == 0 or ended):
                now = reconstruct(models, state.best, codes, args.vocabulary, repeats=1)
                frame = {"step": state.step, "accuracy": state.mean_best_accuracy}
                state.frames.append(frame | {"codes": now.predicted_codes[:SHOWN_TARGETS].tolist()})
                log_progress(wandb_run, tiled([to_image(pixels) for pixels in now.pixels[:SHOWN_TARGETS]]), state.step)
            if not ended:
                save(now=state.step % args.save_every == 0)
            correct = f"correct {row['train/correct_tokens']}/{codes.numel()} ({row['train/accuracy']:.1f} %)"
            best = f"best {state.mean_best_accuracy:.1f} %"
            bar.set_postfix_str(f"loss {row['train/loss']:.3f}, {correct}, {best}", refresh=False)
            bar.update()


def run_steps_or_save(
    models: Models, codes: Tensor, args: argparse.Namespace, state: Optimisation, run: Run, wandb_run: object | None
) -> None:
    """As `run_steps`; whatever ends it early, a signal or an error, leaves a state to go on from."""

    def save(now: bool) -> None:
        if now or run.stop.received:
            save_state(run, state, codes)
        if run.stop.received:
            raise Stopped(run.stop.received)

    with run.stop.held_back():
        try:
            with enough_memory_for(f"step {state.step + 1} of the optimisation"):
                run_steps(models, codes, args, state, wandb_run, save)
        except UserError:
            save(now=True)
            raise


def save_state(run: Run, state: Optimisation, codes: Tensor) -> None:
    write_state(run.folder / STATE_FILE, state, codes, run.settings, run.wandb.id if run.wandb else None)


def begin(reference: Reference, run: Run, saved: SavedState | None) -> None:
    """Clears what an earlier run left, unless this one goes on with it; writes what is known before the first step."""
    if not saved:
        remove_earlier_results(run.folder)
    write_json(run.folder / "config.json", run.settings)
    write_images(run.folder, {"reference_image": tiled([to_image(pixels) for pixels in reference.pixels])})


def learn_proto_tokens(
    models: Models, reference: Reference, m: Tensor | None, args: argparse.Namespace, run: Run, saved: SavedState | None
) -> Optimisation:
    """Optimises from the start, or from where an interrupted run stood; leaves history and best embeddings.

    Raises UserError where the optimisation cannot go on, and Stopped; both leave a state to go on from.
    """
    state = new_optimisation(models, len(reference.codes), args, m)
    if saved:
        restore_state(state, reference.codes, saved)
        log_missing(run.wandb, models, state)
        print(f"resumed after step {state.step}")
    begin(reference, run, saved)
    run_steps_or_save(models, reference.codes, args, state, run, run.wandb)
    write_history(run.folder / "history.csv", state.history)
    write_proto_tokens(run.folder / PROTO_TOKENS_FILE, state.best, models.visual_offset + reference.codes, run.settings)
    if state.diverged:
        raise UserError(f"{divergence(state)}; the best proto-tokens so far are in {run.folder / PROTO_TOKENS_FILE}")
    return state


def divergence(state: Optimisation) -> str:
    at = f"the loss or its gradient is no longer finite at step {state.step + 1}"
    return f"{at}: lower --learning-rate or set --grad-clip 1"


def find_capacity(
    models: Models, reference: Reference, m: Tensor | None, args: argparse.Namespace, run: Run, saved: SavedState | None
) -> list[dict]:
    """Tries longer and shorter beginnings of the targets until the capacity is known. Returns the trials.

    Each trial is an optimisation of its own; an interrupted one goes on where it stood. Raises UserError and Stopped.
    """
    batch, longest = reference.codes.shape
    trials = saved.trials if saved else []
    log_trials(run.wandb, trials, max(0, run.wandb.starting_step - 1) if run.wandb else 0)
    begin(reference, run, saved)
    while num_tokens := next_prefix(trials, args.num_e_tokens, longest):
        codes, state = reference.codes[:, :num_tokens], new_optimisation(models, batch, args, m)
        state.trials = trials
        if saved:
            restore_state(state, codes, saved)
            saved = None
        else:
            save_state(run, state, codes)
        print(f"capacity: {num_tokens} tokens")
        run_steps_or_save(models, codes, args, state, run, None)
        if state.diverged:
            raise UserError(f"with {num_tokens} tokens {divergence(state)}")
        trial = {"num_tokens": num_tokens, "best_accuracy": min(state.best_accuracy), "steps": state.step}
        trials = [*trials, trial | {"reached": target_is_reached(state, args), "seconds": state.seconds}]
        log_trials(run.wandb, trials, len(trials) - 1)
    return trials


def publish_capacity(models: Models, reference: Reference, trials: list[dict], target: float, run: Run) -> None:
    """Writes, logs and prints what a search for the capacity has found."""
    batch, longest = reference.codes.shape
    reached = [trial for trial in trials if trial["reached"]]
    capacity = max((trial["num_tokens"] for trial in reached), default=0)
    summary = {
        "capacity_tokens": capacity,
        "capacity_bits_uniform": capacity * math.log2(models.codebook_size),
        "best_accuracy": max((trial["best_accuracy"] for trial in reached), default=0.0),
        "num_tokens": longest,
        "num_targets": batch,
        "trials": len(trials),
        "optimisation_seconds": sum(trial["seconds"] for trial in trials),
    }
    images = {"capacity": draw_capacity(trials, capacity, target)}
    write_images(run.folder, images)
    write_history(run.folder / TRIALS_FILE, trials)
    write_json(run.folder / "summary.json", summary)
    (run.folder / STATE_FILE).unlink(missing_ok=True)
    log_results(run.wandb, images, {"trials": trials}, summary)
    print(f"\n  capacity       {capacity} of {longest} tokens at {target:g} %, in {len(trials)} trials")
    print(f"  files          {run.folder}/")


def publish(models: Models, reference: Reference, state: Optimisation, args: argparse.Namespace, run: Run) -> dict:
    """Reconstructs from the best proto-tokens; writes and logs the results. Returns the summary."""
    reconstruction = reconstruct(models, state.best, reference.codes, args.vocabulary)
    bits = information(models, reference, reconstruction, args.vocabulary)
    m_learned = not args.m_from and args.num_e_tokens < reference.codes.shape[1]
    learned = state.best.e_t.numel() + (state.best.m.numel() if m_learned else 0)
    summary = summarise(reference, state, reconstruction, bits, learned)
    targets = draw_targets(reference, reconstruction)
    images = draw_figures(targets, reconstruction.target_rank, summary, state.history)
    target_ids = models.visual_offset + reference.codes
    write_images(run.folder, images)
    if state.frames:
        write_progress(run.folder / PROGRESS_FILE, models, state.frames)
    proto_tokens_file = run.folder / PROTO_TOKENS_FILE
    write_proto_tokens(proto_tokens_file, state.best, target_ids, run.settings, reconstruction.predicted_ids)
    write_json(run.folder / "summary.json", summary)
    (run.folder / STATE_FILE).unlink(missing_ok=True)
    tables = {"targets": targets} if len(targets) > 1 else {}
    log_results(run.wandb, images, tables, summary, proto_tokens_file)
    return summary


def learnt_before(models: Models, args: argparse.Namespace, run: Run, stored: tuple) -> tuple[Reference, Optimisation]:
    """The targets and embeddings of --from-proto-tokens. Raises UserError."""
    tensors, settings = stored
    refuse_other_models(models, args, tensors, settings, "--from-proto-tokens")
    remove_earlier_results(run.folder)
    write_json(run.folder / "config.json", run.settings)
    return take_proto_tokens(models, tensors, args.prompts)


def run_experiment(args: argparse.Namespace, stop: StopSwitch) -> None:
    """The whole experiment. Raises UserError for what the user can put right."""
    with run_folder(args) as folder:
        stored = read_earlier_run(args, folder)
        for file in args.images:
            read_picture(file, args.image_size)  # now, as what is wrong with it had better be said early
        with enough_memory_for("the models"):
            models = load_models(args)
        m = None if stored else given_m(models, args)
        settings = describe_run(args, models)
        if args.resume and is_finished(folder, settings):
            print(f"the run in {folder} is finished: there is nothing to resume")
            return
        warn_if_slow(models, settings["num_tokens"], args.num_steps, len(args.prompts))
        saved = read_state(folder, settings) if args.resume else None
        with tracked(args, settings, saved and saved.run_id) as wandb_run:
            run = Run(folder, settings, wandb_run, stop)
            with enough_memory_for("the reference"):
                reference = None if stored else make_reference(models, args)
            if args.control == "untrained":
                with enough_memory_for("the untrained model"):
                    models = untrained(models, args.seed)
            if args.capacity:
                trials = find_capacity(models, reference, m, args, run, saved)
                publish_capacity(models, reference, trials, args.target_accuracy, run)
                return
            if stored:
                reference, state = learnt_before(models, args, run, stored)
            else:
                state = learn_proto_tokens(models, reference, m, args, run, saved)
            with enough_memory_for("the reconstruction"):
                summary = publish(models, reference, state, args, run)
        print_results(summary, folder, wandb_run)


def main(args: argparse.Namespace) -> None:
    try:
        run_experiment(args, StopSwitch())
    except UserError as error:
        exit_with_error(error)
    except Stopped as stopped:
        print(f"stopped by {stopped}; --resume goes on from the last saved step", file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None


if __name__ == "__main__":
    main(ARGUMENTS)
