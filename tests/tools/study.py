"""Measure what one pass over two embeddings can hold, by kind of target and by the model's width, depth and training.

    python tests/tools/study.py FOLDER                     # the tables, the capacities, where the errors are
    python tests/tools/study.py FOLDER --models A B ...    # instead, a law over these models of small_models.py

Every number comes from runs of the script as a user would start them, one per core. The tables use 8 captions and the
--seeds. The law uses 8 targets of each kind, the same for every model: drawings of things that the models learned, of
other things, collages of both, and random tokens (drawing needs the training's packages). The runs' folders stay in
FOLDER: an interrupted study goes on, and ends with study.json and study.png there, or law.json and law.png.
"""

import argparse
import csv
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "demo_model" / "training")]
import pictures  # noqa: E402
from support.contract import CAPTIONS, OTHER_CAPTIONS, SEEDS  # noqa: E402

import verify_proto_tokens as vpt  # noqa: E402

LARGE, SMALL = SIZES = (512, 256)  # 256 and 64 tokens
OWN = ("--m", "own")
PLAIN = "plain: one e_t, one m"
FROZEN = "m learned on 8 others, frozen"
UNSEEN = "pairs left out of training"
ROWS = {
    PLAIN: OWN,
    "K = 2 e_t": (*OWN, "--num-e-tokens", 2),
    "K = 4 e_t": (*OWN, "--num-e-tokens", 4),
    "K = 8 e_t": (*OWN, "--num-e-tokens", 8),
    "m shared by the 8": (),
    FROZEN: ("--m-from", "OTHERS"),
    UNSEEN: OWN,
    "control: shuffled tokens": (*OWN, "--control", "shuffled"),
    "control: random tokens": (*OWN, "--control", "random"),
    "control: untrained generator": (*OWN, "--control", "untrained"),
}
CAPACITIES = {"plain": (), "shuffled": ("--control", "shuffled"), "random": ("--control", "random")}
# Groups of tokens by how often their code occurs in the picture: at least this number of times.
OCCURRENCES = {"1": 1, "2": 2, "3-5": 3, "6-11": 6, "12-23": 12, "≥ 24": 24}
# Student's t at 97.5 %, by degrees of freedom.
STUDENTS_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}
# Captions of things that small models do not learn (unless they learn more than 64), one per background.
UNLEARNED_CAPTIONS = (
    "a drum on a wooden table",
    "a turtle on green grass",
    "a party popper on yellow sand",
    "a Tokyo tower under the night sky",
    "a timer clock on a white background",
    "a nest with eggs in a blue sky",
    "a sled on a pink background",
    "an eye on a teal background",
)
# Four drawings in a picture, of learned and unlearned things in turn.
COLLAGES = tuple(
    (CAPTIONS[k], UNLEARNED_CAPTIONS[(k + 3) % 8], CAPTIONS[(k + 2) % 8], UNLEARNED_CAPTIONS[(k + 5) % 8])
    for k in range(8)
)
# The targets of the law, the same for every model: captions, label and colour.
KINDS = {
    "drawings": (CAPTIONS, "drawings", vpt.BLUE),
    "unlearned": (UNLEARNED_CAPTIONS, "drawings of unlearned things", vpt.GREEN),
    "collages": (tuple(map(", ".join, COLLAGES)), "collages of four drawings", vpt.RED),
    "random": (CAPTIONS, "random tokens", vpt.ORANGE),
}
LAWS = {
    "drawings_accuracy": "accuracy, drawings, %",
    "unlearned_accuracy": "accuracy, unlearned things, %",
    "collages_accuracy": "accuracy, collages, %",
    "random_accuracy": "accuracy, random tokens, %",
    "capacity": "tokens at 99 %, drawings",
    "random_bits_held": "bits held of random tokens",
}
SIMPLEAR = {"SimpleAR-0.5B": 896, "SimpleAR-1.5B": 1536}  # hidden sizes
# What may make a target hard to hold: how surprising its tokens are under the prompt, or how varied they are.
LOADS = {"surprise": "bits of a token under the prompt", "perplexity": "perplexity of the picture's tokens"}
PERPLEXITIES = (16, 32, 64, 128, 192, 256)


