"""Measure the script against its peers, side by side in one process: `python tests/tools/bench.py step`.

    step      one optimisation step, and what it does beside the evaluation, against the usual recipe, against the best
              that torch ships (linear_cross_entropy with its options), and against its bare matrix products
    decode    the reference's tokens a second, against transformers' guided `generate` and against reading the weights
    prompts   tokens a second of 1, 2, 4, 8 and 16 prompts decoded together
    memory    peak memory that a step adds, each variant in a process of its own
    accuracy  steps to 90/95/99 % and best accuracy after some numbers of steps: our optimiser against AdamW and the
              usual recipe, or --candidates against one another; seconds a step; the steps that the first candidate
              needs to reach the final accuracy of the last
    many      --count captions of the demo, each with its own m: evaluations and time when they learn together, against
              one after another in one process, and against --count runs of the script, of which --singles are timed
    limit     this machine's matrix products and memory reads alone
    targets   seconds a step and a target for 1 to 32 targets at a time, each with an m of its own
    start     seconds of --help, imports, loading the demo model
    launches  operations of a step and of a decoded token: each is a kernel launch on a GPU

On any device and in any precision: --device cuda --dtype bfloat16. Repeats are interleaved (ours, usual, floor, ours,
...), and a figure is the median with minimum and maximum: machines are noisy, so only the ratios of one run mean
something. Peers are written plainly from their public definitions.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from support.builders import optimise, reference_of, take_step  # noqa: E402
from support.contract import CAPTIONS, OTHER_CAPTIONS, SEEDS, USUAL_RECIPE  # noqa: E402

import verify_proto_tokens as vpt  # noqa: E402

CPU = torch.device("cpu")
TEXT_IDS, CODES = 151_672, 64_000
SHAPES = {
    "0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864},
    "1.5B": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960},
}


# ----------------------------------------------------------------------------------------------------------------------
# Models of random weights


def build_models(args: argparse.Namespace) -> vpt.Models:
    """Build a generator with random weights, in a real model's shape and vocabulary or in the demo model's."""
    if args.shape == "demo":
        config = Qwen2Config.from_pretrained(vpt.DEMO_FOLDER / "generator")
        text_ids, codes = 1401, config.vocab_size - 1401
    else:
        text_ids, codes = TEXT_IDS, CODES
        config = Qwen2Config(
            vocab_size=text_ids + codes, num_key_value_heads=2, tie_word_embeddings=False, **SHAPES[args.shape]
        )
    config._attn_implementation = "sdpa_without_gqa"
    torch.manual_seed(0)
    with torch.device("meta"):
        generator = Qwen2ForCausalLM(config)
    generator = generator.to(args.dtype).to_empty(device=args.device)
    for parameter in generator.parameters():
        parameter.data.normal_(0, 0.02)
    for name, parameter in generator.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
    # Buffers (the rotary frequencies) have no values on the meta device.
    generator.model.rotary_emb = type(generator.model.rotary_emb)(config).to(args.device)
    return vpt.Models(
        generator=generator.eval().requires_grad_(False),
        text_tokenizer=NumberTokenizer(),
        vq_decoder=None,
        vq_encoder=None,
        vocabulary=args.vocabulary,
        visual_offset=text_ids,
        codebook_size=codes,
        factor=16,
        precision=args.precision,
        repetition_penalty=1.0,
        generator_fingerprint="",
        vq_fingerprint="",
    )


class NumberTokenizer:
    """Stand in for a text tokenizer where weights are random: turn a prompt's words into arbitrary text ids."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [hash_of(word) % 1000 for word in text.split()]}

    def get_vocab(self) -> dict[str, int]:
        return {}


def hash_of(word: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(word))


def script_arguments(args: argparse.Namespace, *extra: object) -> argparse.Namespace:
    return vpt.parse_args(["--demo", "--device", str(args.device), *map(str, extra)])


# ----------------------------------------------------------------------------------------------------------------------
# Timing and reporting


