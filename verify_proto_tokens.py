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

RECIPES = {
    "learning_rate": {"tuned": 0.2, "reference": 0.01},
    "warmup_steps": {"tuned": 20, "reference": 0},
    "betas": {"tuned": (0.9, 0.9), "reference": (0.9, 0.999)},  # the short memory gains most
    "initial_scale": {"tuned": 0.25, "reference": 0.01},
    "grad_clip": {"tuned": 0.0, "reference": 1.0},
}
DEFAULT_PROMPT = "a red apple on a wooden table"
DEFAULT_MODEL = "Daniel0724/SimpleAR-1.5B-RL"
DEFAULT_VQ_MODEL = "nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"
DEMO_FOLDER = Path(__file__).resolve().parent / "tests" / "demo_model"
CACHE_FOLDER = "reference_cache"


class UserError(Exception):
    """Something the user can put right: `main` prints it as one line and exits with code 2."""


def checked(parse: Callable, holds: Callable, what: str) -> Callable:
    """An argparse type: what `parse` makes of the text, where it `holds`; anything else is said to be not `what`."""

    def convert(text: str):
        with contextlib.suppress(ValueError, KeyError):
            found = parse(text)
            if holds(found):
                return found
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")

    return convert


# Not a number fails every comparison.
COUNT = checked(int, lambda n: n >= 1, "a whole number of at least 1")
COUNT_OR_0 = checked(int, lambda n: 0 <= n < 2**63, "a whole number of at least 0")
POSITIVE = checked(float, lambda x: 0 < x <= 1e37, "a number above 0 and at most 1e37")
AT_LEAST_0 = checked(float, lambda x: 0 <= x <= 1e37, "a number from 0 to 1e37")
UP_TO_1000 = checked(float, lambda x: 0 <= x <= 1000, "a number from 0 to 1000")
PROBABILITY = checked(float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
PERCENT = checked(float, lambda x: 0 <= x <= 100, "a number from 0 to 100")
BETAS = checked(
    lambda text: tuple(map(float, text.split(","))),
    lambda b: len(b) == 2 and all(0 <= x < 1 for x in b),
    "two numbers of at least 0 and below 1, with a comma between",
)
PROMPT = checked(str.strip, bool, "a few words that describe the picture")
FILE = checked(lambda text: Path(text).expanduser(), lambda file: True, "a path")
# A run's name is also that of a folder inside the save directory.
RUN_NAME = checked(
    str.strip,
    lambda name: (
        re.fullmatch(r"(?!\.\.?$)[^/\\\x00-\x1f]+", name) and name != CACHE_FOLDER and len(name.encode()) <= 128
    ),
    f"at most 128 bytes without slashes, and not {CACHE_FOLDER}",
)
TAGS = checked(
    lambda text: [tag.strip() for tag in text.split(",") if tag.strip()],
    lambda tags: max(map(len, tags), default=0) <= 64,
    "tags of at most 64 characters, with commas between",
)
# Sweep agents write a switch as --demo=True.
SWITCH = {"type": checked(lambda text: {"true": True, "false": False}[text.lower()], lambda _: True, "true or false")}
SWITCH |= {"nargs": "?", "const": True, "default": False, "metavar": "true|false"}


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
    add("--codebook-size", type=COUNT, metavar="CODES",
        help="number of visual codes (default: the product of the decoder's FSQ levels where it carries them, else the "
        "embedding rows beyond the text vocabulary)")
    add("--device", help="torch device (default: cuda:0 where there is one, else mps, else cpu)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="precision of the generator; the proto-tokens are always float32 (default: auto, that is bfloat16 on CUDA "
        "and float32 elsewhere)")

    add = parser.add_argument_group("reference image").add_argument
    add("--prompt", type=PROMPT, action="append", metavar="TEXT", dest="prompts",
        help="what the reference image shows; given several times, the targets are optimised together "
        f"(default: {DEFAULT_PROMPT})")
    add("--prompts-file", type=FILE, metavar="FILE", help="further prompts, one a line")
    add("--image", type=FILE, action="append", metavar="FILE", dest="images",
        help="a picture of one's own as the target, cut to its middle square, instead of a generated one; --prompt "
        "then says what it shows (default: its file's name)")
    add("--image-size", type=COUNT, default=256, metavar="PIXELS",
        help="width and height; a multiple of the tokenizer's downsampling factor (default: %(default)s)")
    add("--cfg-scale", type=UP_TO_1000, default=6.0, metavar="S",
        help="classifier-free guidance: 1 is none, more follows the prompt more closely (default: %(default)s)")
    add("--temperature", type=POSITIVE, default=1.0, metavar="T",
        help="of sampling the reference (default: %(default)s)")
    add("--top-k", type=COUNT, metavar="K",
        help="sample among the K likeliest codes; 1 is greedy decoding (default: the whole codebook)")
    add("--top-p", type=PROBABILITY, default=1.0, metavar="P",
        help="sample among the likeliest codes that hold a share P of the probability (default: %(default)s)")
    add("--compile", choices=("auto", "on", "off"), default="auto",
        help="compile the decoding of the reference, on CUDA to CUDA graphs; costs half a minute first, and brings "
        "nothing on a CPU (default: auto, that is on CUDA from 1024 tokens)")
    add("--force-generate", **SWITCH, help="generate the reference even if it is cached with these settings")
    add("--seed", type=COUNT_OR_0, default=42,
        help="of the reference and of the initial proto-tokens (default: %(default)s)")
    add("--control", choices=("random", "shuffled", "untrained"),
        help="a harder target to compare with: `random` codes, the reference's own codes `shuffled`, or the reference "
        "for an `untrained` generator of the same architecture (default: none)")

    add = parser.add_argument_group("optimisation of the proto-tokens").add_argument
    add("--num-steps", type=COUNT, default=1000, metavar="STEPS", help="at most (default: %(default)s)")
    add("--num-e-tokens", type=COUNT, default=1, metavar="K",
        help="target-specific embeddings in front: [e_1 .. e_K, m, ..., m], N in all (default: %(default)s)")
    add("--m", choices=("shared", "own"), default="shared",
        help="whether several targets share one m, or each learns its own (default: %(default)s)")
    add("--m-from", type=FILE, metavar="FILE",
        help="take m, frozen, from an earlier run's proto_tokens.safetensors: only e_t learns")
    add("--recipe", choices=("tuned", "reference"), default="tuned",
        help="the defaults of the next five options; `reference` is the usual one: 0.01, no warm-up, betas 0.9 and "
        "0.999, initial values x 0.01, clipping at 1 (default: %(default)s)")
    add("--learning-rate", type=POSITIVE, metavar="RATE",
        help="peak rate of AdamW; from there a cosine (default: 0.2, that of the recipe)")
    add("--warmup-steps", type=COUNT_OR_0, metavar="STEPS",
        help="steps up to the peak rate, a tenth of all at most (default: 20, that of the recipe)")
    add("--betas", type=BETAS, metavar="B1,B2",
        help="memory of AdamW's first and second moments (default: 0.9,0.9, those of the recipe)")
    add("--initial-scale", type=UP_TO_1000, metavar="STD",
        help="standard deviation of the initial values (default: 0.25, that of the recipe)")
    add("--grad-clip", type=AT_LEAST_0, metavar="NORM",
        help="clip the joint gradient of e_t and m to this norm; 0 is off (default: 0, that of the recipe)")
    add("--vocabulary", choices=("full", "visual"), default="full",
        help="the ids that compete in softmax and argmax: every id of the model, text included (the strict claim), or "
        "the visual codes alone (default: %(default)s)")
    add("--gradient-checkpointing", choices=("auto", "on", "off"), default="auto",
        help="keep only each layer's input and compute the rest again on the way back: far less memory, more time "
        "(default: auto, that is where the device would not hold the step otherwise)")
    add("--target-accuracy", type=PERCENT, metavar="PERCENT",
        help="stop as soon as this token accuracy is reached; 0 is never (default: 100; with --capacity 99)")
    add("--capacity", **SWITCH,
        help="find the largest beginning of the target that reaches --target-accuracy within --num-steps")
    add("--log-every", type=COUNT, default=1, metavar="STEPS",
        help="steps between two rows of history.csv and of W&B's history (default: %(default)s)")
    add("--save-every", type=COUNT, default=100, metavar="STEPS",
        help="steps between two saved states, for --resume; Ctrl-C and SIGTERM save one too (default: %(default)s)")
    add("--resume", **SWITCH,
        help="go on with the interrupted run of this name, settings and save directory; starts where there is none")
    add("--from-proto-tokens", type=FILE, metavar="FILE",
        help="learn nothing: reconstruct the picture from an earlier run's proto_tokens.safetensors, whose prompt, "
        "size and vocabulary hold; the models must be that run's")

    add = parser.add_argument_group("output").add_argument
    add("--save-dir", type=FILE, default=Path("./proto_tokens_exp"), metavar="FOLDER",
        help="results go to FOLDER/<run name>/, generated references are cached beside them (default: %(default)s)")

    add = parser.add_argument_group("Weights & Biases").add_argument
    add("--use-wandb", **SWITCH, help="log to W&B; a run started by a sweep agent does so without this flag")
    add("--wandb-project", default="simplear-proto-tokens", metavar="NAME", help="(default: %(default)s)")
    add("--wandb-entity", metavar="NAME", help="user or team (default: W&B's own default)")
    add("--wandb-run-name", type=RUN_NAME, metavar="NAME",
        help="name of the run and of its folder (default: from the settings, as proto_256px_steps1000_lr02_seed42)")
    add("--wandb-tags", type=TAGS, default=["proto-tokens"], metavar="TAG,TAG",
        help="separated by commas (default: proto-tokens)")
    add("--wandb-group", metavar="NAME", help="group that the run belongs to")
    add("--image-every", type=COUNT, metavar="STEPS",
        help="also log the reconstruction every so many steps; W&B shows these with a slider (default: never)")
    add("--wandb-mode", choices=("online", "offline", "disabled"),
        help="offline writes a local run to sync later (default: WANDB_MODE of the environment, else online)")
    return parser
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; a mistake ends the process with one line on stderr and exit code 2."""
    parser = build_parser()
    parser.error = exit_with_error
    # `--num_steps=50` -> `--num-steps=50`; values keep their underscores.
    argv = [
        re.sub("^--[^=]*", lambda name: name[0].replace("_", "-"), word)
        for word in (sys.argv[1:] if argv is None else argv)
    ]
    args = parser.parse_args(argv)
    for name, values in RECIPES.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.recipe])
    if args.target_accuracy is None:
        args.target_accuracy = 99.0 if args.capacity else 100.0
    for contradicts, message in (
        (args.demo and (args.model_path or args.vq_model_ckpt),
         "--demo names both models already: leave out --model-path and --vq-model-ckpt"),
        (args.from_proto_tokens and (args.control or args.m_from or args.images),
         "--from-proto-tokens learns nothing: leave out --control, --m-from and --image"),
        (args.capacity and (args.from_proto_tokens or args.image_every or not args.target_accuracy),
         "--capacity needs a --target-accuracy above 0, and no --from-proto-tokens or --image-every"),
        (args.m_from and args.m == "own", "--m-from gives all targets one m: leave out --m own"),
    ):  # fmt: skip
        if contradicts:
            parser.error(message)
    args.images = args.images or []
    args.prompts = (args.prompts or []) + (read_prompts(args.prompts_file) if args.prompts_file else [])
    own_names = [image.stem.replace("_", " ").strip() or DEFAULT_PROMPT for image in args.images]
    args.prompts = args.prompts or own_names or [DEFAULT_PROMPT]
    if args.images and len(args.images) != len(args.prompts):
        parser.error(f"--image was given {len(args.images)} times, --prompt {len(args.prompts)} times: give one each")
    args.model_path = args.model_path or (str(DEMO_FOLDER / "generator") if args.demo else DEFAULT_MODEL)
    args.vq_model_ckpt = args.vq_model_ckpt or (str(DEMO_FOLDER / "vq") if args.demo else DEFAULT_VQ_MODEL)
    args.wandb_run_name = args.wandb_run_name or default_run_name(args)
    return args


def read_prompts(file: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines do not count."""
    try:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        exit_with_error(f"--prompts-file {file} cannot be read: {getattr(error, 'strerror', None) or error}")
    return prompts or exit_with_error(f"--prompts-file {file} holds no prompt")


def exit_with_error(message: object) -> None:
    print("verify_proto_tokens.py: error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def default_run_name(args: argparse.Namespace) -> str:
    """From the settings, as proto_256px_steps1000_lr02_seed42, and what else makes it another experiment."""
    rate, count = f"{args.learning_rate:g}".replace(".", ""), len(args.prompts)
    parts = {
        f"proto_{args.image_size}px_steps{args.num_steps}_lr{rate}_seed{args.seed}": True,
        "image": args.images,
        f"targets{count}": count > 1,
        "own": count > 1 and args.m == "own",
        f"e{args.num_e_tokens}": args.num_e_tokens > 1,
        "given": args.m_from,
        str(args.control): args.control,
        "capacity": args.capacity,
    }
    name = "reconstructed" if args.from_proto_tokens else "_".join(part for part, holds in parts.items() if holds)
    # The runs of a sweep differ in settings that the name may not show: each keeps to a folder of its own.
    return f"{name}_{os.environ['WANDB_RUN_ID']}" if in_sweep() and os.environ.get("WANDB_RUN_ID") else name


def in_sweep() -> bool:
    """Whether a W&B sweep agent started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


if __name__ == "__main__":
    ARGUMENTS = parse_args()  # here, so that --help and a mistyped option answer before the heavy imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during these there is nothing to save, and no traceback to show

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM, TopKLogitsWarper, TopPLogitsWarper

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

    def num_tokens(self, image_size: int) -> int:
        return (image_size // self.factor) ** 2

    def has(self, codes: Tensor) -> bool:
        """Whether all are visual codes."""
        return bool(((codes >= 0) & (codes < self.codebook_size)).all())


@contextlib.contextmanager
def enough_memory_for(what: str) -> Iterator[None]:
    """Turns running out of memory, on the device or the host, into a UserError that says during what."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise UserError(
            f"out of memory for {what}: fewer targets, a smaller --image-size, --dtype bfloat16 or "
            "--gradient-checkpointing on needs less"
        ) from None


@enough_memory_for("the models")
def load_models(args: argparse.Namespace) -> Models:
    """Loads everything that stays frozen, the cheap and telling parts first. Raises UserError."""
    device = pick_device(args.device)
    generator_folder = local_folder(args.model_path, CONFIGURATION_FILES, "--model-path")
    vocabulary_rows = read_vocabulary_rows(generator_folder)
    text_tokenizer = load_text_tokenizer(generator_folder)
    vq_files = (*VQ_FILES, VQ_ENCODER) if args.images else VQ_FILES
    vq_folder = local_folder(args.vq_model_ckpt, vq_files, "--vq-model-ckpt")
    vq_decoder, vq_encoder = [*(load_torchscript(vq_folder / name, device) for name in vq_files), None][:2]
    factor, visual_offset = downsampling_factor(vq_decoder, device), len(text_tokenizer)
    refuse_misfitting_size(args.image_size, args.num_e_tokens, factor)
    codebook_size = args.codebook_size or fsq_codebook_size(vq_decoder) or vocabulary_rows - visual_offset
    if codebook_size < 1 or vocabulary_rows < visual_offset + codebook_size:
        raise UserError(
            f"--model-path {args.model_path} has {vocabulary_rows} embedding rows, too few for {visual_offset} text "
            f"tokens and a codebook of {codebook_size}: it is no SimpleAR checkpoint for this VQ tokenizer"
        )
    generator_folder = local_folder(args.model_path, GENERATOR_FILES, "--model-path")
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, automatic if args.dtype == "auto" else args.dtype)
    generator = load_generator(generator_folder, dtype, device)
    fingerprints = fingerprint_of(generator_folder, GENERATOR_FILES), fingerprint_of(vq_folder, VQ_FILES)
    print(
        f"generator: {generator.num_parameters() / 1e6:,.1f} M parameters, {str(dtype).removeprefix('torch.')} on "
        f"{device}; {visual_offset} text ids + {codebook_size} visual codes"
    )
    vocabulary = visual_offset, codebook_size
    return Models(generator, text_tokenizer, vq_decoder, vq_encoder, *vocabulary, factor, *fingerprints)


def pick_device(name: str | None) -> torch.device:
    name = name or ("cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # not built for it, not there, not known
        raise UserError(f"--device {name} cannot be used here ({line_of(error)}): try --device cpu") from None
    return torch.device(name)


def line_of(error: BaseException, number: int = 0) -> str:
    """A line of what an error says; TorchScript's own say in the last one (-1) what happened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[number].rstrip(".")


def local_folder(name: str, patterns: tuple[str, ...], option: str) -> Path:
    """The folder itself, or the local snapshot of a hub repository, downloaded where needed. Raises UserError."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{option} {name} is a file: name the folder that holds it")
    try:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
            raise HFValidationError
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except HFValidationError:
        why = f"there is no such folder (and this is no hub id such as {DEFAULT_MODEL})"
    except GatedRepoError:
        why = f"it is gated: accept its licence at https://huggingface.co/{name}, then run `hf auth login`"
    except RepositoryNotFoundError:
        why = "there is no such folder, and no such repository on the Hugging Face hub that you may read (a private "
        why += "one needs `hf auth login`)"
    except Exception as error:  # of the hub client, its HTTP library or the disk: no common class
        why = "there is no such folder, and it cannot be fetched from the Hugging Face hub "
        why += f"({line_of(error.__cause__ or error)[:120]})"
    raise UserError(f"{option} {name}: {why}; name a local folder, or try --demo")


def read_vocabulary_rows(folder: Path) -> int:
    """The embedding rows that the checkpoint's config.json promises. Raises UserError where it is no Qwen2 model."""
    try:
        config = json.loads((folder / "config.json").read_text())
        kind, rows = config["model_type"], int(config["vocab_size"])
    except OSError:
        raise UserError(f"--model-path {folder} holds no config.json: it is no model folder") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder}/config.json is damaged or no model configuration: download it again") from None
    if kind != "qwen2":
        raise UserError(f"--model-path {folder} is a {kind!r} model: SimpleAR generators are 'qwen2'")
    return rows


