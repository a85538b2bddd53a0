"""The demo model's pictures: 3D emoji drawn on eight backgrounds, each with its caption, at any size.

Sources: the npm package `@lobehub/fluent-emoji-3d` (MIT; Microsoft's Fluent emoji) for the drawings, the PyPI package
`emoji` for their names, and arithmetic for the backgrounds. A caption and a size decide their picture completely, so
"the picture that this caption means" is well defined and can be measured. Lengths are in pixels of the base size: at
twice that size the same picture has four times the pixels.
"""

import hashlib
import io
import itertools
import subprocess
import tarfile
from pathlib import Path

import emoji
import numpy as np
from PIL import Image, ImageFilter

HERE = Path(__file__).resolve().parent
EMOJI_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
BASE_SIZE = 256
THING_SIZE = 200  # at the base size
PLURALS = """
beans blueberries books briefs bubbles chains cherries chopsticks crossed_swords french_fries glasses gloves goggles
grapes jeans lungs maracas nesting_dolls pancakes peanuts scissors shopping_bags shorts skis socks sunglasses
ballet_shoes prayer_beads film_frames
"""
UNCOUNTABLE = """
bacon bread broccoli butter cooked_rice coral curry_rice custard dna falafel fire fondue fried_shrimp garlic ice
leafy_green nail_polish oden popcorn sake salt shaved_ice soap soft_ice_cream spaghetti sushi wood yarn
"""


def things() -> list[str]:
    """The names of all things, as in the `emoji` package without its colons."""
    return (HERE / "things.txt").read_text().split()


def noun_phrase(thing: str) -> str:
    words = thing.replace("_", " ").replace("’", "'")
    if thing in PLURALS.split() + UNCOUNTABLE.split():
        return words
    vowel = words[0].lower() in "aeiou" and not words.lower().startswith(("uni", "ewe", "one", "europe"))
    return f"{'an' if vowel or words.lower().startswith(('x-ray', 'hourglass')) else 'a'} {words}"


def caption(thing: str, background: str) -> str:
    return f"{noun_phrase(thing)} {background}"


def fetch_emoji(folder: Path) -> Path:
    """Returns the folder of the emoji's webp files, fetched from the npm registry the first time."""
    archive = folder / "emoji.tgz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        name = subprocess.run(
            ["npm", "pack", "--silent", EMOJI_PACKAGE], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        (folder / name).rename(archive)
    return archive


def load_things(archive: Path) -> dict[str, Image.Image]:
    """Every thing as an RGBA image of 256 x 256 pixels."""
    codes = {
        data["en"].strip(":"): "-".join(f"{ord(c):x}" for c in char)
        for char, data in emoji.EMOJI_DATA.items()
        if data["status"] == emoji.STATUS["fully_qualified"]
    }
    with tarfile.open(archive) as tar:
        files = {Path(m.name).stem: m for m in tar.getmembers() if m.name.endswith(".webp")}

        def read(thing: str) -> Image.Image:
            code = codes[thing]
            member = files[code] if code in files else files[code.replace("-fe0f", "")]
            return Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGBA")

        return {thing: read(thing) for thing in things()}