@dataclass(frozen=True)
class Run:
    """A run of the script: its name, which is its folder's, the captions it learns, and its options."""

    name: str
    captions: tuple[str, ...]
    options: tuple
    model: Path | None = None  # None is the demo's

    def command(self, folder: Path) -> list[str]:
        prompts = [word for caption in self.captions for word in ("--prompt", caption)]
        demo = vpt.DEMO_FOLDER / "vq"
        models = ["--model-path", self.model, "--vq-model-ckpt", demo] if self.model else ["--demo"]
        command = [sys.executable, ROOT / "verify_proto_tokens.py", *models, "--device", "cpu", "--resume", *prompts]
        return [str(word) for word in (*command, "--save-dir", folder, "--wandb-run-name", self.name, *self.options)]


def name_of(*parts: object) -> str:
    return "_".join("".join(letter if letter.isalnum() else "-" for letter in str(part)) for part in parts)


def unseen_captions() -> tuple[str, ...]:
    """Return eight of the pairs that the demo model was not trained on, chosen without looking at them."""
    return tuple(sorted(pictures.held_out())[::6][: len(CAPTIONS)])


def runs_of_row(args: argparse.Namespace, label: str, size: int) -> list[Run]:
    """Return the runs for a row of a table, one per seed."""
    captions = unseen_captions() if label == UNSEEN else CAPTIONS
    runs = []
    for seed in args.seeds:
        options = ROWS[label]
        if "OTHERS" in options:
            options = ("--m-from", args.folder / run_of_others(args, size, seed).name / vpt.PROTO_TOKENS_FILE)
        common = ("--image-size", size, "--seed", seed, "--num-steps", args.num_steps)
        runs.append(Run(name_of(label, size, seed, args.num_steps), captions, (*common, *options)))
    return runs


def run_of_others(args: argparse.Namespace, size: int, seed: int) -> Run:
    """Return the run on the other captions, which learns the m of the row `FROZEN`."""
    options = ("--image-size", size, "--seed", seed, "--num-steps", args.num_steps)
    return Run(name_of("others", size, seed, args.num_steps), OTHER_CAPTIONS, options)


def runs_of_capacity(args: argparse.Namespace, kind: str) -> list[Run]:
    """Return the runs for the capacities of a kind, one per caption and seed."""
    common = ("--capacity", "--image-size", LARGE, "--num-steps", args.capacity_steps, *CAPACITIES[kind])
    runs = []
    for seed in args.seeds:
        for k, caption in enumerate(CAPTIONS):
            # Random codes depend only on the seed: without a seed per caption, all captions would be the same target.
            own_seed = 100 * seed + k if kind == "random" else seed
            options = (*common, "--seed", own_seed)
            runs.append(Run(name_of("capacity", kind, k, seed, args.capacity_steps), (caption,), options))
    return runs


def runs_of_model(args: argparse.Namespace, model: Path) -> dict[str, list[Run]]:
    """Return the runs of a model for the law: one for each kind of target, and the capacities."""
    common = ("--image-size", LARGE, "--seed", SEEDS[0])

    runs = {}
    for kind, (captions, _, _) in KINDS.items():
        targets = ("--control", "random") if kind == "random" else images_of(args, *captions)
        options = (*common, *OWN, "--num-steps", args.num_steps, *targets)
        runs[kind] = [Run(name_of(model.name, kind, args.num_steps), captions, options, model)]
    runs["capacity"] = []
    for caption in CAPTIONS:
        options = (*common, "--capacity", "--num-steps", args.capacity_steps, *images_of(args, caption))
        runs["capacity"].append(Run(name_of(model.name, caption, args.capacity_steps), (caption,), options, model))
    return runs


def images_of(args: argparse.Namespace, *captions: str) -> list:
    return [word for caption in captions for word in ("--image", drawing_of(args, caption))]


