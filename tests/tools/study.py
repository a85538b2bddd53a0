"""The study of the README: what one pass can hold on the demo model, and what it cannot, over 8 captions x 2 seeds.

    python tests/tools/study.py FOLDER                # goes on where it was interrupted; prints the README's table

Every row is runs of the script as a user would start them; their folders stay in FOLDER. Eight targets share a run;
but for "shared m" and "reused m" each has an m of its own, and so learns as it would alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.contract import CAPTIONS, OTHER_CAPTIONS, SEEDS  # noqa: E402

OWN = ("--m", "own")
ROWS = {
    "plain: one e_t, one m": OWN,
    "K = 2 e_t": (*OWN, "--num-e-tokens", 2),
    "K = 4 e_t": (*OWN, "--num-e-tokens", 4),
    "K = 8 e_t": (*OWN, "--num-e-tokens", 8),
    "m shared by the 8": (),
    "m learned on 8 others, frozen": ("--m-from", "OTHERS"),
    "control: shuffled tokens": (*OWN, "--control", "shuffled"),
    "control: random tokens": (*OWN, "--control", "random"),
    "control: untrained generator": (*OWN, "--control", "untrained"),
}


def run(folder: Path, name: str, captions: tuple[str, ...], *options) -> dict:
    """One run of the script; its summary. A finished one is not repeated."""
    prompts = [word for caption in captions for word in ("--prompt", caption)]
    command = [sys.executable, ROOT / "verify_proto_tokens.py", "--demo", "--device", "cpu", "--resume", *prompts]
    command += ["--save-dir", folder, "--wandb-run-name", name, *options]
    started = time.monotonic()
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return json.loads((folder / name / "summary.json").read_text())


def mean_and_spread(values: list[float], digits: int = 1) -> str:
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def targets_of(summaries: list[dict], key: str) -> list[float]:
    return [summary[f"targets/{k}/{key}"] for summary in summaries for k in range(summary["num_targets"])]


def study_row(folder: Path, label: str, options: tuple, num_steps: int) -> list[str]:
    summaries = []
    for seed in SEEDS:
        common = ("--seed", seed, "--num-steps", num_steps)
        if "OTHERS" in options:
            run(folder, f"others_{seed}", OTHER_CAPTIONS, *common)
        given = [folder / f"others_{seed}" / "proto_tokens.safetensors" if o == "OTHERS" else o for o in options]
        name = "".join(letter if letter.isalnum() else "_" for letter in label)
        summaries.append(run(folder, f"{name}_{seed}", CAPTIONS, *common, *given))
    decibels = [value for value in targets_of(summaries, "psnr") if value is not None]
    whole = sum(value is None for value in targets_of(summaries, "psnr"))
    return [
        label,
        mean_and_spread(targets_of(summaries, "best_accuracy")),
        f"{min(targets_of(summaries, 'best_accuracy')):.0f}",
        f"{whole} of {len(CAPTIONS) * len(SEEDS)}",
        mean_and_spread(decibels) if len(decibels) > 1 else "-",
        mean_and_spread(targets_of(summaries, "information_gain_bits"), 0),
        f"{statistics.fmean(s['bits_per_parameter'] for s in summaries):.2f}",
    ]


def capacity_row(folder: Path, image_size: int, num_steps: int) -> str:
    found = []
    for seed in SEEDS:
        for k, caption in enumerate(CAPTIONS):
            options = ("--capacity", "--seed", seed, "--num-steps", num_steps, "--image-size", image_size)
            found.append(run(folder, f"capacity_{k}_{seed}", (caption,), *options)["capacity_tokens"])
    return f"{mean_and_spread(found)} tokens, from {min(found)} to {max(found)}"


def print_table(args: argparse.Namespace) -> None:
    print("| | accuracy, % | lowest | whole | PSNR of the others, dB | gain, bits a target | bits a parameter |")
    print("|---|---|---|---|---|---|---|")
    for label, options in ROWS.items():
        print("| " + " | ".join(study_row(args.folder, label, options, args.num_steps)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-steps", type=int, default=1000, help="of every run (default: %(default)s)")
    parser.add_argument("--capacity-steps", type=int, default=300, help="of a capacity's trials (default: %(default)s)")
    parser.add_argument("--capacity-size", type=int, default=512, help="pixels of its targets (default: %(default)s)")
    parser.add_argument("--only", choices=("table", "capacity"), help="half of it (default: both)")
    args = parser.parse_args()
    started = time.monotonic()
    if args.only != "capacity":
        print_table(args)
    if args.only != "table":
        print(f"\ncapacity: {capacity_row(args.folder, args.capacity_size, args.capacity_steps)}")
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
