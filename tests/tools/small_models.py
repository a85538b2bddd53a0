"""Train small generators of other widths, depths and numbers of steps than the demo model's, with its tokenizers.

    python tests/tools/small_models.py FOLDER --hidden-size 256 --layers 10    # goes on where it was interrupted

They learn a part of the demo model's pictures from scratch, at one size, by its training script (see there for the
packages that it needs). Look at what a model draws before using it: after 1,500 steps on 64 things, all models that
were tried draw most of them; on all 692, a model of hidden size 256 drew none. FOLDER keeps the pictures and their
tokens for the next model. The last line printed is --model-path; --vq-model-ckpt is the demo's, tests/demo_model/vq.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from transformers import Qwen2Tokenizer

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "demo_model" / "training")]
import pictures  # noqa: E402
import train  # noqa: E402
from support.contract import CAPTIONS  # noqa: E402

# Each key-value head has four query heads of 32 numbers, but six in width 192 and five in width 320.
WIDTHS = (128, 192, 256, 320, 384, 512, 640, 768)


def rows_of_things(captions: list[str], count: int) -> list[int]:
    """Return the rows, in all captions, of `count` things on all backgrounds; the benches' things are chosen first."""
    backgrounds = len(pictures.BACKGROUNDS)
    needed = [captions.index(text) // backgrounds for text in CAPTIONS]
    others = np.random.default_rng(0).permutation(len(captions) // backgrounds).tolist()
    chosen = list(dict.fromkeys(needed + others))[:count]
    return [thing * backgrounds + background for thing in sorted(chosen) for background in range(backgrounds)]


def make(args: argparse.Namespace) -> Path:
    """Train a model, save it with the demo's text tokenizer in a folder of its own, and return the folder."""
    name, folder = f"hidden{args.hidden_size}_layers{args.layers}_{args.size}px_steps{args.num_steps}", args.folder
    name += f"_sequences{args.sequences}_things{args.things}"
    if (folder / name / "config.json").exists():
        return folder / name
    folder.mkdir(parents=True, exist_ok=True)
    images = {each: train.load_pictures(folder, each) for each in train.SIZES}
    codes = train.load_codes(folder, images, train.DEMO / "vq" / "encoder.jit")
    text_tokenizer = Qwen2Tokenizer.from_pretrained(train.DEMO / "generator")
    vocab_size = len(text_tokenizer) + train.vq.CODEBOOK_SIZE
    generator = train.make_generator(vocab_size, 1, args.hidden_size, args.layers)
    settings = argparse.Namespace(work_dir=folder, seed=1, small_steps=args.num_steps, generator_steps=args.num_steps)
    sequences_at_once = {args.size: args.sequences}
    captions = pictures.all_captions()
    rows = rows_of_things(captions, args.things)
    captions, codes = [captions[row] for row in rows], {each: codes[each][rows] for each in codes}
    trained = train.train_generator(name, generator, text_tokenizer, captions, codes, sequences_at_once, settings)
    partial = folder / f"{name}.partial"
    text_tokenizer.save_pretrained(partial)
    trained.save_pretrained(partial)
    partial.rename(folder / name)
    return folder / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden-size", type=int, choices=WIDTHS, default=256, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--size", type=int, choices=train.SIZES, default=512, help="pixels (default: %(default)s)")
    parser.add_argument("--num-steps", type=int, default=1500, help="of training (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=8, help="sequences per step (default: %(default)s)")
    parser.add_argument("--things", type=int, default=64, help="number of things shown (default: %(default)s)")
    args = parser.parse_args()
    print(make(args))


if __name__ == "__main__":
    main()
