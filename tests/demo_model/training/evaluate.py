"""Measures the demo model at the script's default settings, on the CPU, at both sizes.

    python tests/demo_model/training/evaluate.py tokenizer     # how near its pictures come to the drawings
    python tests/demo_model/training/evaluate.py pictures      # does a caption's picture come out? draws samples.png
    python tests/demo_model/training/evaluate.py proto-tokens  # how many tokens come back in one pass, how fast

Needs the drawn pictures (as train.py makes them, in the same --work-dir) and the packages of requirements.txt here.
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
from skimage.metrics import structural_similarity
from torch import Tensor
from train import DEMO, SIZES, encode_all, load_pictures

sys.path.insert(0, str(DEMO.parent))
from support.builders import optimise, reference_of

import verify_proto_tokens as vpt

SHEET_COLUMNS, SHEET_PICTURE = 6, 192
PROMPTS_AT_ONCE = 10


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tokenizer", "pictures", "proto-tokens"))
    parser.add_argument("--work-dir", type=Path, default=DEMO / ".work", help="where train.py keeps the drawn pictures")
    parser.add_argument("--count", type=int, help="drawings, or captions, half of them held out (200, 100 and 10)")
    parser.add_argument("--size", type=int, choices=SIZES, help="this one alone (default: both, one after the other)")
    parser.add_argument("--model", type=Path, default=DEMO, metavar="FOLDER", help="of vq/ and generator/")
    return parser.parse_args()


def choose_captions(count: int) -> list[str]:
    """Held-out captions and as many seen ones, in turn, chosen by hash: nobody's favourites."""

    def shuffled(texts) -> list[str]:
        return sorted(texts, key=lambda text: hashlib.sha256(b"evaluate" + text.encode()).hexdigest())

    captions = pictures.all_captions()
    held_out = pictures.held_out()
    pairs = zip(shuffled(held_out), shuffled(set(captions) - held_out), strict=False)
    return [text for pair in pairs for text in pair][:count]


def settings_for(captions: list[str], size: int, model: Path, save_dir: str) -> argparse.Namespace:
    prompts_file = Path(save_dir) / "prompts.txt"
    prompts_file.write_text("\n".join(captions))
    options = ["--prompts-file", str(prompts_file), "--image-size", str(size), "--save-dir", save_dir]
    options += ["--model-path", str(model / "generator"), "--vq-model-ckpt", str(model / "vq")]
    return vpt.parse_args(["--device", "cpu", *options])


