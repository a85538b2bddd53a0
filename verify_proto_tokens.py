"""Test whether a frozen autoregressive image generator emits a whole image in one pass from two learned embeddings.

The script loads SimpleAR (a Qwen2 decoder over the visual tokens of NVIDIA's Cosmos tokenizer), freezes it, and
generates a reference image from a prompt. It then optimises two proto-token embeddings, e_t and m, with cross-entropy,
so that one forward pass over [e_t, m, ..., m] predicts all N tokens of that image. Last, it decodes the predicted
tokens to an image and reports how close this reconstruction is to the reference.

    python verify_proto_tokens.py --demo        # a small real model kept in the repository: no GPU, no network

The method is Mezentsev & Oseledets, "Exploring the Latent Capacity of LLMs for One-Step Text Generation"
(arXiv 2505.21189), applied to image tokens. Start reading at `experiment`, near the end, which shows all steps in
order. `load_generator` freezes the generator. `generate_visual_codes` makes the reference, from `conditional_prompt`
and with `guided_scores`. `learn_batch` is the training loop, `ProtoTokens.inputs` builds [e_t, m, ..., m],
`loss_and_gradient` is the loss, `predict_positions` compares predictions with the target, `TargetResults.update` finds
a target's best step and its end, `make_optimizer` picks the optimiser, and `reconstruct` decodes the predictions.

Shapes in comments: B = targets (default: 1), N = tokens, K = embeddings e_t per target (default: 1), D = hidden size,
V = ids that compete in the softmax, C = visual codes, P = positions in a chunk of logits, A = targets that still learn,
G = optimisation problems (1 if the targets share a learned m, else one per target), L = learned numbers per problem,
M = pairs that L-BFGS keeps, T = tokens of a prompt. A target is the N visual codes (0 .. C - 1) of one image. Token ids
(code + visual_offset) occur only in the generator's input, `Predictions.ids`, and proto_tokens.safetensors.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import functools
import glob
import hashlib
import importlib.metadata
import io
import json
import logging
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
import threading
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

try:
    import fcntl
except ImportError:  # on Windows, where runs do not lock their folders
    fcntl = None

# ----------------------------------------------------------------------------------------------------------------------
# Arguments

DEFAULT_PROMPT = "a red apple on a wooden table"
DEFAULT_MODEL = "Daniel0724/SimpleAR-1.5B-RL"
DEFAULT_PROJECT = "simplear-proto-tokens"
DEFAULT_VQ_MODEL = "nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"
DEMO_FOLDER = Path(__file__).resolve().parent / "tests" / "demo_model"
PROTO_TOKENS_FILE = "proto_tokens.safetensors"
CACHE_FOLDER = "reference_cache"
SHOWN_TARGETS, SHOWN_WORST = 24, 8  # figures show the first targets and the worst others; means are over all targets


class UserError(Exception):
    """Report an error that the user can fix: `main` prints it as one line and exits with code 2."""


def exit_with_error(message: object) -> NoReturn:
    print("verify_proto_tokens.py: error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def checked(parse: Callable, holds: Callable | None, what: str) -> Callable:
    """Return an argparse type that applies `parse`; it reports "must be {what}" if `parse` or `holds` fails."""

    def convert(text: str):
        with contextlib.suppress(ValueError, KeyError, OverflowError, RuntimeError):
            text.encode()  # fails if the command line has bytes that are not UTF-8
            value = parse(text)
            if holds is None or holds(value):
                return value
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")

    return convert


def whole_number(text: str) -> int:
    """Parse a whole number; accept also the notations of sweep agents, such as 500.0 and 1e3."""
    with contextlib.suppress(ValueError):
        return int(text)
    number = float(text)
    if number != int(number):
        raise ValueError
    return int(number)


def listed(text: str) -> list[str]:
    """Parse a list as sweep agents write it, ['a', 'b'] or [0.9, 0.99]; return any other text as the only item."""
    if text.strip().startswith("["):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return [str(item) for item in ast.literal_eval(text.strip())]
    return [text]


def proto_tokens_path(text: str) -> Path:
    """Return the path of an earlier run's proto-tokens file; `text` names the file or its folder."""
    path = Path(text).expanduser()
    return path / PROTO_TOKENS_FILE if os.path.isdir(path) else path


# NaN fails every comparison, so these types reject it.
COUNT = checked(whole_number, lambda n: 1 <= n < 2**63, "a whole number of at least 1")
COUNT_OR_0 = checked(whole_number, lambda n: 0 <= n < 2**63, "a whole number of at least 0")
IMAGE_SIZE = checked(whole_number, lambda n: 1 <= n <= 16384, "a whole number from 1 to 16384")
POSITIVE = checked(float, lambda x: 0 < x <= 1e37, "a number above 0 and at most 1e37")
TEMPERATURE = checked(float, lambda x: 1e-6 <= x <= 1e37, "a number from 1e-6 to 1e37 (greedy decoding: --top-k 1)")
AT_LEAST_0 = checked(float, lambda x: 0 <= x <= 1e37, "a number from 0 to 1e37")
PENALTY = checked(float, lambda x: 0.01 <= x <= 100, "a number from 0.01 to 100; 1 means no penalty")
UP_TO_1000 = checked(float, lambda x: 0 <= x <= 1000, "a number from 0 to 1000")
PROBABILITY = checked(float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
PERCENT = checked(float, lambda x: 0 <= x <= 100, "a number from 0 to 100")
BETAS = checked(
    lambda text: tuple(map(float, ",".join(listed(text)).split(","))),
    lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
    "two numbers of at least 0 and below 1, with a comma between",
)
SHARD = checked(
    lambda text: tuple(map(whole_number, text.split("/"))),
    lambda shard: len(shard) == 2 and 1 <= shard[0] <= shard[1],
    "of the form 2/8 (the second of eight)",
)
TEXT = checked(str, None, "UTF-8 text")
PROMPTS = checked(
    lambda text: [item.strip() for item in listed(text)],
    lambda prompts: prompts and all(prompts),
    "a few words in UTF-8 that describe the picture",
)
A_PATH = "a path in UTF-8 (a ~ must name a home folder)"  # expanduser raises RuntimeError if it does not
FILE = checked(lambda text: Path(text).expanduser(), None, A_PATH)
PROTO_TOKENS = checked(proto_tokens_path, None, A_PATH)
FILES = checked(lambda text: [Path(item).expanduser() for item in listed(text)], bool, A_PATH)
# The run's folder inside the save directory has the same name as the run.
RUN_NAME = checked(
    str.strip,
    lambda name: (
        re.fullmatch(r"(?!\.\.?$)[^/\\\x00-\x1f]+", name) and name != CACHE_FOLDER and len(name.encode()) <= 128
    ),
    f"a folder name of at most 128 bytes of UTF-8 without slashes or control characters, and not {CACHE_FOLDER}",
)
TAGS = checked(
    lambda text: [tag.strip() for tag in ",".join(listed(text)).split(",") if tag.strip()],
    lambda tags: max(map(len, tags), default=0) <= 64,
    "tags in UTF-8 of at most 64 characters, with commas between",
)
SWITCH_VALUES = {"true": True, "false": False, "1": True, "0": False}
SWITCH = {
    # Sweep agents write a switch as --demo=True.
    "type": checked(lambda text: SWITCH_VALUES[text.lower()], None, "true or false"),
    "nargs": "?",
    "const": True,
    "default": False,
    "metavar": "true|false",
}


# Laid out by hand, like a table: the formatter would put each argument on a line of its own.
# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """Return the parser; its `decides` maps each setting to a category (the second argument of `add`).

    "model": chooses the models. "reference": changes the codes generated for a prompt, and is in the cache's key.
    "result": changes something else about the targets, the learning or the history. "nothing": changes only how the run
    works and reports. A run's default name leaves out "nothing" settings; --resume compares "reference" and "result".
    """
    parser = argparse.ArgumentParser(
        prog="verify_proto_tokens.py",
        usage="%(prog)s [--demo] [--prompt TEXT] [--use-wandb] [other options]",
        description="Learn two embeddings from which a frozen image generator emits a whole image in one forward pass.",
        epilog="Every option may also be written with underscores (--num_steps), as W&B sweep agents do.",
        allow_abbrev=False,
    )
    parser.options, parser.decides = set(), {}

    def add(name: str, decides: str, help: str, **options) -> None:
        if options.get("default"):
            help += " (default: %(default)s)"
        parser.options.add(name)
        setting = group.add_argument(name, help=help, **options).dest
        parser.decides[setting] = decides

    group = parser.add_argument_group("models")
    add("--model-path", "model", f"SimpleAR generator: a folder or a hub id (default: {DEFAULT_MODEL})",
        type=TEXT, metavar="PATH")
    add("--vq-model-ckpt", "model", "VQ tokenizer: a hub id or a folder with decoder.jit; the file is code: trusted "
        f"sources only (default: {DEFAULT_VQ_MODEL})", type=TEXT, metavar="PATH")
    add("--demo", "model", "use the small demo model kept in the repository; needs no network", **SWITCH)
    add("--device", "nothing", "torch device (default: CUDA GPU 0, or the local rank's GPU in torchrun and srun; else "
        "mps, else cpu)", type=TEXT)
    add("--dtype", "reference", "precision of the generator; the proto-tokens are float32. auto: tf32 on GPUs that "
        "have it, else float32", choices=("auto", "float32", "tf32", "bfloat16", "float16"), default="auto")

    group = parser.add_argument_group("reference image")
    add("--prompt", "reference", f"what the picture shows; repeat for several pictures (default: {DEFAULT_PROMPT})",
        type=PROMPTS, action="extend", default=[], metavar="TEXT", dest="prompts")
    add("--prompts-file", "nothing", "text file with further prompts, one per line",
        type=FILES, action="extend", default=[], metavar="FILE", dest="prompts_files")
    add("--shard", "result", "split the prompts among N runs: this run takes every N-th, from the I-th on; needs --m "
        "own or --m-from", type=SHARD, metavar="I/N")
    add("--image", "result", "use your own picture's middle square as the reference; --prompt defaults to the file's "
        "name; Cosmos' encoder needs a GPU", type=FILES, action="extend", default=[], metavar="FILE", dest="images")
    add("--image-size", "result", "width and height, a multiple of the VQ tokenizer's factor of 16 (demo: 32)",
        type=IMAGE_SIZE, default=256, metavar="PIXELS")
    add("--cfg-scale", "reference", "classifier-free guidance scale; 1: off", type=UP_TO_1000, default=6.0, metavar="S")
    add("--temperature", "reference", "sampling temperature", type=TEMPERATURE, default=1.0, metavar="T")
    add("--top-k", "reference", "sample from the K likeliest visual codes only; 1 is greedy (default: "
        "all visual codes)", type=COUNT, metavar="K")
    add("--top-p", "reference", "sample among the likeliest visual codes that together have the probability P",
        type=PROBABILITY, default=1.0, metavar="P")
    add("--repetition-penalty", "reference", "penalty on codes that the picture already has, as in transformers; "
        "1 means no penalty (default: from generation_config.json, else 1)", type=PENALTY, metavar="P")
    add("--force-generate", "nothing", "generate the reference even if it is cached", **SWITCH)
    add("--seed", "reference", "seed of the reference and of the initial proto-tokens", type=COUNT_OR_0, default=42)
    add("--control", "result", "learn a control: random codes, the reference's codes in random order, or the reference "
        "with an untrained generator", choices=("random", "shuffled", "untrained"))

    group = parser.add_argument_group("optimisation of the proto-tokens")
    add("--num-steps", "result", "maximum number of steps for a target", type=COUNT, default=1000, metavar="STEPS")
    add("--num-e-tokens", "result", "number of embeddings e_t per target; the input is [e_1 .. e_K, m, ..., m]",
        type=COUNT, default=1, metavar="K")
    add("--m", "result", "whether several targets share one m or learn one each",
        choices=("shared", "own"), default="shared")
    add("--m-from", "result", "use the m of an earlier run, frozen; give its folder or its proto_tokens.safetensors",
        type=PROTO_TOKENS, metavar="FILE")
    add("--optimizer", "result", "optimiser", choices=("lbfgs", "adamw"), default="lbfgs")
    add("--learning-rate", "result", "L-BFGS: largest root-mean-square change of e_t and m in a step; AdamW: peak rate "
        "before a cosine decay", type=POSITIVE, default=0.2, metavar="RATE")
    add("--warmup-steps", "result", "AdamW: warm-up steps, capped at a tenth of --num-steps",
        type=COUNT_OR_0, default=20, metavar="STEPS")
    add("--betas", "result", "AdamW: decay of the first and second moments",
        type=BETAS, default="0.9,0.9", metavar="B1,B2")
    add("--grad-clip", "result", "AdamW: clip the gradient to this norm; 0 means no clipping",
        type=AT_LEAST_0, default="0", metavar="NORM")  # a string, because `add` leaves the number 0 out of the help
    add("--initial-scale", "result", "standard deviation of the initial proto-tokens",
        type=UP_TO_1000, default=0.25, metavar="STD")
    add("--vocabulary", "result", "ids in the softmax: all of the model's, including text, or only the visual codes",
        choices=("full", "visual"), default="full")
    add("--cuda-graphs", "nothing", "record the kernels of a forward and backward pass and of a decoding step, and "
        "replay them: fewer launches; never tried on a GPU", choices=("off", "on"), default="off")
    add("--gradient-checkpointing", "nothing", "recompute the layers in the backward pass: less memory, more time; "
        "auto: only if memory runs out", choices=("auto", "on", "off"), default="auto")
    add("--target-accuracy", "result", "stop learning a target at this token accuracy; 0: never stop early "
        "(default: 100, or 99 with --capacity)", type=PERCENT, metavar="PERCENT")
    add("--capacity", "result", "find the longest prefix of the target's tokens that reaches --target-accuracy "
        "within --num-steps", **SWITCH)
    add("--log-every", "result", "steps between two rows of history.csv; times n if targets are learned in n batches",
        type=COUNT, default=1, metavar="STEPS")
    add("--save-every", "nothing", "steps between two saved states; a stop signal also saves the state",
        type=COUNT, default=100, metavar="STEPS")
    add("--resume", "nothing", "continue the run with this name and these settings if it was interrupted; start it "
        "if it has no saved state; do nothing if it is finished", **SWITCH)
    add("--from-proto-tokens", "result", "learn nothing: reconstruct an earlier run's picture; give its folder or "
        "proto_tokens.safetensors, and the same models", type=PROTO_TOKENS, metavar="FILE")

    group = parser.add_argument_group("output")
    add("--save-dir", "nothing", "save results in FOLDER/<run name>/ and cached references in FOLDER/reference_cache/",
        type=FILE, default=Path("./proto_tokens_exp"), metavar="FOLDER")
    add("--image-every", "nothing", "draw the reconstruction every STEPS steps, for progress.gif and a slider in W&B "
        "(default: never)", type=COUNT, metavar="STEPS")

    group = parser.add_argument_group("Weights & Biases")
    add("--use-wandb", "nothing", "log to W&B; always on in runs of a sweep agent", **SWITCH)
    add("--wandb-project", "nothing", f"W&B project (default: from WANDB_PROJECT if set, else {DEFAULT_PROJECT})",
        type=TEXT, metavar="NAME")
    add("--wandb-entity", "nothing", "user or team (default: W&B's own default)", type=TEXT, metavar="NAME")
    add("--wandb-run-name", "nothing", "name of the run and its folder (default: made from the settings, such as "
        "proto_256px_steps1000_lr02_seed42)", type=RUN_NAME, metavar="NAME")
    add("--wandb-tags", "nothing", "tags of the run (default: from WANDB_TAGS if set, else proto-tokens)",
        type=TAGS, metavar="TAG,TAG")
    add("--wandb-group", "nothing", "W&B group of the run", type=TEXT, metavar="NAME")
    add("--wandb-mode", "nothing", "offline: sync later (default: from WANDB_MODE if set, else online)",
        choices=("online", "offline", "disabled"))
    return parser
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; on a mistake, print one line on stderr and exit with code 2."""
    parser = build_parser()
    parser.error = exit_with_error
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(without_sweep_syntax(words, parser.options))
    defaults = parser.parse_args([])
    try:
        refuse_contradictions(args, defaults)  # first: `fill_in` hides which options were given
        for each in (args, defaults):
            fill_in(each)
        take_shard(args)  # needs all prompts; sets --shard, which is part of the default name
        refuse_git_lfs_pointers(args)
        fill_in_name_and_wandb(args, default_run_name(args, defaults))
    except UserError as error:
        exit_with_error(error)
    return args


def fill_in(args: argparse.Namespace) -> None:
    """Set the options that were not given and depend on others; read the prompts files. Raises UserError."""
    if args.target_accuracy is None:
        args.target_accuracy = 99.0 if args.capacity else 100.0
    args.model_path = args.model_path or (str(DEMO_FOLDER / "generator") if args.demo else DEFAULT_MODEL)
    args.vq_model_ckpt = args.vq_model_ckpt or (str(DEMO_FOLDER / "vq") if args.demo else DEFAULT_VQ_MODEL)
    args.use_wandb = args.use_wandb or in_sweep()
    for file in args.prompts_files:
        args.prompts = [*args.prompts, *read_prompts(file)]  # a new list, so that the parser's default stays empty
    if not args.prompts:
        names = [image.stem.replace("_", " ").strip() or DEFAULT_PROMPT for image in args.images]
        args.prompts = names or [DEFAULT_PROMPT]
    if args.images and len(args.images) != len(args.prompts):
        raise UserError(f"pictures: {len(args.images)}, prompts: {len(args.prompts)}; give one --prompt per --image")


def without_sweep_syntax(words: list[str], options: set[str]) -> list[str]:
    """Change --num_steps=50 to --num-steps=50, and drop --_wandb, which sweep agents add, and options set to None."""
    result = []
    for word in words:
        name, equals, value = word.partition("=")
        hyphened = name.replace("_", "-")
        if not (name.startswith("--") and (value == "None" or name == "--_wandb")):
            result.append(hyphened + equals + value if hyphened in options else word)
    return result


def refuse_contradictions(args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    if args.demo and not DEMO_FOLDER.is_dir():
        raise UserError(f"--demo needs the repository's tests/demo_model beside the script: there is no {DEMO_FOLDER}")
    if args.demo and (args.model_path or args.vq_model_ckpt):
        raise UserError("--demo already sets both models: leave out --model-path and --vq-model-ckpt")
    if args.from_proto_tokens and (args.control or args.m_from or args.images or args.shard):
        raise UserError("--from-proto-tokens learns nothing: leave out --control, --m-from, --image and --shard")
    if args.control == "random" and args.images:
        raise UserError("--control random draws codes instead of reading a picture: leave out --image")
    if args.capacity and (args.from_proto_tokens or args.image_every or args.target_accuracy == 0):
        raise UserError("--capacity needs a --target-accuracy above 0, and no --from-proto-tokens or --image-every")
    if args.m_from and args.m == "own":
        raise UserError("--m-from gives all targets one m: leave out --m own")
    for name in ("warmup_steps", "betas", "grad_clip"):
        if args.optimizer != "adamw" and getattr(args, name) != getattr(defaults, name):
            raise UserError(f"--{name.replace('_', '-')} is an option of AdamW: add --optimizer adamw, or leave it out")


def take_shard(args: argparse.Namespace) -> None:
    """Keep this run's share of prompts and pictures: every N-th from the I-th, by --shard or the process's rank."""
    rank, num_prompts = launched_rank(), len(args.prompts)
    if rank and (args.shard or num_prompts == 1):
        raise UserError("torchrun and srun split the prompts: give several prompts, no --shard; or start one process")
    args.shard = args.shard or rank
    if not args.shard:
        return
    index, count = args.shard
    if num_prompts > 1 and args.m == "shared" and not args.m_from:
        raise UserError("--shard and launchers split the targets, which then cannot share m: add --m own or --m-from")
    if index > num_prompts and rank:
        print(f"there is no prompt left for process {index} of {count}")
        raise SystemExit(0)
    if index > num_prompts:
        raise UserError(f"--shard {index}/{count} has no prompt: only {num_prompts} given")
    args.prompts, args.images = args.prompts[index - 1 :: count], args.images[index - 1 :: count]


def launched_rank() -> tuple[int, int] | None:
    """Return this process's rank, from 1, and the number of ranks if torchrun or srun started several, else None."""
    for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        rank, count = (os.environ.get(name, "") for name in names)
        if rank.isdigit() and count.isdigit() and int(count) > 1:
            return int(rank) + 1, int(count)
    return None


def read_prompts(file: Path) -> list[str]:
    """Return the prompts of a text file, one per line, without empty lines. Raises UserError."""
    try:
        text = file.read_text(encoding="utf-8")
        if "\0" in text:
            raise ValueError("it has null bytes")
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts-file {file} cannot be read as UTF-8 text: {error}") from None
    prompts = [line.strip() for line in text.replace("\ufeff", "").split("\n") if line.strip()]  # drop byte order marks
    if not prompts:
        raise UserError(f"--prompts-file {file} holds no prompt")
    return prompts


def refuse_git_lfs_pointers(args: argparse.Namespace) -> None:
    """Raise UserError if a file that the run needs is only a git-LFS pointer."""
    files = [*args.prompts_files, *args.images]
    files += [file for file in (args.m_from, args.from_proto_tokens) if file]
    for folder in (args.model_path, args.vq_model_ckpt):
        for pattern in ("*.json", "*.txt", "*.safetensors", "*.jit"):
            files += glob.glob(os.path.join(glob.escape(os.path.expanduser(folder)), pattern))
    for file in filter(os.path.isfile, files):  # skip pipes: a pipe can be read only once
        with contextlib.suppress(OSError), open(file, "rb") as stream:
            if stream.read(40).startswith(b"version https://git-lfs.github.com/"):
                raise UserError(f"{file} is a git-LFS pointer, not the file itself: run `git lfs pull` in its folder")


def fill_in_name_and_wandb(args: argparse.Namespace, default_name: str) -> None:
    """Fill in the run's name and the W&B settings from the options, the environment and the defaults."""
    args.name_in_wandb = args.wandb_run_name or os.environ.get("WANDB_NAME") or default_name
    args.wandb_run_name = args.wandb_run_name or default_name
    for setting in ("wandb_project", "wandb_entity", "wandb_tags", "wandb_group", "wandb_mode"):
        if getattr(args, setting) not in (None, "disabled") and not args.use_wandb:
            print(f"note: --{setting.replace('_', '-')} has no effect without --use-wandb")
    args.wandb_project = args.wandb_project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT
    if args.wandb_tags is None and not os.environ.get("WANDB_TAGS"):
        args.wandb_tags = ["proto-tokens"]
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        args.wandb_mode = args.wandb_mode or "disabled"


def default_run_name(args: argparse.Namespace, defaults: argparse.Namespace) -> str:
    """Return a name such as proto_256px_steps1000_lr02_seed42, followed by all other settings not at their defaults.

    Settings in the category "nothing" of `build_parser` are left out. If the name does not show a value in full, it
    ends in a digest. So runs that differ in a setting of another category never share a folder.
    """
    rate = re.sub(r"^0\.", "0", name_part(args.learning_rate))
    name = f"proto_{args.image_size}px_steps{args.num_steps}_lr{rate}_seed{args.seed}"
    shown, texts = {"image_size", "num_steps", "learning_rate", "seed"}, []
    if args.from_proto_tokens:
        name, shown = "reconstructed", set()
    if args.demo:
        shown |= {"model_path", "vq_model_ckpt"}
    for setting, value in vars(args).items():
        if DECIDES[setting] == "nothing" or setting in shown or value == getattr(defaults, setting):
            continue
        if isinstance(value, str) and DECIDES[setting] == "model" and os.path.isdir(os.path.expanduser(value)):
            value = Path(os.path.expanduser(value))
        name += f"_{setting.replace('_', '-')}"
        if value is not True:
            name += f"-{name_part(value)}"
        if isinstance(value, (str, list, Path)) and name_part(value) != value:
            items = value if isinstance(value, list) else [value]
            texts += [os.path.abspath(item) if isinstance(item, Path) else item for item in items]
    if texts or len(name.encode()) > 128:
        digest = hashlib.sha256("\0".join([name, *texts]).encode(errors="surrogateescape")).hexdigest()
        name = f"{name.encode()[:100].decode(errors='ignore')}-{digest[:6]}"
    if in_sweep() and os.environ.get("WANDB_RUN_ID"):
        name += f"_{os.environ['WANDB_RUN_ID']}"  # a sweep may repeat the same settings
    return name


def name_part(value: object) -> str:
    """Format a value for a run's name: a list of several items as their count, a path as its last part."""
    if isinstance(value, tuple):
        return "-".join(map(name_part, value))
    if isinstance(value, list):
        return name_part(value[0]) if len(value) == 1 else str(len(value))
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, Path):
        value = value.parent.name if value.name == PROTO_TOKENS_FILE else value.name  # each run has this file
    return re.sub(r"[^\w.]|_", "-", str(value))[:40].strip("-.")


class LastingOutput(io.FileIO):
    """Write to a stream's file; drop what cannot be written (the pipe's reader is gone, the disk is full)."""

    def write(self, content: bytes) -> int:
        with contextlib.suppress(OSError):
            return super().write(content) or len(content)  # None means that the write would block
        return len(content)


def keep_outputs_open() -> None:
    """Escape characters that the terminal cannot show; ignore a closed pipe or a full disk."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # skip closed streams and those of a notebook
            buffer = io.BufferedWriter(LastingOutput(stream.fileno(), "w", closefd=False))
            lasting = io.TextIOWrapper(buffer, stream.encoding, errors="backslashreplace", line_buffering=True)
            setattr(sys, name, lasting)


def in_sweep() -> bool:
    """Return whether a W&B sweep agent started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


# This maps the entries of config.json (options and values derived from them) to what they decide; see `build_parser`.
# The "environment" also decides the reference, but an interrupted run may continue in another environment.
DECIDES = (
    build_parser().decides
    | dict.fromkeys(("prompt", "num_tokens", "codebook_size", "prompt_templates"), "reference")
    | dict.fromkeys(("visual_offset", "generator_fingerprint"), "reference")
    | dict.fromkeys(("device_name", "torch_version"), "environment")
    | dict.fromkeys(("m_from_fingerprint", "images_fingerprint", "factor", "hidden_size", "vq_fingerprint"), "result")
    | dict.fromkeys(("learned_with", "versions"), "nothing")  # learned_with: settings of the reconstructed run
)


def settings_deciding(settings: dict, *decided: str) -> dict:
    """Return the settings that DECIDES maps to one of `decided`, such as "reference"."""
    return {name: value for name, value in settings.items() if DECIDES[name] in decided}


# Figures are drawn in memory only. A shell inside a notebook may inherit a backend that does not load.
os.environ["MPLBACKEND"] = "agg"
os.environ["PYTORCH_JIT"] = "1"  # the VQ tokenizer is TorchScript
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a few prompts need no threads; some systems forbid threads
# Without this, Intel MKL's matrix products depend on memory addresses, and two processes get different results.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# cuBLAS is reproducible only with a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if __name__ == "__main__":
    keep_outputs_open()
    try:
        os.getcwd()
    except OSError as gone:
        exit_with_error(f"the working folder cannot be used ({gone.strerror}): go to another one")
    ARGUMENTS = parse_args()  # before the slow imports, for a fast --help and fast option errors
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once: only the training loop has something to save

# A matplotlibrc can name unknown keys or missing fonts: matplotlib would warn at import and for each letter drawn.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn instead
try:
    import matplotlib.style
    import numpy as np
    import torch
    import torch.nn.functional as F
    import transformers
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save as to_safetensors
    from torch import Tensor
    from tqdm import tqdm
    from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except Exception as error:  # a bad environment variable or a file that shadows a package can raise any error
    if __name__ != "__main__":
        raise
    statement = traceback.extract_tb(error.__traceback__)[0].line
    why = textwrap.shorten(str(error), 250) or type(error).__name__
    remedy = "fix what the error names, install requirements.txt, or use .venv/bin/python"
    exit_with_error(f"`{statement}` fails ({why}): {remedy}")

# ----------------------------------------------------------------------------------------------------------------------
# Errors and small helpers

# SIGHUP is a lost terminal; SIGUSR1, SIGUSR2 and SIGXCPU are a scheduler's warnings. Windows lacks some.
STOP_SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")]


class Stopped(SystemExit):
    """Exit with code 128 + the stop signal's number; the run's state is saved first."""


@contextlib.contextmanager
def on_stop_signal(handle: Callable[[int], None]) -> Iterator[None]:
    """Call `handle` with the number of each stop signal inside the block; an ignored signal stays ignored."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # Python sets handlers only there
    with contextlib.ExitStack() as afterwards:
        for number in STOP_SIGNALS if in_main_thread else []:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                before = signal.signal(number, lambda number, frame: handle(number))
                afterwards.callback(signal.signal, number, before)
        yield


def main_line(error: BaseException) -> str:
    """Return the line of an error's message that says what happened.

    TorchScript puts it after a traceback, huggingface_hub after a title, and pydantic into the first of its details.
    """
    if type(error).__name__ == "ValidationError":  # of pydantic, which checks W&B's settings
        details = error.errors()[0]
        return f"{details['loc'][0]} is {details['input']!r}: {details['msg']}" if details["loc"] else details["msg"]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    named = [line.strip() for line in lines if re.match(r"\s*\w+Error: ", line)]
    return (named or lines)[0].rstrip(".")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; recognise also the messages of TorchScript, cuBLAS and the host's allocator."""
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words):
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__)  # a failed graph capture can hide it