def load_text_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        text_tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise UserError(f"the text tokenizer in {folder} does not load: {line_of(error)}") from None
    for token in (TEXT_TO_IMAGE, START_OF_IMAGE):
        if token not in text_tokenizer.get_vocab() or len(text_tokenizer(token)["input_ids"]) != 1:
            raise UserError(f"the text tokenizer in {folder} lacks {token} or splits it: it is not SimpleAR's")
    return text_tokenizer


def load_generator(folder: Path, dtype: torch.dtype, device: torch.device) -> Qwen2ForCausalLM:
    """The generator, frozen: no parameter has requires_grad. Raises UserError."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"dtype": dtype, "attn_implementation": "sdpa", "attention_dropout": 0.0, "use_safetensors": True}
    try:
        # By class: config.json may name SimpleAR's own class, which no library ships; its weights are plain Qwen2.
        generator, report = Qwen2ForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the weights in {folder} do not load as a Qwen2 model: {line_of(error)}") from None
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
        # [P, I] as pixels [1, I, 1, P]: in memory that is channels-last, and so no copy.
        return F.conv2d(rows[None].mT[:, :, None], weight[:, :, None, None], bias)[0, :, 0].T

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return product_back(gradient.contiguous(), *ctx.saved_tensors), None, None


def product_back(x: Tensor, weight: Tensor) -> Tensor:
    """x [P, O] @ weight [O, I] -> [P, I]: the way back through `product`."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return x @ weight
    return F.conv_transpose2d(x[None].mT[:, :, None], weight[:, :, None, None])[0, :, 0].T


