"""Check the script on a device, and measure it there: `python tests/tools/gpu_check.py`. No network is needed.

First whether it is right: greedy tokens against the CPU's; loss and gradient against the plain formula in each
precision; a whole run at 256 and 512 px, twice, with CUDA graphs, then killed and resumed, bit for bit; what each
precision learns at 512 px; and what running out of memory leaves. Then how quick it is: steps and tokens a second and
peak memory for each size of picture and precision, beside the bare products and the bare reading of the weights. Ends
with exit code 0 only if all that was checked holds, prints a table for the README, and writes gpu_check.json as it
goes. Meant for ten minutes on a large GPU. It was never run on one. On a CPU (--device cpu) it does less, on the demo
model: that is one of the tests.
"""

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from support.contract import STATE  # noqa: E402
from support.processes import ended, kill, start, start_pausing  # noqa: E402
from support.results import results_of  # noqa: E402
from tools import bench  # noqa: E402

import verify_proto_tokens as vpt  # noqa: E402

# After three steps, limits the memory of the process to what it has, and a little more.
STARVING = """
import contextlib, resource, sys
from pathlib import Path
import torch
import verify_proto_tokens as vpt

really_step, ballast = vpt.Recorder.keep_step, []

def step(record, row, learning):
    really_step(record, row, learning)
    if learning.step == 3 and learning.codes.is_cuda:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(learning.codes.device).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                ballast.append(torch.empty(2**17, dtype=torch.uint8, device=learning.codes.device))
    elif learning.step == 3:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), -1))
        with contextlib.suppress(MemoryError):
            while True:
                ballast.append(bytearray(2**17))
        del ballast[-64:]

vpt.Recorder.keep_step = step
vpt.main(vpt.parse_args(sys.argv[1:]))
"""


class Check:
    """Collect and print what holds and what does not."""

    def __init__(self):
        self.findings: list[dict] = []

    def holds(self, what: str, condition: bool, detail: str = "") -> None:
        self.findings.append({"what": what, "holds": bool(condition), "detail": detail})
        print(f"{'ok  ' if condition else 'FAIL'} {what}{f': {detail}' if detail else ''}", flush=True)

    def tried(self, what: str, work: Callable) -> None:
        """Run a check; if it raises an error, note that it does not hold, and go on."""
        try:
            work()
        except (Exception, SystemExit) as error:
            self.holds(what, False, f"{type(error).__name__}: {vpt.main_line(error)}")


def on(args: argparse.Namespace, **changes: object) -> argparse.Namespace:
    """Return arguments for the functions of the bench."""
    plain = {"device": args.device, "dtype": torch.float32, "precision": "float32"}
    plain |= {"shape": "demo", "vocabulary": "full", "num_tokens": None}
    return argparse.Namespace(**plain | changes)


# ----------------------------------------------------------------------------------------------------------------------
# Is it right?


def check_tokens(check: Check, args: argparse.Namespace, shape: str, num_tokens: int) -> None:
    """Check that greedy tokens in float32 are the CPU's."""
    options = vpt.parse_args(["--demo", "--top-k", "1"])
    codes = []
    models = bench.build_models(on(args, shape=shape, device=bench.CPU))
    for device in (bench.CPU, args.device):
        models.generator.to(device)
        codes.append(vpt.generate_visual_codes(models, ["a red apple", "a cat"], num_tokens, options)[0].cpu())
    same = int((codes[0] == codes[1]).sum())
    check.holds(f"greedy tokens of the {shape} shape are the CPU's", same == codes[0].numel(), f"{same} equal")


def plain_loss_and_gradient(models: vpt.Models, proto_tokens: vpt.ProtoTokens, codes: torch.Tensor) -> tuple:
    """Compute loss and gradient by the plain formula, in float32."""
    generator = models.generator
    inputs = proto_tokens.inputs(codes.shape[1]).detach().requires_grad_()
    logits = generator(inputs_embeds=inputs, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten() + models.visual_offset)
    (gradient,) = torch.autograd.grad(loss, inputs)
    return loss.item(), torch.cat((gradient[0, 0], gradient[0, 1:].sum(0))).cpu()


def precisions(args: argparse.Namespace) -> list[str]:
    """Return the precisions that this device has."""
    tf32 = ["tf32"] if vpt.pick_precision("auto", args.device) == "tf32" else []
    return ["float32", *tf32, "float16", "bfloat16"]