@contextlib.contextmanager
def one_line_for(failure: str, remedy: str) -> Iterator[None]:
    """Turn any error that a library raises, except out of memory, into a UserError."""
    try:
        yield
    except BaseException as error:  # a Rust panic in tokenizers is not an Exception
        if isinstance(error, (UserError, KeyboardInterrupt, SystemExit)) or is_out_of_memory(error):
            raise
        raise UserError(f"{failure} ({main_line(error)}): {remedy}") from None


def slices(count: int, at_once: int) -> list[slice]:
    return [slice(first, first + at_once) for first in range(0, count, at_once)]


def in_parts_that_fit(work: Callable[[slice], object], count: int, at_once: int, what: str) -> list:
    """Call `work` on slices of `count` items, `at_once` per slice; halve the slice if memory runs out."""
    results, done = [], 0
    while done < count:
        part = slice(done, min(done + at_once, count))
        try:
            results.append(work(part))
            done = part.stop
        except (MemoryError, RuntimeError) as error:
            size = part.stop - part.start
            if size == 1 or not is_out_of_memory(error):
                raise
            at_once = (size + 1) // 2
            print(f"note: out of memory for {what}: going on with {at_once} at a time")
    return results


def synchronised_time(device: torch.device) -> float:
    """Wait until the device has finished its work, then return the current time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def as_cuda_graph(work: Callable[..., object], *inputs: Tensor) -> Callable[..., object]:
    """Record the CUDA kernels of `work(*inputs)` as a graph; return a function that replays them for other inputs.

    The inputs must keep their shapes. `work` must use the same memory in each call and never wait for the device. A
    replay launches all kernels at once, and writes its results into the tensors that the recording returned.
    """
    buffers, stream = [tensor.clone() for tensor in inputs], torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work(*buffers)  # the first call loads kernels, and loading cannot be recorded
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as W&B's, may use CUDA meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        results = work(*buffers)

    def replay(*inputs: Tensor) -> object:
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor)
        graph.replay()
        return results

    replay.work = work  # keeps alive the tensors that the kernels use
    return replay


def progress_bar(iterable: Iterable | None, label: str, unit: str, **options) -> tqdm:
    """Return a progress bar that updates often on a terminal and every 30 seconds in a log file."""
    on_terminal = sys.stderr.isatty()
    interval = 0.1 if on_terminal else 30
    return tqdm(iterable, label, unit=f" {unit}", dynamic_ncols=on_terminal, mininterval=interval, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Models

CONFIGURATION_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
)
GENERATOR_FILES = (*CONFIGURATION_FILES, "model.safetensors.index.json", "model*.safetensors")
VQ_DECODER, VQ_ENCODER = "decoder.jit", "encoder.jit"
TEXT_TO_IMAGE, START_OF_IMAGE = "<|t2i|>", "<|soi|>"


@dataclass(frozen=True)
class Models:
    """Hold the frozen generator, its text tokenizer, the VQ tokenizer, and the mapping between their vocabularies.

    Visual code k (0 .. codebook_size - 1) is token id visual_offset + k of the generator, and row first_code_row + k of
    `head`. `head` holds the rows of the generator's head for the ids that compete.
    """

    generator: Qwen2ForCausalLM
    text_tokenizer: PreTrainedTokenizerBase
    vq_decoder: torch.jit.ScriptModule
    vq_encoder: torch.jit.ScriptModule | None  # loaded only if there are pictures to encode
    vocabulary: str  # "full": all ids compete; "visual": only the visual codes
    visual_offset: int
    codebook_size: int
    factor: int  # pixels per latent cell, in each direction
    precision: str  # of the generator: float32, tf32, bfloat16 or float16
    repetition_penalty: float  # for decoding: --repetition-penalty, else the checkpoint's
    generator_fingerprint: str
    vq_fingerprint: str

    @property
    def device(self) -> torch.device:
        return self.generator.device

    @property
    def hidden_size(self) -> int:
        return self.generator.config.hidden_size

    @property
    def visual_head(self) -> Tensor:
        """Return the head's rows for the visual codes, [C, D]."""
        return self.generator.lm_head.weight[self.visual_offset : self.visual_offset + self.codebook_size]

    @property
    def head(self) -> Tensor:
        """Return the head's rows for the ids that compete, [V, D]."""
        return self.visual_head if self.vocabulary == "visual" else self.generator.lm_head.weight

    @property
    def first_code_row(self) -> int:
        return 0 if self.vocabulary == "visual" else self.visual_offset

    def size_token(self, num_tokens: int) -> str:
        return size_token_of(self.text_tokenizer, math.isqrt(num_tokens) * self.factor)

    def are_visual(self, codes: Tensor) -> bool:
        """Return whether all `codes` are visual codes."""
        return bool(((codes >= 0) & (codes < self.codebook_size)).all())