def evaluate_tokenizer(images: np.ndarray, size: int, vq_folder: Path, count: int) -> None:
    """Drawings against what the decoder makes of their tokens, in float32."""
    chosen = images[:: len(images) // count][:count]
    codes = encode_all(chosen, vq_folder / vpt.VQ_ENCODER).flatten(1)
    decoder = torch.jit.load(vq_folder / vpt.VQ_DECODER).float()
    psnrs, ssims = [], []
    for image, of_image in zip(chosen, codes, strict=True):
        pixels = vpt.decode_codes(decoder, of_image[None])
        drawing = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        psnrs.append(vpt.psnr((pixels - drawing).square().mean().item()))
        ssims.append(structural_similarity(drawing[0].numpy(), pixels[0].numpy(), channel_axis=0, data_range=1.0))
    print(f"{size} px: PSNR {statistics.fmean(psnrs):.2f} dB, SSIM {statistics.fmean(ssims):.3f}, {count} drawings")


def thumbnails(images: np.ndarray) -> Tensor:
    """Pictures [M, H, W, 3] -> [M, 64 * 64 * 3], each pixel the mean of a square block."""
    block = images.shape[1] // 64
    small = [torch.from_numpy(np.array(image)).float().view(64, block, 64, block, 3).mean((1, 3)) for image in images]
    return torch.stack(small).flatten(1)


def draw(chosen: list[str], size: int, model: Path) -> np.ndarray:
    """The pictures that the generator draws for the captions, uint8 [M, size, size, 3]."""
    drawn = []
    with tempfile.TemporaryDirectory() as folder:
        models = vpt.load_models(settings_for(chosen, size, model, folder))
        for few in vpt.slices(len(chosen), PROMPTS_AT_ONCE):
            reference = reference_of(models, settings_for(chosen[few], size, model, folder))
            drawn += [np.asarray(vpt.to_image(pixels)) for pixels in reference.pixels]
    return np.stack(drawn)


def evaluate_pictures(chosen: list[str], size: int, generated: np.ndarray, images: np.ndarray) -> None:
    """Counts the captions whose generated picture is nearer to their own drawing than to any other (at 64 x 64)."""
    captions = pictures.all_captions()
    held_out, hits = pictures.held_out(), {True: [], False: []}
    nearest = torch.cdist(thumbnails(generated), thumbnails(images)).argmin(1).tolist()
    for caption, index in zip(chosen, nearest, strict=True):
        hits[caption in held_out].append(captions[index] == caption)
        print(f"{'hit ' if captions[index] == caption else 'MISS'} {caption}   (nearest: {captions[index]})")
    for name, group in (("held out", hits[True]), ("seen", hits[False]), ("all", hits[True] + hits[False])):
        print(f"{size} px, {name}: {sum(group)} of {len(group)} ({100 * sum(group) / max(1, len(group)):.0f} %)")


def draw_sheet(chosen: list[str], generated: dict[int, np.ndarray], file: Path) -> None:
    """The first captions' pictures, twelve of each size."""
    count = 2 * SHEET_COLUMNS
    shown = [image for of_size in generated.values() for image in of_size[:count]]
    small = [Image.fromarray(image).resize((SHEET_PICTURE, SHEET_PICTURE), Image.LANCZOS) for image in shown]
    rows = [np.concatenate(small[few], axis=1) for few in vpt.slices(len(small), SHEET_COLUMNS)]
    Image.fromarray(np.concatenate(rows)).save(file)
    print(f"{file}, row by row, each size: " + "; ".join(chosen[:count]))


def evaluate_proto_tokens(chosen: list[str], size: int, model: Path) -> None:
    accuracies, seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        models = vpt.load_models(settings_for(chosen[:1], size, model, folder))
        for caption in chosen:
            args = settings_for([caption], size, model, folder)
            reference = reference_of(models, args)
            started = time.perf_counter()
            learning, _ = optimise(models, args, reference.codes)
            seconds.append(time.perf_counter() - started)
            reconstruction = vpt.reconstruct(models, learning.best, reference.codes, learning.predictions)
            accuracies.append(100 * reconstruction.predictions.num_correct.item() / reference.codes.numel())
            distinct = reference.codes.unique().numel()
            print(
                f"{accuracies[-1]:5.1f} % in {seconds[-1]:3.0f} s, {learning.step} steps, PSNR "
                f"{vpt.psnr(reconstruction.errors.item()):.1f} dB, {distinct} distinct tokens: {caption}"
            )
    mean, lowest = statistics.fmean(accuracies), min(accuracies)
    print(f"{size} px, accuracy: mean {mean:.1f} %, lowest {lowest:.1f} %")
    print(f"{size} px, seconds: median {statistics.median(seconds):.0f}, longest {max(seconds):.0f}")


def main() -> None:
    args = parse_args()
    sizes = (args.size,) if args.size else SIZES
    if args.what == "proto-tokens":
        for size in sizes:
            evaluate_proto_tokens(choose_captions(args.count or 10), size, args.model)
        return
    images = {size: load_pictures(args.work_dir, size) for size in sizes}
    if args.what == "tokenizer":
        for size in sizes:
            evaluate_tokenizer(images[size], size, args.model / "vq", args.count or 200)
        return
    chosen = choose_captions(args.count or 100)
    generated = {size: draw(chosen, size, args.model) for size in sizes}
    for size in sizes:
        evaluate_pictures(chosen, size, generated[size], images[size])
    draw_sheet(chosen, generated, args.model / "samples.png")


if __name__ == "__main__":
    main()