def check_gradients(check: Check, args: argparse.Namespace, shape: str) -> None:
    """Check loss and gradient in each precision against the plain formula in float32."""
    models = bench.build_models(on(args, shape=shape))
    codes = bench.random_codes(models, 64)
    proto_tokens = vpt.initial_proto_tokens(models, 1, vpt.parse_args(["--demo"]))
    loss, gradient = plain_loss_and_gradient(models, proto_tokens, codes)
    # In this order, as the weights lose bits on the way.
    limits = {"float32": (1e-4, 0.9999), "tf32": (1e-3, 0.999), "float16": (0.01, 0.99), "bfloat16": (0.02, 0.98)}
    for name in precisions(args):
        of_loss, of_gradient = limits[name]
        models = replace(models, precision=name)
        generator = models.generator.to(torch.float32 if name == "tf32" else getattr(torch, name))
        generator.model.rotary_emb.float()
        with vpt.tf32_if_asked(models):
            predictions = vpt.loss_and_gradient(models, proto_tokens, codes, targets_per_pass=1)
        ours = proto_tokens.points.grad[0].cpu()
        difference = abs(predictions.losses.mean().item() / loss - 1)
        likeness = F.cosine_similarity(ours, gradient, dim=0).item()
        close = difference < of_loss and likeness > of_gradient
        detail = f"loss differs by {difference:.1e}, cosine of the gradients {likeness:.6f}"
        check.holds(f"loss and gradient of the {shape} shape in {name} are the plain formula's", close, detail)


def check_runs(check: Check, args: argparse.Namespace, folder: Path, size: int) -> None:
    """Check that whole runs agree: made twice, with CUDA graphs, killed and resumed; each decodes its own reference."""
    options = ["--demo", "--device", str(args.device), "--save-dir", str(folder), "--save-every", "5"]
    options += ["--num-steps", str(args.num_steps), "--image-size", str(size), "--force-generate"]
    first, second, killed = (folder / f"{name}{size}" for name in ("first", "second", "killed"))
    for run in (first, second):
        vpt.main(vpt.parse_args([*options, "--wandb-run-name", run.name]))
    summary = results_of(first)[2]
    what, accuracy = f"a demo run of {size} px", summary["best_accuracy"]
    if args.small or size == 512:
        check.holds(f"{what} learns", accuracy > 20, f"{accuracy:.1f} % in {args.num_steps} steps")
    else:
        check.holds(f"{what} reaches every token", accuracy == 100, f"{accuracy:.1f} %, {summary['steps']} steps")
    same = "the same tokens, history and summary"
    check.holds(f"two runs of {size} px have {same}", results_of(second) == results_of(first))
    if not args.small:
        vpt.main(vpt.parse_args([*options, "--cuda-graphs", "on", "--wandb-run-name", f"graphs{size}"]))
        graphs = results_of(folder / f"graphs{size}")
        check.holds(f"a run of {size} px with CUDA graphs has {same}", graphs == results_of(first))
    resumed = [*options, "--wandb-run-name", killed.name, "--resume"]
    kill(start_pausing(folder, 7, *resumed, seconds=300))
    vpt.main(vpt.parse_args(resumed))
    check.holds(f"a run of {size} px killed and resumed has {same}", results_of(killed) == results_of(first))


def check_learning(check: Check, args: argparse.Namespace, folder: Path) -> None:
    """Check that TF32 learns at 512 px as well as float32; print what half precision reaches."""
    options = ["--demo", "--device", str(args.device), "--save-dir", str(folder), "--image-size", "512"]
    options += ["--num-steps", "400"]
    accuracy = {}
    for name in precisions(args):
        vpt.main(vpt.parse_args([*options, "--dtype", name, "--wandb-run-name", name]))
        accuracy[name] = results_of(folder / name)[2]["best_accuracy"]
    told = ", ".join(f"{name} {value:.1f} %" for name, value in accuracy.items())
    close = abs(accuracy.get("tf32", accuracy["float32"]) - accuracy["float32"]) <= 5
    check.holds("TF32 learns 256 tokens as well as float32, in 400 steps", close, told)


def check_memory(check: Check, args: argparse.Namespace, folder: Path) -> None:
    """Check that running out of memory in the middle prints one line and leaves a state to resume from."""
    options = (
        "--demo",
        "--device",
        str(args.device),
        "--num-steps",
        "8",
        "--target-accuracy",
        "0",
        "--save-every",
        "2",
    )
    options += ("--wandb-run-name", "starved", "--save-dir", str(folder))
    env = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks return to the system, so that the limit refuses new ones
    end = ended(start([sys.executable, "-c", STARVING, *options], folder, env), timeout=300)
    lines = [line for line in end.err.splitlines() if "error" in line.lower()]
    told = end.code == 2 and len(lines) == 1 and "out of memory" in lines[0]
    check.holds("running out of memory prints one line", told, lines[-1][:160] if lines else f"exit code {end.code}")
    state = folder / "starved" / STATE
    check.holds(
        "the last saved state is left", state.exists() and vpt.read_state(state.parent)["learning"]["step"] >= 2
    )


# ----------------------------------------------------------------------------------------------------------------------
# How quick is it?