def load_torchscript(file: Path, device: torch.device) -> torch.jit.ScriptModule:
    """A part of the VQ tokenizer in its own precision (casts are traced in as constants). Raises UserError."""
    if not file.is_file():
        raise UserError(f"--vq-model-ckpt {file.parent} holds no {file.name}: it is no Cosmos-style VQ tokenizer")
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            return torch.jit.load(file, map_location=device).eval()
    except (RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{file} is no TorchScript file, or a damaged one: {line_of(error)}") from None


def downsampling_factor(vq_decoder: torch.jit.ScriptModule, device: torch.device) -> int:
    """Pixels per latent cell, learnt by decoding one cell. Raises UserError."""
    try:
        return decode_codes(vq_decoder, torch.zeros(1, 1, dtype=torch.long, device=device)).shape[-1]
    except Exception as error:  # whatever foreign TorchScript may raise
        raise UserError(
            f"--vq-model-ckpt: decoder.jit does not decode one code to a picture on {device} ({line_of(error, -1)}): "
            "it is no Cosmos-style discrete decoder, or its operations do not exist there (then try --device cpu)"
        ) from None


def refuse_misfitting_size(image_size: int, num_e_tokens: int, factor: int) -> None:
    below = image_size // factor * factor
    if image_size != below:
        nearest = f"{below} or {below + factor}" if below else f"{factor}"
        raise UserError(f"--image-size {image_size} is no multiple of the tokenizer's {factor} pixels: try {nearest}")
    num_tokens = (image_size // factor) ** 2
    if num_e_tokens > num_tokens:
        raise UserError(f"--num-e-tokens {num_e_tokens} exceeds the {num_tokens} tokens of --image-size {image_size}")


def fsq_codebook_size(vq_decoder: torch.jit.ScriptModule) -> int | None:
    """The product of the FSQ levels that a Cosmos decoder carries in its state; None where it carries none."""
    levels = (buffer for name, buffer in vq_decoder.named_buffers() if name.endswith("quantizer._levels"))
    return next((int(each.prod()) for each in levels), None)


@torch.inference_mode()
def decode_codes(vq_decoder: torch.jit.ScriptModule, codes: Tensor) -> Tensor:
    """Visual codes [B, N] of square images in raster order -> pixels [B, 3, H, W], float32 in [0, 1], on the CPU."""
    side = math.isqrt(codes.shape[1])
    # A few at a time: the decoder needs far more memory than its pictures.
    videos = [vq_decoder(some).cpu() for some in codes.view(-1, 1, side, side).split(4)]  # [b, 3, 1, H, W], in [-1, 1]
    return ((torch.cat(videos)[:, :, 0].float() + 1) / 2).clamp(0, 1)


@torch.inference_mode()
def encode_pixels(models: Models, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [0, 1] -> visual codes [B, N] in raster order. Raises UserError."""
    try:
        weight = next(models.vq_encoder.parameters())
        video = (2 * pixels - 1)[:, :, None].to(weight.device, weight.dtype)
        found = [models.vq_encoder(each)[0] for each in video.split(1)]  # [1, 1, h, w] each
        codes = torch.cat(found).flatten(1).long()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever foreign TorchScript may raise
        raise UserError(
            f"--image: encoder.jit cannot run here ({line_of(error, -1)}): the bfloat16 encoder of Cosmos needs a GPU; "
            "or it is no Cosmos-style encoder"
        ) from None
    if codes.shape[1] != models.num_tokens(pixels.shape[-1]) or not models.has(codes):
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


def warn_if_slow(models: Models, num_tokens: int, num_steps: int) -> None:
    """One line about how long a real-size model takes on a CPU, from timing one pass of each kind."""
    parameters = models.generator.num_parameters()
    if models.device.type != "cpu" or parameters < REAL_SIZE:
        return
    seconds = []
    for shape in ((2, 1), (2, 1), (1, min(num_tokens, 256))):  # the first one also reads the weights from disk
        started = time.perf_counter()
        with torch.inference_mode():
            models.generator(input_ids=torch.zeros(shape, dtype=torch.long), use_cache=False)
        seconds.append((time.perf_counter() - started) / shape[1])
    step = 2 * seconds[2] * num_tokens  # the way back costs about one more way there
    print(
        f"note: {parameters / 1e9:.1f} B parameters on a CPU: expect about {duration(seconds[1] * num_tokens)} for a "
        f"new reference and {duration(step * num_steps)} for {num_steps} steps of one target; a GPU, --dtype bfloat16 "
        "or fewer --num-steps shorten this"
    )


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ----------------------------------------------------------------------------------------------------------------------
# Reference image

CACHE_FORMAT = 3
TARGETS_AT_ONCE = 16  # in a batch without gradients, whose key/value cache must fit
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


@enough_memory_for("the reference")
def make_reference(
    models: Models, args: argparse.Namespace, pixels: Tensor | None = None, codes: Tensor | None = None
) -> Reference:
    """The targets of a run: stored `codes` [B, N], own pictures' `pixels` [B, 3, H, W], or the prompts' pictures."""
    codes, seconds = target_codes(models, args, pixels) if codes is None else (codes, None)
    codes = codes.to(models.device)
    return Reference(codes, seconds, decode_codes(models.vq_decoder, codes), args.prompts)


def target_codes(models: Models, args: argparse.Namespace, pixels: Tensor | None) -> tuple[Tensor, float | None]:
    """Codes [B, N] of pictures, of prompts, or of a control; and the seconds of decoding them one after another."""
    num_tokens, rng = models.num_tokens(args.image_size), torch.Generator().manual_seed(args.seed)
    if args.control == "random":
        return torch.randint(models.codebook_size, (len(args.prompts), num_tokens), generator=rng), None
    if pixels is not None:
        codes, seconds = encode_pixels(models, pixels).cpu(), None
    else:
        codes, seconds = generated_codes(models, args, num_tokens)
    if args.control == "shuffled":
        codes, seconds = codes[:, torch.randperm(num_tokens, generator=rng)], None
    return codes, seconds


def read_pictures(files: list[Path], size: int) -> Tensor | None:
    """Pictures [B, 3, size, size] in [0, 1]; None where there are none. Raises UserError."""
    return torch.stack([read_picture(file, size) for file in files]) if files else None


def read_picture(file: Path, size: int) -> Tensor:
    """A picture's middle square as pixels [3, size, size] in [0, 1]. Raises UserError.

    Scaled as in SimpleAR's data preparation: halved by box averages while twice too large, then bicubic.
    Turned as its EXIF orientation says; transparent parts are white.
    """
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode == "F":
                raise ValueError("its pixels are of floating point; convert it to 8 or 16 bits")
            if image.mode.startswith("I"):  # of 16 bits a pixel; Pillow would clip them
                values = np.asarray(image).clip(0, 65535)
                image = Image.fromarray((values / (257 if values.max() > 255 else 1)).round().astype(np.uint8))
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).convert("RGBA")
    except FileNotFoundError:
        raise UserError(f"--image {file}: there is no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"--image {file} cannot be read as a picture: {line_of(error)}") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    while image.width >= 2 * size:
        image = image.resize((image.width // 2,) * 2, Image.Resampling.BOX)
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def generated_codes(models: Models, args: argparse.Namespace, num_tokens: int) -> tuple[Tensor, float]:
    """Takes each prompt's codes from the cache where these very settings made them; decodes the others together.

    Returns codes [B, N] and the seconds that decoding them took, whenever that was.
    """
    found = {}  # by prompt: codes [1, N] and seconds
    for prompt in {} if args.force_generate else dict.fromkeys(args.prompts):
        file, key = cache_entry(models, args, prompt, num_tokens)
        if cached := read_cached_codes(models, file, key, num_tokens):
            found[prompt] = cached
            print(f"reference: {num_tokens} tokens, reused from {file}")
    missing = [prompt for prompt in dict.fromkeys(args.prompts) if prompt not in found]
    for some in parts(len(missing), TARGETS_AT_ONCE):
        codes, seconds = generate_visual_codes(models, missing[some], num_tokens, args)
        print(f"reference: {codes.numel()} tokens in {duration(seconds)} ({codes.numel() / seconds:.1f} tokens/s)")
        for prompt, row in zip(missing[some], codes.cpu().split(1), strict=True):
            found[prompt] = row, seconds / len(codes)
            write_cached_codes(*cache_entry(models, args, prompt, num_tokens), *found[prompt])
    return torch.cat([found[prompt][0] for prompt in args.prompts]), sum(seconds for _, seconds in found.values())


@enough_memory_for("the untrained model")
def untrained(models: Models, seed: int) -> Models:
    """The same architecture with fresh weights, drawn as before any training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Qwen2ForCausalLM(models.generator.config)
    return dataclasses.replace(models, generator=frozen(generator.to(models.device, models.generator.dtype)))


def cache_entry(models: Models, args: argparse.Namespace, prompt: str, num_tokens: int) -> tuple[Path, str]:
    """The cache's file for a reference, and its key: it stands for everything that determines the tokens."""
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
    } | {name: getattr(args, name) for name in ("cfg_scale", "temperature", "top_k", "top_p", "seed")}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return args.save_dir / CACHE_FOLDER / f"{key[:32]}.safetensors", key


def read_cached_codes(models: Models, file: Path, key: str, num_tokens: int) -> tuple[Tensor, float] | None:
    """The cached codes [1, N] and their decoding time; None where there are none, with a warning if damaged."""
    if not file.exists():
        return None
    with (
        contextlib.suppress(SafetensorError, OSError, KeyError, ValueError, TypeError),
        safe_open(file, "pt") as stored,
    ):
        codes, metadata = stored.get_tensor("codes"), stored.metadata()
        seconds = float(metadata["autoregressive_seconds"])
        whole = metadata["key"] == key and codes.dtype == torch.int64 and codes.shape == (1, num_tokens)
        if whole and models.has(codes) and 0 < seconds < math.inf:
            return codes, seconds
    print(f"warning: {file} is damaged or foreign; generating the reference anew", file=sys.stderr)
    return None


def write_cached_codes(file: Path, key: str, codes: Tensor, seconds: float) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as partial:
        partial.write_bytes(to_safetensors({"codes": codes}, {"key": key, "autoregressive_seconds": repr(seconds)}))


def compiles(models: Models, num_tokens: int, choice: str) -> bool:
    return choice == "on" or (choice == "auto" and models.device.type == "cuda" and num_tokens >= COMPILED_FROM)


def warmed_up_layers(models: Models, num_tokens: int, choice: str, decode_one: Callable) -> Callable:
    """The generator's layers for one more token, as they are or compiled, after passes that no clock is to pay for."""
    layers = models.generator.model
    decode_one(layers)
    if not compiles(models, num_tokens, choice):
        return layers
    mode = "reduce-overhead" if models.device.type == "cuda" else "default"
    compiled = torch.compile(layers, dynamic=False, mode=mode)
    try:
        decode_one(compiled)
        decode_one(compiled)
    except Exception as error:  # of torch.compile, or of the compiler that it calls
        print(f"note: decoding is not compiled, which fails here: {line_of(error)}")
        return layers
    return compiled


@torch.no_grad()
def generate_visual_codes(
    models: Models, prompts: list[str], num_tokens: int, args: argparse.Namespace
) -> tuple[Tensor, float]:
    """Samples visual codes [B, N] with classifier-free guidance, one per step; returns them and the seconds taken.

    The conditional and the unconditional prompt of every target run as one left-padded batch [2B, L] over one
    key/value cache, and only the visual rows of the head are computed: text ids can never be sampled.
    """
    input_ids, attention_mask = prompt_batch(models, prompts, num_tokens)  # [2B, L], [2B, L + N]
    position_ids = (attention_mask[:, : input_ids.shape[1]].cumsum(1) - 1).clamp(min=0)
    visual_head, _ = competing_head(models, "visual")  # [C, D]
    # A stream for each target: its picture does not depend on the others'.
    rngs = [torch.Generator(models.device).manual_seed(args.seed) for _ in prompts]
    cache, codes = transformers.StaticCache(models.generator.config, attention_mask.shape[1]), []

    def last_hidden_states(layers: Callable, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[2B, D] after any number of new tokens [2B, L]; the cache grows by them."""
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}
        return layers(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]

    newest = {"input_ids": input_ids[:, -1:].contiguous(), "position_ids": position_ids[:, -1:].contiguous()}
    warm_up = functools.partial(last_hidden_states, **newest)
    one_more = warmed_up_layers(models, num_tokens, args.compile, warm_up)
    cache.reset()
    started = time_on(models.device)
    for _ in progress_bar(range(num_tokens), "reference", "tokens"):
        hidden_states = last_hidden_states(one_more if codes else models.generator.model, input_ids, position_ids)
        scores = guided_scores(*product(hidden_states, visual_head).float().chunk(2), args.cfg_scale)  # [B, C]
        if not codes and not scores.isfinite().all():
            raise UserError("the generator's logits are not finite: try another --dtype; else its weights are damaged")
        codes.append(sample(scores, args.temperature, args.top_k, args.top_p, rngs))  # [B]
        input_ids = (codes[-1] + models.visual_offset).repeat(2)[:, None]  # both prompts are fed the same token
        position_ids = position_ids[:, -1:] + 1
    return torch.stack(codes, dim=1), time_on(models.device) - started


def prompt_batch(models: Models, prompts: list[str], num_tokens: int) -> tuple[Tensor, Tensor]:
    """Each prompt's ids, then as often the negative one's, padded in front: ids [2B, L], mask [2B, L + N].

    Causality hides the N tokens that are to come. Raises UserError where the model has too few positions for them.
    """
    texts = [conditional_prompt(prompt) for prompt in prompts] + [unconditional_prompt()] * len(prompts)
    prompt_ids = [models.text_tokenizer(text)["input_ids"] for text in texts]
    length, longest = max(map(len, prompt_ids)), models.generator.config.max_position_embeddings
    if length + num_tokens > longest:
        raise UserError(
            f"--prompt has {length} tokens, and the image {num_tokens}: together they must stay within the model's "
            f"{longest}; shorten the prompt"
        )
    ids = [[0] * (length - len(row)) + row for row in prompt_ids]
    mask = [[0] * (length - len(row)) + [1] * (len(row) + num_tokens) for row in prompt_ids]
    return torch.tensor(ids, device=models.device), torch.tensor(mask, device=models.device)


def guided_scores(cond_logits: Tensor, uncond_logits: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance on log-probabilities, as SimpleAR has it: uncond + cfg_scale * (cond - uncond)."""
    cond, uncond = cond_logits.log_softmax(-1), uncond_logits.log_softmax(-1)
    return uncond + cfg_scale * (cond - uncond)


def sample(scores: Tensor, temperature: float, top_k: int | None, top_p: float, rngs: list[torch.Generator]) -> Tensor:
    """Draws one index per row of scores [B, C] -> [B], each by its own generator; ties with the k-th score stay in."""
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature  # the largest stays 0 at any temperature
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    probability = scores.softmax(-1)
    return torch.cat([torch.multinomial(row, 1, generator=rng) for row, rng in zip(probability, rngs, strict=True)])


def time_on(device: torch.device) -> float:
    """Seconds on a clock, read when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def progress_bar(iterable, label: str, unit: str, **options) -> tqdm:
    """Lively on a terminal, a line a half-minute in a log file."""
    lively = sys.stderr.isatty()
    interval = 0.1 if lively else 30
    return tqdm(iterable, label, unit=f" {unit}", dynamic_ncols=lively, mininterval=interval, **options)


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

    def reached(self, target_accuracy: float) -> bool:
        return 0 < target_accuracy <= min(self.best_accuracy)

    def keep_the_best(self, accuracy: list[float], loss: list[float], target_accuracy: float) -> None:
        """Keeps the present embeddings where their accuracy is the highest yet, and among equals their loss lowest.

        A group's best is final once all its targets have reached `target_accuracy`, as the run would end there alone.
        """
        for members in parts(len(accuracy), len(accuracy) // self.proto_tokens.groups):
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


def new_optimisation(
    models: Models, batch: int, args: argparse.Namespace, given_m: Tensor | None = None
) -> Optimisation:
    """An optimisation before its first step; `given_m` [1, D] stays as it is."""
    sizes = batch, args.num_e_tokens, models.hidden_size
    start = initial_proto_tokens(*sizes, args.initial_scale, args.seed, args.m == "own")
    e_t, m = (each.to(models.device) for each in (start.e_t, start.m if given_m is None else given_m))
    proto_tokens = ProtoTokens(e_t.requires_grad_(), m.requires_grad_(given_m is None))
    optimizer = torch.optim.AdamW(proto_tokens.learning, lr=args.learning_rate, betas=args.betas, weight_decay=0.0)
    nothing_yet = {"best_step": [0] * batch, "best_accuracy": [-1.0] * batch, "best_loss": [math.inf] * batch}
    return Optimisation(proto_tokens, optimizer, proto_tokens.copy(), **nothing_yet)


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
    pairs = zip(
        *(each.split(POSITIONS_AT_ONCE) for each in (hidden_states.flatten(0, 1), target.flatten())), strict=True
    )
    found = [cross_entropy_of_positions(some, head, ids, max(1, budget // len(some))) for some, ids in pairs]
    losses, gradient, ranks = (torch.cat(part) for part in zip(*found, strict=True))
    return losses.view_as(target), (gradient / target.shape[1]).view_as(hidden_states), ranks.view_as(target)


def cross_entropy_of_positions(
    hidden_states: Tensor, head: Tensor, target: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [P], the gradient [P, D] of each one's own loss, and ranks [P] of hidden_states [P, D] and target [P]."""
    # [P, 1], rounded as the chunks' logits will be, so that they compare.
    target_logits = (hidden_states.float() * head[target].float()).sum(-1, keepdim=True).to(head.dtype).float()
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


def step_bytes(models: Models, num_tokens: int, recomputes: bool) -> int:
    """About how much memory a target adds to a step: what autograd keeps of each layer, or of one and all inputs."""
    config = models.generator.config
    kept = KEPT_PER_TOKEN["hidden"] * config.hidden_size + KEPT_PER_TOKEN["mlp"] * config.intermediate_size
    of_all = config.num_hidden_layers * (config.hidden_size if recomputes else kept) + (kept if recomputes else 0)
    return of_all * num_tokens * models.generator.dtype.itemsize


def free_bytes(device: torch.device) -> float:
    """Memory that is free on the device, where it can be asked; else without end."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    with contextlib.suppress(OSError, TypeError):
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
    return math.inf


def memory_plan(models: Models, batch: int, num_tokens: int, choice: str) -> tuple[bool, int]:
    """Whether --gradient-checkpointing is on (as said, or where not one target fits without); targets at once."""
    budget = 0.8 * free_bytes(models.device)
    recomputes = choice == "on" or (choice == "auto" and step_bytes(models, num_tokens, False) > budget)
    return recomputes, max(1, int(min(batch, budget / step_bytes(models, num_tokens, recomputes))))


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
    gradients = [each.grad.view(groups, -1) for each in proto_tokens.learning]
    norms = torch.cat(gradients, dim=1).norm(dim=1)
    for gradient in gradients if limit else ():
        gradient *= (limit / (norms + 1e-6)).clamp(max=1)[:, None]
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
    while state.step < args.num_steps and not state.reached(args.target_accuracy):
        started = time.perf_counter()
        rate = rate_at(state.step + 1, args.num_steps, args.warmup_steps, args.learning_rate)
        state.optimizer.param_groups[0]["lr"] = rate
        losses, target_rank = gradient_step(models, proto_tokens, head, codes + first_code, at_once)
        with torch.no_grad():
            grad_norm = clip_gradients(proto_tokens, args.grad_clip).mean()
            norms = proto_tokens.e_t.norm(dim=-1).mean(), proto_tokens.m.norm(dim=-1).mean(), grad_norm
            of_targets = losses.mean(1), (target_rank == 0).sum(1), (target_rank < 5).sum(1)
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
        yield history_row(state, loss, accuracy, 100 * sum(in_top5) / codes.numel(), int(sum(correct)), measured[-3:])


def history_row(
    state: Optimisation, loss: list[float], accuracy: list[float], top5: float, correct: int, norms: list[float]
) -> dict[str, float]:
    """A step's numbers by their W&B names; loss and accuracy [B], norms of e_t, m and the gradient."""
    row = {
        "step": state.step,
        "train/loss": statistics.fmean(loss),
        "train/accuracy": statistics.fmean(accuracy),
        "train/top5_accuracy": top5,
        "train/correct_tokens": correct,
        "train/best_accuracy": state.mean_best_accuracy,
        "train/learning_rate": state.optimizer.param_groups[0]["lr"],
    } | dict(zip(("embeddings/e_t_norm", "embeddings/m_norm", "gradients/grad_norm"), norms, strict=True))
    for k in range(len(loss)) if len(loss) > 1 else ():
        own = {"loss": loss[k], "accuracy": accuracy[k], "best_accuracy": state.best_accuracy[k]}
        row |= {f"targets/{k}/{name}": value for name, value in own.items()}
    return row


def next_prefix(trials: list[dict], shortest: int, longest: int) -> int | None:
    """How many tokens to try next: twice as many until that fails, then between what held and what failed.

    None where the capacity is known: the largest `num_tokens` of the trials that `reached` the target accuracy, taking
    it that a longer prefix is no easier.
    """
    held = max((trial["num_tokens"] for trial in trials if trial["reached"]), default=0)
    failed = min((trial["num_tokens"] for trial in trials if not trial["reached"]), default=longest + 1)
    if failed - held <= 1 or failed <= shortest:
        return None
    return max(shortest, min(2 * held, longest) if failed > longest else (held + failed) // 2)


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
def reconstruct(models: Models, proto_tokens: ProtoTokens, codes: Tensor, vocabulary: str) -> Reconstruction:
    """One forward pass, argmax, VQ decode; the pass is timed too (median of five, after one).

    A position whose argmax is a text id counts as wrong; the picture shows its likeliest visual code.
    """
    seconds = []
    for _ in range(6):
        started = time_on(models.device)
        hidden_states, *predicted = one_pass(models, proto_tokens, codes, vocabulary)
        seconds.append(time_on(models.device) - started)
    head, first_code = competing_head(models, vocabulary)
    losses, *_ = chunked_cross_entropy(hidden_states, head, codes + first_code)
    pixels = decode_codes(models.vq_decoder, predicted[1])
    return Reconstruction(*predicted, losses, pixels, statistics.median(seconds[1:]))


@torch.inference_mode()
def one_pass(
    models: Models, proto_tokens: ProtoTokens, codes: Tensor, vocabulary: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [B, N, D] of all targets, some at a time, and what `predict` makes of them."""
    batches = [proto_tokens.of(targets) for targets in parts(len(codes), TARGETS_AT_ONCE)]
    found = [one_pass_hidden_states(models.generator, batch, codes.shape[1]) for batch in batches]
    hidden_states = torch.cat(found)
    return hidden_states, *predict(models, hidden_states, codes, vocabulary)


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

    def bits_behind(texts: list[str]) -> list[float]:
        pairs = zip(texts, reference.codes, strict=True)
        return [teacher_forced_bits(models, text, codes, vocabulary) for text, codes in pairs]

    unprompted = bits_behind([unconditional_prompt()] * len(reference.prompts))
    remaining = (reconstruction.losses.sum(1) / math.log(2)).tolist()
    return {
        "target_bits_uniform": [reference.codes.shape[1] * math.log2(models.codebook_size)] * len(remaining),
        "target_bits_autoregressive": bits_behind([conditional_prompt(prompt) for prompt in reference.prompts]),
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
    of_targets = {  # [B] each; of the embeddings as stored
        "best_accuracy": [100 * (num_tokens - count) / num_tokens for count in reconstruction.num_errors],
        "num_errors": reconstruction.num_errors,
        "psnr": [psnr(*pair) for pair in zip(reconstruction.pixels, reference.pixels, strict=True)],
    } | bits
    summary = {name: statistics.fmean(values) for name, values in of_targets.items()} | {
        "num_errors": sum(reconstruction.num_errors),
        "error_rate": 100 * sum(reconstruction.num_errors) / reference.codes.numel(),
        "total_params": total_params,
        "num_tokens": num_tokens,
        "num_targets": batch,
        "num_e_tokens": state.best.e_t.shape[1],
        "one_pass_seconds": reconstruction.one_pass_seconds,
        "psnr": psnr(reconstruction.pixels, reference.pixels),
    }
    summary["status"] = status_of(summary["best_accuracy"])
    summary["bits_per_parameter"] = batch * summary["information_gain_bits"] / total_params
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
        summary |= {f"targets/{k}/{name}": values[k] for name, values in of_targets.items()}
    return summary


# ----------------------------------------------------------------------------------------------------------------------
# Figures

SHOWN_TARGETS = 24  # of more, the first stand in the figures, all in the numbers
INK, FAINT, BLUE, ORANGE, RED, GREEN = "#1f2430", "#8a8f99", "#2f6fde", "#f0a202", "#d7263d", "#2a9d6f"
STYLE = {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11}
STYLE |= {"axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 9}
STYLE |= {"legend.frameon": False, "grid.color": FAINT, "grid.alpha": 0.25, "grid.linewidth": 0.6}
STYLE |= {"figure.facecolor": "white", "axes.facecolor": "white", "figure.constrained_layout.h_pad": 0.08}


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


def likeness(decibels: float) -> str:
    return f"PSNR {decibels:.1f} dB" if math.isfinite(decibels) else "identical picture"


def show(axis: Axes, image: Image.Image, title: str = "", detail: str = "") -> None:
    axis.imshow(image, interpolation="antialiased")
    axis.set_title(title, loc="center")
    axis.set_xlabel(detail, fontsize=10, labelpad=6)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


@matplotlib.rc_context(STYLE)
def draw_comparison(prompt: str, reference: Image.Image, reconstruction: Image.Image, summary: dict) -> Image.Image:
    """Reference and reconstruction side by side, with accuracy and PSNR."""
    figure = Figure(figsize=(8.4, 5.1), dpi=150)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(wspace=0.06, left=0.03, right=0.97, top=0.83, bottom=0.07)
    total = summary["num_tokens"]
    embeddings = "two" if summary["num_e_tokens"] == 1 else summary["num_e_tokens"] + 1
    correct = total - summary["num_errors"]
    one_by_one = ", one after another" if "autoregressive_seconds" in summary else ""
    accuracy = f"{correct}/{total} tokens ({100 * correct / total:.1f} %), {likeness(summary['psnr'])}"
    show(left, reference, "reference", f"{total} tokens{one_by_one}")
    show(right, reconstruction, f"one forward pass over {embeddings} embeddings", accuracy)
    figure.suptitle(caption_of(prompt), fontsize=13, fontweight="bold", y=0.965, parse_math=False)
    return render(figure)


def mark_errors(reference: Image.Image, target_rank: Tensor, size: int = 768) -> Image.Image:
    """The latent grid over a faint reference: a wrong token is orange with its target in the top 5, else red."""
    side = math.isqrt(target_rank.numel())
    level = np.digitize(target_rank.view(side, side).cpu(), (1, 5))  # 0 right, 1 near, 2 far
    colours = np.array([(0, 0, 0, 0), *((*ImageColor.getrgb(colour), 178) for colour in (ORANGE, RED))], dtype=np.uint8)
    marks = Image.fromarray(colours[level]).resize((size, size), Image.Resampling.NEAREST)
    faint = Image.blend(reference, Image.new("RGB", reference.size, "white"), 0.55).resize((size, size)).convert("RGBA")
    marked = Image.alpha_composite(faint, marks).convert("RGB")
    for line in range(side + 1):
        at = line * size // side
        ImageDraw.Draw(marked).line([(at, 0), (at, size)], "white", max(1, 32 // side))
        ImageDraw.Draw(marked).line([(0, at), (size, at)], "white", max(1, 32 // side))
    return marked


@matplotlib.rc_context(STYLE)
def draw_token_error_map(reference: Image.Image, target_rank: Tensor) -> Image.Image:
    """The wrong tokens of one target, marked by how near the right ones came. target_rank: [N]."""
    figure = Figure(figsize=(5.6, 6.1), dpi=150)
    axis = figure.add_axes((0.04, 0.1, 0.92, 0.8))
    wrong, far = int((target_rank > 0).sum()), int((target_rank >= 5).sum())
    show(axis, mark_errors(reference, target_rank))
    title = f"{wrong} of {target_rank.numel()} tokens wrong ({100 * wrong / target_rank.numel():.1f} %)"
    axis.set_title(title, fontsize=13, fontweight="bold", loc="center", pad=10)
    near = f"{wrong - far} with the target among the top 5"
    for x, colour, label in ((0.06, ORANGE, near), (0.6, RED, f"{far} farther off")):
        figure.text(x, 0.045, "■", color=colour, fontsize=14, va="center")
        figure.text(x + 0.045, 0.045, label, fontsize=10, va="center")
    return render(figure)


@matplotlib.rc_context(STYLE)
def draw_contact_sheet(targets: list[dict]) -> Image.Image:
    """A row for each target: prompt and accuracy, reference, reconstruction, error map."""
    shown = targets[:SHOWN_TARGETS]
    figure = Figure(figsize=(10.6, 2.3 * len(shown) + 0.6), dpi=110, layout="constrained")
    rows = figure.subplots(len(shown), 4, squeeze=False, width_ratios=(1.25, 1, 1, 1))
    if len(shown) < len(targets):
        figure.suptitle(f"the first {len(shown)} of {len(targets)} targets", fontsize=11)
    titles = ("reference", "one forward pass", "wrong tokens")
    for row, (axes, target) in enumerate(zip(rows, shown, strict=True)):
        words = textwrap.fill(caption_of(target["prompt"]), 30)
        axes[0].axis("off")
        axes[0].text(0, 0.52, words, fontsize=11, va="bottom", fontweight="bold", parse_math=False)
        axes[0].text(0, 0.48, f"{target['accuracy']:.1f} %", fontsize=11, va="top")
        for axis, name, title in zip(axes[1:], ("reference", "reconstruction", "error_map"), titles, strict=True):
            show(axis, target[name], title if row == 0 else "")
    return render(figure)


@matplotlib.rc_context(STYLE)
def draw_capacity(trials: list[dict], capacity: int, target_accuracy: float) -> Image.Image:
    """Best accuracy of each trial against its number of tokens."""
    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    axis = figure.subplots()
    dots = sorted((trial["num_tokens"], trial["best_accuracy"], trial["reached"]) for trial in trials)
    counts = [count for count, *_ in dots]
    axis.plot(counts, [accuracy for _, accuracy, _ in dots], color=FAINT, linewidth=1, zorder=1)
    for outcome, colour, label in ((True, GREEN, "reached"), (False, RED, "not reached")):
        x, y = [[dot[i] for dot in dots if dot[2] is outcome] for i in (0, 1)]
        if x:
            axis.scatter(x, y, color=colour, s=34, label=label, zorder=2)
    axis.axhline(target_accuracy, color=ORANGE, linewidth=1, linestyle="--", label=f"target {target_accuracy:g} %")
    axis.set_xscale("log", base=2)
    ticks = [2**power for power in range(1 + max(counts).bit_length()) if min(counts) <= 2**power < 2 * max(counts)]
    axis.set_xticks(ticks, labels=map(str, ticks))
    axis.set(ylim=(-2, 104), xlabel="tokens of the target, from its beginning", ylabel="best token accuracy (%)")
    axis.set_title(f"capacity: {capacity} tokens", fontsize=13, fontweight="bold")
    axis.grid()
    axis.legend(loc="lower left")
    return render(figure)


@matplotlib.rc_context(STYLE)
def draw_training_curves(history: list[dict[str, float]]) -> Image.Image:
    """Loss, accuracies, norms, gradient norm and learning rate over the steps, in one figure."""
    figure = Figure(figsize=(11, 6.6), dpi=130, layout="constrained")
    axes = figure.subplot_mosaic("AAABBB;CCDDEE")
    for panel, scale, title, lines in (
        ("A", "log", "cross-entropy (nats per token)", {"train/loss": ("loss", BLUE)}),
        ("B", "linear", "token accuracy (%)", {
            "train/top5_accuracy": ("top-5", GREEN),
            "train/accuracy": ("top-1", BLUE),
            "train/best_accuracy": ("best top-1", ORANGE),
        }),
        ("C", "linear", "embedding norms (L2)",
         {"embeddings/e_t_norm": ("e_t", BLUE), "embeddings/m_norm": ("m", ORANGE)}),
        ("D", "log", "gradient norm before clipping", {"gradients/grad_norm": ("gradient", BLUE)}),
        ("E", "linear", "learning rate", {"train/learning_rate": ("rate", BLUE)}),
    ):  # fmt: skip
        for key, (label, colour) in lines.items():
            marker = "o" if len(history) == 1 else None  # a single row has no line to draw
            points = [row["step"] for row in history], [row[key] for row in history]
            axes[panel].plot(*points, color=colour, linewidth=1.4, label=label, marker=marker)
        axes[panel].set(title=title, yscale=scale, xlabel="step" if panel in "CDE" else "")
        axes[panel].grid()
        if len(lines) > 1:
            axes[panel].legend()
    axes["B"].set_ylim(-2, 102)
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


def progress_frame(sheet: Image.Image, step: int, accuracy: float) -> Image.Image:
    """The reconstructions at a step, above a line that says which."""
    width = max(256, sheet.width)
    frame = Image.new("RGB", (width, round(sheet.height * width / sheet.width) + 28), "white")
    frame.paste(sheet.resize((width, frame.height - 28), Image.Resampling.NEAREST))
    label = f"step {step}   {accuracy:.1f} %"
    ImageDraw.Draw(frame).text((8, frame.height - 23), label, fill=INK, font=ImageFont.load_default(size=16))
    return frame


def draw_results(
    reference: Reference, reconstruction: Reconstruction, summary: dict, history: list[dict[str, float]]
) -> tuple[dict[str, Image.Image], list[dict]]:
    """Every picture of a run, by its W&B name, which with `.png` is its file's; and a row of W&B's table a target."""
    ranks = reconstruction.target_rank
    references, reconstructions = (list(map(to_image, each.pixels)) for each in (reference, reconstruction))
    accuracy = (100 * (ranks == 0).float().mean(1)).tolist()
    columns = reference.prompts, references, reconstructions, map(mark_errors, references, ranks), accuracy
    names = "prompt", "reference", "reconstruction", "error_map", "accuracy"
    targets = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    alone = reference.prompts[0], references[0], reconstructions[0], summary
    images = {
        "reference_image": tiled(references),
        "reconstructed_image": tiled(reconstructions),
        "comparison": draw_comparison(*alone) if len(targets) == 1 else draw_contact_sheet(targets),
        "token_error_map": tiled(list(map(draw_token_error_map, references[:SHOWN_TARGETS], ranks))),
    }
    return images | ({"training_curves": draw_training_curves(history)} if history else {}), targets


# ----------------------------------------------------------------------------------------------------------------------
# Files

VERSIONED = ("torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "wandb")
VERSIONED += ("numpy", "pillow", "matplotlib", "tqdm")
STATE_FILE, PROTO_TOKENS_FILE = "interrupted_run.pt", "proto_tokens.safetensors"
PROGRESS_FILE, TRIALS_FILE = "progress.gif", "capacity.csv"
IMAGES = ("reference_image", "reconstructed_image", "comparison", "training_curves", "token_error_map", "capacity")
# All that a run writes; what says that the others are whole, or where they stand, is the first to go.
RESULTS = ("summary.json", STATE_FILE, "config.json", "history.csv", TRIALS_FILE, PROTO_TOKENS_FILE, PROGRESS_FILE)
RESULTS += tuple(f"{name}.png" for name in IMAGES)
ABANDONED_SECONDS = 3600  # no file takes so long to write
# Of an optimisation, what an interrupted run's file holds beside tensors.
CARRIED_OVER = ("step", "seconds", "best_step", "best_accuracy", "best_loss", "history", "frames", "trials")
# Settings of a run that its proto-tokens mean nothing without, with their types.
TAKEN_OVER = {"image_size": int, "vocabulary": str, "control": str | None, "seed": int, "num_e_tokens": int, "m": str}
TAKEN_OVER |= {"m_from": str | None}
# What may change between the two halves of an interrupted run: where it reports, and what the fingerprints stand for.
FREE_TO_CHANGE = {"resume", "force_generate", "save_dir", "save_every", "use_wandb", "image_every", "versions"}
FREE_TO_CHANGE |= {"gradient_checkpointing", "compile", "prompts_file", "demo", "model_path", "vq_model_ckpt", "device"}


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
        raise UserError(f"cannot write {file}: {error.strerror or line_of(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def run_folder(args: argparse.Namespace) -> Iterator[Path]:
    """Makes <save-dir>/<run-name>, tries that it can be written, and keeps other runs out of it. Raises UserError."""
    folder, cache = args.save_dir / args.wandb_run_name, args.save_dir / CACHE_FOLDER
    made = [each for each in (folder, cache, args.save_dir, *args.save_dir.parents) if not each.exists()]
    try:
        for each in (folder, cache):
            each.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=each):
                pass
        lock = os.open(folder if fcntl else os.devnull, os.O_RDONLY)
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
        for each in made:
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
    settings |= {"prompt": prompts[0] if len(prompts) == 1 else prompts, "images": list(map(str, args.images))}
    if args.m_from:
        settings["m_from_fingerprint"] = fingerprint_of(Path(args.m_from).parent, (Path(args.m_from).name,))
    settings |= {name: getattr(models, name) for name in ("codebook_size", "visual_offset", "factor", "hidden_size")}
    settings |= {"generator_fingerprint": models.fingerprint, "vq_fingerprint": models.vq_fingerprint}
    settings |= {"device": str(models.device), "dtype": str(models.generator.dtype).removeprefix("torch.")}
    settings |= {"num_tokens": models.num_tokens(args.image_size), "final_learning_rate": FINAL_RATE}
    versions = {"python": platform.python_version()}
    for package in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return settings | {"versions": versions | {"torch": torch.__version__}}  # which says the build, too


def write_json(file: Path, content: dict) -> None:
    """Strict JSON: a number that JSON has no word for (an infinite PSNR) becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
    with written_whole(file) as partial:
        text = json.dumps(finite, indent=2, ensure_ascii=False, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")


def write_history(file: Path, history: list[dict[str, float]]) -> None:
    with written_whole(file) as partial, partial.open("w", encoding="utf-8", newline="") as table:
        writer = csv.DictWriter(table, list(history[0]) if history else ["step"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)


def write_images(folder: Path, images: dict[str, Image.Image]) -> None:
    for name, image in images.items():
        with written_whole(folder / f"{name}.png") as partial:
            image.save(partial, format="PNG")


def frame_sheet(models: Models, frame: dict) -> Image.Image:
    return tiled([to_image(pixels) for pixels in decode_codes(models.vq_decoder, frame["codes"].to(models.device))])


def write_progress(file: Path, models: Models, frames: list[dict]) -> None:
    """The reconstruction forming, as a moving picture that rests on its last frame."""
    pictures = (progress_frame(frame_sheet(models, each), each["step"], each["accuracy"]) for each in frames)
    durations = [150] * (len(frames) - 1) + [2000]  # milliseconds
    with written_whole(file) as partial:
        next(pictures).save(partial, format="GIF", save_all=True, append_images=pictures, duration=durations, loop=0)


def write_proto_tokens(
    file: Path, proto_tokens: ProtoTokens, target_ids: Tensor, settings: dict, predicted_ids: Tensor | None = None
) -> None:
    """e_t [B, K, D], m [1 or B, D], target and predicted token ids [B, N]; the settings as JSON in the metadata."""
    tensors = vars(proto_tokens) | {"target_ids": target_ids, "predicted_ids": predicted_ids}
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
    with written_whole(file) as partial:
        partial.write_bytes(to_safetensors(stored, {"settings": json.dumps(settings)}))


# ---- going on with an interrupted run


def is_finished(folder: Path, settings: dict) -> bool:
    """Whether the run in `folder` has ended. Raises UserError where there is one with other settings."""
    if not any((folder / name).exists() for name in ("summary.json", STATE_FILE)):
        return False
    try:
        earlier = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{folder}/config.json is missing or damaged: leave out --resume to run anew") from None
    settings = json.loads(json.dumps(settings))  # as the earlier ones were stored
    names = [name for name in settings if name not in FREE_TO_CHANGE and not name.startswith("wandb_")]
    changed = [f"{n} ({earlier.get(n)}, now {settings[n]})" for n in names if earlier.get(n) != settings[n]]
    if changed:
        raise UserError(
            f"--resume: the run in {folder} has other settings: {', '.join(changed)}; repeat its settings, or give "
            "this run another --wandb-run-name, or leave out --resume to replace it"
        )
    return (folder / "summary.json").exists()


def write_state(file: Path, state: Optimisation, codes: Tensor, run_id: str | None) -> None:
    content = {name: getattr(state, name) for name in CARRIED_OVER} | {"codes": codes, "run_id": run_id}
    content |= {
        "proto_tokens": {name: tensor.detach() for name, tensor in vars(state.proto_tokens).items()},
        "best": vars(state.best),
    }
    buffer = io.BytesIO()
    torch.save(content | {"optimizer": state.optimizer.state_dict()}, buffer)
    with written_whole(file) as partial:
        partial.write_bytes(buffer.getbuffer())


def read_state(file: Path) -> dict | None:
    """What `write_state` left, on the CPU; None where there is nothing. Raises UserError."""
    if not file.exists():
        return None
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        return {name: saved[name] for name in (*CARRIED_OVER, "codes", "run_id", "proto_tokens", "best", "optimizer")}
    except Exception:  # whatever the bytes of a damaged file suggest
        raise UserError(f"{file} is damaged: leave out --resume to run anew") from None


def restore_state(state: Optimisation, saved: dict) -> None:
    """Puts a fresh optimisation where the interrupted one stood."""
    for mine, stored in ((state.proto_tokens, saved["proto_tokens"]), (state.best, saved["best"])):
        mine.e_t.data.copy_(stored["e_t"])
        mine.m.data.copy_(stored["m"])
    state.optimizer.load_state_dict(saved["optimizer"])
    for name in CARRIED_OVER:
        setattr(state, name, saved[name])


# ---- an earlier run's proto-tokens


def read_earlier_run(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Tensor], dict] | None:
    """The tensors and settings behind --from-proto-tokens, whose settings then hold here too, or behind --m-from.

    Raises UserError where the file cannot serve, or lies where this run's own will.
    """
    option = "--from-proto-tokens" if args.from_proto_tokens else "--m-from"
    file = args.from_proto_tokens or args.m_from
    if not file:
        return None
    if file.resolve().parent == folder.resolve():
        raise UserError(f"{option} {file} lies in this run's own folder: name the run with --wandb-run-name")
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in ("e_t", "m", "target_ids")}
            settings = json.loads(stored.metadata()["settings"])
        prompts = [settings["prompt"]] if isinstance(settings["prompt"], str) else settings["prompt"]
        (batch, num_e_tokens, size), (batch_of_ids, num_tokens) = tensors["e_t"].shape, tensors["target_ids"].shape
        whole = batch == batch_of_ids == len(prompts) and tensors["m"].shape in ((1, size), (batch, size))
        whole &= num_e_tokens <= num_tokens == math.isqrt(num_tokens) ** 2
        whole &= tensors["target_ids"].dtype == torch.int64
        whole &= all(isinstance(settings[name], kind) for name, kind in TAKEN_OVER.items())
        whole &= all(bool(tensors[name].isfinite().all()) for name in ("e_t", "m"))
    except FileNotFoundError:
        raise UserError(f"{option} {file}: there is no such file") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{option} {file} is damaged or no proto_tokens.safetensors of a run")
    if args.from_proto_tokens:
        vars(args).update({name: settings[name] for name in TAKEN_OVER}, prompts=prompts)
    elif len(tensors["m"]) > 1:
        raise UserError(f"--m-from {file} holds {len(tensors['m'])} m, one for each target: name a run that shares one")
    return tensors, settings


def refuse_other_models(models: Models, args: argparse.Namespace, tensors: dict[str, Tensor], settings: dict) -> None:
    """Raises UserError where the proto-tokens of an earlier run were made for another generator."""
    ours = {"hidden_size": models.hidden_size, "visual_offset": models.visual_offset}
    ours |= {"codebook_size": models.codebook_size, "generator_fingerprint": models.fingerprint}
    theirs = {name: settings.get(name) for name in ours}
    for known, control, seed in ((ours, args.control, args.seed), (theirs, settings["control"], settings["seed"])):
        known["untrained control"] = f"seed {seed}" if control == "untrained" else "none"
    other = [f"{name} {theirs[name]}, not {value}" for name, value in ours.items() if theirs[name] != value]
    codes = tensors["target_ids"] - models.visual_offset
    if not other and (tensors["m"].shape[1] != models.hidden_size or not models.has(codes)):
        other = ["its tensors do not fit its own settings"]
    if other:
        option = "--from-proto-tokens" if args.from_proto_tokens else "--m-from"
        raise UserError(f"{option}: the file is damaged or was made for another model ({other[0]}): name that one")


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
    run, exit_code = start_wandb(args, settings, run_id), 1
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
            rest = f"send the rest with: {sync_command(run)}"
            print(f"W&B: the server did not take everything in time; {rest}", file=sys.stderr)


def start_wandb(args: argparse.Namespace, settings: dict, run_id: str | None) -> object:
    """A new W&B run, or the one called `run_id` continued. Raises UserError where W&B refuses a name."""
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", str(WANDB_ANSWER_SECONDS))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # the client's own telemetry would wait on a dead network
    import wandb

    timeouts = {"init_timeout": WANDB_START_SECONDS, "finish_timeout": WANDB_FINISH_SECONDS}
    options = {"entity": args.wandb_entity, "name": args.wandb_run_name, "group": args.wandb_group}
    options |= {"tags": args.wandb_tags, "config": settings, "id": run_id, "resume": "allow" if run_id else None}
    options["project"] = None if in_sweep() else args.wandb_project  # a sweep's runs belong to the sweep's project
    options["settings"] = wandb.Settings(**timeouts, finish_timeout_raises=True)
    mode = args.wandb_mode or os.environ.get("WANDB_MODE") or "online"
    if mode == "online":
        try:
            wandb.login(verify=True)  # asks for a key on a terminal only
        except wandb.Error as error:
            mode = keep_offline(error)
    try:
        try:
            run = wandb.init(mode=mode, **options)
        except wandb.errors.CommError as error:
            wandb.teardown()  # a service that failed once would fail an offline run too
            run = wandb.init(mode=keep_offline(error), **options)
    except (wandb.Error, ValueError) as error:
        raise UserError(f"W&B does not take these settings: {line_of(error)}") from None
    run.define_metric("optimisation_step", hidden=True)
    run.define_metric("capacity/*", step_metric="capacity/num_tokens")
    for names in ("train/*", "targets/*", "embeddings/*", "gradients/*", "progress/*"):
        run.define_metric(names, step_metric="optimisation_step")
    run.define_metric("best_accuracy", step_metric="optimisation_step", summary="max")
    return run


def keep_offline(error: Exception) -> str:
    print(f"W&B: {line_of(error)}; this run is kept offline", file=sys.stderr)
    return "offline"


def sync_command(run: object) -> str:
    """The command that sends what is only here; without the option wandb passes over runs that began online."""
    option = "" if run.offline else "--no-skip-online "
    return f"wandb sync {option}{shlex.quote(str(Path(run.settings.sync_dir)))}"


def log(run: object | None, values: dict, step: int) -> None:
    """A row of W&B's history, unless a resumed run had sent it before it was interrupted."""
    if run and step >= run.starting_step:
        run.log(values, step=step)


def as_media(value: object) -> object:
    import wandb

    return wandb.Image(value) if isinstance(value, Image.Image) else value


def log_step(run: object | None, row: dict[str, float]) -> None:
    """A row of the history; `best_accuracy` too, so that a sweep can stop a run early."""
    values = {name: value for name, value in row.items() if name != "step"}
    log(run, values | {"best_accuracy": row["train/best_accuracy"], "optimisation_step": row["step"]}, row["step"])


def log_trial(run: object | None, trial: dict, count: int) -> None:
    log(run, {f"capacity/{name}": value for name, value in trial.items()}, count)


def log_frame(run: object | None, models: Models, frame: dict) -> None:
    if run and frame["step"] >= run.starting_step:
        run.log({"progress/reconstruction": as_media(frame_sheet(models, frame))}, step=frame["step"])


def log_missing(run: object | None, models: Models, state: Optimisation) -> None:
    """After a resumption, the rows and pictures that the interrupted run had not sent."""
    rows, frames = ({each["step"]: each for each in found} for found in (state.history, state.frames))
    for step in sorted(rows.keys() | frames.keys()):
        if step in rows:
            log_step(run, rows[step])
        if step in frames:
            log_frame(run, models, frames[step])


def log_results(
    run: object | None, images: dict[str, Image.Image], table: tuple[str, list[dict]], summary: dict, file: Path | None
) -> None:
    """Pictures and a table as media of the last step, the summary, and the proto-tokens' file as an artifact."""
    if not run:
        return
    import wandb

    name, rows = table
    data = [list(map(as_media, row.values())) for row in rows]
    tables = {name: wandb.Table(columns=list(rows[0]), data=data)} if rows else {}
    media = {name: as_media(image) for name, image in images.items()} | tables
    # A run that was stopped after its last step goes on with the next.
    run.log(media, step=max(summary["steps"], run.starting_step) if "steps" in summary else None)
    run.summary.update({name: value for name, value in summary.items() if value != math.inf})
    if file:
        artifact = wandb.Artifact(f"proto_tokens_{run.id}", type="proto-tokens", metadata={"status": summary["status"]})
        artifact.add_file(str(file))
        try:
            run.log_artifact(artifact)
        except wandb.Error:
            # Unlike all else this asks the server; where that is gone, the file at least is kept, to sync.
            run.save(str(file), base_path=str(file.parent), policy="now")


# ----------------------------------------------------------------------------------------------------------------------
# Main

RESULT_LINES = {
    "status": "{status}",
    "capacity": "{capacity_tokens} of {num_tokens} tokens, in {trials} trials",
    "best accuracy": "{best_accuracy:.1f} %, {num_errors} of {all_tokens} tokens wrong",
    "targets": "{num_targets}, from {lowest:.1f} to {highest:.1f} %",
    "information": "{information_gain_bits:.0f} bits gained of {target_bits_unprompted:.0f} unprompted, "
    "{bits_per_parameter:.2f} a parameter",
    "likeness": "{likeness}",
    "parameters": "{total_params} for {all_tokens} tokens",
    "optimisation": "{steps} steps in {optimisation_seconds:.1f} s, the best after {best_step}",
    "one pass": "{one_pass_seconds:.4f} s",
    "one by one": "{autoregressive_seconds:.2f} s: one pass is {speedup:.0f} x faster",
    "files": "{files}/",
    "to W&B later": "{sync}",
}


@dataclass(frozen=True)
class Run:
    """One run: what was asked for, where its results go, and what it goes on from."""

    args: argparse.Namespace
    folder: Path
    settings: dict
    wandb: object | None
    saved: dict | None  # the state of the interrupted run that this one continues
    earlier: dict[str, Tensor] | None  # the tensors of --from-proto-tokens or --m-from

    @property
    def given_m(self) -> Tensor | None:  # [1, D]
        return self.earlier["m"] if self.earlier else None


class Stopped(BaseException):
    """SIGINT or SIGTERM came; like KeyboardInterrupt it passes every `except Exception`."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def on_stop_signals(handler: Callable) -> None:
    """Has `handler` called with the number of the first SIGINT or SIGTERM; a second one ends the process at once."""
    received = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            os._exit(128 + number)
        handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def stop_at_once(number: int) -> None:
    raise Stopped(number)


def run_steps(models: Models, codes: Tensor, state: Optimisation, run: Run, tracker: object | None) -> None:
    """The optimisation with everything around it: progress bar, history, W&B, saved states.

    Whatever ends it early, a signal or an error, leaves a state to go on from.
    """
    stopped, num_steps = [], run.args.num_steps
    on_stop_signals(stopped.append)  # from here on they wait for the end of a step
    bar = progress_bar(None, "proto-tokens", "steps", total=num_steps, initial=state.step)
    try:
        with bar, enough_memory_for("a step of the optimisation"):
            for row in optimise_proto_tokens(models, codes, run.args, state):
                ended = state.step == num_steps or state.reached(run.args.target_accuracy)
                keep_row(models, codes, state, run, tracker, row, ended)
                if stopped or state.step % run.args.save_every == 0:
                    save_state(run, state, codes)
                if stopped:
                    raise Stopped(stopped[0])
                correct = f"correct {row['train/correct_tokens']}/{codes.numel()} ({row['train/accuracy']:.1f} %)"
                best = f"best {state.mean_best_accuracy:.1f} %"
                bar.set_postfix_str(f"loss {row['train/loss']:.3f}, {correct}, {best}", refresh=False)
                bar.update()
    except UserError:
        save_state(run, state, codes)
        raise
    finally:
        if not stopped:
            on_stop_signals(stop_at_once)


def keep_row(
    models: Models, codes: Tensor, state: Optimisation, run: Run, tracker: object | None, row: dict, ended: bool
) -> None:
    """Keeps a step's row and picture for history, W&B and moving picture, as often as these are asked for."""
    if state.step == 1 or state.step % run.args.log_every == 0 or ended:
        state.history.append(row)
        log_step(tracker, row)
    if run.args.image_every and (state.step % run.args.image_every == 0 or ended):
        _, _, predicted, _ = one_pass(models, state.best, codes, run.args.vocabulary)
        frame = {"step": state.step, "accuracy": state.mean_best_accuracy, "codes": predicted[:SHOWN_TARGETS].cpu()}
        state.frames.append(frame)
        log_frame(tracker, models, frame)


def save_state(run: Run, state: Optimisation, codes: Tensor) -> None:
    write_state(run.folder / STATE_FILE, state, codes, run.wandb.id if run.wandb else None)


def begin(reference: Reference, run: Run) -> None:
    """Writes what is known before the first step, in place of an earlier run's results unless this one goes on.

    Never a mixture of two runs. Raises UserError where the interrupted run had another target.
    """
    if run.saved is None:
        for name in RESULTS:
            (run.folder / name).unlink(missing_ok=True)
    elif not torch.equal(run.saved["codes"], reference.codes[:, : run.saved["codes"].shape[1]].cpu()):
        raise UserError("--resume: the reference is not the interrupted run's; leave out --resume to run anew")
    write_json(run.folder / "config.json", run.settings)
    write_images(run.folder, {"reference_image": tiled([to_image(pixels) for pixels in reference.pixels])})


def learn_proto_tokens(models: Models, reference: Reference, run: Run) -> Optimisation:
    """Optimises from the start, or from where an interrupted run stood; leaves history and best embeddings.

    Raises UserError where the optimisation cannot go on, and Stopped; both leave a state to go on from.
    """
    state = new_optimisation(models, len(reference.codes), run.args, run.given_m)
    if run.saved:
        restore_state(state, run.saved)
        log_missing(run.wandb, models, state)
        print(f"resumed after step {state.step}")
    run_steps(models, reference.codes, state, run, run.wandb)
    file = run.folder / PROTO_TOKENS_FILE
    write_history(run.folder / "history.csv", state.history)
    write_proto_tokens(file, state.best, models.visual_offset + reference.codes, run.settings)
    if state.diverged:
        raise UserError(f"{divergence(state)}; the best proto-tokens so far are in {file}")
    return state


def stored_proto_tokens(models: Models, reference: Reference, run: Run) -> Optimisation:
    """The embeddings of --from-proto-tokens, as those of a finished optimisation."""
    best = ProtoTokens(run.earlier["e_t"].to(models.device), run.earlier["m"].to(models.device))
    return Optimisation(best, None, best, [], [], [])


def divergence(state: Optimisation) -> str:
    at = f"the loss or its gradient is no longer finite at step {state.step + 1}"
    return f"{at}: lower --learning-rate or set --grad-clip 1"


def find_capacity(models: Models, reference: Reference, run: Run) -> list[dict]:
    """Tries longer and shorter beginnings of the targets until the capacity is known. Returns the trials.

    Each trial is an optimisation of its own; an interrupted one goes on where it stood. Raises UserError and Stopped.
    """
    batch, longest = reference.codes.shape
    saved, trials = run.saved, run.saved["trials"] if run.saved else []
    for count, trial in enumerate(trials, 1):
        log_trial(run.wandb, trial, count)
    while num_tokens := next_prefix(trials, run.args.num_e_tokens, longest):
        print(f"capacity: {num_tokens} tokens")
        codes = reference.codes[:, :num_tokens]
        state = new_optimisation(models, batch, run.args, run.given_m)
        state.trials = trials
        if saved:
            restore_state(state, saved)
            saved = None
        save_state(run, state, codes)  # the trials behind it
        run_steps(models, codes, state, run, None)
        if state.diverged:
            raise UserError(f"with {num_tokens} tokens {divergence(state)}")
        outcome = {"steps": state.step, "reached": state.reached(run.args.target_accuracy), "seconds": state.seconds}
        trials = [*trials, {"num_tokens": num_tokens, "best_accuracy": min(state.best_accuracy)} | outcome]
        log_trial(run.wandb, trials[-1], len(trials))
    return trials


def publish_capacity(models: Models, reference: Reference, trials: list[dict], run: Run) -> dict:
    """Writes and logs what a search for the capacity has found. Returns the summary."""
    reached = [trial for trial in trials if trial["reached"]]
    capacity = max((trial["num_tokens"] for trial in reached), default=0)
    summary = {
        "capacity_tokens": capacity,
        "capacity_bits_uniform": capacity * math.log2(models.codebook_size),
        "best_accuracy": max((trial["best_accuracy"] for trial in reached), default=0.0),
        "num_tokens": reference.codes.shape[1],
        "num_targets": reference.codes.shape[0],
        "trials": len(trials),
        "optimisation_seconds": sum(trial["seconds"] for trial in trials),
    }
    write_history(run.folder / TRIALS_FILE, trials)
    finish(run, {"capacity": draw_capacity(trials, capacity, run.args.target_accuracy)}, ("trials", trials), summary)
    return summary


@enough_memory_for("the reconstruction")
def publish(models: Models, reference: Reference, state: Optimisation, run: Run) -> dict:
    """Reconstructs from the best proto-tokens; writes and logs the results. Returns the summary."""
    reconstruction = reconstruct(models, state.best, reference.codes, run.args.vocabulary)
    bits = information(models, reference, reconstruction, run.args.vocabulary)
    m_learned = not run.args.m_from and run.args.num_e_tokens < reference.codes.shape[1]
    learned = state.best.e_t.numel() + (state.best.m.numel() if m_learned else 0)
    summary = summarise(reference, state, reconstruction, bits, learned)
    images, targets = draw_results(reference, reconstruction, summary, state.history)
    file, target_ids = run.folder / PROTO_TOKENS_FILE, models.visual_offset + reference.codes
    write_proto_tokens(file, state.best, target_ids, run.settings, reconstruction.predicted_ids)
    if state.frames:
        write_progress(run.folder / PROGRESS_FILE, models, state.frames)
    finish(run, images, ("targets", targets if len(targets) > 1 else []), summary, file)
    return summary


def finish(
    run: Run, images: dict[str, Image.Image], table: tuple[str, list[dict]], summary: dict, file: Path | None = None
) -> None:
    """Writes and logs the results; the summary comes last, and says that the others are whole."""
    write_images(run.folder, images)
    write_json(run.folder / "summary.json", summary)
    (run.folder / STATE_FILE).unlink(missing_ok=True)
    log_results(run.wandb, images, table, summary, file)


def print_results(summary: dict, run: Run) -> None:
    """What a reader asks first; a line about something that the run does not know is left out."""
    known = summary | {"files": run.folder, "all_tokens": summary["num_targets"] * summary["num_tokens"]}
    if "psnr" in summary:
        known["likeness"] = likeness(summary["psnr"])
    if own := [value for name, value in summary.items() if re.fullmatch(r"targets/\d+/best_accuracy", name)]:
        known |= {"lowest": min(own), "highest": max(own)}
    if run.wandb and run.wandb.offline:
        known["sync"] = sync_command(run.wandb)
    print()
    for label, text in RESULT_LINES.items():
        with contextlib.suppress(KeyError):
            print(f"  {label:<14} {text.format(**known)}")


def run_experiment(args: argparse.Namespace) -> None:
    """The whole experiment. Raises UserError for what the user can put right, and Stopped."""
    with run_folder(args) as folder:
        earlier = read_earlier_run(args, folder)
        pixels = read_pictures(args.images, args.image_size)
        models = load_models(args)
        if earlier:
            refuse_other_models(models, args, *earlier)
        settings = describe_run(args, models)
        if args.resume and is_finished(folder, settings):
            print(f"the run in {folder} is finished: there is nothing to resume")
            return
        saved = read_state(folder / STATE_FILE) if args.resume else None
        warn_if_slow(models, settings["num_tokens"], args.num_steps)
        with tracked(args, settings, saved and saved["run_id"]) as wandb_run:
            run = Run(args, folder, settings, wandb_run, saved, earlier and earlier[0])
            stored_codes = earlier[0]["target_ids"] - models.visual_offset if args.from_proto_tokens else None
            reference = make_reference(models, args, pixels, stored_codes)
            if args.control == "untrained":
                models = untrained(models, args.seed)
            begin(reference, run)
            if args.capacity:
                summary = publish_capacity(models, reference, find_capacity(models, reference, run), run)
            else:
                learn = stored_proto_tokens if args.from_proto_tokens else learn_proto_tokens
                summary = publish(models, reference, learn(models, reference, run), run)
        print_results(summary, run)


def main(args: argparse.Namespace) -> None:
    on_stop_signals(stop_at_once)
    try:
        run_experiment(args)
    except UserError as error:
        exit_with_error(error)
    except Stopped as stopped:
        print(f"stopped by {stopped}; --resume goes on from the last saved step", file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None


if __name__ == "__main__":
    main(ARGUMENTS)
