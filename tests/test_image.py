"""Test --image: how a picture is read, cropped and encoded, and which pictures are refused."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.processes import DEMO
from support.results import config_in, refused, summary_in, tensors_in
from support.tiny_model import save_torchscript

import verify_proto_tokens as vpt

# Four greys that TinyDecoder knows: codes 0, 3, 6, 9 of 12.
GREYS = np.array([[0, 64], [128, 191]], dtype=np.uint8).repeat(2, 0).repeat(2, 1)  # [4, 4]
CODES = torch.tensor([0, 0, 3, 3, 0, 0, 3, 3, 6, 6, 9, 9, 6, 6, 9, 9])


def picture(mode="L", size=16) -> Image.Image:
    return Image.fromarray(GREYS).resize((size, size), Image.Resampling.NEAREST).convert(mode)


def saved(tmp_path, image, name="p.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "CMYK"])
def test_any_mode_gives_the_same_pixels(tmp_path, mode):
    file = saved(tmp_path, picture(mode), "p.tiff" if mode == "CMYK" else "p.png")
    expected = torch.from_numpy(np.array(picture())).float() / 255
    assert (vpt.read_picture(file, 16) - expected).abs().max() < 0.01


@pytest.mark.parametrize("kind", [np.float32, np.uint16, np.int32])
def test_a_picture_of_more_than_eight_bits_is_refused_not_clipped(call_tiny, tmp_path, kind):
    file = saved(tmp_path, Image.fromarray(np.full((16, 16), 0.5, dtype=kind)), "p.tiff")
    refused(call_tiny("--image", file), "--image", "more than 8 bits")


def test_the_middle_of_a_long_strip_is_read(tmp_path):
    assert vpt.read_picture(saved(tmp_path, Image.new("L", (60_000, 1))), 256).shape == (3, 256, 256)


def test_transparent_parts_are_white(tmp_path):
    image = picture("RGBA")
    image.putalpha(0)
    assert torch.equal(vpt.read_picture(saved(tmp_path, image), 16), torch.ones(3, 16, 16))


@pytest.mark.parametrize("name", ["p.png", "p.tiff"])  # Pillow itself turns a TIFF
def test_a_picture_is_turned_upright_by_its_exif_orientation(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise shows it upright
    file = saved(tmp_path, picture().rotate(90), name, exif=exif)
    assert torch.equal(vpt.read_picture(file, 16)[0], vpt.read_picture(saved(tmp_path, picture(), "q.png"), 16)[0])


def exif_of(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Return EXIF with these entries (tag, type, count, four bytes of value), followed by the rational -1/3."""
    rows = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    first = b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + struct.pack("<I", 0)
    return b"Exif\0\0" + first + struct.pack("<ii", -1, 3)


def test_exif_that_cannot_be_written_back_still_turns_the_picture(tmp_path):
    """Use a negative rational, as some cameras write it, under a tag that is unsigned by the standard."""
    orientation = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
    negative = (0x011A, 10, 1, struct.pack("<I", 8 + 2 + 2 * 12 + 4))
    turned = saved(tmp_path, picture(size=64).rotate(90), "p.jpg", exif=exif_of(orientation, negative), quality=95)
    upright = vpt.read_picture(saved(tmp_path, picture(size=64), "q.jpg", quality=95), 16)
    assert (vpt.read_picture(turned, 16) - upright).abs().max() < 0.02


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage of a camera",
        exif_of((0x0112, 3, 1, b"\xff\xff\xff\xff")),
        exif_of((0x0112, 2, 4, b"six\0")),
        exif_of((0x0112, 5, 1, struct.pack("<I", 99999))),
    ],
)
def test_damaged_exif_is_ignored(tmp_path, exif):
    file = saved(tmp_path, picture(size=64), "p.jpg", exif=exif, quality=95)
    plain = vpt.read_picture(saved(tmp_path, picture(size=64), "q.jpg", quality=95), 16)
    assert torch.equal(vpt.read_picture(file, 16), plain)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(tmp_path, Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10), exif=exif)
    with Image.open(file) as image:
        expected = ImageOps.exif_transpose(image)
    expected.save(tmp_path / "q.png")
    assert torch.equal(vpt.read_picture(file, 4), vpt.read_picture(tmp_path / "q.png", 4))


def test_a_picture_of_200_megapixels_is_read_without_a_warning(tmp_path, recwarn):
    file = saved(tmp_path, Image.new("1", (400_000, 500), 1))
    assert torch.equal(vpt.read_picture(file, 16), torch.ones(3, 16, 16))
    assert not recwarn.list


def test_a_picture_of_550_megapixels_is_refused_in_one_line(call_tiny, tmp_path):
    file = saved(tmp_path, Image.new("1", (1_100_000, 500)))
    refused(call_tiny("--image", file), "--image", "exceeds limit")