def measured(args: argparse.Namespace, models: vpt.Models, num_tokens: int) -> dict:
    """Measure steps a second, tokens a second and peak memory; return them with their shares of the floors."""
    codes, figures = bench.random_codes(models, num_tokens), {}
    take_step = bench.endless_steps(on(args), models, codes)
    candidates = {"step": take_step, "floor": bench.matrix_products(models, num_tokens)}
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
        take_step()
        figures["peak GB"] = torch.cuda.max_memory_reserved(args.device) / 1e9
        candidates["graphs"] = bench.endless_steps(on(args), models, codes, "--cuda-graphs", "on")
    seconds = bench.interleaved(candidates, args.repeats, args.device)
    best = {name: min(each) for name, each in seconds.items()}
    figures |= {"steps/s": 1 / best["step"], "of the products": best["floor"] / best["step"]}
    if "graphs" in best:
        figures["steps/s, graphs"] = 1 / best["graphs"]
    if num_tokens != args.sizes[0]:  # larger pictures are decoded as quickly, except for their caches
        return figures
    options = vpt.parse_args(["--demo", "--device", str(args.device)])
    if args.device.type == "cuda":
        options.cuda_graphs = "on"
        codes, seconds = vpt.generate_visual_codes(models, ["a red apple"], args.decoded, options)
        figures["tokens/s, graphs"] = codes.numel() / seconds
        options.cuda_graphs = "off"
    codes, seconds = vpt.generate_visual_codes(models, ["a red apple"], args.decoded, options)
    reading = min(bench.interleaved({"read": bench.read_weights(models)}, 3, args.device)["read"])
    rate = codes.numel() / seconds
    return figures | {"tokens/s": rate, "of the reading": rate * reading}


def measure(check: Check, args: argparse.Namespace) -> list[dict]:
    rows = []
    for shape in args.shapes:
        for precision in ["float32"] if args.small else precisions(args):
            dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
            models = bench.build_models(on(args, shape=shape, dtype=dtype, precision=precision))
            for num_tokens in args.sizes:
                row = {"shape": shape, "precision": precision, "N": num_tokens}
                try:
                    with vpt.tf32_if_asked(models):
                        rows.append(row | measured(args, models, num_tokens))
                except (vpt.UserError, RuntimeError) as error:
                    check.holds(f"{shape}, {precision}, N = {num_tokens} can be run", False, vpt.main_line(error))
                write(check, args, rows)
                gc.collect()
                if args.device.type == "cuda":
                    torch.cuda.empty_cache()
    return rows


def write(check: Check, args: argparse.Namespace, rows: list[dict]) -> None:
    """Write all that is known so far."""
    found = {"machine": bench.machine(args.device), "findings": check.findings, "figures": rows}
    args.json.write_text(json.dumps(found, indent=2) + "\n")


def print_table(rows: list[dict], machine: str) -> None:
    """Print the figures as a Markdown table for the README."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n{machine}, {time.strftime('%Y-%m-%d')}: `python tests/tools/gpu_check.py`\n")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        cells = [row.get(name, "") for name in head]
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=torch.device, default=default, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), metavar="FILE")
    parser.add_argument("--shapes", nargs="+", choices=("demo", "0.5B", "1.5B"), help="(default: 0.5B 1.5B; CPU: demo)")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="TOKENS", help="(default: 256 1024 2304 4096; CPU: 16)")
    args = parser.parse_args()
    args.small = args.device.type == "cpu"
    args.num_steps = 10 if args.small else 1000
    args.repeats = 2 if args.small else 20
    args.decoded = 16 if args.small else 128
    args.shapes = args.shapes or (["demo"] if args.small else ["0.5B", "1.5B"])
    args.sizes = args.sizes or ([16] if args.small else [256, 1024, 2304, 4096])
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device.index or 0)
    check, started, folder = Check(), time.monotonic(), Path(tempfile.mkdtemp(prefix="gpu_check-"))
    try:
        for shape, num_tokens in (("demo", 8),) if args.small else (("demo", 64), ("0.5B", 16), ("1.5B", 8)):
            check.tried(f"tokens of {shape}", lambda s=shape, n=num_tokens: check_tokens(check, args, s, n))
        for shape in ("demo",) if args.small else ("demo", "0.5B", "1.5B"):
            check.tried(f"gradients of {shape}", lambda s=shape: check_gradients(check, args, s))
        for size in (256,) if args.small else (256, 512):
            check.tried(f"runs of {size} px", lambda s=size: check_runs(check, args, folder, s))
        if not args.small:
            check.tried("learning", lambda: check_learning(check, args, folder))
        check.tried("memory", lambda: check_memory(check, args, folder))
        rows = measure(check, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_table(rows, bench.machine(args.device))
    failed = [finding for finding in check.findings if not finding["holds"]]
    write(check, args, rows)
    print(f"\n{len(check.findings)} checks, {len(failed)} failed, in {time.monotonic() - started:.0f} s; {args.json}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