def num_tokens_of(image_size: int, factor: int) -> int:
    return (image_size // factor) ** 2


def load_models(args: argparse.Namespace) -> Models:
    """Load the frozen models; check the small parts before the generator, which loads slowly. Raises UserError."""
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # torch's precision checks and graphs use the current device
    elif args.cuda_graphs == "on":
        raise UserError(f"--cuda-graphs on needs a CUDA GPU, not {device}: leave it out")
    precision = pick_precision(args.dtype, device)
    generator_folder = local_folder(args.model_path, CONFIGURATION_FILES, "--model-path")
    config = read_config(generator_folder)
    text_tokenizer = load_text_tokenizer(generator_folder)
    visual_offset = len(text_tokenizer)  # the visual ids follow all text ids
    vq_files = (VQ_DECODER, VQ_ENCODER) if args.images else (VQ_DECODER,)
    vq_folder = local_folder(args.vq_model_ckpt, vq_files, "--vq-model-ckpt")
    print(f"loading the VQ tokenizer from {vq_folder}")
    vq_decoder = load_torchscript(vq_folder / VQ_DECODER, device)
    factor = downsampling_factor(vq_decoder, device)
    vq_encoder = load_vq_encoder(vq_folder / VQ_ENCODER, device, factor) if args.images else None
    codebook_size = fsq_codebook_size(vq_decoder) or config.vocab_size - visual_offset
    refuse_misfits(args, config, text_tokenizer, factor, codebook_size)
    generator_folder = local_folder(args.model_path, GENERATOR_FILES, "--model-path")
    repetition_penalty = args.repetition_penalty or read_repetition_penalty(generator_folder)
    generator = load_generator(generator_folder, precision, device)
    print(f"vocabulary: {visual_offset} text ids + {codebook_size} visual codes")
    return Models(
        generator=generator,
        text_tokenizer=text_tokenizer,
        vq_decoder=vq_decoder,
        vq_encoder=vq_encoder,
        vocabulary=args.vocabulary,
        visual_offset=visual_offset,
        codebook_size=codebook_size,
        factor=factor,
        precision=precision,
        repetition_penalty=repetition_penalty,
        generator_fingerprint=fingerprint_of(generator_folder, GENERATOR_FILES),
        vq_fingerprint=fingerprint_of(vq_folder, (VQ_DECODER,)),
    )


def pick_device(name: str | None) -> torch.device:
    if name is None and torch.cuda.is_available():
        local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"  # torchrun, srun
        index = int(local_rank) if local_rank.isdigit() else 0
        name = f"cuda:{index % torch.cuda.device_count()}"
    elif name is None:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        if os.path.exists("/dev/nvidia0"):
            print("note: torch cannot use the NVIDIA GPU here; its driver may be older than torch's CUDA")
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()
    except (RuntimeError, AssertionError) as error:  # no such device, a full one, or a torch built without it
        raise UserError(f"--device {name} cannot be used here ({main_line(error)}): try --device cpu") from None
    return probe.device  # includes the device number, unlike `cuda`


def device_name(device: torch.device) -> str:
    """Return the GPU's name, else the device type. The cache key has it: other GPUs may make other codes."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def pick_precision(name: str, device: torch.device) -> str:
    """Return the precision that --dtype selects on this device. Raises UserError."""
    has_tf32 = device.type == "cuda" and torch.cuda.is_tf32_supported()
    if name == "tf32" and not has_tf32:
        raise UserError(f"--dtype tf32 needs a CUDA GPU with TF32, not {device_name(device)}: try --dtype float32")
    if name == "auto":
        return "tf32" if has_tf32 else "float32"
    return name


@contextlib.contextmanager
def tf32_if_asked(models: Models) -> Iterator[None]:
    """Compute products in TF32 inside the block if the generator uses it. Not for the optimiser; do not nest."""
    torch.set_float32_matmul_precision("high" if models.precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def local_folder(name: str, patterns: tuple[str, ...], option: str) -> Path:
    """Return the folder `name`, else a snapshot of the hub repository `name`, fetched if needed. Raises UserError."""
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        for file in folder.iterdir():
            if not file.exists() and any(file.match(pattern) for pattern in patterns):
                raise UserError(f"{option}: {file} is a link to a file that is not there")
        return folder
    if os.path.exists(folder):
        raise UserError(f"{option} {name} is a file: give the folder that contains it")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        no_id = f"it is not a hub id such as {DEFAULT_MODEL}"
        raise UserError(f"{option} {name}: there is no such folder, and {no_id}; give a local folder, or try --demo")
    print(f"{option}: fetching {', '.join(patterns)} of {name} from the Hugging Face hub, unless they are cached")
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except GatedRepoError:
        why = f"it is gated: accept its licence at https://huggingface.co/{name}, then run `hf auth login`"
    except Exception as error:  # from the hub client, HTTP library or disk: no common base class
        failed = f"it cannot be fetched from the Hugging Face hub ({textwrap.shorten(str(error), 160)})"
        why = f"{failed}: check the name, the network, and for a private repository HF_TOKEN or `hf auth login`"
    raise UserError(f"{option} {name}: no such folder, and as a hub repository {why}; or give a local folder or --demo")


def read_config(folder: Path) -> Qwen2Config:
    """Read the checkpoint's configuration. Raises UserError if it is not a plain Qwen2 model."""
    file = folder / "config.json"
    failure = f"{file} is damaged or does not describe a Qwen2 model"
    with one_line_for(failure, "give a SimpleAR model's folder, or download it again"):
        fields = dict(json.loads(file.read_text(encoding="utf-8")))
        kind = fields["model_type"]
        fields["vocab_size"]  # must be there, too: the library would fall back to a default
        if kind != "qwen2":
            raise UserError(f"--model-path {folder} is a {kind!r} model: SimpleAR generators are 'qwen2'")
        if fields.get("quantization_config"):
            raise UserError(f"--model-path {folder} is quantised, which can stop gradients: use the original weights")
        config = Qwen2Config.from_dict(fields)
    if "sliding_attention" in config.layer_types or config.rope_parameters["rope_type"] != "default":
        raise UserError(f"--model-path {folder} has sliding windows or rope scaling, which no SimpleAR generator has")
    return config


def read_repetition_penalty(folder: Path) -> float:
    """Read the checkpoint's repetition penalty; return 1 if it sets none. Raises UserError."""
    file = folder / "generation_config.json"
    if not file.exists():
        file = folder / "config.json"  # as in SimpleAR
    with one_line_for(f"{file} cannot be used", "fix it, or give a --repetition-penalty"):
        penalty = PENALTY(str(json.loads(file.read_text(encoding="utf-8")).get("repetition_penalty") or 1))
    if penalty != 1:
        print(f"note: decoding with the checkpoint's own repetition_penalty of {penalty:g}; 1 means no penalty")
    return penalty


def load_text_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    with one_line_for(f"the text tokenizer in {folder} does not load", "download its files again"):
        text_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for token in (TEXT_TO_IMAGE, START_OF_IMAGE):
        if token not in text_tokenizer.get_vocab() or len(text_tokenizer(token)["input_ids"]) != 1:
            raise UserError(f"the text tokenizer in {folder} lacks {token} or splits it: it is not SimpleAR's")
    return text_tokenizer


def load_generator(folder: Path, precision: str, device: torch.device) -> Qwen2ForCausalLM:
    """Load the generator, freeze it, and run it once, so that failures show now. Raises UserError."""
    print(f"loading the generator from {folder}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    remedy = "download them again, or take a SimpleAR checkpoint"
    with one_line_for(f"the weights in {folder} do not load as a Qwen2 model", remedy):
        # Load by class: config.json may name SimpleAR's own class, which no library has; the weights are plain Qwen2.
        generator, report = Qwen2ForCausalLM.from_pretrained(
            folder,
            dtype="float32" if precision == "tf32" else precision,
            attn_implementation="sdpa_without_gqa",
            attention_dropout=0.0,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the error below can name them
        )
        refuse_misfitting_weights(folder, report)
        if generator.config.tie_word_embeddings and generator.lm_head.weight is not generator.model.embed_tokens.weight:
            print("note: config.json ties the head to the embedding, so the file's own lm_head.weight is not used")
            generator.lm_head.weight = generator.model.embed_tokens.weight
    with one_line_for(f"the generator does not run in {precision} on {device}", "try --dtype float32 or --device cpu"):
        generator = generator.to(device).eval().requires_grad_(False)  # frozen: from here on, no parameter learns
        generator(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
    print(f"generator: {generator.num_parameters() / 1e6:,.1f} M parameters, {precision} on {device}")
    return generator


def refuse_misfitting_weights(folder: Path, report: dict) -> None:
    """Raise UserError if tensors that config.json requires are missing or misshapen, or if layers are extra."""
    missing, others = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    wrong = [f"{name} has {list(has)}, not {list(needs)}" for name, has, needs in sorted(report["mismatched_keys"])]
    wrong += [f"{name} is one too many" for name in others if re.match(r"model\.layers\.\d+\.(self_attn|mlp)\.", name)]
    if missing or wrong:
        examples = "; ".join([*wrong[:1], *missing[:1], *others[:1]])
        counts = f"{len(missing)} tensors are missing, {len(wrong)} do not fit, {len(others)} are not known"
        raise UserError(
            f"the weights in {folder} do not fit its config.json: {counts} ({examples}); download both again"
        )
    if others:
        print(f"note: {len(others)} tensors in {folder} are ignored, since Qwen2 has no such tensors, e.g. {others[0]}")


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """Compute attention like transformers' "sdpa"; on a GPU in float32, repeat keys and values for each query head.

    With enable_gqa, CUDA has only its slowest kernel for float32, which stores all attention weights [B, heads, N, N].
    """
    if query.device.type != "cpu" and query.dtype == torch.float32 and query.shape[2] > 1:  # one needs little
        key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
        states = F.scaled_dot_product_attention(
            query, key, value, attention_mask, is_causal=attention_mask is None, scale=options["scaling"]
        )
        return states.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


transformers.AttentionInterface.register("sdpa_without_gqa", attention)
transformers.AttentionMaskInterface.register("sdpa_without_gqa", sdpa_mask)


def randomise_weights(generator: Qwen2ForCausalLM, seed: int) -> None:
    """Replace the generator's weights with random ones, as before training, for --control untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = Qwen2ForCausalLM(generator.config)
    generator.load_state_dict(untrained.state_dict())


def load_torchscript(file: Path, device: torch.device) -> torch.jit.ScriptModule:
    """Load a part of the VQ tokenizer. Do not change its dtype: its trace contains fixed casts. Raises UserError."""
    if not file.is_file():
        offline = "without a network, the hub's cache may lack it"
        raise UserError(f"--vq-model-ckpt {file.parent} holds no {file.name}, a part of a Cosmos tokenizer; {offline}")
    with (
        one_line_for(f"{file} is damaged or is not a TorchScript file", "download it again"),
        warnings.catch_warnings(action="ignore", category=DeprecationWarning),
        file.open("rb") as stream,  # torch cannot open every file name
    ):
        return torch.jit.load(stream, map_location=device).eval()


def load_vq_encoder(file: Path, device: torch.device, factor: int) -> torch.jit.ScriptModule:
    """Load the encoder and encode a small picture, so that a bad encoder is found before the generator loads."""
    vq_encoder = load_torchscript(file, device)
    if encode_pixels(vq_encoder, torch.zeros(1, 3, 2 * factor, 2 * factor)).shape != (1, 4):
        raise UserError("--image: encoder.jit does not belong to decoder.jit: its number of codes differs")
    return vq_encoder


def downsampling_factor(vq_decoder: torch.jit.ScriptModule, device: torch.device) -> int:
    """Decode one latent cell; return its width in pixels. Raises UserError."""
    failure = f"--vq-model-ckpt: decoder.jit does not decode one code to a picture on {device}"
    with one_line_for(failure, "it is not a discrete Cosmos decoder, or it cannot run there (try --device cpu)"):
        return decode_codes(vq_decoder, torch.zeros(1, 1, dtype=torch.long, device=device)).shape[-1]


def refuse_misfits(
    args: argparse.Namespace,
    config: Qwen2Config,
    text_tokenizer: PreTrainedTokenizerBase,
    factor: int,
    codebook_size: int,
) -> None:
    """Raise UserError if the image size or a prompt does not fit the models, or the models do not fit each other."""
    image_size, num_tokens = args.image_size, num_tokens_of(args.image_size, factor)
    if image_size % factor:
        above = image_size - image_size % factor + factor
        raise UserError(f"--image-size {image_size} is no multiple of the tokenizer's factor of {factor}: try {above}")
    if args.num_e_tokens > num_tokens:
        raise UserError(f"--num-e-tokens {args.num_e_tokens} exceeds the {num_tokens} tokens of the image")
    size = size_token_of(text_tokenizer, image_size)
    texts = [conditional_prompt(prompt, size) for prompt in args.prompts] + [negative_prompt(size)]
    lengths = [len(ids) for ids in text_tokenizer(texts)["input_ids"]]
    longest = max(lengths)
    if longest + num_tokens > config.max_position_embeddings:
        which = textwrap.shorten([*args.prompts, "negative prompt"][lengths.index(longest)], 80, placeholder="...")
        sizes = f"the longest prompt ({which}) has {longest} tokens, and the image {num_tokens}"
        limit = f"together more than the model's {config.max_position_embeddings} positions"
        raise UserError(f"{sizes}, {limit}: lower --image-size, or shorten a --prompt")
    visual_offset = len(text_tokenizer)
    if codebook_size < 1 or config.vocab_size < visual_offset + codebook_size:
        needed = f"{visual_offset} text tokens and a codebook of {codebook_size}: use the VQ tokenizer of this model"
        raise UserError(f"--model-path {args.model_path} has {config.vocab_size} embedding rows, too few for {needed}")


def fsq_codebook_size(vq_decoder: torch.jit.ScriptModule) -> int | None:
    """Return the codebook size, the product of the FSQ levels in a Cosmos decoder; None if it has no levels."""
    for name, buffer in vq_decoder.named_buffers():
        if name.endswith("quantizer._levels"):
            return int(buffer.prod())
    return None


@torch.inference_mode()
def decode_codes(vq_decoder: torch.jit.ScriptModule, codes: Tensor) -> Tensor:
    """Decode codes [B, N] of square images in raster order to pixels [B, 3, H, W], float32 in [0, 1], on the CPU."""
    side = math.isqrt(codes.shape[1])
    indices = codes.view(-1, 1, side, side)  # one frame each: [B, 1, h, w]
    # Do not optimise: from the second call on, fused kernels may round differently and give other pixels.
    with torch.jit.optimized_execution(False):
        # A few at a time: the decoder needs far more memory than its pictures.
        videos = torch.cat([vq_decoder(few).cpu() for few in indices.split(4)])  # [B, 3, 1, H, W], in [-1, 1]
    return ((videos[:, :, 0].float() + 1) / 2).clamp(0, 1)


@torch.inference_mode()
def encode_pixels(vq_encoder: torch.jit.ScriptModule, pixels: Tensor) -> Tensor:
    """Encode pixels [B, 3, H, W] in [0, 1] as visual codes [B, N] in raster order. Raises UserError."""
    remedy = "Cosmos' encoder needs a GPU (bfloat16); if there is one, the file is not a Cosmos encoder"
    with one_line_for("--image: encoder.jit cannot run here", remedy):
        weight = next(vq_encoder.parameters())
        videos = (2 * pixels - 1)[:, :, None].to(weight.device, weight.dtype)  # [B, 3, 1, H, W]
        with torch.jit.optimized_execution(False):  # see decode_codes: other rounding could give other codes
            indices = [vq_encoder(video)[0] for video in videos.split(1)]  # [1, 1, h, w] each
        return torch.cat(indices).flatten(1).long()


def fingerprint_of(folder: Path, patterns: tuple[str, ...]) -> str:
    """Return a digest of a model's file names and contents, the same for a hub snapshot and a copy of it."""
    return digest_of(sorted({file for pattern in patterns for file in folder.glob(pattern)}))


def digest_of(files: list[Path]) -> str:
    """Return a digest of the files' names and contents. Raises OSError."""
    digest = hashlib.sha256()
    for file in files:
        blob = os.path.basename(os.path.realpath(file))  # the hub's cache names its large files by their SHA-256
        with file.open("rb") as stream:
            known = re.fullmatch(r"[0-9a-f]{64}", blob)
            sha256 = bytes.fromhex(blob) if known else hashlib.file_digest(stream, "sha256").digest()
        digest.update(file.name.encode() + sha256)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Reference

CACHE_FORMAT = 5  # raise it when the same settings give other codes
BATCH_WITHOUT_GRADIENTS = 16  # targets at a time, to generate codes and to decode them to pictures
NEGATIVE_PROMPT = (
    "An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion"
)
Image.MAX_IMAGE_PIXELS = 250_000_000  # Pillow refuses more than twice as many pixels: they need some 6 GB of memory


@dataclass(frozen=True)
class Reference:
    """Hold the targets: visual codes and prompts, and the pixels of the first few."""

    codes: Tensor  # [B, N]
    autoregressive_seconds: float | None  # to generate the codes; None unless there is one target, generated alone
    pixels: Tensor  # [SHOWN_TARGETS or fewer, 3, H, W] in [0, 1]
    prompts: list[str]


def conditional_prompt(prompt: str, size_token: str = "") -> str:
    """Return the prompt in SimpleAR's template, with the size token if the generator has one."""
    return f"{TEXT_TO_IMAGE}A highly realistic image of {prompt}{size_token}{START_OF_IMAGE}"


def negative_prompt(size_token: str = "") -> str:
    """Return SimpleAR's unconditional prompt, from which guidance moves away."""
    return f"{TEXT_TO_IMAGE}{NEGATIVE_PROMPT}{size_token}{START_OF_IMAGE}"


def size_token_of(text_tokenizer: PreTrainedTokenizerBase, image_size: int) -> str:
    """Return the token for the image size, such as `<|512px|>`, or "" if the tokenizer has none, as in SimpleAR."""
    token = f"<|{image_size}px|>"
    return token if token in text_tokenizer.get_vocab() else ""


def make_reference(
    models: Models,
    args: argparse.Namespace,
    cache: ReferenceCache,
    inputs: Inputs,
    interrupted: dict | None = None,
) -> Reference:
    """Return a run's targets: those of the run to reconstruct, those of the interrupted run, or new ones.

    The targets of an interrupted run are not made again: another device or torch version could make other codes.
    """
    if inputs.learned:
        codes, seconds = inputs.learned.codes, None
    elif interrupted:
        codes, seconds = interrupted["codes"], interrupted["autoregressive_seconds"]
    else:
        codes, seconds = new_targets(models, args, cache, inputs.pictures)
    codes = codes.to(models.device)
    print("reference: decoding its picture")
    return Reference(codes, seconds, decode_codes(models.vq_decoder, codes[:SHOWN_TARGETS]), args.prompts)


def new_targets(
    models: Models, args: argparse.Namespace, cache: ReferenceCache, pictures: Tensor | None
) -> tuple[Tensor, float | None]:
    """Make new codes [B, N] as --image and --control ask; return them and the seconds to generate them (or None).

    To add a kind of target, add an option. Check it in `refuse_contradictions` and `fill_in`; take a shard of it in
    `take_shard`. If it names files, add them to `refuse_git_lfs_pointers`, `read_inputs` and `Inputs`, and their
    fingerprint to DECIDES and `describe_run`. Add a branch here that returns int64 codes, one row per prompt, and None.
    """
    num_tokens, rng = num_tokens_of(args.image_size, models.factor), torch.Generator().manual_seed(args.seed)
    if args.control == "random":
        index, count = args.shard or (1, 1)
        all_codes = torch.randint(models.codebook_size, (len(args.prompts) * count, num_tokens), generator=rng)
        return all_codes[index - 1 :: count].clone(), None  # a view would keep the other shards' codes in memory
    if args.images:
        codes, seconds = encode_pixels(models.vq_encoder, pictures).cpu(), None
        if not models.are_visual(codes):
            raise UserError("--image: encoder.jit does not belong to decoder.jit: codes out of range")
    else:
        codes, seconds = generate_or_reuse(models, args, cache)
    if args.control == "shuffled":
        return codes[:, torch.randperm(num_tokens, generator=rng)], None
    return codes, seconds


def generate_or_reuse(models: Models, args: argparse.Namespace, cache: ReferenceCache) -> tuple[Tensor, float | None]:
    """Return the codes [B, N] of the prompts: from the cache if it has them for these settings, else newly generated.

    Also return the seconds that generating them took, now or earlier; None unless there is one prompt, generated alone.
    """
    num_tokens, prompts = num_tokens_of(args.image_size, models.factor), list(dict.fromkeys(args.prompts))
    decoded = {} if args.force_generate else cache.read(prompts)  # prompt -> codes [N], seconds
    missing = [prompt for prompt in prompts if prompt not in decoded]

    def decode(part: slice) -> None:
        codes, seconds = generate_visual_codes(models, missing[part], num_tokens, args)
        print(f"reference: {codes.numel()} tokens in {seconds:.1f} s ({codes.numel() / seconds:.1f} tokens/s)")
        for prompt, row in zip(missing[part], codes.cpu(), strict=True):
            decoded[prompt] = row, seconds if len(codes) == 1 else None
            cache.write(prompt, *decoded[prompt])

    with tf32_if_asked(models):
        in_parts_that_fit(decode, len(missing), BATCH_WITHOUT_GRADIENTS, "the references")
    codes = torch.stack([decoded[prompt][0] for prompt in args.prompts])
    return codes, decoded[args.prompts[0]][1] if len(args.prompts) == 1 else None


def read_picture(file: Path, size: int) -> Tensor:
    """Read a picture's middle square as pixels [3, size, size] in [0, 1]. Raises UserError.

    Turn it as its EXIF orientation says, and make transparent parts white. Scale it as SimpleAR's data preparation
    does: halve it by box averages while its side is at least twice `size`, then resize it with a bicubic filter.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:  # Pillow warns of damaged EXIF
            if image.mode.startswith(("I", "F")):  # modes with more than 8 bits: Pillow would clip the values
                raise ValueError("its pixels have more than 8 bits a channel: convert it to 8 bits")
            image.load()  # raises an error for a damaged picture; damaged EXIF, below, is ignored
            with contextlib.suppress(Exception):  # it turns the picture first; only then can damaged EXIF make it fail
                ImageOps.exif_transpose(image, in_place=True)
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).convert("RGBA")
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise UserError(f"--image {file} cannot be read as a picture: {main_line(error)}") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    while image.width >= 2 * size:
        image = image.resize((image.width // 2, image.width // 2), Image.Resampling.BOX)
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def prepare_decoding(
    models: Models, prompts: list[str], num_tokens: int
) -> tuple[Tensor, transformers.StaticCache, Callable[[Tensor], Tensor]]:
    """Return ids [2B, T] of the B conditional prompts and then B negative ones, an empty cache, and `feed`.

    `feed` runs the generator on ids [2B, n], adds them to the cache, and returns the last position's states [2B, D].
    """
    size = models.size_token(num_tokens)
    texts = [conditional_prompt(prompt, size) for prompt in prompts] + [negative_prompt(size)] * len(prompts)
    rows = [models.text_tokenizer(text)["input_ids"] for text in texts]
    length = max(map(len, rows))
    prompt_ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=models.device)
    padding = torch.tensor([[length - len(row)] for row in rows], device=models.device)  # [2B, 1], before each prompt
    cache_positions = torch.arange(length + num_tokens, device=models.device)  # [T + N]
    cache = transformers.StaticCache(models.generator.config, length + num_tokens)

    def feed(ids: Tensor) -> Tensor:
        positions = cache.get_seq_length() + cache_positions[: ids.shape[1]]  # [n]
        distance = positions[:, None] - cache_positions  # [n, T + N], how far back each cache position is
        visible = (cache_positions >= padding[:, :, None]) & (distance >= 0)  # [2B, n, T + N]
        visible = visible | (distance == 0)  # padding attends to itself, because it must attend to something
        output = models.generator.model(
            input_ids=ids,
            position_ids=(positions - padding).clamp(min=0),
            attention_mask={"full_attention": visible[:, None]},
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    return prompt_ids, cache, feed


@torch.no_grad()
def generate_visual_codes(
    models: Models, prompts: list[str], num_tokens: int, args: argparse.Namespace
) -> tuple[Tensor, float]:
    """Sample visual codes [B, N] one after another with classifier-free guidance; return them and the seconds it took.

    Compute the logits of visual codes only, so that text ids are never sampled. Raises UserError.
    """
    # One random generator per target, so that its picture does not depend on the other targets.
    rngs = [torch.Generator(models.device).manual_seed(args.seed) for _ in prompts]
    penalise = transformers.RepetitionPenaltyLogitsProcessor(models.repetition_penalty)
    codes = torch.zeros(len(prompts), num_tokens, dtype=torch.long, device=models.device)
    all_finite = torch.ones((), dtype=torch.bool, device=models.device)
    ids, cache, feed = prepare_decoding(models, prompts, num_tokens)
    # Warm up before timing, with the prompts and then one token: a GPU loads and chooses kernels for each new shape.
    feed(ids)
    cache.reset()
    feed_one = as_cuda_graph(feed, ids[:, -1:]) if args.cuda_graphs == "on" else feed
    feed_one(ids[:, -1:])
    cache.reset()
    started = synchronised_time(models.device)
    for position in progress_bar(range(num_tokens), "reference", "tokens"):
        hidden_states = feed(ids) if position == 0 else feed_one(ids)  # [2B, D]
        logits = F.linear(hidden_states, models.visual_head).float()  # [2B, C]
        cond_logits, uncond_logits = logits.chunk(2)
        if models.repetition_penalty != 1 and position > 0:
            cond_logits = penalise(codes[:, :position], cond_logits)
        scores = guided_scores(cond_logits, uncond_logits, args.cfg_scale)  # [B, C]
        all_finite = all_finite & scores.isfinite().all()
        if position in (0, num_tokens - 1) and not all_finite:  # only here: each check makes the host wait
            raise UserError("the generator's logits are not finite: try another --dtype, or replace damaged weights")
        codes[:, position] = sample(scores, args.temperature, args.top_k, args.top_p, rngs)
        ids = (codes[:, position] + models.visual_offset).repeat(2)[:, None]  # both prompts are fed the same token
    return codes, synchronised_time(models.device) - started


def guided_scores(cond_logits: Tensor, uncond_logits: Tensor, cfg_scale: float) -> Tensor:
    """Apply classifier-free guidance to log-probabilities, as SimpleAR does: uncond + cfg_scale * (cond - uncond)."""
    cond, uncond = cond_logits.log_softmax(-1), uncond_logits.log_softmax(-1)
    return uncond + cfg_scale * (cond - uncond)


def sample(scores: Tensor, temperature: float, top_k: int | None, top_p: float, rngs: list[torch.Generator]) -> Tensor:
    """Sample one index per row of scores [B, C], each with its own RNG; top-k keeps ties with the k-th score."""
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature  # the largest is 0, so it cannot overflow
    if top_k is not None:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    probability = scores.softmax(-1)
    # Same as torch.multinomial, without its host synchronisation.
    noise = [torch.empty_like(row).exponential_(generator=rng) for row, rng in zip(probability, rngs, strict=True)]
    # On MPS the noise can be 0, and argmax would take 0 / 0 as the largest: pytorch/pytorch#192577.
    return (probability / torch.stack(noise).clamp(min=torch.finfo(torch.float32).tiny)).argmax(-1)


# ----------------------------------------------------------------------------------------------------------------------
# Proto-tokens

FINAL_RATE = 1e-5
LOGITS_AT_ONCE = 2**25  # about this many are computed at a time: in float32, a few copies of 128 MiB each exist


@dataclass
class ProtoTokens:
    """Hold the learned embeddings of B targets, in float32 for any precision of the generator.

    All learned numbers are in one leaf tensor, `points` [G, L], with one row per problem. If the targets learn one
    m together, they form one problem (G = 1); otherwise each target is a problem (G = B). A row holds the e_t of its
    targets, then m unless m was given.
    """

    points: Tensor
    num_e_tokens: int  # K
    hidden_size: int  # D
    given_m: Tensor | None = None  # [1, D]

    @property
    def e_t(self) -> Tensor:
        """Return e_t of all targets, [B, K, D]."""
        e_t = self.points[:, : -self.hidden_size] if self.given_m is None else self.points
        return e_t.reshape(-1, self.num_e_tokens, self.hidden_size)

    @property
    def m(self) -> Tensor:
        """Return m, [1, D] if the targets share it, else [B, D]."""
        return self.points[:, -self.hidden_size :] if self.given_m is None else self.given_m

    def inputs(self, num_tokens: int, part: slice = slice(None)) -> Tensor:
        """Return the generator's inputs [e_1 .. e_K, m, ..., m] of a part of the targets: [B, N, D]."""
        e_t = self.e_t[part]
        m = self.m if len(self.m) == 1 else self.m[part]
        filler = m[:, None].expand(len(e_t), num_tokens - e_t.shape[1], -1)
        return torch.cat((e_t, filler), dim=1)


def proto_tokens_of(e_t: Tensor, m: Tensor, m_learns: bool = True) -> ProtoTokens:
    """Return proto-tokens with the given e_t [B, K, D] and m, [1, D] or [B, D]."""
    points = torch.cat((e_t.reshape(len(m), -1), m), dim=1) if m_learns else e_t.flatten(1)
    return ProtoTokens(points.clone().requires_grad_(), e_t.shape[1], e_t.shape[2], None if m_learns else m)


def initial_proto_tokens(
    models: Models, num_targets: int, args: argparse.Namespace, given_m: Tensor | None = None
) -> ProtoTokens:
    """Draw the initial values with a seeded RNG on the CPU: the same for every target and on any device.

    If there is a `given_m` [1, D], use it unchanged as m.
    """
    rng = torch.Generator().manual_seed(args.seed)
    # Draw m even if it is given, so that e_t stays the same.
    m = torch.randn(1, models.hidden_size, generator=rng) * args.initial_scale
    e_t = torch.randn(1, args.num_e_tokens, models.hidden_size, generator=rng) * args.initial_scale
    e_t = e_t.repeat(num_targets, 1, 1).to(models.device)
    if given_m is not None:
        return proto_tokens_of(e_t, given_m.to(models.device), m_learns=False)
    return proto_tokens_of(e_t, m.repeat(num_targets if args.m == "own" else 1, 1).to(models.device))


def one_pass(models: Models, proto_tokens: ProtoTokens, num_tokens: int, part: slice) -> Tensor:
    """Return the hidden states [B, N, D] of one forward pass over [e_1 .. e_K, m, ..., m] of a part of the targets.

    Position i predicts token i.
    """
    inputs_embeds = proto_tokens.inputs(num_tokens, part).to(models.generator.dtype)
    mask = {"full_attention": None}  # None means causal; transformers' own mask would make the host wait in each pass
    output = models.generator.model(inputs_embeds=inputs_embeds, attention_mask=mask, use_cache=False)
    return output.last_hidden_state


class Predictions(NamedTuple):
    """Hold what is predicted at each position and how it compares with the target: [B, N], or [P] for a chunk."""

    losses: Tensor  # cross-entropy, in nats
    rank: Tensor  # 0: right, the target is the argmax; else the number of likelier ids, at least 1
    ids: Tensor  # the argmax, as a token id
    drawable_codes: Tensor  # the likeliest visual code: the argmax, unless the argmax is a text id

    @property
    def num_correct(self) -> Tensor:
        return (self.rank == 0).sum(-1)


def predict_positions(models: Models, hidden_states: Tensor, codes: Tensor) -> Predictions:
    """Compare the predictions of hidden_states [P, D] with the targets `codes` [P]."""
    logits = F.linear(hidden_states, models.head).float()  # [P, V]
    target_rows = codes + models.first_code_row  # row indices of the head, like those that argmax returns below
    losses = F.cross_entropy(logits, target_rows, reduction="none")
    likeliest_rows = logits.argmax(-1)
    likelier = (logits > logits.gather(-1, target_rows[:, None])).sum(-1, dtype=torch.int32)
    # If the target shares the largest logit with another id, it is right (rank 0) only if argmax picks it.
    rank = torch.where(likeliest_rows == target_rows, 0, likelier.clamp(min=1))
    visual_logits = logits[:, models.first_code_row : models.first_code_row + models.codebook_size]
    predicted_ids = likeliest_rows - models.first_code_row + models.visual_offset
    return Predictions(losses, rank, predicted_ids, visual_logits.argmax(-1))


def chunks_of_positions(num_positions: int, head: Tensor) -> list[slice]:
    """Return slices of positions, with about LOGITS_AT_ONCE logits or fewer each: memory may not hold all [B, N, V]."""
    num_chunks = math.ceil(num_positions * len(head) / LOGITS_AT_ONCE)
    # Chunks of equal size: a small last one would be slow.
    return slices(num_positions, math.ceil(num_positions / num_chunks))


def predict(models: Models, hidden_states: Tensor, codes: Tensor) -> Predictions:
    """Compare the predictions of hidden_states [B, N, D] with the targets `codes` [B, N]."""
    all_states, all_codes = hidden_states.flatten(0, 1), codes.flatten()
    chunks = chunks_of_positions(len(all_codes), models.head)
    return joined([predict_positions(models, all_states[chunk], all_codes[chunk]) for chunk in chunks], codes.shape)


def joined(parts: list[Predictions], shape: tuple[int, int]) -> Predictions:
    """Join the predictions of all parts of the positions; each field becomes [B, N]."""
    return Predictions(*(torch.cat(values).view(shape) for values in zip(*parts, strict=True)))


def predict_in_one_pass(models: Models, proto_tokens: ProtoTokens, codes: Tensor) -> Predictions:
    """Predict targets `codes` [B, N], one pass each; run as many at once as in learning, fewer if memory runs out."""

    def predict_part(part: slice) -> Predictions:
        return predict(models, one_pass(models, proto_tokens, codes.shape[1], part), codes[part])

    at_once = targets_at_once(models, codes.shape[1])
    return joined(in_parts_that_fit(predict_part, len(codes), at_once, "the pass"), codes.shape)


def loss_and_gradient(models: Models, proto_tokens: ProtoTokens, codes: Tensor, targets_per_pass: int) -> Predictions:
    """Run a forward and a backward pass for the targets `codes` [B, N]; leave the gradient in `points.grad`.

    loss = sum_b 1/N sum_i -log p(code_bi | e_t_b, m), with p the softmax over all ids that compete. This is
    cross-entropy, averaged over positions and summed over targets, so targets with their own m learn independently.
    """
    proto_tokens.points.grad = None
    parts = []
    for part in slices(len(codes), targets_per_pass):
        hidden_states = one_pass(models, proto_tokens, codes.shape[1], part)
        # Backpropagate through the head in chunks of positions, so that only one chunk's logits exist at a time;
        # then once through the layers.
        head_inputs = hidden_states.detach().requires_grad_()
        all_states, all_codes = head_inputs.flatten(0, 1), codes[part].flatten()
        for chunk in chunks_of_positions(len(all_codes), models.head):
            predictions = predict_positions(models, all_states[chunk], all_codes[chunk])
            predictions.losses.sum().backward()
            parts.append(predictions._replace(losses=predictions.losses.detach()))
        hidden_states.backward(head_inputs.grad)
    proto_tokens.points.grad /= codes.shape[1]  # divide last, in float32: small gradients vanish in half precision
    return joined(parts, codes.shape)


# ---- optimisers: `step` moves the points [G, L] in place, using points.grad and the losses [A]. To add one, write a
# ---- class with the methods `step`, `load_state_dict`, `state_dict` (of tensors and numbers) and `drop_others` (may be
# ---- called before the first `step`). Its tensors `change` and `can_go_back` [G] describe the last `step`; the loop
# ---- reads them after the next evaluation. A problem that is not finite must not affect the others. Then add a branch
# ---- to `make_optimizer` and a choice to --optimizer; adapt `refuse_contradictions`.


def rate_at(step: int, num_steps: int, warmup_steps: int, peak: float) -> float:
    """Return the learning rate of a step, counted from 1: linear warm-up, then a cosine from `peak` to FINAL_RATE."""
    warmup = min(warmup_steps, num_steps // 10)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup - 1) / max(1, num_steps - warmup - 1)
    final = min(FINAL_RATE, peak)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


class AdamW:
    """Apply torch's AdamW without weight decay. It updates each number separately, so the G problems are independent.

    The rate follows `rate_at`. If --grad-clip is above 0, the gradient of each problem is clipped first.
    """

    def __init__(self, points: Tensor, args: argparse.Namespace):
        self.points, self.args = points, args
        self.adamw = torch.optim.AdamW([points], betas=args.betas, weight_decay=0.0)
        self.steps_done = 0
        self.change = points.new_zeros(len(points))  # [G], root-mean-square change of the numbers in the last step
        self.can_go_back = torch.zeros_like(self.change, dtype=torch.bool)  # AdamW cannot undo a step that diverged

    @torch.no_grad()
    def step(self, losses: Tensor) -> None:
        args, gradient = self.args, self.points.grad
        if args.grad_clip > 0:
            gradient *= (args.grad_clip / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
        self.steps_done += 1
        rate = rate_at(self.steps_done, args.num_steps, args.warmup_steps, args.learning_rate)
        self.adamw.param_groups[0]["lr"] = rate
        before = self.points.clone()
        self.adamw.step()
        self.change = (self.points - before).square().mean(1).sqrt()

    def drop_others(self, kept: Tensor, points: Tensor) -> None:
        """Keep only the problems in `kept`; `points` is their new leaf tensor."""
        moments = self.adamw.state.pop(self.points, {})  # none before the first step
        moments = {name: value[kept] if value.dim() else value for name, value in moments.items()}  # `step` is a scalar
        self.adamw.param_groups[0]["params"] = [points]
        self.adamw.state[points] = moments
        self.points, self.change, self.can_go_back = points, self.change[kept], self.can_go_back[kept]

    def state_dict(self) -> dict:
        return {"steps_done": self.steps_done, "change": self.change, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.steps_done = state["steps_done"]
        self.change.copy_(state["change"])
        self.adamw.load_state_dict(state["adamw"])


class LBFGS:
    """Solve G independent problems of L numbers each by limited-memory BFGS, with one evaluation of the loss per step.

    A step moves from the last accepted point x by -alpha H g, at most `rate` (root mean square over the numbers). H
    approximates the inverse Hessian; it is built from the newest pairs, each a step s and its change y of the gradient
    g. If the loss falls too little (Armijo's condition, with a tolerance for rounding) or is not finite, the next step
    tries a smaller alpha; after TRIES failures, all pairs are discarded. The initial H is diagonal, with a scale per
    embedding, as m fills many positions, e_t one. Nocedal and Wright, "Numerical Optimization", 2nd ed., 3.1, 3.5, 7.2.
    """

    PAIRS = 60
    TRIES = 10
    SUFFICIENT_DECREASE = 1e-4
    MIN_CURVATURE_COSINE = 1e-6  # pairs with a lower cosine of s and y are left out
    MAX_SCALE_RATIO = 30  # an embedding's scale is at most this factor above or below the scale over all numbers

    def __init__(self, points: Tensor, embedding_size: int, rate: float, rounding: float):
        """Start at `points`. `rounding` is the relative rounding error of a loss; no loss may be negative."""
        self.points, self.embedding_size, self.rate, self.rounding = points, embedding_size, rate, rounding
        count, size = points.shape
        self.x = points.detach().clone()  # [G, L], the last point accepted
        self.loss = points.new_full((count,), math.inf)  # [G], the loss at x; inf, so that the first point is accepted
        self.gradient = torch.zeros_like(self.x)
        self.direction = torch.zeros_like(self.x)
        self.alpha = torch.zeros_like(self.loss)  # the next point to try is x + alpha * direction
        self.failures = torch.zeros_like(self.loss)  # number of failed trials along the direction
        self.pairs = self.x.new_zeros(count, 2, self.PAIRS, size)  # s and y, newest last; unused places are 0
        self.change = torch.zeros_like(self.loss)  # [G], root-mean-square change of the numbers in the last step
        self.can_go_back = torch.zeros_like(self.loss, dtype=torch.bool)  # the next step can return to a finite loss

    @torch.no_grad()
    def step(self, losses: Tensor) -> None:
        problem_losses = losses.view(len(self.points), -1).sum(1)  # [G]
        self.judge(self.points.detach(), self.points.grad, problem_losses)
        moved = torch.addcmul(self.x, self.alpha[:, None], self.direction)
        self.change = (moved - self.points).norm(dim=1) / math.sqrt(moved.shape[1])
        self.points.copy_(moved)

    def judge(self, tried: Tensor, gradient: Tensor, losses: Tensor) -> None:
        """Accept the tried points [G, L]; else choose a smaller alpha, or discard the pairs and restart from x."""
        losses = torch.where(losses + gradient.norm(dim=1) < math.inf, losses, math.inf)  # also replaces NaN
        descent = self.alpha * (self.gradient * self.direction).sum(1)  # change of the loss predicted by its slope at x
        s, y = tried - self.x, gradient - self.gradient
        # The step was so short that rounding undid it: give up this direction.
        vanished = (self.failures > 0) & ~s.any(1)
        decreased = (1 - self.rounding) * losses <= self.loss + self.SUFFICIENT_DECREASE * descent
        accepted = decreased & ~vanished
        failures = self.failures + 1
        given_up = ~accepted & ((failures >= self.TRIES) | vanished)
        search_ended = accepted | given_up
        self.failures = failures.masked_fill_(search_ended, 0)
        # Read pairs before `remember` discards them. If steepest descent (no pairs) has failed, no way back is left.
        self.can_go_back = ~given_up | self.pairs[:, 0, -1].any(1)
        # A parabola fits the loss and slope at x and the tried point's loss. Its minimum is at this fraction of alpha.
        fraction = 0.5 * descent / (self.loss + descent - losses)
        shorter_alpha = self.alpha * fraction.clamp(0.1, 0.5)

        self.remember(s, y, accepted, given_up)
        self.x = torch.where(accepted[:, None], tried, self.x)
        self.gradient = torch.where(accepted[:, None], gradient, self.gradient)
        self.loss = torch.where(accepted, losses, self.loss)
        self.direction, alpha = self.next_direction()  # the same if only alpha shrinks: x and pairs do not change
        self.alpha = torch.where(search_ended, alpha, shorter_alpha)

    def remember(self, s: Tensor, y: Tensor, accepted: Tensor, given_up: Tensor) -> None:
        """Store the pair of an accepted point if the loss curves upwards; discard all if the direction is given up."""
        new = accepted & ((s * y).sum(1) > self.MIN_CURVATURE_COSINE * s.norm(dim=1) * y.norm(dim=1))
        newest = torch.stack((s, y), dim=1)[:, :, None]  # [G, 2, 1, L]
        shifted = torch.cat((self.pairs[:, :, 1:], newest), dim=2)
        self.pairs = torch.where(new[:, None, None, None], shifted, self.pairs)
        self.pairs.masked_fill_(given_up[:, None, None, None], 0)

    def next_direction(self) -> tuple[Tensor, Tensor]:
        """Return the direction from x, [G, L], and the alpha to try first, [G]."""
        s, y = self.pairs.unbind(1)  # [G, M, L]
        scales = scales_of_embeddings(s[:, -1], y[:, -1], self.embedding_size, self.MAX_SCALE_RATIO)
        steepest = -self.gradient
        direction = inverse_hessian_times(steepest, s, y, scales)
        # Without pairs (the direction is 0), or if rounding spoils it, use steepest descent and move by `rate` / 2.
        usable = (direction * steepest).sum(1) > 0
        direction = torch.where(usable[:, None], direction, steepest)
        limit = self.rate * math.sqrt(direction.shape[1]) / direction.norm(dim=1).clamp(min=1e-30)
        return direction, torch.where(usable, limit.clamp(max=1), limit / 2)

    def drop_others(self, kept: Tensor, points: Tensor) -> None:
        """Keep only the problems in `kept`; `points` is their new leaf tensor."""
        self.points = points
        for name, value in self.state_dict().items():  # its keys are attribute names
            setattr(self, name, value[kept])

    def state_dict(self) -> dict[str, Tensor]:
        accepted = {"x": self.x, "loss": self.loss, "gradient": self.gradient, "pairs": self.pairs}
        trial = {"direction": self.direction, "alpha": self.alpha, "failures": self.failures}
        return accepted | trial | {"change": self.change, "can_go_back": self.can_go_back}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def scales_of_embeddings(s: Tensor, y: Tensor, embedding_size: int, max_ratio: float) -> Tensor:
    """Return the diagonal of the initial H, [G, L], from the newest pair s and y [G, L].

    All numbers of an embedding have the same scale: s'y / y'y over them if this is positive, else over all numbers of
    the problem. A scale differs from the value over all numbers by at most a factor `max_ratio`.
    """
    s, y = (values.unflatten(1, (-1, embedding_size)) for values in (s, y))  # [G, L / D, D]
    s_y, y_y = (s * y).sum(2), y.square().sum(2).clamp(min=1e-30)  # [G, L / D]
    of_all = s_y.sum(1, keepdim=True) / y_y.sum(1, keepdim=True)  # [G, 1]
    scales = torch.where(s_y > 0, s_y / y_y, of_all).clamp(of_all / max_ratio, of_all * max_ratio)
    return scales.repeat_interleave(embedding_size, dim=1)


def inverse_hessian_times(gradient: Tensor, s: Tensor, y: Tensor, scales: Tensor) -> Tensor:
    """Multiply gradient [G, L] by the inverse BFGS matrix H of pairs s and y [G, M, L]; missing pairs are zero.

    Byrd, Nocedal and Schnabel, "Representations of quasi-Newton matrices" (1994), theorem 2.2, in its own letters: with
    the pairs as columns of S and Y, R the upper triangle of S'Y, D its diagonal, and C the diagonal matrix of scales
    [G, L], H = C + [S, CY] [[R^-T (D + Y'CY) R^-1, -R^-T], [-R^-1, 0]] [S, CY]'. Multiplied out from the right, with
    a = R^-1 S'g and r = C (g - Ya), this gives Hg = r + S R^-T (Da - Y'r).
    """
    triangle = (s @ y.mT).triu()  # R, [G, M, M]
    curvature = triangle.diagonal(dim1=1, dim2=2)  # D, [G, M]; a view
    # Set the diagonal to 1 at unused places: R stays invertible, and these places contribute 0.
    curvature.masked_fill_(curvature == 0, 1)
    a = torch.linalg.solve_triangular(triangle, s @ gradient[:, :, None], upper=True)  # [G, M, 1]
    r = scales * (gradient - (y.mT @ a)[:, :, 0])  # [G, L]
    middle = curvature[:, :, None] * a - y @ r[:, :, None]
    weights = torch.linalg.solve_triangular(triangle.mT, middle, upper=False)
    return r + (s.mT @ weights)[:, :, 0]


def make_optimizer(points: Tensor, args: argparse.Namespace, generator: Qwen2ForCausalLM) -> AdamW | LBFGS:
    if args.optimizer == "lbfgs":
        rounding = torch.finfo(generator.dtype).eps  # also with TF32: its larger errors cost no accuracy in a trial
        return LBFGS(points, generator.config.hidden_size, args.learning_rate, rounding)
    return AdamW(points, args)


# ---- results of the targets


class TargetResults:
    """Hold the results of B targets so far: a table of columns [B], on the host.

    The best step is the one that reaches --target-accuracy, else the one with the highest accuracy and, among equal
    accuracies, the lowest loss. Targets that share a learned m have the same best step; otherwise each has its own.
    `reached`: the target reached --target-accuracy; `ended`: it stopped learning, for this or another reason.
    """

    def __init__(self, count: int, together: bool, args: argparse.Namespace):
        self.together, self.num_steps = together, args.num_steps
        self.goal = args.target_accuracy or math.inf  # percent; 0 means never to end early
        zeros = torch.zeros(count, dtype=torch.float64)
        self.table = {
            "steps": torch.zeros(count, dtype=torch.long),
            "loss": zeros.clone(),  # in nats; this and the next three are from the last finite step
            "num_correct": zeros.clone(),
            "accuracy": zeros.clone(),  # percent
            "top5_accuracy": zeros.clone(),
            "best_step": torch.zeros(count, dtype=torch.long),
            "best_accuracy": zeros.clone(),
            "best_loss": zeros + math.inf,
            "reached": torch.zeros(count, dtype=torch.bool),
            "ended": torch.zeros(count, dtype=torch.bool),
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.table[name]

    @property
    def begun(self) -> Tensor:
        return self["steps"] > 0

    @property
    def num_ended(self) -> int:
        return int(self["ended"].sum())

    @property
    def diverged(self) -> Tensor:
        """Return which targets ended because the loss or gradient was not finite; their last step is not counted."""
        return self["ended"] & ~self["reached"] & (self["steps"] < self.num_steps)

    def update(self, active: list[int], numbers: dict[str, Tensor]) -> Tensor:
        """Record a step's numbers [A] for the active targets, and mark those that end.

        Return a mask [A] of those with a new best step.
        """
        rows = torch.tensor(active)
        accuracy, loss = numbers["accuracy"], numbers["loss"]
        best_accuracy, best_loss = self["best_accuracy"][rows], self["best_loss"][rows]
        finite = loss.isfinite() & numbers["grad_norm"].isfinite()
        met = finite & (accuracy >= self.goal)
        if self.together:  # compare the targets' means; the goal is met when all meet it
            finite, met = finite.all().expand(len(rows)), met.all().expand(len(rows))
            accuracy, loss = accuracy.mean(), loss.mean()
            best_accuracy, best_loss = best_accuracy.mean(), best_loss.mean()
        improved = (accuracy > best_accuracy) | ((accuracy == best_accuracy) & (loss < best_loss))
        # A step that meets the goal is the best, even if the joint mean of the targets was higher before.
        new_best = finite & (met | improved)
        lost = ~finite & (numbers["can_go_back"] == 0)  # can_go_back: set by the optimiser's previous step
        self["steps"][rows] += ~lost
        for name in ("loss", "num_correct", "accuracy", "top5_accuracy"):
            self[name][rows[finite]] = numbers[name][finite]
        for name in ("accuracy", "loss"):
            self[f"best_{name}"][rows[new_best]] = numbers[name][new_best]
        self["best_step"][rows[new_best]] = self["steps"][rows[new_best]]
        self["reached"][rows] |= met
        self["ended"][rows] = met | lost | (self["steps"][rows] >= self.num_steps)
        return new_best

    def means(self) -> dict[str, float]:
        """Return means over the targets that have begun (best accuracy: over all), and the number of correct tokens."""
        begun = self.begun
        return {
            "train/loss": self["loss"][begun].mean().item(),
            "train/accuracy": self["accuracy"][begun].mean().item(),
            "train/top5_accuracy": self["top5_accuracy"][begun].mean().item(),
            "train/correct_tokens": int(self["num_correct"].sum()),
            "train/best_accuracy": self["best_accuracy"].mean().item(),  # over all: a new batch does not lower it
        }

    def numbers_per_target(self) -> dict[str, float | None]:
        """Return the numbers of each target by their W&B names; None before the target has begun.

        For more than SHOWN_TARGETS targets, return how many ended, how many learn, and best-accuracy percentiles.
        """
        begun = self.begun
        if len(begun) > SHOWN_TARGETS:
            shares, best = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), self["best_accuracy"][begun]
            p10, p50, p90 = best.quantile(shares).tolist() if len(best) else (0.0, 0.0, 0.0)
            counts = {"targets/ended": self.num_ended, "targets/in_flight": int((begun & ~self["ended"]).sum())}
            return counts | {"targets/best_p10": p10, "targets/best_p50": p50, "targets/best_p90": p90}
        return {
            f"targets/{k}/{name}": self[name][k].item() if begun[k] else None
            for name in ("loss", "accuracy", "best_accuracy")
            for k in range(len(begun))
        }

    def rows(self, prompts: Sequence[str]) -> list[dict]:
        """Return the rows of targets.csv for the first targets, one for each of `prompts`."""
        columns = {name: self[name] for name in ("best_accuracy", "best_step", "steps")} | {"diverged": self.diverged}
        return [
            {"target": k, "prompt": prompt} | {name: column[k].item() for name, column in columns.items()}
            for k, prompt in enumerate(prompts)
        ]


def mean_of_finite(values: Tensor) -> float | None:
    """Return the mean of the finite numbers, or None if there are none."""
    finite = [value for value in values.tolist() if math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


@torch.no_grad()
def numbers_of(predictions: Predictions, proto_tokens: ProtoTokens, optimizer: AdamW | LBFGS) -> dict[str, Tensor]:
    """Copy the step's numbers, [A] each, to the host: the only copy in a step, because the host must wait for it."""
    num_targets, num_tokens = predictions.losses.shape
    columns = {
        "loss": predictions.losses.mean(1),
        "num_correct": predictions.num_correct,
        "num_in_top5": (predictions.rank < 5).sum(1, dtype=torch.float32),
        "grad_norm": proto_tokens.points.grad.norm(dim=1),
        "e_t_norm": proto_tokens.e_t.norm(dim=-1).mean(1),
        "m_norm": proto_tokens.m.norm(dim=-1),
        "change": optimizer.change,
        "can_go_back": optimizer.can_go_back,
    }  # [A], or [1] if shared by all
    values = torch.stack([column.float().expand(num_targets) for column in columns.values()]).cpu().double()
    numbers = dict(zip(columns, values, strict=True))
    numbers["accuracy"] = 100 * numbers["num_correct"] / num_tokens
    numbers["top5_accuracy"] = 100 * numbers["num_in_top5"] / num_tokens
    return numbers


# ---- the optimisation


class Optimisation:
    """Hold the state of learning to predict codes [B, N]: all targets' results, and the batch that learns now.

    Targets that share a learned m are one batch and end together. Targets with a given m or an m of their own learn
    independently, one batch after another. A target that has ended is no longer active; its last numbers and its best
    embeddings are kept.
    """

    def __init__(self, models: Models, codes: Tensor, args: argparse.Namespace, given_m: Tensor | None = None):
        count, num_tokens = codes.shape
        self.models, self.codes, self.args, self.given_m = models, codes, args, given_m
        self.recomputes = args.gradient_checkpointing == "on"
        self.targets_per_pass = targets_at_once(models, num_tokens)
        self.together = args.m == "shared" and given_m is None
        self.batch_size = count if self.together else min(count, self.targets_per_pass)
        self.targets = TargetResults(count, self.together, args)
        self.best = initial_proto_tokens(models, count, args, given_m)
        zeros = torch.zeros_like(codes)
        # [B, N], from each target's best step. Before it has one, all positions count as wrong (rank 1; 0 is right).
        self.predictions = Predictions(zeros + math.nan, zeros.int() + 1, zeros, zeros.clone())
        self.step = 0  # steps done, of all batches
        self.seconds = 0.0
        self.begin_batch(0)

    def begin_batch(self, first: int) -> None:
        """Start the batch that begins with target `first`."""
        self.first = first
        self.active = list(self.batch)  # the targets that learn
        self.proto_tokens = initial_proto_tokens(self.models, len(self.active), self.args, self.given_m)
        self.optimizer = make_optimizer(self.proto_tokens.points, self.args, self.models.generator)
        self.active_codes = self.codes[self.active]
        self.replay: Callable[[], Predictions] | None = None  # replays the evaluation, see --cuda-graphs

    def drop_ended(self) -> None:
        """Remove the ended targets from the active ones, with their codes, points and optimiser state."""
        kept = [place for place, target in enumerate(self.active) if not self.targets["ended"][target]]
        if len(kept) == len(self.active):
            return
        self.active = [self.active[place] for place in kept]
        kept = torch.tensor(kept, dtype=torch.long, device=self.models.device)
        self.active_codes = self.active_codes[kept]
        # Here, places of targets are places of problems: targets that learn one m together also end together.
        points = self.proto_tokens.points.detach()[kept].requires_grad_()
        self.proto_tokens = replace(self.proto_tokens, points=points)
        self.optimizer.drop_others(kept, points)
        self.replay = None  # the old recording evaluates more targets

    @property
    def batch(self) -> range:
        """Return all targets of the current batch, learning or ended."""
        return range(self.first, min(self.first + self.batch_size, len(self.codes)))

    @property
    def finished(self) -> bool:
        return self.targets.num_ended == len(self.codes)

    @property
    def num_batches(self) -> int:
        return math.ceil(len(self.codes) / self.batch_size)

    def evaluate(self) -> Predictions:
        """Compute loss and gradient of the targets that learn; if memory runs out, retry in a way that needs less.

        With --gradient-checkpointing auto, turn checkpointing on first. Then halve the number of targets in a pass.
        """
        while True:
            try:
                with tf32_if_asked(self.models), gradient_checkpointing(self.models.generator, self.recomputes):
                    if self.args.cuda_graphs == "off":
                        return self.evaluate_once()
                    self.replay = self.replay or as_cuda_graph(self.evaluate_once)
                    return self.replay()
            except (MemoryError, RuntimeError) as error:
                self.replay = None
                if not is_out_of_memory(error) or not self.need_less_memory():
                    raise

    def evaluate_once(self) -> Predictions:
        return loss_and_gradient(self.models, self.proto_tokens, self.active_codes, self.targets_per_pass)

    def need_less_memory(self) -> bool:
        """Choose the next way to use less memory in a step, and print it; return False if no way is left."""
        at_once = min(self.targets_per_pass, len(self.active))
        if not self.recomputes and self.args.gradient_checkpointing == "auto":
            self.recomputes = True
            print("note: out of memory for a step: going on with --gradient-checkpointing on")
        elif at_once > 1:
            self.targets_per_pass = (at_once + 1) // 2
            print(f"note: out of memory for a step: going on with {self.targets_per_pass} targets per pass")
        else:
            return False
        return True

    @torch.no_grad()
    def keep_best(self, new_best: Tensor, predictions: Predictions) -> None:
        """Keep the embeddings and predictions of the active targets for which `new_best` [A] is true."""
        places = new_best.nonzero().flatten().tolist()  # `new_best` is on the host: no wait for the device
        if not places:
            return
        if self.together:  # one problem, so `new_best` is true for all targets
            targets = places = slice(None)
        else:
            targets = torch.tensor([self.active[place] for place in places], device=self.models.device)
            places = torch.tensor(places, device=self.models.device)
        best = (self.best.points, *self.predictions)
        for kept, present in zip(best, (self.proto_tokens.points, *predictions), strict=True):
            kept[targets] = present[places]

    def summary(self) -> dict:
        """Return final accuracies and loss, the targets' latest best step, and the steps and seconds of all batches."""
        last = self.targets.means()
        return {
            "final_accuracy": last["train/accuracy"],
            "final_top5_accuracy": last["train/top5_accuracy"],
            "final_loss": last["train/loss"],
            "best_step": self.targets["best_step"].max().item(),
            "steps": self.step,
            "optimisation_seconds": self.seconds,
        }

    def results(self) -> dict[str, Tensor]:
        """Return the results of all targets: `best` has a row per problem, the rest have a row per target."""
        return {"best": self.best.points.detach(), **self.targets.table, **self.predictions._asdict()}

    def state_dict(self) -> dict:
        """Return everything that the next step needs, and the results so far."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "batch_size": self.batch_size,
            "first": self.first,
            "points": self.proto_tokens.points.detach(),
            "optimizer": self.optimizer.state_dict(),
            "results": self.results(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.step, self.seconds, self.batch_size = state["step"], state["seconds"], state["batch_size"]
        for name, column in self.results().items():
            column.copy_(state["results"][name])
        self.begin_batch(state["first"])
        self.drop_ended()  # before loading: the saved tensors have only the targets that still learn
        self.proto_tokens.points.detach().copy_(state["points"])
        self.optimizer.load_state_dict(state["optimizer"])


def learn(models: Models, codes: Tensor, given_m: Tensor | None, record: Recorder) -> Optimisation:
    """Learn e_t and m for codes [B, N], from the start or from the state of an interrupted run; record each step.

    At a stop signal, save the state and raise Stopped. After any error, --resume goes on from the last saved state.
    """
    learning = Optimisation(models, codes, record.args, given_m)
    record.start_learning(learning)
    with progress_bar_of(learning) as record.bar, on_stop_signal(record.note_stop_signal), deterministic(models.device):
        while not learning.finished:
            learn_batch(learning, record)
            if not learning.active:
                record.keep_targets(learning)
                if not learning.finished:
                    learning.begin_batch(learning.batch.stop)
            record.save_state(learning)
            if record.stop_signals:
                raise Stopped(128 + record.stop_signals[0])
    return learning


def learn_batch(learning: Optimisation, record: Recorder) -> None:
    """Run the optimisation loop, which learns the proto-tokens of the current batch.

    A target ends after --num-steps steps, when it reaches --target-accuracy, or when its loss or gradient is not finite
    and the optimiser cannot return to a finite loss. Targets that share a learned m end together; for
    --target-accuracy, all must reach it. The numbers of a step describe the embeddings before its update. So
    `numbers_of` and `keep_best` must come before the update, and `drop_ended` after it.
    """
    while learning.active and not record.stop_signals:
        started = time.perf_counter()
        predictions = learning.evaluate()  # one pass over [e_t, m, ..., m], and its backward pass
        numbers = numbers_of(predictions, learning.proto_tokens, learning.optimizer)  # the host waits for the device
        learning.step += 1
        new_best = learning.targets.update(learning.active, numbers)  # also marks the targets that end
        learning.keep_best(new_best, predictions)
        learning.optimizer.step(predictions.losses.mean(1))  # moves the proto-tokens
        learning.drop_ended()
        learning.seconds += time.perf_counter() - started
        record.keep_step(row_of_step(learning, numbers), learning)


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use deterministic algorithms. On a GPU, others may sum in a different order in each run, changing the history."""
    torch.use_deterministic_algorithms(device.type != "mps")  # not tested on mps
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def progress_bar_of(learning: Optimisation) -> tqdm:
    """Return a bar that counts steps, or targets if there are several batches."""
    if learning.num_batches > 1:
        done, total, unit = learning.targets.num_ended, len(learning.codes), "targets"
    else:
        done, total, unit = learning.step, learning.args.num_steps, "steps"
    return progress_bar(None, "proto-tokens", unit, total=total, initial=done)


def row_of_step(learning: Optimisation, numbers: dict[str, Tensor]) -> dict[str, float]:
    """Return the numbers of a step by W&B name; a number is None if no target has a finite value.

    Losses and accuracies are means of the targets' last values, including targets that have ended. The rate
    (root-mean-square change in the step before) and the norms are means over the targets that still learn.
    """
    targets = learning.targets
    row = {
        "step": learning.step,
        **targets.means(),
        "train/learning_rate": mean_of_finite(numbers["change"]),
        "embeddings/e_t_norm": mean_of_finite(numbers["e_t_norm"]),
        "embeddings/m_norm": mean_of_finite(numbers["m_norm"]),
        "gradients/grad_norm": mean_of_finite(numbers["grad_norm"]),
    }
    if len(learning.codes) > 1:
        row |= targets.numbers_per_target()
    return row


def targets_at_once(models: Models, num_tokens: int) -> int:
    """Return how many targets of `num_tokens` tokens go into one pass: more would hardly be faster."""
    tokens = 1024 if models.device.type == "cpu" else 8192
    return max(1, tokens // num_tokens)


@contextlib.contextmanager
def gradient_checkpointing(generator: Qwen2ForCausalLM, on: bool) -> Iterator[None]:
    """If `on`, recompute layers in the backward pass. This needs training mode, which is harmless: dropout is 0."""
    if not on:
        yield
        return
    generator.model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    generator.model.train()
    try:
        yield
    finally:
        generator.model.activation_checkpointing_disable()
        generator.model.eval()


def next_prefix(trials: list[dict], shortest: int, longest: int) -> int | None:
    """Return how many tokens to try next: double the number until a trial fails, then bisect.

    Return None once the capacity is known: the largest `num_tokens` of the trials that `reached` the target accuracy.
    The search assumes that a longer prefix is never easier.
    """
    held = max((trial["num_tokens"] for trial in trials if trial["reached"]), default=0)
    failed = min((trial["num_tokens"] for trial in trials if not trial["reached"]), default=longest + 1)
    if failed - held <= 1 or failed <= shortest:
        return None
    if failed > longest:
        return max(shortest, min(2 * held, longest))
    return max(shortest, (held + failed) // 2)


def find_capacity(models: Models, codes: Tensor, given_m: Tensor | None, record: Recorder) -> dict:
    """Try longer and shorter prefixes of codes [B, N] until the capacity is known; return the summary.

    A trial that diverges has not reached the target accuracy.
    """
    num_targets, longest = codes.shape
    while num_tokens := next_prefix(record.trials, record.args.num_e_tokens, longest):
        print(f"capacity: trying {num_tokens} tokens")
        learning = learn(models, codes[:, :num_tokens], given_m, record)
        record.add_trial(
            {
                "num_tokens": num_tokens,
                "best_accuracy": learning.targets["best_accuracy"].min().item(),
                "steps": learning.step,
                "reached": bool(learning.targets["reached"].all()),
                "seconds": learning.seconds,
            }
        )
    reached = [trial for trial in record.trials if trial["reached"]]
    capacity = max((trial["num_tokens"] for trial in reached), default=0)
    return {
        "capacity_tokens": capacity,
        "capacity_bits_uniform": capacity * math.log2(models.codebook_size),
        "best_accuracy": next((trial["best_accuracy"] for trial in reached if trial["num_tokens"] == capacity), 0.0),
        "num_tokens": longest,
        "num_targets": num_targets,
        "trials": len(record.trials),
        "optimisation_seconds": sum(trial["seconds"] for trial in record.trials),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Reconstruction


@dataclass(frozen=True)
class Reconstruction:
    """Hold what one forward pass over the proto-tokens predicts, [B, N] for all targets, and pictures of some."""

    predictions: Predictions
    errors: Tensor  # [B], mean squared error of pixels in [0, 1]
    pictures: dict[int, Tensor]  # of each target in the figures: original and reconstruction, [2, 3, H, W]
    one_pass_seconds: float


@torch.no_grad()
def reconstruct(
    models: Models, proto_tokens: ProtoTokens, codes: Tensor, predictions: Predictions | None = None
) -> Reconstruction:
    """Decode the likeliest codes of `predictions`, or of a new pass if none are given. Time a pass in both cases.

    After learning, `predictions` come from the best step, not from a new pass: in half precision, a pass over another
    set of targets may round differently. If the argmax of a position is a text id, the position counts as wrong, and
    the picture shows its likeliest visual code.
    """
    print("reconstruction: timing one pass, and decoding the best predictions")
    one_pass_seconds = timed_pass(models, proto_tokens, codes.shape[1])
    predictions = predictions or predict_in_one_pass(models, proto_tokens, codes)
    shown = targets_to_show(codes.shape[1] - predictions.num_correct)
    errors, drawn = [], {}
    parts = slices(len(codes), BATCH_WITHOUT_GRADIENTS)  # all pictures of many targets may not fit into memory
    for part in progress_bar(parts, "pictures", "parts"):
        originals = decode_codes(models.vq_decoder, codes[part])
        pixels = decode_codes(models.vq_decoder, predictions.drawable_codes[part])
        errors.append((pixels - originals).square().mean((1, 2, 3)))
        pairs = enumerate(zip(originals, pixels, strict=True), part.start)
        drawn |= {k: torch.stack(pair) for k, pair in pairs if k in shown}
    return Reconstruction(predictions, torch.cat(errors), {k: drawn[k] for k in shown}, one_pass_seconds)


def timed_pass(models: Models, proto_tokens: ProtoTokens, num_tokens: int) -> float:
    """Emit the codes of all targets repeatedly, for 2 s but at most six times; return the median time in seconds.

    Many targets need several passes. Compute the logits of visual codes only, as `generate_visual_codes` does.
    """

    def emit(part: slice) -> None:
        hidden_states = one_pass(models, proto_tokens, num_tokens, part).flatten(0, 1)
        for chunk in chunks_of_positions(len(hidden_states), models.visual_head):
            F.linear(hidden_states[chunk], models.visual_head).argmax(-1)

    num_targets, at_once, seconds = len(proto_tokens.e_t), targets_at_once(models, num_tokens), []
    while sum(seconds) < 2 and len(seconds) < 6:
        started = synchronised_time(models.device)
        in_parts_that_fit(emit, num_targets, at_once, "the pass")
        seconds.append(synchronised_time(models.device) - started)
    return statistics.median(seconds[1:] or seconds)  # drop the first, a warm-up, unless it is the only one


def targets_to_show(num_errors: Tensor) -> list[int]:
    """Return the first SHOWN_TARGETS targets, then up to SHOWN_WORST others with the most `num_errors` [B]."""
    rest = num_errors[SHOWN_TARGETS:]
    worst = rest.argsort(descending=True, stable=True)[:SHOWN_WORST]
    worst = worst[rest[worst] > 0] + SHOWN_TARGETS
    return [*range(min(len(num_errors), SHOWN_TARGETS)), *worst.tolist()]


def psnr(error: float) -> float:
    """Return the peak signal-to-noise ratio in dB of pixels in [0, 1] with this mean squared error."""
    return math.inf if error == 0 else -10 * math.log10(error)


@torch.no_grad()
def teacher_forced(models: Models, text: str, codes: Tensor) -> Tensor:
    """Return the hidden states [N, D] that predict each of codes [N] from a text and the true codes before it."""
    prompt_ids = torch.tensor(models.text_tokenizer(text)["input_ids"], device=models.device)
    input_ids = torch.cat((prompt_ids, codes[:-1] + models.visual_offset))[None]
    hidden_states = models.generator.model(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden_states[0, len(prompt_ids) - 1 :]


@torch.no_grad()
def bits_of(models: Models, hidden_states: Tensor, codes: Tensor) -> Tensor:
    """Return -log2 p(code), in bits, of each of the true codes [N] under the predictions of hidden_states [N, D]."""
    return predict(models, hidden_states[None], codes[None]).losses[0] / math.log(2)


@torch.no_grad()
def text_ids_ahead(models: Models, cond_states: Tensor, uncond_states: Tensor, cfg_scale: float) -> float:
    """Return the percent of positions at which, with guidance, a text id is likelier than every visual code.

    `cond_states` [N, D] come from the prompt, `uncond_states` [N, D] from the negative prompt.
    """
    head, count = models.generator.lm_head.weight, 0
    for chunk in chunks_of_positions(len(cond_states), head):
        cond_logits, uncond_logits = (F.linear(states[chunk], head).float() for states in (cond_states, uncond_states))
        likeliest = guided_scores(cond_logits, uncond_logits, cfg_scale).argmax(-1) - models.visual_offset
        count += ((likeliest < 0) | (likeliest >= models.codebook_size)).sum().item()
    return 100 * count / len(cond_states)


def unigram_bits(codes: Tensor) -> float:
    """Return the bits of a target's codes [N]: N times the entropy of their frequencies."""
    _, counts = codes.cpu().unique(return_counts=True)
    return (counts * (len(codes) / counts).log2()).sum().item()


def status_of(best_accuracy: float) -> str:
    if best_accuracy >= 99:
        return "success"
    return "partial_success" if best_accuracy >= 80 else "need_improvement"


def describe_targets(
    models: Models, reference: Reference, reconstruction: Reconstruction, rows: list[dict], cfg_scale: float
) -> list[dict]:
    """Return the targets' rows with accuracy in percent, wrong tokens, PSNR in dB, bits, and `text_ids_ahead`.

    The bits follow Kuratov et al. (ACL 2025, arXiv 2502.13063). uniform: N log2(codebook size), the same for any codes.
    unigram: N times the entropy of the target's own codes. autoregressive: teacher-forced after the prompt. unprompted:
    teacher-forced after the template without a prompt. proto: in one pass over the learned embeddings. The gain,
    unprompted - proto, is the information about the target that the embeddings give the generator.
    """
    predictions, num_tokens = reconstruction.predictions, reference.codes.shape[1]
    num_correct = predictions.num_correct.tolist()
    proto_bits = (predictions.losses.sum(1) / math.log(2)).tolist()
    size, targets = models.size_token(num_tokens), []
    for k, row in enumerate(progress_bar(rows, "bits", "targets")):
        codes = reference.codes[k]
        cond_states = teacher_forced(models, conditional_prompt(row["prompt"], size), codes)
        negative_states = teacher_forced(models, negative_prompt(size), codes)
        unprompted_states = teacher_forced(models, conditional_prompt("", size), codes)
        unprompted_bits = bits_of(models, unprompted_states, codes).sum().item()
        numbers = {
            "best_accuracy": 100 * num_correct[k] / num_tokens,
            "num_errors": num_tokens - num_correct[k],
            "psnr": psnr(reconstruction.errors[k].item()),
            "target_bits_uniform": num_tokens * math.log2(models.codebook_size),
            "target_bits_unigram": unigram_bits(codes),
            "target_bits_autoregressive": bits_of(models, cond_states, codes).sum().item(),
            "target_bits_unprompted": unprompted_bits,
            "proto_bits": proto_bits[k],
            "information_gain_bits": unprompted_bits - proto_bits[k],
            "text_ids_ahead": text_ids_ahead(models, cond_states, negative_states, cfg_scale),
        }
        targets.append(row | numbers)
    return targets


def summarise(
    reference: Reference, reconstruction: Reconstruction, targets: list[dict], proto_tokens: ProtoTokens
) -> dict:
    """Return the summary of a run. Percentages are from 0 to 100, times in seconds.

    Accuracies and bits are means over the targets, and the number of errors is the sum. With 2 to SHOWN_TARGETS
    targets, the numbers of each target are also listed under targets/<k>/.
    """
    num_targets, num_tokens = reference.codes.shape
    num_errors = sum(target["num_errors"] for target in targets)
    averaged = [name for name in targets[0] if name in ("best_accuracy", "text_ids_ahead") or "bits" in name]
    m_is_used = num_tokens > proto_tokens.num_e_tokens
    total_params = (proto_tokens.points if m_is_used else proto_tokens.e_t).numel()
    summary = {
        **{name: statistics.fmean(target[name] for target in targets) for name in averaged},
        "num_errors": num_errors,
        "error_rate": 100 * num_errors / reference.codes.numel(),
        "total_params": total_params,
        "num_tokens": num_tokens,
        "num_targets": num_targets,
        "num_e_tokens": proto_tokens.e_t.shape[1],
        "one_pass_seconds": reconstruction.one_pass_seconds,
        "psnr": psnr(reconstruction.errors.mean().item()),
    }
    summary["status"] = status_of(summary["best_accuracy"])
    summary["bits_per_parameter"] = num_targets * summary["information_gain_bits"] / total_params
    if reference.autoregressive_seconds is not None:
        summary["autoregressive_seconds"] = reference.autoregressive_seconds
        summary["speedup"] = reference.autoregressive_seconds / reconstruction.one_pass_seconds
    if num_targets > 1:
        summary["complete_targets"] = sum(target["num_errors"] == 0 for target in targets)
        summary["lowest_accuracy"] = min(target["best_accuracy"] for target in targets)
    if 1 < num_targets <= SHOWN_TARGETS:
        for k, target in enumerate(targets):
            own = {name: value for name, value in target.items() if name not in ("target", "prompt")}
            summary |= {f"targets/{k}/{name}": value for name, value in own.items()}
    return summary


# ----------------------------------------------------------------------------------------------------------------------
# Figures

INK, FAINT, BLUE, ORANGE, RED, GREEN = "#1f2430", "#8a8f99", "#2f6fde", "#f0a202", "#d7263d", "#2a9d6f"
# For each character (also Chinese and emoji), Matplotlib uses the first installed font of this list that has it.
FONT_FAMILIES = [
    "DejaVu Sans",
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans", "Microsoft YaHei"),
    *("Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai", "Nirmala UI", "Leelawadee UI", "Arial Unicode MS"),
    *("Noto Emoji", "Symbola", "Segoe UI Emoji", "Segoe UI Symbol", "STIXGeneral"),
]
STYLES = [
    "default",  # Matplotlib's own style, so that no matplotlibrc changes the figures
    {
        "font.family": FONT_FAMILIES,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "grid.color": FAINT,
        "grid.alpha": 0.25,
        "figure.constrained_layout.h_pad": 0.08,
        "axes.formatter.min_exponent": 3,  # on a logarithmic axis, write 0.2 instead of 2 x 10^-1
    },
]


def to_image(pixels: Tensor) -> Image.Image:
    """Return pixels [3, H, W] in [0, 1] as a picture."""
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def render(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def psnr_text(decibels: float) -> str:
    return "identical picture" if decibels == math.inf else f"PSNR {decibels:.1f} dB"


def show(axis: matplotlib.axes.Axes, image: Image.Image, title: str = "", detail: str = "") -> None:
    axis.imshow(image, interpolation="antialiased")
    axis.set_title(title, loc="center")
    axis.set_xlabel(detail, fontsize=10, labelpad=6)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


@matplotlib.style.context(STYLES)
def draw_comparison(target: dict, summary: dict) -> Image.Image:
    """Draw reference and reconstruction side by side, with accuracy and PSNR."""
    figure = Figure(figsize=(8.4, 5.1), dpi=150)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(wspace=0.06, left=0.03, right=0.97, top=0.83, bottom=0.07)
    total = summary["num_tokens"]
    embeddings = "two" if summary["num_e_tokens"] == 1 else summary["num_e_tokens"] + 1
    correct = total - summary["num_errors"]
    one_by_one = ", one after another" if "autoregressive_seconds" in summary else ""
    accuracy = f"{correct}/{total} tokens ({100 * correct / total:.1f} %), {psnr_text(summary['psnr'])}"
    show(left, target["reference"], "reference", f"{total} tokens{one_by_one}")
    show(right, target["reconstruction"], f"one forward pass over {embeddings} embeddings", accuracy)
    heading = textwrap.fill(target["prompt"], 44, max_lines=2, placeholder=" …")
    figure.suptitle(heading, fontsize=11.5, fontweight="bold", y=0.945, va="center", parse_math=False)
    return render(figure)


def mark_errors(reference: Image.Image, rank: Tensor) -> Image.Image:
    """Draw a token grid over a faint reference. A wrong token is orange if the right one is in the top 5, else red."""
    size, side = 768, math.isqrt(rank.numel())
    level = np.digitize(rank.view(side, side).cpu(), (1, 5))  # 0: right; 1 ("near"): in the top 5; 2 ("far"): not
    clear, near, far = (0, 0, 0, 0), (*ImageColor.getrgb(ORANGE), 178), (*ImageColor.getrgb(RED), 178)
    colours = np.array([clear, near, far], dtype=np.uint8)
    marks = Image.fromarray(colours[level]).resize((size, size), Image.Resampling.NEAREST)
    faint = Image.blend(reference, Image.new("RGB", reference.size, "white"), 0.55).resize((size, size)).convert("RGBA")
    marked = Image.alpha_composite(faint, marks).convert("RGB")
    draw = ImageDraw.Draw(marked)
    for line in range(side + 1):
        at = line * size // side
        draw.line([(at, 0), (at, size)], "white", max(1, 32 // side))
        draw.line([(0, at), (size, at)], "white", max(1, 32 // side))
    return marked


@matplotlib.style.context(STYLES)
def draw_token_error_map(marked: Image.Image, rank: Tensor) -> Image.Image:
    """Draw a target's error map, made by `mark_errors`, and below it the number of errors in each colour. rank: [N]."""
    figure = Figure(figsize=(5.6, 6.1), dpi=150)
    axis = figure.add_axes((0.04, 0.1, 0.92, 0.8))
    wrong, far = int((rank > 0).sum()), int((rank >= 5).sum())
    show(axis, marked)
    title = f"{wrong} of {rank.numel()} tokens wrong ({100 * wrong / rank.numel():.1f} %)"
    axis.set_title(title, fontsize=13, fontweight="bold", loc="center", pad=10)
    near = f"{wrong - far} with the target among the top 5"
    for x, colour, label in ((0.06, ORANGE, near), (0.6, RED, f"{far} not in the top 5")):
        figure.text(x, 0.045, "■", color=colour, fontsize=14, va="center")
        figure.text(x + 0.045, 0.045, label, fontsize=10, va="center")
    return render(figure)


@matplotlib.style.context(STYLES)
def draw_contact_sheet(shown: list[dict], title: str) -> Image.Image:
    """Draw each target's prompt, accuracy, reference, reconstruction and error map, in columns of up to 8 targets."""
    columns = math.ceil(len(shown) / 8)
    num_rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(10.6 * columns, 2.3 * num_rows + 0.6), dpi=110, layout="constrained")
    axes = figure.subplots(num_rows, 4 * columns, squeeze=False, width_ratios=(1.25, 1, 1, 1) * columns)
    if title:
        figure.suptitle(title, fontsize=11)
    for axis in axes.flat:
        axis.axis("off")
    for k, target in enumerate(shown):
        column, row = divmod(k, num_rows)
        text_axis, *picture_axes = axes[row, 4 * column : 4 * column + 4]
        heading = textwrap.fill(target["prompt"], 22, max_lines=3, placeholder=" …")
        text_axis.text(0.06, 0.52, heading, fontsize=10, va="bottom", fontweight="bold", parse_math=False)
        text_axis.text(0.06, 0.48, f"{target['best_accuracy']:.1f} %", fontsize=10, va="top")
        names = {"reference": "reference", "reconstruction": "one forward pass", "error_map": "wrong tokens"}
        for axis, (name, label) in zip(picture_axes, names.items(), strict=True):
            show(axis, target[name], label if row == 0 else "")
    return render(figure)


@matplotlib.style.context(STYLES)
def draw_capacity(trials: list[dict], capacity: int, target_accuracy: float) -> Image.Image:
    """Plot the best accuracy of each trial against its number of tokens."""
    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    axis = figure.subplots()
    trials = sorted(trials, key=lambda trial: trial["num_tokens"])
    counts = [trial["num_tokens"] for trial in trials]
    axis.plot(counts, [trial["best_accuracy"] for trial in trials], color=FAINT, linewidth=1, zorder=1)
    for reached, colour, label in ((True, GREEN, "reached"), (False, RED, "not reached")):
        y = [trial["best_accuracy"] if trial["reached"] is reached else math.nan for trial in trials]
        axis.scatter(counts, y, color=colour, s=34, label=label, zorder=2)
    axis.axhline(target_accuracy, color=ORANGE, linewidth=1, linestyle="--", label=f"target {target_accuracy:g} %")
    axis.set_xscale("log", base=2)
    ticks = [2**power for power in range(1 + max(counts).bit_length()) if min(counts) <= 2**power < 2 * max(counts)]
    axis.set_xticks(ticks, labels=map(str, ticks))
    axis.set(ylim=(-2, 104), xlabel="length of the target's prefix (tokens)", ylabel="best token accuracy (%)")
    axis.set_title(f"capacity: {capacity} tokens", fontsize=13, fontweight="bold")
    axis.grid()
    axis.legend(loc="lower left")
    return render(figure)


@matplotlib.style.context(STYLES)
def draw_training_curves(history: list[dict[str, float]]) -> Image.Image:
    """Plot loss, accuracies, embedding norms, gradient norm and learning rate over the steps, in one figure."""
    figure = Figure(figsize=(11, 6.6), dpi=130, layout="constrained")
    panels = figure.subplot_mosaic("AAABBB;CCDDEE")
    steps = [row["step"] for row in history]

    def plot(panel: str, key: str, label: str = "", colour: str = BLUE) -> None:
        marker = "o" if len(history) == 1 else None  # a single row has no line to draw
        values = [row[key] for row in history]
        panels[panel].plot(steps, values, color=colour, linewidth=1.4, label=label, marker=marker)

    plot("A", "train/loss")
    panels["A"].set(title="cross-entropy (nats per token)", yscale="log")
    plot("B", "train/top5_accuracy", "top-5", GREEN)
    plot("B", "train/accuracy", "top-1", BLUE)
    plot("B", "train/best_accuracy", "best top-1", ORANGE)
    panels["B"].set(title="token accuracy (%)", ylim=(-2, 102))
    plot("C", "embeddings/e_t_norm", "e_t", BLUE)
    plot("C", "embeddings/m_norm", "m", ORANGE)
    panels["C"].set(title="embedding norms (L2)", xlabel="step")
    plot("D", "gradients/grad_norm")
    panels["D"].set(title="gradient norm", yscale="log", xlabel="step")
    plot("E", "train/learning_rate")
    panels["E"].set(title="learning rate: change per step (rms)", xlabel="step", ylim=(0, None))
    for panel in panels.values():
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid()
    for several_lines in "BC":
        panels[several_lines].legend()
    return render(figure)


def tiled(images: list[Image.Image]) -> Image.Image:
    """Tile pictures of equal size in a nearly square grid."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * width, k // columns * height))
    return sheet


def draw_progress(pixels: Tensor, step: int, accuracy: float) -> Image.Image:
    """Draw the reconstructions [B, 3, H, W] above a line of text with the step and the accuracy."""
    sheet = tiled([to_image(each) for each in pixels])
    width = max(256, sheet.width)
    frame = Image.new("RGB", (width, round(sheet.height * width / sheet.width) + 28), "white")
    frame.paste(sheet.resize((width, frame.height - 28), Image.Resampling.NEAREST))
    label = f"step {step}   {accuracy:.1f} %"
    ImageDraw.Draw(frame).text((8, frame.height - 23), label, fill=INK, font=ImageFont.load_default(size=16))
    return frame


def draw_targets(targets: list[dict], reconstruction: Reconstruction) -> list[dict]:
    """Return the targets' rows with their pictures added; the pictures are None if no figure shows the target."""
    rows = [target | {"reference": None, "reconstruction": None, "error_map": None} for target in targets]
    for k, (original, pixels) in reconstruction.pictures.items():
        rows[k]["reference"] = to_image(original)
        rows[k]["reconstruction"] = to_image(pixels)
        rows[k]["error_map"] = mark_errors(rows[k]["reference"], reconstruction.predictions.rank[k])
    return rows


def draw_results(
    targets: list[dict], rank: Tensor, summary: dict, history: list[dict[str, float]]
) -> dict[str, Image.Image]:
    """Draw the pictures of a run, and return them by W&B name. The file name is the W&B name with `.png`.

    `targets` are rows of the first SHOWN_TARGETS targets, then of the worst others. `rank` [B, N] is of all targets.
    A new figure's file must also be listed in RESULTS: only files listed there are removed when a run is replaced.
    """
    first, worst = targets[:SHOWN_TARGETS], targets[SHOWN_TARGETS:]
    maps = zip(first, rank[: len(first)], strict=True)
    images = {
        "reference_image": tiled([target["reference"] for target in first]),
        "reconstructed_image": tiled([target["reconstruction"] for target in first]),
        "token_error_map": tiled([draw_token_error_map(target["error_map"], of_target) for target, of_target in maps]),
    }
    if len(rank) == 1:
        images["comparison"] = draw_comparison(first[0], summary)
    else:
        title = f"the first {len(first)} of {len(rank)} targets" if len(rank) > len(first) else ""
        images["comparison"] = draw_contact_sheet(first, title)
    if worst:
        images["worst_targets"] = draw_contact_sheet(worst, f"the worst {len(worst)} of the other targets")
    if history:
        images["training_curves"] = draw_training_curves(history)
    return images


# ----------------------------------------------------------------------------------------------------------------------
# Files

STATE_FILE, STATE_FORMAT = "interrupted_run.pt", 14  # raise the format when the saved state has other contents
HISTORY_FILE, TARGETS_FILE = "history.csv", "targets.csv"
# Files that a run writes, in the order of removal: first the files that show whether the others are complete.
RESULTS = ["summary.json", STATE_FILE, "config.json", HISTORY_FILE, TARGETS_FILE, "capacity.csv", PROTO_TOKENS_FILE]
RESULTS += ["progress.gif", "reference_image.png", "reconstructed_image.png", "comparison.png", "worst_targets.png"]
RESULTS += ["token_error_map.png", "training_curves.png", "capacity.png"]


@contextlib.contextmanager
def file_named_in_errors(file: Path) -> Iterator[None]:
    """Replace an OSError, which may not name the file, with a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or main_line(error)}") from None


@contextlib.contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces the file if the block succeeds, so that the file is always complete.

    Make the folder if it is missing. Raises UserError if the file cannot be written.
    """
    # The time is in the name because containers that share a folder can have the same process id.
    partial = file.with_name(f"{file.name}.{os.getpid()}{time.time_ns()}.partial")
    try:
        with file_named_in_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)  # another run may have removed an empty cache folder
            yield partial
            os.replace(partial, file)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def run_folder(args: argparse.Namespace) -> Iterator[Path]:
    """Make <save-dir>/<run-name>, check that it can be written, and keep other runs out. Raises UserError."""
    folder, cache = args.save_dir / args.wandb_run_name, args.save_dir / CACHE_FOLDER
    try:
        made = [path for path in (folder, cache, args.save_dir, *args.save_dir.parents) if not path.exists()]
        for path in (folder, cache):
            os.makedirs(os.path.realpath(path), exist_ok=True)  # also makes the target of a dangling link
            with tempfile.TemporaryFile(dir=path):
                pass
        lock = lock_folder(folder)
    except OSError as error:
        raise UserError(f"--save-dir {args.save_dir} cannot be written: {error.strerror} ({error.filename})") from None
    try:
        refuse_foreign(folder)
        yield folder
    finally:
        os.close(lock)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()  # removes only empty folders, and only those that this run made


def refuse_foreign(folder: Path) -> None:
    """Raise UserError if the run would replace files that no run wrote, for example those of a model."""
    there = [name for name in RESULTS if (folder / name).exists()]
    settings = read_settings(folder)
    if settings is None:  # config.json may be missing or damaged in a run's folder, too: go by the file names
        is_run = not {"config.json", STATE_FILE, "summary.json"}.isdisjoint(there)
    else:
        is_run = "generator_fingerprint" in settings
    if there and not is_run:
        raise UserError(f"{folder} is no run's folder, and its {there[0]} would be lost: choose another --save-dir")


def read_settings(folder: Path) -> dict | None:
    """Return the content of the folder's config.json, or None if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return None


def lock_folder(folder: Path) -> int:
    """Lock the folder against other runs, and return a descriptor. Closing it or ending the process unlocks the folder.

    The lock is on the folder itself, so it leaves no file. Raises UserError if another run holds the lock.
    """
    lock = os.open(folder if fcntl else os.devnull, os.O_RDONLY)
    if fcntl:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(f"another run is at work in {folder}: choose another --wandb-run-name, or wait") from None
        except OSError:
            pass  # a file system without locks
    return lock


def remove_results(folder: Path) -> None:
    """Remove the files of an earlier run with this name, so that the two runs do not mix. Raises OSError."""
    for file in (*(folder / name for name in RESULTS), *frames_in(folder)):
        file.unlink(missing_ok=True)
    remove_unfinished(folder)
    with contextlib.suppress(OSError):
        (folder / "progress").rmdir()


def remove_unfinished(folder: Path) -> None:
    """Remove an interrupted run's state, and the half-written files of a killed run. Raises OSError."""
    half_written = [*folder.glob("*.[0-9]*.partial"), *folder.glob("progress/*.[0-9]*.partial")]
    for file in (folder / STATE_FILE, *half_written):
        file.unlink(missing_ok=True)


def frames_in(folder: Path) -> list[Path]:
    """Return the frame files of progress.gif in the order of their steps; ignore other files."""
    frames = [file for file in folder.glob("progress/step_*.png") if file.stem[5:].isdecimal()]
    return sorted(frames, key=lambda file: int(file.stem[5:]))


def describe_run(args: argparse.Namespace, models: Models) -> dict:
    """Return all settings, the values derived from them, and the versions: what is needed to repeat the run."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "tokenizers", "safetensors", "wandb", "numpy", "pillow", "matplotlib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    num_tokens = num_tokens_of(args.image_size, models.factor)
    size = models.size_token(num_tokens)
    settings = vars(args) | {name: getattr(models, name) for name in MODEL_SETTINGS}
    settings |= {
        "prompt": args.prompts[0] if len(args.prompts) == 1 else args.prompts,
        "num_tokens": num_tokens,
        "prompt_templates": [conditional_prompt("", size), negative_prompt(size)],
        "repetition_penalty": models.repetition_penalty,
        "device": str(models.device),
        "device_name": device_name(models.device),
        "dtype": models.precision,
        "torch_version": torch.__version__,
        "versions": versions,
    }
    if args.m_from and not args.from_proto_tokens:  # --from-proto-tokens also sets m_from, but does not read that file
        settings["m_from_fingerprint"] = digest_of([args.m_from])
    if args.images:
        settings["images_fingerprint"] = digest_of(args.images)
    del settings["prompts"]
    settings = {name: settings[name] for name in DECIDES if name in settings}
    return json.loads(json.dumps(settings, default=str))  # paths become text and tuples become lists, as in config.json


def write_json(file: Path, content: dict) -> None:
    """Write strict JSON: a number that JSON cannot express, such as an infinite PSNR, becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
    text = json.dumps(finite, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(file) as partial:
        partial.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # escapes badly encoded names


def write_image(file: Path, image: Image.Image) -> None:
    with atomic_write(file) as partial:
        image.save(partial, format="PNG")


def write_moving_picture(file: Path, frames: list[Path]) -> None:
    """Write the frames as a GIF that pauses on the last."""
    durations = [150] * (len(frames) - 1) + [2000]  # milliseconds
    pictures = map(Image.open, frames)
    with atomic_write(file) as partial:
        next(pictures).save(partial, format="GIF", save_all=True, append_images=pictures, duration=durations, loop=0)


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    content = to_safetensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    with atomic_write(file) as partial:
        partial.write_bytes(content)


def write_table(file: Path, rows: list[dict]) -> None:
    with (
        atomic_write(file) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as table,
    ):
        writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append_to_table(file: Path, row: dict) -> None:
    """Append a row to a table, whole or not at all; start the table if the file is missing. Raises UserError."""
    if not file.exists():
        write_table(file, [row])
        return
    size = file.stat().st_size
    with file_named_in_errors(file):
        try:
            with file.open("a", newline="", encoding="utf-8") as table:
                csv.DictWriter(table, list(row), lineterminator="\n").writerow(row)
        except OSError:
            os.truncate(file, size)
            raise


class ReferenceCache:
    """Cache the codes of references, each in a file named by a hash of its prompt and the settings that affect it."""

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.num_tokens, self.codebook_size = folder, settings["num_tokens"], settings["codebook_size"]
        self.settings = settings_deciding(settings, "reference", "environment") | {"format": CACHE_FORMAT}

    def entry(self, prompt: str) -> tuple[Path, str]:
        """Return the file for a prompt, and the whole key, which the file also stores."""
        everything = self.settings | {"prompt": prompt}
        key = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{key[:32]}.safetensors", key

    def read(self, prompts: list[str]) -> dict[str, tuple[Tensor, float | None]]:
        """Map each of `prompts` that is cached to its codes [N] and decoding seconds. Warn of damaged files."""
        decoded = {}
        for prompt in prompts:
            file, key = self.entry(prompt)
            if not file.exists():
                continue
            try:
                with safe_open(file, "pt") as stored:
                    codes, metadata = stored.get_tensor("codes"), stored.metadata()
                fitting = codes.shape == (1, self.num_tokens) and codes.dtype == torch.int64
                if metadata["key"] != key or not fitting or codes.min() < 0 or codes.max() >= self.codebook_size:
                    raise ValueError
                decoded[prompt] = codes[0], json.loads(metadata["autoregressive_seconds"])
            except (SafetensorError, OSError, KeyError, ValueError, TypeError):
                print(f"warning: {file} is damaged or holds other data; generating the reference anew", file=sys.stderr)
        if decoded:
            print(f"reference: {len(decoded)} of {len(prompts)} reused from {self.folder}")
        return decoded

    def write(self, prompt: str, codes: Tensor, seconds: float | None) -> None:
        file, key = self.entry(prompt)
        try:
            write_tensors(file, {"codes": codes[None]}, {"key": key, "autoregressive_seconds": json.dumps(seconds)})
        except UserError as error:  # for example, the file in a shared folder is another user's
            print(f"warning: {error}; this reference is not kept for later runs", file=sys.stderr)


# ---- a run's input files

# The settings that are properties of the models.
MODEL_SETTINGS = ("hidden_size", "visual_offset", "codebook_size", "factor", "generator_fingerprint", "vq_fingerprint")
# --from-proto-tokens takes these settings and the prompts from the earlier run: its proto-tokens or results need them.
INHERITED_SETTINGS = ("image_size", "seed", "cfg_scale", "control", "num_e_tokens", "m", "m_from", "vocabulary")


@dataclass(frozen=True)
class EarlierRun:
    """Hold the checked contents of an earlier run's proto_tokens.safetensors."""

    option: str  # the option that named the file
    e_t: Tensor  # [B, K, D]
    m: Tensor  # [1, D] or [B, D]
    codes: Tensor  # [B, N]
    settings: dict
    prompts: list[str]

    def proto_tokens(self, device: torch.device) -> ProtoTokens:
        return proto_tokens_of(self.e_t.to(device), self.m.to(device), m_learns=not self.settings["m_from"])


class Inputs(NamedTuple):
    """Hold the contents of the files that --from-proto-tokens, --m-from and --image name."""

    learned: EarlierRun | None = None  # by --from-proto-tokens: the run to reconstruct
    m_source: EarlierRun | None = None  # by --m-from
    pictures: Tensor | None = None  # by --image, [B, 3, H, W]


def read_inputs(args: argparse.Namespace, folder: Path) -> Inputs:
    """Read the files that --from-proto-tokens, --m-from and --image name, before anything slow. Raises UserError."""
    if args.from_proto_tokens:
        return Inputs(learned=read_earlier_run("--from-proto-tokens", args.from_proto_tokens, folder))
    m_source = pictures = None
    if args.m_from:
        m_source = read_earlier_run("--m-from", args.m_from, folder)
        if len(m_source.m) > 1:
            one_each = f"--m-from {args.m_from} holds {len(m_source.m)} m, one for each target"
            raise UserError(f"{one_each}: name a run with a shared m")
    if args.images:
        pictures = torch.stack([read_picture(file, args.image_size) for file in args.images])
    return Inputs(None, m_source, pictures)


def read_earlier_run(option: str, file: Path, folder: Path) -> EarlierRun:
    """Read the proto-tokens of an earlier run. Raises UserError if the file is invalid or in this run's own folder."""
    if os.path.dirname(os.path.realpath(file)) == os.path.realpath(folder):
        raise UserError(f"{option} {file} is in this run's own folder: give this run another --wandb-run-name")
    failure = f"{option} {file} is missing, damaged or not the {PROTO_TOKENS_FILE} of a run"
    with one_line_for(failure, f"name a run's folder, or its {PROTO_TOKENS_FILE}"):
        with safe_open(file, "pt") as stored:
            e_t, m, target_ids = (stored.get_tensor(name) for name in ("e_t", "m", "target_ids"))
            settings = json.loads(stored.metadata()["settings"])
        prompts = [settings["prompt"]] if isinstance(settings["prompt"], str) else settings["prompt"]
        batch, num_e_tokens, hidden_size = e_t.shape
        _, num_tokens = target_ids.shape
        fitting = (
            len(target_ids) == len(prompts) == batch
            and m.shape in ((1, hidden_size), (batch, hidden_size))
            and num_e_tokens <= num_tokens == math.isqrt(num_tokens) ** 2
            and target_ids.dtype == torch.int64
            and bool(e_t.isfinite().all() and m.isfinite().all())
            and settings.keys() >= set(INHERITED_SETTINGS)
            and all(isinstance(prompt, str) for prompt in prompts)
            and all(isinstance(settings[name], int) for name in ("image_size", "seed", "num_e_tokens", "visual_offset"))
        )
        if not fitting:
            raise ValueError("its tensors and settings do not fit each other")
        codes = target_ids - settings["visual_offset"]
    return EarlierRun(option, e_t, m, codes, settings, prompts)


def refuse_other_models(models: Models, args: argparse.Namespace, earlier: EarlierRun) -> None:
    """Raise UserError if the proto-tokens of an earlier run were made for other models."""
    needed = {name: getattr(models, name) for name in MODEL_SETTINGS}
    if "untrained" in (args.control, earlier.settings["control"]):  # then the seed decides the weights
        needed |= {"control": args.control, "seed": args.seed}
    theirs = earlier.settings
    other = [f"{name} {theirs.get(name)}, not {ours}" for name, ours in needed.items() if theirs.get(name) != ours]
    if not other and (earlier.m.shape[1] != models.hidden_size or not models.are_visual(earlier.codes)):
        other = ["its tensors do not fit its own settings"]
    if other:
        damaged_or_foreign = "the file is damaged or was made for another model"
        raise UserError(f"{earlier.option}: {damaged_or_foreign} ({other[0]}): use that model")


# ---- resuming an interrupted run


def is_finished(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def refuse_other_settings(folder: Path, settings: dict) -> None:
    """Raise UserError if the run to resume has other settings."""
    if not (folder / STATE_FILE).exists() and not is_finished(folder):
        return
    stored = read_settings(folder)
    if stored is None:
        raise UserError(f"{folder}/config.json is missing or damaged: leave out --resume to start again")
    short = functools.partial(textwrap.shorten, width=80, placeholder="...")
    changed = [
        f"{name} ({short(str(stored.get(name)))}, now {short(str(value))})"
        for name, value in settings_deciding(settings, "reference", "result").items()
        if stored.get(name) != value
    ]
    if changed:
        remedy = "repeat its settings, give another --wandb-run-name, or leave out --resume to replace it"
        raise UserError(f"--resume: the run in {folder} has other settings: {', '.join(changed)}; {remedy}")


def read_state(folder: Path) -> dict | None:
    """Load `Recorder`'s saved state onto the CPU; return None if there is none. Raises UserError if it is damaged."""
    file = folder / STATE_FILE
    if not file.exists():
        return None
    with one_line_for(f"{file} is damaged or of another version", "leave out --resume to start again"):
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():  # torch does not check the checksums
                raise ValueError(f"{damaged} is damaged")
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if saved["format"] != STATE_FORMAT:
            raise ValueError(f"format {saved['format']}, not {STATE_FORMAT}")
    return saved


# ----------------------------------------------------------------------------------------------------------------------
# Tracking: the only code that imports wandb

# With these three timeouts, a dead server delays a run by less than a minute.
WANDB_ANSWER_SECONDS, WANDB_START_SECONDS, WANDB_FINISH_SECONDS = 10, 15, 25
WANDB_LOGIN_SECONDS = 30  # for the user to enter an API key when W&B asks for it


def set_up_wandb(args: argparse.Namespace) -> object | None:
    """Return W&B's settings; options override the environment. Return None if its service does not start.

    Raises UserError if W&B is not installed or refuses a setting.
    """
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", str(WANDB_ANSWER_SECONDS))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # the client's own telemetry would wait on a dead network
    if os.environ.get("HOME") == "":
        del os.environ["HOME"]  # if HOME is unset, expanduser asks the system for the home
    if not os.path.isdir(os.path.expanduser("~")):  # for example, a container's user may have no home
        os.environ["HOME"] = tempfile.mkdtemp(prefix="wandb-home-")  # the client would fail without a home
    with one_line_for("--use-wandb needs wandb", "pip install -r requirements.txt"):
        import wandb
        from wandb import Settings  # fails if `wandb` is only a wandb.py beside the script
    with contextlib.suppress(ImportError, AttributeError):  # disable W&B's telemetry of errors
        wandb.analytics.opentelemetry.opentelemetry_proxy.disable()  # else it waits forever for a dead service
    try:
        # W&B also reads the environment, and the file wandb/settings, which commands such as `wandb offline` write.
        mode = {"mode": args.wandb_mode} if args.wandb_mode else {}
        wandb.setup(Settings(login_timeout=WANDB_LOGIN_SECONDS, **mode))
        return Settings(
            project=None if in_sweep() else args.wandb_project,  # a sweep's runs belong to the sweep's project
            entity=args.wandb_entity,
            run_name=args.name_in_wandb,
            run_group=args.wandb_group,
            run_tags=args.wandb_tags,
            init_timeout=WANDB_START_SECONDS,
            finish_timeout=WANDB_FINISH_SECONDS,
            finish_timeout_raises=True,
        )
    except (ValueError, wandb.errors.UsageError) as error:
        remedy = "correct the option, the WANDB_ variable or the file wandb/settings"
        raise UserError(f"W&B refuses a setting ({main_line(error)}): {remedy}") from None
    except Exception as error:  # errors of its service process or the disk have no common class
        print(f"W&B cannot start ({main_line(error)}); the run goes on without it", file=sys.stderr)
        return None


def as_wandb_value(value: object) -> object:
    import wandb

    if isinstance(value, Image.Image):
        return wandb.Image(value)
    return None if value == math.inf else value  # JSON has no infinity


class Tracker:
    """Report a run to Weights & Biases, if the user asks. If W&B fails after `start`, print why once and go on."""

    def __init__(self, args: argparse.Namespace):
        """Prepare W&B's settings. Raises UserError if W&B refuses one."""
        self.args = args
        self.settings = set_up_wandb(args) if args.use_wandb else None
        self.run: object | None = None
        self.run_id: str | None = None

    def start(self, config: dict, run_id: str | None) -> None:
        """Start a W&B run, or resume the run `run_id`; keep it offline if the server fails.

        Raises UserError if W&B already has a run with the id in WANDB_RUN_ID, or cannot start at all.
        """
        self.run_id = run_id
        if self.settings is None:
            return
        import wandb

        resume = "never"  # even if WANDB_RESUME differs: the steps of two runs must not be mixed
        if self.args.resume:
            resume = "allow"
        elif in_sweep():
            resume = None  # the server may already know the run of a sweep agent
        start = functools.partial(wandb.init, config=config, id=run_id, resume=resume, settings=self.settings)
        with one_line_for("W&B cannot start", "correct the WANDB_ variables, or set WANDB_DIR to a writable folder"):
            try:
                self.run = start()
            except wandb.Error as error:
                if "already exists" in str(error):
                    raise UserError(
                        f"W&B already has a run with the id {os.environ.get('WANDB_RUN_ID')}, from WANDB_RUN_ID: "
                        "unset the variable, or continue that run with --resume"
                    ) from None
                print(f"W&B: {main_line(error)}; this run is kept offline", file=sys.stderr)
                wandb.teardown()  # a service that failed once would fail an offline run too
                self.run = start(mode="offline")
        self.run_id = self.run.id
        with self.tolerating_wandb_errors():
            self.run.define_metric("optimisation_step", hidden=True)
            self.run.define_metric("capacity/*", step_metric="capacity/num_tokens")
            for metrics in ("train/*", "targets/*", "embeddings/*", "gradients/*", "progress/*"):
                self.run.define_metric(metrics, step_metric="optimisation_step")
            self.run.define_metric("best_accuracy", step_metric="optimisation_step", summary="max")

    def finish(self, exit_code: int) -> None:
        if self.run is None:
            return
        with self.tolerating_wandb_errors():
            try:
                self.run.finish(exit_code=exit_code)
            except TimeoutError:
                rest = f"send the rest with: {self.sync_command()}"
                print(f"W&B: the server did not take everything in time; {rest}", file=sys.stderr)

    def end_by_signal(self, number: int) -> None:
        """Finish the W&B run, so that W&B does not show it as running; then let the signal end the process."""
        for stop_signal in STOP_SIGNALS:
            if signal.getsignal(stop_signal) != signal.SIG_IGN:
                signal.signal(stop_signal, signal.SIG_DFL)  # a second signal ends the process at once
        self.finish(128 + number)
        signal.raise_signal(number)

    @contextlib.contextmanager
    def tolerating_wandb_errors(self) -> Iterator[None]:
        """Go on without W&B if the block fails, and print why."""
        try:
            yield
        except Exception as error:  # errors of the client, its service or the disk have no common class
            import wandb

            kept = f"upload the logged data with: {self.sync_command()}"
            print(f"W&B: {main_line(error)}; the run goes on without it; {kept}", file=sys.stderr)
            self.run = None
            logging.raiseExceptions = False  # else each line that W&B cannot write to its log prints an error
            with contextlib.suppress(Exception):
                wandb.teardown()  # else it prints a traceback when the process ends

    def sync_command(self) -> str:
        """Return the command that sends the unsent data. By default, `wandb sync` skips runs that began online."""
        option = "" if self.run.offline else "--no-skip-online "
        return f"wandb sync {option}{shlex.quote(str(Path(self.run.settings.sync_dir)))}"

    def log(self, values: dict, step: int) -> None:
        """Log the values of a step, unless the run sent them before it was interrupted."""
        if self.run and step >= self.run.starting_step:
            with self.tolerating_wandb_errors():
                self.run.log({name: as_wandb_value(value) for name, value in values.items()}, step=step)

    def log_row(self, row: dict[str, float]) -> None:
        """Log a row of the history, and `best_accuracy`, so that a sweep can stop a run early."""
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        values["best_accuracy"] = row["train/best_accuracy"]
        values["optimisation_step"] = row["step"]
        self.log(values, row["step"])

    def log_results(self, images: dict[str, Image.Image], summary: dict, tables: dict[str, list[dict]]) -> None:
        if self.run is None:
            return
        import wandb

        with self.tolerating_wandb_errors():
            media = {name: as_wandb_value(image) for name, image in images.items()}
            for name, rows in tables.items():
                data = [[as_wandb_value(value) for value in row.values()] for row in rows]
                media[name] = wandb.Table(columns=list(rows[0]), data=data)
            self.run.log(media)
            self.run.summary.update({name: value for name, value in summary.items() if value != math.inf})

    def log_proto_tokens(self, file: Path) -> None:
        """Log the file as an artifact. If that fails, for example without a server, save it among the run's files."""
        if self.run is None:
            return
        with self.tolerating_wandb_errors():
            try:
                name = re.sub(r"[^\w.-]", "_", f"proto_tokens_{self.run_id}", flags=re.ASCII)[:128]  # W&B's limit
                self.run.log_artifact(str(file), name, type="proto-tokens")
            except Exception:  # for example, there is no server
                self.run.save(str(file), base_path=str(file.parent), policy="now")


# ----------------------------------------------------------------------------------------------------------------------
# Recording


class Recorder:
    """Write a run's files while it learns, log to W&B, and save the state that --resume needs.

    Call `begin` first. Each `learn` calls `start_learning`, `keep_step` after a step, and `keep_targets` after a batch.
    Last, call `write_results` or `write_capacity`. On exit, the W&B run ends. It is shown as failed after an exception.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, settings: dict, tracker: Tracker):
        self.args, self.folder, self.settings, self.tracker = args, folder, settings, tracker
        self.saved = read_state(folder) if args.resume else None  # an interrupted run's state, until restored
        self.trials: list[dict] = []  # the trials of a --capacity search
        self.reference: Reference | None = None
        self.history: list[dict[str, float]] = self.saved["history"] if self.saved else []
        self.stop_signals: list[int] = []  # the stop signals received while learning
        self.bar: tqdm | None = None  # the progress bar, set by `learn`

    def __enter__(self) -> Recorder:
        self.tracker.start(self.settings, self.saved["run_id"] if self.saved else None)
        for trial in self.saved["trials"] if self.saved else []:
            self.add_trial(trial)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        exit_code = 0 if error is None else 1
        self.tracker.finish(error.code if isinstance(error, Stopped) else exit_code)

    def begin(self, reference: Reference) -> None:
        """Write what is known before the first step; remove an earlier run's results unless this run resumes it."""
        self.reference = reference
        if self.saved is None:
            if (self.folder / STATE_FILE).exists() or is_finished(self.folder):
                print(f"note: this replaces the run in {self.folder}: --resume or another --wandb-run-name keeps it")
            remove_results(self.folder)
        write_json(self.folder / "config.json", self.settings)
        write_image(self.folder / "reference_image.png", tiled([to_image(pixels) for pixels in reference.pixels]))

    # ---- while learning

    def note_stop_signal(self, number: int) -> None:
        """Note a stop signal, for the training loop to check; a second one ends the process."""
        if self.stop_signals:
            os._exit(128 + number)
        self.stop_signals.append(number)

    def start_learning(self, learning: Optimisation) -> None:
        """Restore the optimisation and the history from `saved`, once. In any case, save the state."""
        if self.saved:
            learning.load_state_dict(self.saved["learning"])
            print(f"resumed after step {learning.step}")
            for file in frames_in(self.folder):
                if int(file.stem[5:]) > learning.step:
                    file.unlink()  # it will be drawn again
            (self.folder / HISTORY_FILE).unlink(missing_ok=True)  # its last rows can be newer than the saved state
            if self.history:
                write_table(self.folder / HISTORY_FILE, self.history)
            for row in self.history:
                self.tracker.log_row(row)  # sends only the rows that W&B lacks
            self.saved = None  # the next trial of a search for the capacity starts from the beginning
        self.save_state(learning)

    def keep_step(self, row: dict[str, float], learning: Optimisation) -> None:
        """Keep a step's row, picture and state at the intervals that options set; keep the last row and picture, too.

        With n batches, the interval between rows is n times as long, so that the history stays short.
        """
        if not learning.targets.begun.any():
            return  # no finite step yet
        interval = self.args.log_every * learning.num_batches
        is_due = learning.step == 1 or learning.step % interval == 0 or learning.finished
        if is_due and not self.args.capacity:  # a search for the capacity has no history
            append_to_table(self.folder / HISTORY_FILE, row)
            self.history.append(row)
            self.tracker.log_row(row)
        if self.args.image_every and (learning.step % self.args.image_every == 0 or learning.finished):
            self.keep_frame(learning)
        accuracies = f"accuracy {row['train/accuracy']:.1f} %, best {row['train/best_accuracy']:.1f} %"
        self.bar.set_postfix_str(f"loss {row['train/loss']:.3f}, {accuracies}", refresh=False)
        done = learning.targets.num_ended if learning.num_batches > 1 else learning.step
        self.bar.update(done - self.bar.n)
        if learning.active and learning.step % self.args.save_every == 0:
            self.save_state(learning)  # at the end of a batch, `learn` saves it

    def keep_targets(self, learning: Optimisation) -> None:
        """Write the results of all batches so far, if there are several targets."""
        if len(learning.codes) > 1 and not self.args.capacity:
            prompts = self.reference.prompts[: learning.batch.stop]
            write_table(self.folder / TARGETS_FILE, learning.targets.rows(prompts))

    def keep_frame(self, learning: Optimisation) -> None:
        """Draw, write and log the reconstruction from the best embeddings so far, as a frame of progress.gif."""
        pixels = decode_codes(learning.models.vq_decoder, learning.predictions.drawable_codes[:SHOWN_TARGETS])
        frame = draw_progress(pixels, learning.step, learning.targets["best_accuracy"].mean().item())
        write_image(self.folder / "progress" / f"step_{learning.step:06}.png", frame)
        self.tracker.log({"progress/reconstruction": frame, "optimisation_step": learning.step}, learning.step)

    def save_state(self, learning: Optimisation) -> None:
        """Save what --resume needs. Raises UserError."""
        state = {
            "format": STATE_FORMAT,
            "codes": self.reference.codes,
            "learning": learning.state_dict(),
            "autoregressive_seconds": self.reference.autoregressive_seconds,
            "trials": self.trials,
            "history": self.history,
            "run_id": self.tracker.run_id,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with atomic_write(self.folder / STATE_FILE) as partial:
            partial.write_bytes(buffer.getbuffer())

    def report_divergence(self, learning: Optimisation) -> None:
        """If all targets diverged, write their best proto-tokens and raise UserError; if some did, print how many."""
        diverged = learning.targets.diverged
        if diverged.all():
            why = f"the loss or its gradient is no longer finite at step {learning.step}"
            remedy = "lower --learning-rate" + (" or set --grad-clip 1" if self.args.optimizer == "adamw" else "")
            file = self.write_proto_tokens(learning.best)
            raise UserError(f"{why}: {remedy}; the best proto-tokens so far are in {file}")
        if diverged.any():
            lost = f"{int(diverged.sum())} of {len(diverged)} targets"
            print(f"note: {lost} ended because their loss or its gradient was no longer finite")

    def add_trial(self, trial: dict) -> None:
        """Keep a trial of the search for the capacity; its number is W&B's step, as such a run logs nothing else."""
        self.trials.append(trial)
        self.tracker.log({f"capacity/{name}": value for name, value in trial.items()}, len(self.trials))

    # ---- at the end

    def write_results(
        self, reconstruction: Reconstruction, proto_tokens: ProtoTokens, summary: dict, targets: list[dict]
    ) -> None:
        """Write and log the results of proto-tokens that this run or an earlier run learned."""
        print("writing the results")
        target_columns = {"predicted_ids": reconstruction.predictions.ids}
        for name in ("best_accuracy", "steps"):
            if name in targets[0]:  # there are steps only if this run learned
                target_columns[name] = torch.tensor([target[name] for target in targets])
        file = self.write_proto_tokens(proto_tokens, **target_columns)
        self.tracker.log_proto_tokens(file)
        if frames := frames_in(self.folder):
            write_moving_picture(self.folder / "progress.gif", frames)
        rows = draw_targets(targets, reconstruction)
        tables = {}
        if len(targets) > 1:
            write_table(self.folder / TARGETS_FILE, targets)
            tables["targets"] = rows
        shown = [rows[k] for k in reconstruction.pictures]
        images = draw_results(shown, reconstruction.predictions.rank, summary, self.history)
        self.publish(images, summary, tables)

    def write_proto_tokens(self, proto_tokens: ProtoTokens, **target_columns: Tensor) -> Path:
        """Write e_t [B, K, D], m [1 or B, D], the targets' ids [B, N], and `target_columns`, with one row per target.

        Store in the metadata, as JSON, the settings of the run that learned e_t and m.
        """
        file, settings = self.folder / PROTO_TOKENS_FILE, self.settings.get("learned_with", self.settings)
        tensors = {"e_t": proto_tokens.e_t.detach(), "m": proto_tokens.m.detach()}
        tensors |= {"target_ids": self.reference.codes + settings["visual_offset"], **target_columns}
        write_tensors(file, tensors, {"settings": json.dumps(settings)})
        return file

    def write_capacity(self, summary: dict) -> None:
        """Write and log the results of a search for the capacity."""
        write_table(self.folder / "capacity.csv", self.trials)
        image = draw_capacity(self.trials, summary["capacity_tokens"], self.args.target_accuracy)
        self.publish({"capacity": image}, summary, {"trials": self.trials})

    def publish(self, images: dict[str, Image.Image], summary: dict, tables: dict[str, list[dict]]) -> None:
        """Write the pictures, log the results, then write the summary, which shows that the rest is complete."""
        for name, image in images.items():
            if name != "reference_image":  # `begin` has written it
                write_image(self.folder / f"{name}.png", image)
        self.tracker.log_results(images, summary, tables)
        write_json(self.folder / "summary.json", summary)
        remove_unfinished(self.folder)


# ----------------------------------------------------------------------------------------------------------------------
# Main


def print_results(summary: dict, record: Recorder) -> None:
    """Print the main results."""
    lines = lines_of_results(summary)
    lines["files"] = f"{record.folder}/"
    if record.tracker.run and record.tracker.run.offline:
        lines["to W&B later"] = record.tracker.sync_command()
    print()
    for label, text in lines.items():
        print(f"  {label:<14} {text}")


def lines_of_results(s: dict) -> dict[str, str]:
    if "capacity_tokens" in s:
        return {"capacity": f"{s['capacity_tokens']} of {s['num_tokens']} tokens, in {s['trials']} trials"}
    num_targets, total = s["num_targets"], s["num_targets"] * s["num_tokens"]
    lines = {"status": s["status"]}
    lines["best accuracy"] = f"{s['best_accuracy']:.1f} %, {s['num_errors']} of {total} tokens wrong"
    if num_targets > 1:
        lines["targets"] = f"{num_targets}, {s['complete_targets']} complete, the worst at {s['lowest_accuracy']:.1f} %"
    gained = f"e_t and m supply {s['information_gain_bits']:.0f} of the {s['target_bits_unprompted']:.0f} bits needed"
    lines["information"] = f"{gained} without a prompt, {s['bits_per_parameter']:.2f} per parameter"
    lines["likeness"] = psnr_text(s["psnr"])
    if s["text_ids_ahead"]:
        lines["text ids"] = f"with guidance, likelier than all visual codes at {s['text_ids_ahead']:.1f} % of positions"
    lines["parameters"] = f"{s['total_params']} for {total} tokens"
    if "steps" in s:
        took = f"{s['steps']} steps in {s['optimisation_seconds']:.1f} s"
        lines["optimisation"] = took if num_targets > 1 else f"{took}, the best at {s['best_step']}"
    lines["one pass"] = f"{s['one_pass_seconds']:.4f} s for {total} tokens"
    if "speedup" in s:
        lines["one by one"] = f"{s['autoregressive_seconds']:.2f} s: one pass is {s['speedup']:.0f} x faster"
    return lines


def experiment(models: Models, inputs: Inputs, record: Recorder) -> dict:
    """Run the experiment on the frozen models, and return its summary."""
    args = record.args
    # 1. The targets: pictures that the generator draws for the prompts, the user's own pictures, or a control.
    cache = ReferenceCache(args.save_dir / CACHE_FOLDER, record.settings)
    reference = make_reference(models, args, cache, inputs, record.saved)
    record.begin(reference)  # also removes an earlier run's results
    if args.control == "untrained":
        randomise_weights(models.generator, args.seed)  # only now, because the trained generator makes the reference
    given_m = inputs.m_source.m if inputs.m_source else None
    if args.capacity:  # instead of steps 2 and 3
        summary = find_capacity(models, reference.codes, given_m, record)
        record.write_capacity(summary)
        return summary
    # 2. Load e_t and m, or learn them until one pass of the frozen generator over [e_t, m, ..., m] emits the targets.
    if inputs.learned:
        proto_tokens, predictions = inputs.learned.proto_tokens(models.device), None
        optimisation, rows = {}, [{"target": k, "prompt": prompt} for k, prompt in enumerate(reference.prompts)]
    else:
        learning = learn(models, reference.codes, given_m, record)
        record.report_divergence(learning)
        proto_tokens, predictions = learning.best, learning.predictions
        optimisation = learning.summary()
        rows = learning.targets.rows(reference.prompts)
    # 3. Reconstruct the pictures, and measure how much information e_t and m give the generator.
    with tf32_if_asked(models):
        reconstruction = reconstruct(models, proto_tokens, reference.codes, predictions)
        targets = describe_targets(models, reference, reconstruction, rows, args.cfg_scale)
    summary = summarise(reference, reconstruction, targets, proto_tokens) | optimisation
    record.write_results(reconstruction, proto_tokens, summary, targets)
    return summary


def run_experiment(args: argparse.Namespace) -> None:
    """Prepare and run the experiment. Raises UserError, and Stopped if a stop signal comes while it learns."""
    with run_folder(args) as folder:
        tracker = Tracker(args)  # before anything slow, so that a wrong W&B setting is found at once
        inputs = read_inputs(args, folder)
        if inputs.learned:
            inherited = {name: inputs.learned.settings[name] for name in INHERITED_SETTINGS}
            args = argparse.Namespace(**vars(args) | inherited | {"prompts": inputs.learned.prompts})
            print(f"the earlier run decides the prompts, {', '.join(INHERITED_SETTINGS)}")
        models = load_models(args)
        if earlier := inputs.learned or inputs.m_source:
            refuse_other_models(models, args, earlier)
        settings = describe_run(args, models)
        if inputs.learned:
            settings["learned_with"] = inputs.learned.settings
        if args.resume:
            refuse_other_settings(folder, settings)
            if is_finished(folder):
                print(f"the run in {folder} is finished: there is nothing to resume")
                remove_unfinished(folder)  # a run killed right after its summary leaves its state behind
                return
        with Recorder(args, folder, settings, tracker) as record, on_stop_signal(tracker.end_by_signal):
            summary = experiment(models, inputs, record)
        print_results(summary, record)


def main(args: argparse.Namespace) -> None:
    try:
        run_experiment(args)
    except (UserError, OSError) as error:
        exit_with_error(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "try fewer targets, a smaller --image-size, --dtype bfloat16 or --gradient-checkpointing on"
        exit_with_error(f"out of memory: {remedy}")
    except Stopped as stopped:
        name = signal.Signals(stopped.code - 128).name
        print(f"stopped by {name}; --resume goes on from the last saved step", file=sys.stderr)
        raise


if __name__ == "__main__":
    main(ARGUMENTS)