def drawing_of(args: argparse.Namespace, caption: str) -> Path:
    return args.folder / "drawings" / f"{name_of(caption)}.png"


def draw_captions(args: argparse.Namespace) -> None:
    """Draw and save the captions' pictures: those that models generate for a caption differ from model to model."""
    drawing_of(args, CAPTIONS[0]).parent.mkdir(parents=True, exist_ok=True)
    things = pictures.load_things(pictures.fetch_emoji(args.folder))
    backgrounds = pictures.draw_backgrounds(LARGE)
    drawings = {}
    for thing, background in itertools.product(things, backgrounds):
        caption = pictures.caption(thing, background)
        if caption in CAPTIONS + UNLEARNED_CAPTIONS:
            drawings[caption] = pictures.compose(things[thing], backgrounds[background])
    for parts in COLLAGES:
        drawings[", ".join(parts)] = vpt.tiled([drawings[part].resize((LARGE // 2, LARGE // 2)) for part in parts])
    for caption, drawing in drawings.items():
        drawing.save(drawing_of(args, caption))


def runs_of_tables(args: argparse.Namespace) -> tuple[list[Run], list[Run]]:
    """Return the first runs, and those that need their m; the many short runs come last, so that no core waits."""
    others = [run_of_others(args, size, seed) for size in SIZES for seed in args.seeds]
    rows = [run for size in SIZES for label in ROWS if label != FROZEN for run in runs_of_row(args, label, size)]
    frozen = [run for size in SIZES for run in runs_of_row(args, FROZEN, size)]
    capacities = [run for kind in CAPACITIES for run in runs_of_capacity(args, kind)]
    return others + rows, frozen + capacities


def runs_of_law(args: argparse.Namespace) -> list[Run]:
    return [run for model in args.models for runs in runs_of_model(args, model).values() for run in runs]


def do(args: argparse.Namespace, runs: list[Run]) -> None:
    """Do the runs, one per core; a finished run is not repeated, and is refused if its settings were different."""
    started, done = time.monotonic(), []
    # One thread per run: two runs at once, with a thread each, are quicker than two in turn with two threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def do_one(run: Run) -> None:
        subprocess.run(run.command(args.folder), check=True, env=environment, stdout=subprocess.DEVNULL)
        done.append(run)
        seconds = time.monotonic() - started
        print(f"{len(done)} of {len(runs)} runs, {seconds / 60:.0f} min: {run.name}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(do_one, runs):
            pass


# ----------------------------------------------------------------------------------------------------------------------
# Results of the runs


def summary_of(args: argparse.Namespace, run: Run) -> dict:
    return json.loads((args.folder / run.name / "summary.json").read_text())


def targets_of(args: argparse.Namespace, runs: list[Run]) -> list[dict[str, float]]:
    """Return the numbers of all targets of several runs."""
    rows = []
    for run in runs:
        with (args.folder / run.name / vpt.TARGETS_FILE).open(encoding="utf-8", newline="") as table:
            for row in csv.DictReader(table):
                numbers = {name: float(row[name]) for name in row if name not in ("prompt", "diverged")}
                rows.append(numbers | {"prompt": row["prompt"]})
    return rows


def found_of_row(args: argparse.Namespace, label: str, size: int) -> dict:
    runs = runs_of_row(args, label, size)
    targets = targets_of(args, runs)
    return {
        "accuracy": [target["best_accuracy"] for target in targets],
        "steps": [target["steps"] for target in targets],
        "psnr": [target["psnr"] for target in targets if math.isfinite(target["psnr"])],
        "bits": [target["information_gain_bits"] for target in targets],
        "bits_unprompted": [target["target_bits_unprompted"] for target in targets],
        "bits_per_parameter": statistics.fmean(summary_of(args, run)["bits_per_parameter"] for run in runs),
    }


def found_of_capacity(args: argparse.Namespace, runs: list[Run]) -> list[int]:
    return [summary_of(args, run)["capacity_tokens"] for run in runs]


def found_of_model(args: argparse.Namespace, model: Path) -> dict:
    runs = runs_of_model(args, model)
    found = {"name": model.name} | made_with({"name": model.name})
    for kind in KINDS:
        (run,) = runs[kind]
        targets, ids = targets_of(args, [run]), load_file(args.folder / run.name / vpt.PROTO_TOKENS_FILE)["target_ids"]
        num_tokens = ids.shape[1]
        found[f"{kind}_surprise"] = [target["target_bits_autoregressive"] / num_tokens for target in targets]
        found[f"{kind}_perplexity"] = [2 ** (vpt.unigram_bits(row) / num_tokens) for row in ids]
        found[f"{kind}_accuracy"] = [target["best_accuracy"] for target in targets]
        # Not relative to the unprompted bits: there the generator expects other tokens, and to undo that holds nothing.
        found[f"{kind}_bits_held"] = [target["target_bits_uniform"] - target["proto_bits"] for target in targets]
    return found | {"capacity": found_of_capacity(args, runs["capacity"])}


def found_of_errors(args: argparse.Namespace) -> dict:
    """Return the accuracy of the plain row's tokens by place, surprise, occurrences of their code, and caption."""
    models = vpt.load_models(vpt.parse_args(["--demo", "--device", "cpu"]))
    correct, bits, occurrences = [], [], []
    for run in runs_of_row(args, PLAIN, LARGE):
        tensors = load_file(args.folder / run.name / vpt.PROTO_TOKENS_FILE)
        codes = tensors["target_ids"] - models.visual_offset  # [B, N]
        size = models.size_token(codes.shape[1])
        correct.append((tensors["predicted_ids"] == tensors["target_ids"]).numpy())
        occurrences.append((codes[:, :, None] == codes[:, None]).sum(2).numpy())
        for caption, of_target in zip(run.captions, codes, strict=True):
            hidden_states = vpt.teacher_forced(models, vpt.conditional_prompt(caption, size), of_target)
            bits.append(vpt.bits_of(models, hidden_states, of_target).numpy())
    # [captions of all seeds, N] each.
    correct, bits, occurrences = np.concatenate(correct), np.stack(bits), np.concatenate(occurrences)
    edges = np.quantile(bits, np.linspace(0, 1, 9))
    groups = np.clip(np.searchsorted(edges, bits, side="right") - 1, 0, 7)
    often = np.digitize(occurrences, list(OCCURRENCES.values())) - 1
    of_captions = correct.reshape(-1, len(CAPTIONS), correct.shape[1]).mean((0, 2))
    return {
        "by_place": (100 * correct.mean(0)).tolist(),
        "bits": [float(np.median(bits[groups == group])) for group in range(8)],
        "by_bits": [100 * float(correct[groups == group].mean()) for group in range(8)],
        "by_occurrences": [100 * float(correct[often == group].mean()) for group in range(len(OCCURRENCES))],
        "by_caption": dict(zip(CAPTIONS, (100 * of_captions).tolist(), strict=True)),
    }


def power_law(y: list[float], x: list[float]) -> dict:
    """Fit log y = power * log x + constant by least squares; return also the standard error of the power.

    Draper and Smith, "Applied Regression Analysis", 3rd ed., sections 1.2 to 1.4.
    """
    x, y = np.log(x), np.log(y)
    line, covariance = np.polyfit(x, y, 1, cov=True)
    freedom = len(x) - 2
    spread = math.sqrt(np.square(y - np.polyval(line, x)).sum() / freedom)
    return {
        "power": float(line[0]),
        "error": math.sqrt(covariance[0, 0]),
        "constant": float(line[1]),
        "covariance": covariance.tolist(),
        "spread": spread,
        "freedom": freedom,
    }


def predicted(law: dict, x: float) -> tuple[float, float, float]:
    """Return what a power law predicts at x, and the interval that contains 95 of 100 new observations."""
    at = np.array([math.log(x), 1])
    middle = at @ [law["power"], law["constant"]]
    reach = students_t(law["freedom"]) * math.sqrt(law["spread"] ** 2 + at @ law["covariance"] @ at)
    return math.exp(middle), math.exp(middle - reach), math.exp(middle + reach)


def students_t(freedom: int) -> float:
    """Return Student's t at 97.5 %; beyond the table by Abramowitz and Stegun, "Handbook of Mathematical Functions"."""
    return STUDENTS_T.get(freedom) or 1.960 + 2.372 / freedom + 2.823 / freedom**2


def found_of_law(args: argparse.Namespace) -> dict:
    """Return what each model holds, and lines through those that differ only in width or training, if three or more."""
    models = [found_of_model(args, model) for model in args.models]
    lines = {}
    for name in ("hidden", "steps"):
        fitted = differ_only_in(name, models)
        if len(fitted) >= 3:
            lines[name] = {key: line_through(fitted, key, name) for key in LAWS}
    targets = [(model, kind) for model in differ_only_in("hidden", models) for kind in KINDS]
    odds = [odds_of(accuracy) for model, kind in targets for accuracy in model[f"{kind}_accuracy"]]
    loads = {}
    for load in LOADS:
        widths = [width for model, kind in targets for width in widths_per(load, model, kind)]
        loads[load] = power_law(odds, widths)
    return {"models": models, "lines": lines, "loads": loads}


def line_through(models: list[dict], key: str, name: str) -> dict:
    means = [statistics.fmean(model[key]) for model in models]
    if is_accuracy(key):
        means = [odds_of(mean) for mean in means]  # an accuracy cannot grow as a power
    return power_law(means, [model[name] for model in models])


def is_accuracy(key: str) -> bool:
    return key in [f"{kind}_accuracy" for kind in KINDS]


def widths_per(load: str, model: dict, kind: str) -> list[float]:
    """Return the hidden size divided by each target's load."""
    return [model["hidden"] / of_target for of_target in model[f"{kind}_{load}"]]


def odds_of(accuracy: float) -> float:
    """Return the odds of an accuracy in percent; half a token keeps them finite."""
    half_a_token = 50 / (LARGE // 32) ** 2
    return (accuracy + half_a_token) / (100 - accuracy + half_a_token)


def accuracy_of(odds: float) -> float:
    return 100 * odds / (1 + odds)


def made_with(model: dict) -> dict[str, int]:
    """Read what small_models.py puts in a model's name: its `hidden` size, `layers`, `steps` of training and so on."""
    return {name: int(number) for name, number in re.findall(r"([a-z]+)(\d+)", model["name"])}


def differ_only_in(name: str, models: list[dict]) -> list[dict]:
    """Return the largest group of models that are alike in all except `name`."""
    others = [json.dumps(made_with(model) | {name: None}) for model in models]
    usual = statistics.mode(others)
    return [model for model, other in zip(models, others, strict=True) if other == usual]


# ----------------------------------------------------------------------------------------------------------------------
# Tables and figures


def mean_and_spread(values: list[float], digits: int = 1) -> str:
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def print_rows(rows: dict[str, dict], size: int) -> None:
    print(f"\n{size} px, {len(rows[PLAIN]['accuracy'])} targets: mean ± standard deviation")
    print("| | accuracy, % | lowest | whole | PSNR of the others, dB | gain, bits a target | bits a parameter |")
    print("|---|---|---|---|---|---|---|")
    for label, found in rows.items():
        cells = [
            label,
            mean_and_spread(found["accuracy"]),
            f"{min(found['accuracy']):.0f}",
            f"{sum(accuracy == 100 for accuracy in found['accuracy'])} of {len(found['accuracy'])}",
            mean_and_spread(found["psnr"]) if len(found["psnr"]) > 1 else "-",
            mean_and_spread(found["bits"], 0),
            f"{found['bits_per_parameter']:.2f}",
        ]
        print("| " + " | ".join(cells) + " |")


def print_capacities(capacities: dict[str, list[int]]) -> None:
    print(f"\n| capacity at 99 %, beginnings of {LARGE} px | tokens | lowest | highest |")
    print("|---|---|---|---|")
    for kind, found in capacities.items():
        whole = " (all there are)" if max(found) == (LARGE // 32) ** 2 else ""
        print(f"| {kind} | {mean_and_spread(found, 0)} | {min(found)} | {max(found)}{whole} |")


def print_law(law: dict) -> None:
    print_models(law["models"], LAWS, digits=0)
    for load, what in LOADS.items():
        print_models(law["models"], {f"{kind}_{load}": f"{what}, {label}" for kind, (_, label, _) in KINDS.items()}, 1)
    print()
    for key, label in LAWS.items():
        grows = "its odds grow" if is_accuracy(key) else "grows"
        shown = accuracy_of if is_accuracy(key) else float
        line = law["lines"]["hidden"][key]
        expected = []
        for name, hidden_size in SIMPLEAR.items():
            middle, low, high = map(shown, predicted(line, hidden_size))
            expected.append(f"{name}: {middle:.0f} ({low:.0f} to {high:.0f})")
        print(f"{label}: {grows} as hidden size ** {power_of(line)}; 95 % of new models: {', '.join(expected)}")
        if "steps" in law["lines"]:
            print(f"{label}: {grows} as steps of training ** {power_of(law['lines']['steps'][key])}")
    for load, what in LOADS.items():
        line = law["loads"][load]
        apart = math.exp(students_t(line["freedom"]) * line["spread"])
        print(
            f"\nodds of a right token: {math.exp(line['constant']):.5f} x (hidden size / {what}) ** {power_of(line)};"
        )
        print(f"95 of 100 targets within a factor of {apart:.1f}")
    print(f"\n| {LOADS['perplexity']} | " + " | ".join(SIMPLEAR) + " |\n|---|" + "---|" * len(SIMPLEAR))
    for perplexity in PERPLEXITIES:
        cells = []
        for hidden_size in SIMPLEAR.values():
            middle, low, high = map(accuracy_of, predicted(law["loads"]["perplexity"], hidden_size / perplexity))
            cells.append(f"{middle:.0f} % ({low:.0f} to {high:.0f})")
        print(f"| {perplexity} | " + " | ".join(cells) + " |")


def print_models(models: list[dict], columns: dict[str, str], digits: int) -> None:
    print("\n| model | " + " | ".join(columns.values()) + " |\n" + "|---" * (1 + len(columns)) + "|")
    for model in models:
        cells = [model["name"], *(mean_and_spread(model[key], digits) for key in columns)]
        print("| " + " | ".join(cells) + " |")


def power_of(law: dict) -> str:
    return f"{law['power']:.2f} (standard error {law['error']:.2f})"


@matplotlib.style.context(vpt.STYLES)
def draw_study(study: dict) -> vpt.Image.Image:
    """Draw the accuracy by kind of target, the capacities, and where the errors are."""
    figure = Figure(figsize=(13, 9.4), dpi=130, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    panels = above.subplot_mosaic("AAB") | below.subplot_mosaic("CDEF", width_ratios=(1, 1, 1.1, 1))
    draw_rows(panels["A"], study["rows"])
    kinds = study["capacity"]
    panels["B"].boxplot(kinds.values(), tick_labels=list(kinds), medianprops={"color": vpt.BLUE})
    panels["B"].set(title="tokens held at 99 %", ylim=(0, None))
    below.suptitle(f"{PLAIN}, {LARGE} px: tokens right (%)", fontsize=11, x=0.006, ha="left")
    errors, side = study["errors"], math.isqrt(len(study["errors"]["by_place"]))
    # Four neighbours together: for a single place, few pictures say little.
    of_four = np.reshape(errors["by_place"], (side // 2, 2, side // 2, 2)).mean((1, 3))
    places = panels["C"].imshow(of_four, cmap="viridis", vmax=100)
    panels["C"].set(title="by place in the picture", xticks=[], yticks=[])
    below.colorbar(places, ax=panels["C"], shrink=0.85)
    panels["D"].plot(errors["bits"], errors["by_bits"], color=vpt.BLUE, marker="o")
    panels["D"].set(title="by surprise of the token", xlabel="bits under the prompt", ylim=(0, 102))
    panels["E"].bar(list(OCCURRENCES), errors["by_occurrences"], color=vpt.BLUE, width=0.6)
    panels["E"].set(title="by occurrences of its code", ylim=(0, 102))
    captions = list(errors["by_caption"])
    panels["F"].barh(captions, errors["by_caption"].values(), color=vpt.BLUE, height=0.6)
    panels["F"].set(title="by caption", xlim=(0, 100))
    panels["F"].invert_yaxis()
    for letter in "BDEF":
        panels[letter].grid(axis="x" if letter == "F" else "y")
    return vpt.render(figure)


def draw_rows(axis: Axes, rows: dict[str, dict[str, dict]]) -> None:
    """Draw each target as a dot and the means as bars, for both sizes."""
    labels = list(ROWS)
    for offset, (size, colour) in zip((-0.18, 0.18), ((SMALL, vpt.FAINT), (LARGE, vpt.BLUE)), strict=True):
        for place, label in enumerate(labels):
            accuracy = rows[str(size)][label]["accuracy"]
            name = f"{(size // 32) ** 2} tokens, {size} px" if place == 0 else None
            axis.barh(place + offset, statistics.fmean(accuracy), height=0.34, color=colour, alpha=0.55, label=name)
            axis.scatter(accuracy, [place + offset] * len(accuracy), s=6, color=vpt.INK, alpha=0.6, zorder=3)
    axis.set_yticks(range(len(labels)), labels=labels)
    axis.set(title="tokens right after one pass (%)", xlim=(0, 102))
    axis.invert_yaxis()
    axis.grid(axis="x")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))


@matplotlib.style.context(vpt.STYLES)
def draw_law(law: dict) -> vpt.Image.Image:
    """Plot what models hold against their width, with lines that extend to SimpleAR's width, and against the loads."""
    figure = Figure(figsize=(11, 9), dpi=130, layout="constrained")
    panels = figure.subplot_mosaic("AB;CD")
    draw_power(panels["A"], law, "capacity", "drawings", vpt.BLUE)
    draw_power(panels["B"], law, "random_bits_held", "random tokens", vpt.ORANGE)
    panels["A"].set(title="tokens held at 99 %", yscale="log")
    panels["B"].set(title="bits held", yscale="log")
    for panel, load in (("C", "surprise"), ("D", "perplexity")):
        draw_load(panels[panel], law, load)
        panels[panel].set(title="accuracy of 256 tokens (%)", ylim=(0, 102), xlabel=f"D / {LOADS[load]}")
    ticks = sorted({model["hidden"] for model in law["models"]} | set(SIMPLEAR.values()))
    for axis in (panels["A"].yaxis, panels["B"].yaxis, panels["C"].xaxis, panels["D"].xaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ScalarFormatter())
    for panel in "AB":
        for name, hidden_size in SIMPLEAR.items():
            panels[panel].axvline(hidden_size, color=vpt.FAINT, linewidth=0.8, linestyle="--")
            place = {"transform": panels[panel].get_xaxis_transform(), "rotation": 90, "ha": "right", "va": "bottom"}
            panels[panel].text(hidden_size, 0.02, f"{name} ", fontsize=8, color=vpt.INK, **place)
        panels[panel].set(xscale="log", xlabel="hidden size D")
        panels[panel].set_xticks(ticks, labels=map(str, ticks))
    for panel in panels.values():
        panel.minorticks_off()
        panel.legend(loc="upper left")
        panel.grid()
    return vpt.render(figure)


def draw_power(axis: Axes, law: dict, key: str, label: str, colour: str) -> None:
    """Plot a fitted line with its band, each model's captions and their mean (hollow if the model was not fitted)."""
    models, fitted = law["models"], differ_only_in("hidden", law["models"])
    widths = np.geomspace(min(model["hidden"] for model in models), max(SIMPLEAR.values()), 60)
    draw_line(axis, law["lines"]["hidden"][key], widths, float, f"{label}: D", colour)
    for model in models:
        captions, face = model[key], colour if model in fitted else "white"
        axis.scatter([model["hidden"]] * len(captions), captions, s=5, color=colour, alpha=0.4, linewidths=0)
        axis.plot(model["hidden"], statistics.fmean(captions), color=colour, marker="o", mfc=face)


def draw_load(axis: Axes, law: dict, load: str) -> None:
    """Plot every target of every model, and the line through the models that differ only in width."""
    models, fitted = law["models"], differ_only_in("hidden", law["models"])
    for kind, (_, label, colour) in KINDS.items():
        widths = [widths_per(load, model, kind) for model in models]
        accuracies = [model[f"{kind}_accuracy"] for model in models]
        edges = [
            [0 if model in fitted else 0.8] * len(of_model) for model, of_model in zip(models, widths, strict=True)
        ]
        dots = {"s": 12, "alpha": 0.6, "edgecolors": vpt.INK, "linewidths": np.ravel(edges)}
        axis.scatter(widths, accuracies, color=colour, label=label, **dots)
    axis.set(xscale="log")
    widths = np.geomspace(*axis.get_xlim(), 60)
    draw_line(axis, law["loads"][load], widths, accuracy_of, "odds: x", vpt.INK)
    axis.set(xlim=(widths[0], widths[-1]))


def draw_line(axis: Axes, law: dict, x: np.ndarray, shown: Callable, label: str, colour: str) -> None:
    middle, low, high = zip(*(map(shown, predicted(law, each)) for each in x), strict=True)
    axis.plot(x, middle, color=colour, linewidth=1.2, label=f"{label} ** {law['power']:.2f}")
    axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def make_tables(args: argparse.Namespace) -> None:
    for runs in runs_of_tables(args):
        do(args, runs)
    runs_of_kinds = {kind: runs_of_capacity(args, kind) for kind in CAPACITIES}
    study = {
        "rows": {str(size): {label: found_of_row(args, label, size) for label in ROWS} for size in SIZES},
        "capacity": {kind: found_of_capacity(args, runs) for kind, runs in runs_of_kinds.items()},
        "errors": found_of_errors(args),
    }
    (args.folder / "study.json").write_text(json.dumps(study, indent=1))
    for size, rows in study["rows"].items():
        print_rows(rows, size)
    print_capacities(study["capacity"])
    draw_study(study).save(args.folder / "study.png")


def make_law(args: argparse.Namespace) -> None:
    draw_captions(args)
    do(args, runs_of_law(args))
    law = found_of_law(args)
    (args.folder / "law.json").write_text(json.dumps(law, indent=1))
    print_law(law)
    draw_law(law).save(args.folder / "law.png")


def refuse_unfit_models(parser: argparse.ArgumentParser, models: list[Path]) -> None:
    """Refuse models that no line can be fitted to, before the hours that their runs take."""
    named = [{"name": model.name} for model in models]
    for model in named:
        if not made_with(model).keys() >= {"hidden", "layers", "steps"}:
            parser.error(f"--models: {model['name']} is no name that small_models.py gives")
        if named.count(model) > 1:
            parser.error(f"--models: two folders end in {model['name']}, which names the runs: each needs its own")
    fitted = differ_only_in("hidden", named)
    if not 3 <= len(fitted) <= 10:
        parser.error(f"--models: {len(fitted)} differ in width alone; a line with its error needs 3, at most 10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--models", type=Path, nargs="+", default=[], metavar="FOLDER", help="for the law: three or more"
    )
    parser.add_argument("--num-steps", type=int, default=400, help="of a run except capacities (default: %(default)s)")
    parser.add_argument("--capacity-steps", type=int, default=200, help="of a capacity's trials (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the tables (default: 42 43)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: a core each)")
    args = parser.parse_args()
    if args.models:
        refuse_unfit_models(parser, args.models)
    args.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    if args.models:
        make_law(args)
    else:
        make_tables(args)
    print(f"\n{(time.monotonic() - started) / 60:.0f} min in all")


if __name__ == "__main__":
    main()
