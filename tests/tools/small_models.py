"""Makes small generators of other widths, depths and lengths of training than the demo model's, for its tokenizers.

    python tests/tools/small_models.py FOLDER --hidden-size 256 --layers 10    # goes on where it was interrupted

They learn what the demo model learned, by its own training (which see for the packages that it needs), from the start
and at one size. Look at what a model draws before using it: after 500 steps they drew backgrounds and no things. FOLDER
keeps the pictures and their tokens for the next model. The last line says where the model is, for --model-path;
--vq-model-ckpt is the demo's, tests/demo_model/vq.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo_model" / "training"))
import pictures
import train
from transformers import Qwen2Tokenizer

# Four heads of 32 numbers to a key-value head, but six of 192 and five of 320.
WIDTHS = (128, 192, 256, 320, 384, 512, 640, 768)
SEQUENCES_AT_ONCE = {256: 64, 512: 16}


def make(folder: Path, hidden_size: int, num_layers: int, size: int, num_steps: int) -> Path:
    """Trains a model, and saves it with the demo's text tokenizer in a folder of its own, which it returns."""
    name = f"hidden{hidden_size}_layers{num_layers}_{size}px_steps{num_steps}"
    if (folder / name / "config.json").exists():
        return folder / name
    folder.mkdir(parents=True, exist_ok=True)
    images = {each: train.load_pictures(folder, each) for each in train.SIZES}
    codes = train.load_codes(folder, images, train.DEMO / "vq" / "encoder.jit")
    text_tokenizer = Qwen2Tokenizer.from_pretrained(train.DEMO / "generator")
    vocab_size = len(text_tokenizer) + train.vq.CODEBOOK_SIZE
    generator = train.make_generator(vocab_size, 1, hidden_size, num_layers)
    settings = argparse.Namespace(work_dir=folder, seed=1, small_steps=num_steps, generator_steps=num_steps)
    sequences_at_once = {size: SEQUENCES_AT_ONCE[size]}
    captions = pictures.all_captions()
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
    args = parser.parse_args()
    print(make(args.folder, args.hidden_size, args.layers, args.size, args.num_steps))


if __name__ == "__main__":
    main()