@pytest.mark.parametrize("size", [(40, 16), (16, 40), (90, 33), (400, 301)])
def test_only_the_middle_square_is_kept(tmp_path, size):
    image = Image.new("L", size, 255)
    side, (width, height) = min(size), size
    image.paste(0, ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2))
    pixels = vpt.read_picture(saved(tmp_path, image), 16)
    assert pixels.shape == (3, 16, 16) and pixels[:, 2:-2, 2:-2].max() < 0.05


def test_a_run_on_a_picture_learns_the_codes_that_the_encoder_gives(call_tiny, tmp_path):
    result = call_tiny("--image", saved(tmp_path, picture(), "my_greys.png"), "--save-dir", "out")
    assert result.code == 0, result.err
    (folder,) = (tmp_path / "out").glob("*_images-my-greys-*")
    assert torch.equal(tensors_in(folder)["target_ids"][0], CODES + 1401)
    assert config_in(folder)["prompt"] == "my greys"
    assert "speedup" not in summary_in(folder)  # nothing was decoded one by one


def test_an_interrupted_run_resumes_only_with_the_same_picture(call_tiny, tmp_path, monkeypatch):
    options = ("--image", saved(tmp_path, picture()), "--save-every", 1, "--resume", "--wandb-run-name", "run")
    with monkeypatch.context() as patch:
        patch.setattr(vpt, "reconstruct", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call_tiny(*options)
    saved(tmp_path, picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    refused(call_tiny(*options), "other settings", "images_fingerprint")
    saved(tmp_path, picture())
    with monkeypatch.context() as patch:

        def encode_elsewhere(vq_encoder, pixels):
            """Give other codes, as another GPU could."""
            return torch.zeros(len(pixels), (pixels.shape[-1] // 4) ** 2).long()

        patch.setattr(vpt, "encode_pixels", encode_elsewhere)
        assert call_tiny(*options).code == 0
    assert torch.equal(tensors_in(tmp_path / "proto_tokens_exp" / "run")["target_ids"][0] - 1401, CODES)


def test_an_encoder_with_another_number_of_codes_is_refused_before_the_generator_loads(
    call_tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(vpt, "encode_pixels", lambda _, pixels: torch.zeros(len(pixels), 9).long())
    result = call_tiny("--image", saved(tmp_path, picture()))
    refused(result, "encoder.jit does not belong to decoder.jit", "number of codes")
    assert "loading the generator" not in result.out


def test_several_pictures_are_several_targets_each_with_its_prompt(call_tiny, tmp_path):
    flipped = picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    two = ("--image", saved(tmp_path, picture(), "a.png"), "--image", saved(tmp_path, flipped, "b.png"))
    run = ("--save-dir", "out", "--wandb-run-name", "run")
    assert call_tiny(*two, "--prompt", "one", "--prompt", "two", *run).code == 0
    codes = torch.stack((CODES, CODES.view(4, 4).flip(1).flatten()))
    assert torch.equal(tensors_in(tmp_path / "out" / "run")["target_ids"] - 1401, codes)
    assert config_in(tmp_path / "out" / "run")["prompt"] == ["one", "two"]
    refused(call_tiny(*two, "--prompt", "one"), "--image", "--prompt")


def test_the_demos_encoder_and_decoder_reproduce_a_picture():
    models = vpt.load_models(vpt.parse_args(["--demo", "--device", "cpu", "--image", str(DEMO / "samples.png")]))
    pixels = vpt.read_picture(DEMO / "samples.png", 256)[None]
    codes = vpt.encode_pixels(models.vq_encoder, pixels)
    again = vpt.decode_codes(models.vq_decoder, codes)
    assert codes.shape == (1, 64) and vpt.psnr((again - pixels).square().mean().item()) > 15


@pytest.mark.parametrize("content", [None, b"", b"not a picture", "cut", "folder"])
def test_a_file_that_is_no_picture_is_named(call_tiny, tmp_path, content):
    file = tmp_path / "p.png"
    if content == "cut":
        picture(size=200).save(file)
        file.write_bytes(file.read_bytes()[:100])
    elif content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    refused(call_tiny("--image", file), "--image", "p.png")


def test_an_encoder_that_is_missing_or_cannot_run_is_refused_in_one_line(call_tiny, model_folders, tmp_path):
    file = saved(tmp_path, picture())
    encoder = model_folders[1] / "encoder.jit"
    encoder.unlink()
    refused(call_tiny("--image", file), "encoder.jit")
    save_torchscript(torch.nn.Linear(2, 2), encoder)
    result = call_tiny("--image", file)
    refused(result, "encoder.jit cannot run", "GPU")
    assert "generator:" not in result.out  # refused before the generator loads


def test_a_picture_format_that_pillow_does_not_know_is_refused_in_one_line(call_tiny, tmp_path):
    (tmp_path / "p.dds").write_bytes(b"DDS \x7c" + bytes(203))
    refused(call_tiny("--image", tmp_path / "p.dds"), "--image", "cannot be read")
