"""Measures the demo model at the script's default settings, on the CPU.

    python tests/demo_model/training/evaluate.py pictures      # does a caption's picture come out? draws samples.png
    python tests/demo_model/training/evaluate.py proto-tokens  # how many tokens come back in one pass, how fast

Needs the drawn pictures (as train.py makes them, in the same --work-dir) and the package `emoji`.
"""

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pictures
import torch
from PIL import Image
from train import DEMO, load_pictures

sys.path.insert(0, str(DEMO.parent))
from support.builders import reference_of

import verify_proto_tokens as vpt

SHEET_COLUMNS = 6


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pictures", "proto-tokens"))
    parser.add_argument("--work-dir", type=Path, default=DEMO / ".work", help="where train.py keeps the drawn pictures")
    parser.add_argument("--captions", type=int, help="how many, half of them held out (default: 100 and 10)")
    return parser.parse_args()


def choose_captions(captions: list[str], count: int) -> list[str]:
    """Held-out captions and as many seen ones, in turn, chosen by hash: nobody's favourites."""

    def shuffled(texts) -> list[str]:
        return sorted(texts, key=lambda text: hashlib.sha256(b"evaluate" + text.encode()).hexdigest())

    held_out = pictures.held_out(captions)
    pairs = zip(shuffled(held_out), shuffled(set(captions) - held_out), strict=False)
    return [text for pair in pairs for text in pair][:count]


def settings_for(caption: str, save_dir: str) -> argparse.Namespace:
    return vpt.parse_args(["--demo", "--device", "cpu", "--prompt", caption, "--save-dir", save_dir])


def thumbnails(images: np.ndarray) -> torch.Tensor:
    """Pictures [M, 256, 256, 3] -> [M, 64 * 64 * 3], each pixel the mean of a 4 x 4 block."""
    blocks = [torch.from_numpy(np.ascontiguousarray(image)).float() for image in images]
    return torch.stack([block.view(64, 4, 64, 4, 3).mean((1, 3)).flatten() for block in blocks])


def evaluate_pictures(chosen: list[str], captions: list[str], images: np.ndarray) -> None:
    """Counts the captions whose generated picture is nearer to their own drawing than to any other (at 64 x 64)."""
    held_out, drawn = pictures.held_out(captions), thumbnails(images)
    hits, generated = {True: [], False: []}, []
    with tempfile.TemporaryDirectory() as folder:
        models = vpt.load_models(settings_for(chosen[0], folder))
        for caption in chosen:
            reference = reference_of(models, settings_for(caption, folder))
            generated.append(np.asarray(vpt.to_image(reference.pixels[0])))
            distances = torch.cdist(thumbnails(generated[-1:]), drawn)[0]
            nearest = captions[int(distances.argmin())]
            hits[caption in held_out].append(nearest == caption)
            print(f"{'hit ' if nearest == caption else 'MISS'} {caption}   (nearest: {nearest})")
    for name, group in (("held out", hits[True]), ("seen", hits[False]), ("all", hits[True] + hits[False])):
        print(f"{name}: {sum(group)} of {len(group)} ({100 * sum(group) / max(1, len(group)):.0f} %)")
    sheet = np.concatenate(
        [np.concatenate(generated[row : row + SHEET_COLUMNS], 1) for row in range(0, 2 * SHEET_COLUMNS, SHEET_COLUMNS)]
    )
    Image.fromarray(sheet).resize((SHEET_COLUMNS * 160, 320), Image.LANCZOS).save(DEMO / "samples.png")
    print("first twelve, row by row: " + "; ".join(chosen[: 2 * SHEET_COLUMNS]))


def evaluate_proto_tokens(chosen: list[str]) -> None:
    accuracies, seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        models = vpt.load_models(settings_for(chosen[0], folder))
        for caption in chosen:
            args = settings_for(caption, folder)
            reference = reference_of(models, args)
            started = time.perf_counter()
            learning = vpt.Optimisation(models, reference.codes, args)
            for _ in learning.steps():
                pass
            seconds.append(time.perf_counter() - started)
            reconstruction = vpt.reconstruct(models, learning.best, reference.codes, learning.targets_at_once)
            accuracies.append(100 * reconstruction.predictions.num_correct.item() / reference.codes.numel())
            distinct = reference.codes.unique().numel()
            print(
                f"{accuracies[-1]:5.1f} % in {seconds[-1]:3.0f} s, {learning.step} steps, PSNR "
                f"{vpt.psnr(reconstruction.pixels, reference.pixels):.1f} dB, {distinct} distinct tokens: {caption}"
            )
    print(f"accuracy: median {statistics.median(accuracies):.1f} %, lowest {min(accuracies):.1f} %")
    print(f"seconds: median {statistics.median(seconds):.0f}, longest {max(seconds):.0f}")


def main() -> None:
    args = parse_args()
    captions, images = load_pictures(args.work_dir)
    if args.what == "pictures":
        evaluate_pictures(choose_captions(captions, args.captions or 100), captions, images)
    else:
        evaluate_proto_tokens(choose_captions(captions, args.captions or 10))


if __name__ == "__main__":
    main()