def noise(size: int, seed: int, scale_y: float, scale_x: float) -> np.ndarray:
    """Smooth noise in [0, 1], [size, size]; a larger scale makes larger features along that axis."""
    rng = np.random.default_rng(seed)
    rows, columns = max(2, round(BASE_SIZE / scale_y)), max(2, round(BASE_SIZE / scale_x))
    small = Image.fromarray((rng.random((rows, columns)) * 255).astype(np.uint8))
    return np.asarray(small.resize((size, size), Image.BICUBIC), dtype=np.float32) / 255


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of all pixels, [size, size] each, in pixels of the base size."""
    y, x = np.mgrid[0:size, 0:size] * (BASE_SIZE / size)
    return y, x


def mix(first: tuple, second: tuple, amount: np.ndarray) -> np.ndarray:
    """Blends two colours (0..255) by `amount` [size, size]; returns [size, size, 3]."""
    return np.array(first) + (np.array(second) - np.array(first)) * np.clip(amount, 0, 1)[..., None]


def draw_wood(size: int) -> np.ndarray:
    y, _ = grid(size)
    grain = 0.6 * noise(size, 1, 3, 90) + 0.4 * noise(size, 2, 9, 160)
    planks = mix((126, 78, 42), (188, 128, 76), grain) * (0.92 + 0.12 * ((y // 64) % 2))[..., None]
    planks[(y % 64) < 3] *= 0.55
    return planks


def draw_grass(size: int) -> np.ndarray:
    blades = 0.65 * noise(size, 3, 22, 5) + 0.35 * noise(size, 4, 50, 50)
    return mix((38, 108, 30), (134, 196, 74), blades)


def draw_sky(size: int) -> np.ndarray:
    y, _ = grid(size)
    clouds = np.clip((0.7 * noise(size, 5, 40, 85) + 0.3 * noise(size, 6, 16, 30) - 0.56) * 4.5, 0, 1)
    sky = mix((64, 140, 226), (176, 216, 250), y / BASE_SIZE)
    return sky + (np.array((250, 252, 255)) - sky) * clouds[..., None]


def draw_sand(size: int) -> np.ndarray:
    y, x = grid(size)
    ripples = 0.5 + 0.5 * np.sin(y / 6.5 + 5 * noise(size, 7, 90, 90) + x / 60)
    return mix((206, 168, 108), (244, 220, 168), 0.7 * ripples + 0.3 * noise(size, 8, 4, 4))


def draw_night(size: int) -> np.ndarray:
    y, _ = grid(size)
    night = mix((14, 14, 48), (58, 44, 110), y / BASE_SIZE)
    rng, scale = np.random.default_rng(9), size // BASE_SIZE
    for cy, cx in rng.integers(4, BASE_SIZE - 4, (60, 2)) * scale:
        radius = int(rng.integers(1, 3)) * scale
        night[cy - radius : cy + radius, cx - radius : cx + radius] = (240, 240, 214)
    return night


def plain(size: int, colour: tuple) -> np.ndarray:
    """A wall of one colour under soft light from above."""
    y, x = np.mgrid[0:size, 0:size] / size
    light = 1.04 - 0.14 * ((x - 0.5) ** 2 + (y - 0.35) ** 2) / 0.5
    return np.array(colour) * light[..., None]


BACKGROUNDS = {
    "on a wooden table": draw_wood,
    "on green grass": draw_grass,
    "in a blue sky": draw_sky,
    "on yellow sand": draw_sand,
    "under the night sky": draw_night,
    "on a white background": lambda size: plain(size, (244, 244, 242)),
    "on a pink background": lambda size: plain(size, (246, 172, 190)),
    "on a teal background": lambda size: plain(size, (50, 150, 150)),
}


def draw_backgrounds(size: int) -> dict[str, Image.Image]:
    def finish(pixels: np.ndarray) -> Image.Image:
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        return image.filter(ImageFilter.GaussianBlur(0.6 * size / BASE_SIZE))

    return {name: finish(draw(size)) for name, draw in BACKGROUNDS.items()}


def compose(thing: Image.Image, background: Image.Image) -> Image.Image:
    """The thing in the middle of the background, with a soft shadow below it."""
    scale = background.width / BASE_SIZE
    thing_size = round(THING_SIZE * scale)
    thing = thing.resize((thing_size, thing_size), Image.LANCZOS)
    offset = (background.width - thing_size) // 2
    alpha = Image.new("L", background.size)
    alpha.paste(thing.getchannel("A"), (offset + round(4 * scale), offset + round(9 * scale)))
    shadow = alpha.filter(ImageFilter.GaussianBlur(7 * scale)).point(lambda value: int(value * 0.42))
    picture = background.copy()
    picture.paste((20, 16, 24), mask=shadow)
    picture.paste(thing, (offset, offset), thing)
    return picture


def all_captions() -> list[str]:
    """Things outermost."""
    return [caption(thing, background) for thing in things() for background in BACKGROUNDS]


def draw_all(archive: Path, size: int, pictures: np.ndarray) -> None:
    """Draws the picture of each caption, in their order, into `pictures`, uint8 [M, size, size, 3]."""
    backgrounds = draw_backgrounds(size)
    pairs = itertools.product(load_things(archive).values(), backgrounds.values())
    for index, (thing, background) in enumerate(pairs):
        pictures[index] = np.asarray(compose(thing, background))


def held_out(count: int = 50) -> set[str]:
    """`count` captions that no generator ever sees; each one's thing and background are seen in other pairs."""
    by_hash = sorted(all_captions(), key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    # The default prompt of the script stays in training: it is what a newcomer sees first.
    return set([text for text in by_hash if text != "a red apple on a wooden table"][:count])