def interleaved(
    candidates: dict[str, Callable], repeats: int, device: torch.device = CPU, warm_up: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each candidate, called `repeats` times in turn after `warm_up` untimed calls of each."""
    for _ in range(warm_up):
        for call in candidates.values():
            call()
    seconds = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            started = vpt.synchronised_time(device)
            call()
            seconds[name].append(vpt.synchronised_time(device) - started)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cpu_lines() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def machine(device: torch.device = CPU) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {versions}"
    model = next((row.split(": ")[1] for row in cpu_lines() if row.startswith("model name")), platform.processor())
    return f"{model}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"


def product_rate(args: argparse.Namespace) -> float:
    """Measure multiplications and additions a second of a large product: the device's peak in this precision."""
    size = 8192 if args.device.type == "cuda" else 2048
    x = torch.randn(size, size, device=args.device, dtype=args.dtype)
    return 2 * size**3 / min(interleaved({"product": lambda: x @ x}, 5, args.device)["product"])


def read_rate(args: argparse.Namespace) -> float:
    """Measure the bytes a second of reading memory."""
    large = torch.ones(2**28, device=args.device, dtype=args.dtype)
    seconds = min(interleaved({"read": lambda: large.sum()}, 5, args.device)["read"])
    return large.numel() * large.itemsize / seconds


def table(title: str, rows: list[tuple], head: tuple[str, ...], device: torch.device = CPU) -> None:
    print(f"\n{title}\n{machine(device)}\n")
    lines = [head, *[tuple(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def report(
    title: str,
    seconds: dict[str, list[float]],
    device: torch.device,
    least: float,
    peak: str,
    unit: str = "s",
    scale: Callable = lambda x: x,
) -> dict:
    """Print one table; return what --json stores. `scale` turns seconds into the figure shown.

    `least`: the seconds that the arithmetic, or the reading, would take at the device's measured `peak`.
    """
    figures = {name: spread([scale(value) for value in values]) for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, figure in figures.items():
        shares = medians[name] / medians["ours"], f"{100 * least / medians[name]:.0f} %"
        rows.append((name, figure["median"], figure["min"], figure["max"], *shares))
    table(title, rows, ("", f"median ({unit})", "min", "max", "time / ours", "of the peak"), device)
    print(f"peak: {peak}, measured in this run")
    ratios = {name: medians[name] / medians["ours"] for name in medians if name != "ours"}
    return {"unit": unit, "figures": figures, "time_to_ours": ratios, "peak": peak}


# ----------------------------------------------------------------------------------------------------------------------
# One step


def usual_loss(generator: Qwen2ForCausalLM, parameters: list[Tensor], target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Run the usual recipe forward and backward: float32 logits [B, N, V] of all positions and ids, cross-entropy."""
    e_t, m = parameters
    filler = m.expand(target_ids.shape[1] - 1, -1)[None]
    inputs_embeds = torch.cat((e_t[:, None], filler), dim=1).to(generator.dtype)
    logits = generator(inputs_embeds=inputs_embeds, use_cache=False).logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), target_ids.flatten())
    loss.backward()
    return loss, logits


def usual_step(generator, parameters: list[Tensor], optimizer: torch.optim.AdamW, target_ids: Tensor) -> None:
    """Take one step as usually written: clipping, separate top-1 and top-5 passes, an `.item()` for every number."""
    optimizer.zero_grad()
    loss, logits = usual_loss(generator, parameters, target_ids)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    with torch.no_grad():
        top1 = (logits.argmax(-1) == target_ids).float().mean()
        top5 = (logits.topk(5).indices == target_ids[..., None]).any(-1).float().mean()
        for number in (loss, top1, top5, grad_norm, *(parameter.norm() for parameter in parameters)):
            number.item()


def stock_step(generator, parameters: list[Tensor], optimizer: torch.optim.AdamW, target_ids: Tensor) -> None:
    """Take one step with the best that torch ships for a large head: never all logits at once, but no accuracy."""
    optimizer.zero_grad()
    e_t, m = parameters
    filler = m.expand(target_ids.shape[1] - 1, -1)[None]
    inputs_embeds = torch.cat((e_t[:, None], filler), dim=1).to(generator.dtype)
    hidden_states = generator.model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
    options = torch.nn.LinearCrossEntropyOptions()
    weight = generator.lm_head.weight
    F.linear_cross_entropy(hidden_states[0], weight, target_ids[0], options=options).backward()
    optimizer.step()


def matrix_products(models: vpt.Models, num_tokens: int) -> Callable:
    """Return a function that computes one step's products alone: of linear layers and attention, in both directions.

    On CUDA it is one graph, so that launching them costs nothing.
    """
    config, head = models.generator.config, models.head
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    like = {"device": head.device, "dtype": head.dtype}
    x = {size: torch.randn(num_tokens, size, **like) for size in {config.hidden_size, config.intermediate_size}}
    query = torch.randn(heads, num_tokens, width, **like)
    scores = torch.randn(heads, num_tokens, num_tokens, **like)

    @torch.no_grad()
    def products() -> None:
        for layer in models.generator.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    out = torch.matmul(x[module.in_features], module.weight.T)
                    torch.matmul(out, module.weight)
            for _ in range(2):  # scores and values; each has one product forwards and two backwards
                torch.matmul(query, query.transpose(1, 2))
                torch.matmul(scores, query)
                torch.matmul(scores.transpose(1, 2), query)
        for rows in head.split(4096):
            torch.matmul(torch.matmul(x[config.hidden_size], rows.T), rows)

    return vpt.as_cuda_graph(products) if head.device.type == "cuda" else products


def step_operations(models: vpt.Models, num_tokens: int) -> int:
    """Count the multiplications and additions of one step's products."""
    config = models.generator.config
    linear = [m.weight.numel() for m in models.generator.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    of_products = 4 * num_tokens * (sum(linear) + models.head.numel())  # forwards, and back to the input
    return of_products + 12 * num_tokens**2 * config.hidden_size * config.num_hidden_layers


def bench_step(args: argparse.Namespace) -> dict:
    models, num_tokens = build_models(args), args.num_tokens or 256
    codes = random_codes(models, num_tokens)
    target_ids = codes + models.visual_offset
    agreement = compare_gradients(args, dataclasses.replace(models, vocabulary="full"), codes)
    parameters = [torch.randn(1, models.hidden_size, device=args.device).requires_grad_() for _ in range(2)]  # e_t, m
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    candidates = {
        "ours": endless_steps(args, models, codes),
        "ours but the evaluation": rest_of_step(args, models, codes),
        "usual": lambda: usual_step(models.generator, parameters, optimizer, target_ids),
        "floor": matrix_products(models, num_tokens),
    }
    if "stock" in args.peers:
        candidates["stock"] = lambda: stock_step(models.generator, parameters, optimizer, target_ids)
    seconds = interleaved(candidates, args.repeats, args.device)
    rate = product_rate(args)
    least = step_operations(models, num_tokens) / rate
    title = (
        f"one optimisation step, shape {args.shape}, N = {num_tokens}, vocabulary {args.vocabulary}, {args.precision}"
    )
    return report(title, seconds, args.device, least, f"{rate / 1e12:.3g} TFLOP/s of a large product") | agreement


def random_codes(models: vpt.Models, num_tokens: int, batch: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randint(models.codebook_size, (batch, num_tokens), generator=rng).to(models.device)


def endless_steps(args: argparse.Namespace, models: vpt.Models, codes: Tensor, *options: object) -> Callable:
    """Return a function that takes one step of the script's own optimisation at each call."""
    endless = script_arguments(args, "--num-steps", 10**6, "--target-accuracy", 0, *options)
    learning = vpt.Optimisation(models, codes, endless)
    return lambda: take_step(learning)


def rest_of_step(args: argparse.Namespace, models: vpt.Models, codes: Tensor) -> Callable:
    """Return a function that takes a step of the script's own optimisation, but always reuses the first evaluation."""
    own_step, evaluate, evaluations = endless_steps(args, models, codes), vpt.loss_and_gradient, []

    def evaluate_once(*arguments) -> vpt.Predictions:
        if not evaluations:
            evaluations.append(evaluate(*arguments))
        return evaluations[0]

    def step() -> None:
        with mock.patch.object(vpt, "loss_and_gradient", evaluate_once):
            own_step()

    return step


def compare_gradients(args: argparse.Namespace, models: vpt.Models, codes: Tensor) -> dict[str, float]:
    """Return relative differences of our loss and gradient from the plain ones: full vocabulary, same embeddings."""
    ours = vpt.initial_proto_tokens(models, 1, script_arguments(args, "--seed", 7))
    plain = [ours.e_t.detach()[0].clone().requires_grad_(), ours.m.detach().clone().requires_grad_()]
    predictions = vpt.loss_and_gradient(models, ours, codes, targets_per_pass=1)
    loss, _ = usual_loss(models.generator, plain, codes + models.visual_offset)
    of_loss = abs(predictions.losses.mean().item() / loss.item() - 1)
    gradient = torch.cat([parameter.grad.flatten() for parameter in plain])
    of_gradient = ((ours.points.grad[0] - gradient).norm() / gradient.norm()).item()
    print(f"against the plain step, loss differs by {of_loss:.1e}, gradient by {of_gradient:.1e} (relative)")
    return {"loss_difference": of_loss, "gradient_difference": of_gradient}


# ----------------------------------------------------------------------------------------------------------------------
# Launches


class Operations(TorchDispatchMode):
    """Count operations that launch a kernel on a GPU: all except views, uninitialised tensors, and float64.

    Only numbers on the host are float64.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        on_host = isinstance(result, Tensor) and result.dtype == torch.float64
        self.count += not operation.is_view and "empty" not in operation.name() and not on_host
        return result


def operations_of(work: Callable) -> int:
    work()  # the first call does extra work
    with Operations() as operations:
        work()
    return operations.count


def bench_launches(args: argparse.Namespace) -> dict:
    """Count the operations of a step and of a decoded token, each a launch on a GPU; this can be done on a CPU."""
    models, num_tokens = build_models(args), args.num_tokens or 256
    codes = random_codes(models, num_tokens)
    parameters = [torch.randn(1, models.hidden_size, device=args.device).requires_grad_() for _ in range(2)]
    optimizer, options = torch.optim.AdamW(parameters, lr=0.01), script_arguments(args)
    learning = vpt.Optimisation(models, codes, options)
    take_step(learning)
    predictions = learning.evaluate()

    def usual() -> None:
        usual_step(models.generator, parameters, optimizer, codes + models.visual_offset)

    def rest_of_step() -> None:
        vpt.numbers_of(predictions, learning.proto_tokens, learning.optimizer)
        learning.keep_best(torch.tensor([True]), predictions)
        learning.optimizer.step(predictions.losses.mean(1))

    decodings = [
        operations_of(lambda n=n: vpt.generate_visual_codes(models, ["a red apple"], n, options)) for n in (4, 12)
    ]
    counts = {
        "the evaluation of a step": operations_of(learning.evaluate),
        "its numbers, best embeddings and update": operations_of(rest_of_step),
        "a step of the usual recipe": operations_of(usual),
        "a decoded token": (decodings[1] - decodings[0]) / 8,
    }
    table(f"operations, shape {args.shape}, N = {num_tokens}", list(counts.items()), ("", "launches"), args.device)
    return counts


# ----------------------------------------------------------------------------------------------------------------------
# Decoding the reference


def guided_generate(models: vpt.Models, num_tokens: int) -> Tensor:
    """Decode greedily by transformers' own guided decoding: two prompts, two passes a token, all logits."""
    prompt, negative = (
        torch.tensor([models.text_tokenizer(text)["input_ids"]], device=models.device)
        for text in (vpt.conditional_prompt("a red apple"), vpt.negative_prompt())
    )
    text_ids = list(range(models.visual_offset))
    out = models.generator.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        negative_prompt_ids=negative,
        guidance_scale=6.0,
        do_sample=False,
        suppress_tokens=text_ids,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
    )
    return out[0, prompt.shape[1] :] - models.visual_offset


def read_weights(models: vpt.Models) -> Callable:
    """Return a function that reads once every byte that decoding a token needs: the least that a token can cost."""
    tensors = [p for p in models.generator.model.layers.parameters() if p.ndim > 1] + [models.visual_head]

    @torch.no_grad()
    def read() -> None:
        for tensor in tensors:
            tensor.view(-1).sum()

    return vpt.as_cuda_graph(read) if models.device.type == "cuda" else read


def weight_bytes(models: vpt.Models) -> int:
    weights = [p for p in models.generator.model.layers.parameters() if p.ndim > 1] + [models.visual_head]
    return sum(weight.numel() * weight.itemsize for weight in weights)


def bench_decode(args: argparse.Namespace) -> dict:
    models, num_tokens = build_models(args), args.num_tokens or 256
    options, read, outputs = script_arguments(args, "--top-k", 1), read_weights(models), {}

    def ours() -> None:
        outputs["ours"] = vpt.generate_visual_codes(models, ["a red apple"], num_tokens, options)[0]

    def usual() -> None:
        outputs["usual"] = guided_generate(models, num_tokens)

    def floor() -> None:
        for _ in range(num_tokens):
            read()

    candidates = {"ours": ours, "usual": usual, "floor": floor}
    seconds = interleaved(candidates, args.repeats, args.device, warm_up=0)
    same, rate = int((outputs["ours"][0] == outputs["usual"]).sum()), read_rate(args)
    title = f"decoding {num_tokens} tokens with guidance, greedy, shape {args.shape}, {args.precision}"
    least, peak = num_tokens * weight_bytes(models) / rate, f"{rate / 1e9:.3g} GB/s of reading"
    result = report(title, seconds, args.device, least, peak, "tokens/s", lambda value: num_tokens / value)
    print(f"{same} of {num_tokens} greedy tokens are those of `generate`")
    return result | {"same_tokens": same, "num_tokens": num_tokens}


def bench_prompts(args: argparse.Namespace) -> dict:
    """Measure tokens a second of 1, 2, 4, 8 and 16 prompts decoded together; their warm-up is not timed."""
    models, num_tokens = build_models(args), args.num_tokens or 64
    options, rates = script_arguments(args), {}
    for _ in range(args.repeats):
        for batch in (1, 2, 4, 8, 16):
            prompts = [f"a red apple and {k} pears" for k in range(batch)]
            _, seconds = vpt.generate_visual_codes(models, prompts, num_tokens, options)
            rates.setdefault(batch, []).append(batch * num_tokens / seconds)
    medians = {batch: statistics.median(values) for batch, values in rates.items()}
    rows = [(batch, rate, rate / medians[1]) for batch, rate in medians.items()]
    title = f"decoding {num_tokens} tokens of several prompts together, shape {args.shape}, {args.precision}"
    table(title, rows, ("prompts", "tokens/s", "gain"), args.device)
    return {"tokens_a_second": medians}


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_memory(args: argparse.Namespace) -> dict:
    """Return the peak that one step adds to the memory held before it; run this in a process of its own."""
    models, num_tokens = build_models(args), args.num_tokens or 2048
    codes = random_codes(models, num_tokens)
    target_ids = codes + models.visual_offset
    proto_tokens = vpt.initial_proto_tokens(models, 1, script_arguments(args))
    like = {"device": args.device, "requires_grad": True}
    parameters = [torch.randn(1, models.hidden_size, **like) for _ in range(2)]
    hidden_states = torch.randn(1, num_tokens, models.hidden_size, dtype=args.dtype, **like)
    before = peak_bytes(args.device)
    if args.variant == "usual":
        usual_loss(models.generator, parameters, target_ids)
    elif args.variant == "usual loss":
        F.cross_entropy((hidden_states @ models.head.T).float().flatten(0, 1), target_ids.flatten()).backward()
    elif args.variant == "loss":
        with mock.patch.object(vpt, "one_pass", lambda _, each, *__: hidden_states + 0 * each.points.sum()):
            vpt.loss_and_gradient(models, proto_tokens, codes, targets_per_pass=1)
    else:
        with vpt.gradient_checkpointing(models.generator, args.variant == "checkpointing"):
            vpt.loss_and_gradient(models, proto_tokens, codes, targets_per_pass=1)
    return {"bytes": peak_bytes(args.device) - before}


def bench_memory(args: argparse.Namespace) -> dict:
    num_tokens, gib = args.num_tokens or 2048, 2**30
    found = {}
    for variant in ("loss", "usual loss", "step", "checkpointing", "usual"):
        command = [sys.executable, __file__, "memory", "--shape", args.shape, "--num-tokens", str(num_tokens)]
        command += ["--device", str(args.device), "--dtype", args.precision]
        # Large blocks go back to the system at once, for all variants alike: what is measured is what a step holds, not
        # what the allocator keeps for later.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        output = subprocess.run([*command, "--variant", variant], env=environment, capture_output=True, text=True)
        lines = output.stdout.strip().splitlines()
        found[variant] = json.loads(lines[-1])["bytes"] if output.returncode == 0 else math.inf
    rows = [(name, value / gib, found["usual"] / value) for name, value in found.items()]
    title = f"peak memory that a step adds, shape {args.shape}, N = {num_tokens}, full vocabulary, {args.precision}"
    table(title, rows, ("", "GiB", "usual / this"), args.device)
    return {
        "bytes": found,
        "loss_ratio": found["usual loss"] / found["loss"],
        "ratio": found["usual"] / found["step"],
        "checkpointing_ratio": found["usual"] / found["checkpointing"],
    }


# ----------------------------------------------------------------------------------------------------------------------
# Accuracy for the time


def steps_to(goal: float, curve: list[float]) -> int | None:
    """Return the first step with at least this best accuracy, or None."""
    return next((step for step, best in enumerate(curve, 1) if best >= goal), None)


def bench_accuracy(args: argparse.Namespace) -> dict:
    """Learn 8 captions x 2 seeds with each recipe; a step is one evaluation with every optimiser.

    The captions learn together, each with its own m, and therefore as each would alone.
    """
    recipes = {"ours": "", "AdamW": "--optimizer adamw", "usual": USUAL_RECIPE}
    if args.candidates:
        recipes = {options or "ours": options for options in args.candidates}
    generator = ("--model-path", args.model_path, "--vq-model-ckpt", vpt.DEMO_FOLDER / "vq")
    chosen = [str(word) for word in (generator if args.model_path else ("--demo",))]
    chosen += [
        "--device",
        str(args.device),
        "--dtype",
        args.precision,
        "--image-size",
        str(args.image_size),
    ]
    chosen += ["--num-steps", str(args.num_steps), *args.options.split()]
    models = vpt.load_models(vpt.parse_args(chosen))
    goals, marks = (90, 95, 99), [step for step in (50, 100, 200, 400, 1000) if step <= args.num_steps]
    rows, result, means_of_steps = [], {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in recipes.items():
            curves, seconds, evaluations = [], 0.0, 0
            for seed in SEEDS:
                settings = ["--seed", str(seed), "--save-dir", folder, "--m", "own", *recipe.split()]
                settings += [word for caption in CAPTIONS for word in ("--prompt", caption)]
                options = vpt.parse_args([*chosen, *settings])
                learning, rows_of_steps = optimise(models, options, reference_of(models, options).codes)
                seconds += learning.seconds
                evaluations += sum(learning.targets["steps"].tolist())
                for k in range(len(CAPTIONS)):
                    # A target has no numbers before its batch begins.
                    own = [row[f"targets/{k}/best_accuracy"] for row in rows_of_steps]
                    curves.append([best for best in own if best is not None])
                for row in learning.targets.rows(CAPTIONS):
                    found = f"{row['best_accuracy']:.1f} % after {row['steps']}"
                    print(f"{name}; {row['prompt']}, seed {seed}: {found}", flush=True)
            # A target that never reached the goal, or diverged, counts as if it had reached it in the last step.
            reached = [[steps_to(goal, curve) or args.num_steps for curve in curves] for goal in goals]
            medians = [statistics.median(steps) for steps in reached]
            at_marks = [spread([curve[min(step, len(curve)) - 1] for curve in curves]) for step in marks]
            means = [statistics.fmean(curve[min(step, len(curve)) - 1] for curve in curves) for step in marks]
            bands = (f"{mean:.1f} ({at['min']:.0f}-{at['max']:.0f})" for mean, at in zip(means, at_marks, strict=True))
            a_step = seconds / evaluations
            rows.append((name, *(f"{median:.0f}" for median in medians), *bands, f"{a_step:.3f}"))
            result[name] = {"curves": curves, "steps": dict(zip(goals, medians, strict=True)), "seconds a step": a_step}
            every_step = range(1, args.num_steps + 1)
            means_of_steps.append(
                [statistics.fmean(curve[min(step, len(curve)) - 1] for curve in curves) for step in every_step]
            )
    which = (
        f"{args.model_path or 'demo model'}, {args.image_size} px, {len(CAPTIONS) * len(SEEDS)} targets {args.options}"
    )
    steps_to_goals = (f"steps to {goal} %" for goal in goals)
    head = ("", *steps_to_goals, *(f"best at {step} (%)" for step in marks), "s a step")
    table(f"{which}: median steps; mean best accuracy, lowest to highest", rows, head, args.device)
    first, last = next(iter(recipes)), list(recipes)[-1]
    goal = means_of_steps[-1][-1]
    of_last, of_first = steps_to(goal, means_of_steps[-1]), steps_to(goal, means_of_steps[0])
    print(f"a mean of {goal:.1f} % takes {of_last} steps by {last}, {of_first} by {first}")
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Several targets, start-up, the machine alone


def bench_targets(args: argparse.Namespace) -> dict:
    models, num_tokens = build_models(args), args.num_tokens or 64
    seconds = {}
    for batch in (1, 2, 4, 8, 16, 32):
        with mock.patch.object(vpt, "targets_at_once", lambda models, num_tokens, batch=batch: batch):
            step = endless_steps(args, models, random_codes(models, num_tokens, batch), "--m", "own")
        found = interleaved({"step": step}, args.repeats, args.device)
        seconds[batch] = statistics.median(found["step"])
    rows = [(batch, value, value / batch, seconds[1] / (value / batch)) for batch, value in seconds.items()]
    title = f"one step for B targets at once, shape {args.shape}, N = {num_tokens}, {args.precision}"
    table(title, rows, ("B", "s a step", "s a step and target", "gain"), args.device)
    return {"seconds": seconds}


def many_captions(count: int) -> list[str]:
    """Return captions that put each thing of all captions on every background."""
    parts = [re.fullmatch("(.+?) ((?:on|in|under) .+)", caption).groups() for caption in CAPTIONS + OTHER_CAPTIONS]
    backgrounds = dict.fromkeys(background for _, background in parts)
    return [f"{thing} {background}" for background in backgrounds for thing, _ in parts][:count]


def bench_many(args: argparse.Namespace) -> dict:
    """Compare learning together and alone, on the CPU; all share references, which are decoded before any timing."""
    captions = many_captions(args.count)
    with tempfile.TemporaryDirectory() as folder:
        prompts_file = Path(folder) / "prompts.txt"
        prompts_file.write_text("\n".join(captions))
        shared = ["--demo", "--device", "cpu", "--m", "own", "--save-dir", folder, *args.options.split()]
        whole = [*shared, "--prompts-file", str(prompts_file)]
        options = vpt.parse_args(whole)
        models = vpt.load_models(options)
        codes = reference_of(models, options).codes

        def learn(codes: Tensor) -> vpt.Optimisation:
            return optimise(models, options, codes)[0]

        def run(words: list[str]) -> None:
            command = [sys.executable, str(ROOT / "verify_proto_tokens.py"), *words]
            subprocess.run(command, check=True, capture_output=True)

        def seconds_of(work: Callable) -> tuple[object, float]:
            started = time.perf_counter()
            return work(), time.perf_counter() - started

        learn(codes[:1])  # warms up
        together, seconds = seconds_of(lambda: learn(codes))
        alone, seconds_alone = seconds_of(lambda: [learn(row) for row in codes.split(1)])
        _, seconds_run = seconds_of(lambda: run(whole))
        singles = captions[:: max(1, len(captions) // args.singles)][: args.singles]
        _, seconds_singles = seconds_of(lambda: [run([*shared, "--prompt", caption]) for caption in singles])
        seconds_singles *= len(captions) / len(singles)
    needed = sum(learning.step for learning in alone)
    evaluations = int(together.targets["steps"].sum())
    rows = [
        ("evaluations, against those of each alone", evaluations, needed, evaluations / needed),
        ("optimisation (s), against one after another", seconds, seconds_alone, seconds / seconds_alone),
        (f"run (s), against {len(captions)} runs", seconds_run, seconds_singles, seconds_run / seconds_singles),
    ]
    complete = sum(accuracy == 100 for accuracy in together.targets["best_accuracy"].tolist())
    title = f"{len(captions)} targets with an m of their own {args.options}; {complete} complete"
    table(title, rows, ("", "together", "alone", "ratio"))
    return {"rows": rows, "complete": complete}


def bench_start(args: argparse.Namespace) -> dict:
    """Time whole processes; any such script has to pay for `import torch, transformers`."""
    load = f"import verify_proto_tokens as v; v.load_models(v.parse_args(['--demo', '--device', '{args.device}']))"
    commands = {
        "--help": [str(ROOT / "verify_proto_tokens.py"), "--help"],
        "import torch, transformers": ["-c", "import torch; from transformers import AutoTokenizer, Qwen2ForCausalLM"],
        "import the script": ["-c", "import verify_proto_tokens"],
        "import and load the demo": ["-c", load],
    }

    def start(arguments: list[str]) -> None:
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)

    seconds = interleaved({name: lambda c=c: start(c) for name, c in commands.items()}, args.repeats)
    figures = {name: spread(values) for name, values in seconds.items()}
    table("start-up of a process", [(n, *f.values()) for n, f in figures.items()], ("", "median (s)", "min", "max"))
    return figures


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x [P, I] @ weight.T [I, O] as a 1x1 convolution, which uses oneDNN where torch.matmul uses MKL."""
    return F.conv2d(x[None].mT[:, :, None], weight[:, :, None, None])[0, :, 0].T


def bench_limit(args: argparse.Namespace) -> dict:
    """Measure the device: GFLOP/s of a layer's product (on a CPU, with either library), GB/s of reading weights."""
    like = {"device": args.device, "dtype": args.dtype}
    x, weight, large = (torch.randn(*shape, **like) for shape in ((256, 896), (4864, 896), (2**28,)))
    flops = 2 * 256 * 896 * 4864
    work = {"matmul": lambda: x @ weight.T, "convolution": lambda: convolved(x, weight), "read": lambda: large.sum()}
    seconds = interleaved(work, 4 * args.repeats, args.device)
    rates = {name: [flops / value / 1e9 for value in seconds[name]] for name in ("matmul", "convolution")}
    rates["read"] = [large.numel() * large.itemsize / value / 1e9 for value in seconds["read"]]
    units = {"matmul": "GFLOP/s, a product", "convolution": "GFLOP/s, as a 1x1 convolution", "read": "GB/s"}
    figures = {name: spread(values) for name, values in rates.items()}
    rows = [(units[name], *figure.values()) for name, figure in figures.items()]
    table(f"the device alone, {args.precision}", rows, ("", "median", "min", "max"), args.device)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--device", type=torch.device, default=CPU, help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "tf32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=("stock",),
        default=["stock"],
        help="for step: peers beside the usual recipe (default: stock)",
    )
    parser.add_argument("--shape", choices=("demo", *SHAPES), default="0.5B")
    parser.add_argument("--num-tokens", type=int, metavar="N", help="(default: 256; memory 2048; prompts, targets 64)")
    parser.add_argument("--image-size", type=int, default=256, metavar="PIXELS", help="for accuracy (default: 256)")
    parser.add_argument(
        "--model-path", metavar="FOLDER", help="for accuracy: a model of small_models.py (default: demo)"
    )
    parser.add_argument("--num-steps", type=int, default=1000, help="for accuracy (default: %(default)s)")
    parser.add_argument("--options", default="", help="for accuracy, many: such as '--control random'")
    parser.add_argument("--candidates", nargs="+", metavar="OPTIONS", help="for accuracy: options of each; '': none")
    parser.add_argument("--count", type=int, default=64, help="for many: captions (default: %(default)s)")
    parser.add_argument("--singles", type=int, default=8, help="for many: single runs to time (default: %(default)s)")
    parser.add_argument("--vocabulary", choices=("full", "visual"), default="full")
    parser.add_argument("--repeats", type=int, default=5, metavar="R")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.precision = args.dtype
    args.dtype = torch.float32 if args.precision == "tf32" else getattr(torch, args.precision)
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device.index or 0)  # graphs and streams use the current device
    if args.variant:
        print(json.dumps(measure_memory(args)))
        return
    result = MODES[args.mode](args)
    if args.json:
        args.json.write_text(json.dumps(result | {"machine": machine(args.device)}, indent=2) + "\n")


MODES = {"step": bench_step, "decode": bench_decode, "memory": bench_memory, "accuracy": bench_accuracy}
MODES |= {
    "many": bench_many,
    "prompts": bench_prompts,
    "limit": bench_limit,
    "targets": bench_targets,
    "start": bench_start,
    "launches": bench_launches,
}

if __name__ == "__main__":
    main()
