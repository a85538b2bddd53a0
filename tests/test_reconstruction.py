"""Test the reconstruction, its measures, the figures and the files."""

import dataclasses
import json
import math
import stat

import numpy as np
import pytest
import torch
from PIL import Image
from support.builders import memory_for, random_codes
from support.contract import HISTORY

import verify_proto_tokens as vpt


def history(steps=3):
    return [{"step": step} | dict.fromkeys(HISTORY, 1.0 / step) for step in range(1, steps + 1)]


@pytest.fixture
def proto_tokens(tiny_models, make_args):
    return vpt.initial_proto_tokens(tiny_models, 1, make_args("--initial-scale", 0.5, "--seed", 1))


def test_psnr_matches_a_number_worked_by_hand():
    black, grey = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)
    assert vpt.psnr((black - grey).square().mean().item()) == pytest.approx(20.0)  # -10 log10(0.1 ** 2)


def test_psnr_of_equal_pictures_is_infinite():
    assert vpt.psnr(0.0) == math.inf


def test_codes_decode_in_raster_order(tiny_models):
    pixels = vpt.decode_codes(tiny_models.vq_decoder, torch.tensor([[0, 3, 6, 9]]))
    assert pixels.shape == (1, 3, 8, 8) and pixels.dtype == torch.float32
    assert pixels[0, 0, ::4, ::4].flatten().tolist() == pytest.approx([0, 0.25, 0.5, 0.75])


def test_the_reconstruction_is_the_argmax_of_one_pass(tiny_models, proto_tokens):
    codes = random_codes(tiny_models)
    reconstruction = vpt.reconstruct(tiny_models, proto_tokens, codes)
    logits = tiny_models.generator(inputs_embeds=proto_tokens.inputs(16)).logits
    assert torch.equal(reconstruction.predictions.ids, logits.argmax(-1))
    assert torch.equal(reconstruction.predictions.rank > 0, logits.argmax(-1) != codes + 1401)
    assert reconstruction.one_pass_seconds > 0


def test_the_emitted_codes_are_decoded_and_compared_with_the_decoded_target(tiny_models, proto_tokens):
    codes = random_codes(tiny_models)
    reconstruction = vpt.reconstruct(tiny_models, proto_tokens, codes)
    emitted = tiny_models.generator(inputs_embeds=proto_tokens.inputs(16)).logits[..., 1401:].argmax(-1)
    original, pixels = (vpt.decode_codes(tiny_models.vq_decoder, each)[0] for each in (codes, emitted))
    assert torch.equal(reconstruction.pictures[0], torch.stack((original, pixels)))
    assert reconstruction.errors[0].item() == pytest.approx((pixels - original).square().mean().item()) != 0


def test_more_targets_than_fit_at_once_are_reconstructed_in_parts(tiny_models, make_args, capsys):
    proto_tokens = vpt.initial_proto_tokens(tiny_models, 5, make_args("--num-e-tokens", 4))
    proto_tokens.points.data.normal_(generator=torch.Generator().manual_seed(3))
    codes = random_codes(tiny_models, batch=5)
    whole = vpt.reconstruct(tiny_models, proto_tokens, codes).predictions
    with memory_for(tiny_models, targets=2) as sizes:
        in_parts = vpt.reconstruct(tiny_models, proto_tokens, codes).predictions
    assert sizes[:5] == [5, 3, 2, 2, 1]
    assert "note: out of memory for the pass: going on with 2 at a time" in capsys.readouterr().out
    assert torch.equal(whole.ids, in_parts.ids) and len(whole.ids.unique(dim=0)) == 5
    assert torch.allclose(whole.losses, in_parts.losses, rtol=1e-5)


def test_only_equal_pictures_are_called_identical():
    assert vpt.psnr_text(vpt.psnr(0.0)) == "identical picture"
    assert vpt.psnr_text(vpt.psnr(0.01)) == "PSNR 20.0 dB"
    assert vpt.psnr_text(math.nan) == "PSNR nan dB"


def test_a_text_id_as_argmax_is_wrong_and_shows_the_likeliest_visual_code(tiny_models, proto_tokens):
    codes = torch.zeros(1, 16, dtype=torch.long)
    full, visual = (
        vpt.reconstruct(dataclasses.replace(tiny_models, vocabulary=vocabulary), proto_tokens, codes)
        for vocabulary in ("full", "visual")
    )
    text = full.predictions.ids < 1401  # a random model prefers a text id nearly everywhere
    assert text.any() and (full.predictions.rank[text] > 0).all()
    assert torch.equal(full.pictures[0], visual.pictures[0])
    assert (visual.predictions.ids >= 1401).all()


@pytest.mark.parametrize(
    ("accuracy", "status"),
    [(100, "success"), (99, "success"), (98.9, "partial_success"), (80, "partial_success"), (79.9, "need_improvement")],
)
def test_status_follows_the_best_accuracy(accuracy, status):
    assert vpt.status_of(accuracy) == status


@pytest.fixture
def summary_of(tiny_models, make_args):
    """Return a function that gives the summary and the reconstruction of proto-tokens before any learning."""
    models = dataclasses.replace(tiny_models, vocabulary="visual")

    def summary_of(codes, prompts):
        proto_tokens = vpt.initial_proto_tokens(models, len(codes), make_args("--initial-scale", 0.5, "--seed", 1))
        reference = vpt.Reference(codes, 2.0, vpt.decode_codes(models.vq_decoder, codes), prompts)
        reconstruction = vpt.reconstruct(models, proto_tokens, codes)
        rows = [{"prompt": prompt} for prompt in prompts]
        targets = vpt.describe_targets(models, reference, reconstruction, rows, cfg_scale=6.0)
        return vpt.summarise(reference, reconstruction, targets, proto_tokens), reconstruction

    return summary_of


def test_the_summary_counts_the_errors_of_the_stored_embeddings(summary_of):
    summary, reconstruction = summary_of(torch.zeros(1, 16, dtype=torch.long), ["a"])
    assert summary["num_errors"] == int((reconstruction.predictions.rank > 0).sum())
    assert summary["error_rate"] == 100 * summary["num_errors"] / 16
    assert summary["best_accuracy"] == pytest.approx(100 - summary["error_rate"])
    assert summary["total_params"] == 64
    assert summary["speedup"] == pytest.approx(2.0 / reconstruction.one_pass_seconds)
    assert not any(name.startswith("targets/") for name in summary)


def test_the_summary_of_several_targets_has_means_sums_and_each_targets_numbers(tiny_models, summary_of):
    summary, _ = summary_of(random_codes(tiny_models, batch=3), ["a", "b", "c"])
    for name in ("best_accuracy", "proto_bits", "target_bits_unprompted", "information_gain_bits"):
        assert summary[name] == pytest.approx(sum(summary[f"targets/{k}/{name}"] for k in range(3)) / 3)
    assert summary["num_errors"] == sum(summary[f"targets/{k}/num_errors"] for k in range(3))
    assert summary["bits_per_parameter"] == pytest.approx(3 * summary["information_gain_bits"] / (4 * 32))


def test_bits_of_one_pass_equal_those_of_a_loop_over_the_tokens(tiny_models):
    """Compare with a loop that asks the generator for one token after another; the script asks for all in one pass."""
    codes, prompt_ids = torch.tensor([3, 0, 7, 7]), tiny_models.text_tokenizer("hello")["input_ids"]
    bits = []
    for place in range(4):
        ids = torch.tensor([[*prompt_ids, *(codes[:place] + 1401)]])
        probability = tiny_models.generator(input_ids=ids).logits[0, -1].softmax(-1)
        bits.append(-math.log2(probability[1401 + codes[place]]))
    hidden_states = vpt.teacher_forced(tiny_models, "hello", codes)
    assert vpt.bits_of(tiny_models, hidden_states, codes).tolist() == pytest.approx(bits, rel=1e-5)


def test_text_ids_ahead_are_counted_with_guidance_among_all_ids(tiny_models, make_args):
    """Compare with a plain loop: SimpleAR's own choice among all ids, one token after another."""
    codes, texts = random_codes(tiny_models)[0], (vpt.conditional_prompt("a cat"), vpt.negative_prompt())
    prompts = [tiny_models.text_tokenizer(text)["input_ids"] for text in texts]
    strayed = 0
    for place in range(16):
        behind = (codes[:place] + 1401).tolist()
        logits = [tiny_models.generator(input_ids=torch.tensor([ids + behind])).logits[:, -1] for ids in prompts]
        strayed += vpt.guided_scores(*logits, cfg_scale=6.0).argmax().item() < 1401
    states = [vpt.teacher_forced(tiny_models, text, codes) for text in texts]
    assert vpt.text_ids_ahead(tiny_models, *states, cfg_scale=6.0) == 100 * strayed / 16 > 0
    tiny_models.generator.lm_head.weight.zero_()[1401:] = 1
    ones = torch.ones(16, tiny_models.hidden_size)
    assert vpt.text_ids_ahead(tiny_models, ones, ones, cfg_scale=6.0) == 0


def test_the_gain_is_the_bits_after_the_empty_template_minus_the_proto_bits(tiny_models, summary_of):
    codes, models = random_codes(tiny_models), dataclasses.replace(tiny_models, vocabulary="visual")
    summary, _ = summary_of(codes, ["a cat"])
    prompted, unprompted = (
        vpt.bits_of(models, vpt.teacher_forced(models, text, codes[0]), codes[0]).sum().item()
        for text in (vpt.conditional_prompt("a cat"), vpt.conditional_prompt(""))
    )
    assert prompted != pytest.approx(unprompted)
    assert summary["target_bits_autoregressive"] == pytest.approx(prompted)
    assert summary["target_bits_unprompted"] == pytest.approx(unprompted)
    assert summary["information_gain_bits"] == pytest.approx(unprompted - summary["proto_bits"])


def test_unigram_bits_are_those_of_the_targets_own_codes():
    # 4 x log2(4 / 4); 2 x log2(4 / 2) + 2 x log2(4 / 1); 4 x log2(4 / 1).
    codes = torch.tensor([[5, 5, 5, 5], [7, 2, 7, 0], [0, 1, 2, 3]])
    assert [vpt.unigram_bits(row) for row in codes] == [0, 6, 8]


def test_bits_match_numbers_worked_by_hand(tiny_models, summary_of):
    """Make all 12 codes equally likely by a head of zeros: log2 12 bits per token for any prompt, and no gain."""
    tiny_models.generator.lm_head.weight.zero_()
    summary, _ = summary_of(torch.zeros(1, 16, dtype=torch.long), ["a"])
    names = ("target_bits_uniform", "target_bits_autoregressive", "target_bits_unprompted", "proto_bits")
    assert [summary[name] for name in names] == pytest.approx([16 * math.log2(12)] * 4, rel=1e-6)
    assert summary["information_gain_bits"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(("count", "rows", "columns"), [(2, 2, 1), (8, 8, 1), (9, 5, 2), (24, 8, 3)])
def test_a_contact_sheet_shows_the_targets_in_columns_of_up_to_eight(count, rows, columns):
    picture = Image.new("RGB", (64, 64), "teal")
    target = {"prompt": "a " * 100, "reference": picture, "reconstruction": picture, "error_map": picture}
    sheet = vpt.draw_contact_sheet([target | {"best_accuracy": 50.0}] * count, "")
    assert sheet.height // 240 == rows and sheet.width // 1166 == columns


def test_figures_of_many_targets_show_the_first_and_the_worst_of_the_others():
    num_errors = torch.zeros(100, dtype=torch.long)
    num_errors[3], num_errors[40], num_errors[90] = 16, 5, 6  # the fourth is among the first anyway
    assert vpt.targets_to_show(num_errors) == [*range(24), 90, 40]
    assert len(vpt.targets_to_show(num_errors + 1)) == 24 + 8 and vpt.targets_to_show(num_errors[:2]) == [0, 1]
    assert vpt.tiled([Image.new("RGB", (64, 64), "teal")] * 24).size == (5 * 64, 5 * 64)


def test_tiles_fill_a_square_row_by_row():
    tiles = [Image.new("RGB", (2, 2), colour) for colour in ("red", "lime", "blue")]
    sheet = vpt.tiled(tiles)
    assert [sheet.getpixel(place) for place in ((0, 0), (3, 1), (0, 3), (3, 3))] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    ]  # fmt: skip


def test_wrong_tokens_are_marked_where_they_are():
    white = Image.new("RGB", (64, 64), "white")

    rank = torch.zeros(16, dtype=torch.long)
    rank[1], rank[12] = 2, 900  # nearly; far off
    marked = vpt.mark_errors(white, rank)
    colours = [marked.getpixel((k % 4 * 192 + 96, k // 4 * 192 + 96)) for k in range(16)]
    assert [k for k, colour in enumerate(colours) if colour != (255, 255, 255)] == [1, 12]
    assert colours[1][1] > 150 > colours[12][1]  # orange and red


def test_a_comparison_has_the_reference_left_and_the_reconstruction_right():
    pictures = {"reference": Image.new("RGB", (32, 32), "red"), "reconstruction": Image.new("RGB", (32, 32), "blue")}
    numbers = {"num_tokens": 16, "num_errors": 1, "num_e_tokens": 1, "psnr": 20.0}
    image = vpt.draw_comparison({"prompt": "a", **pictures}, numbers)
    assert [image.getpixel((image.width * k // 4, image.height // 2)) for k in (1, 3)] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("steps", [1, 2, 500])
def test_curves_can_be_drawn_for_any_number_of_steps(steps):
    assert vpt.draw_training_curves(history(steps)).size == vpt.draw_training_curves(history()).size


@pytest.mark.parametrize("prompt", ["$x^2 \\frac{a}$", "🍎 苹果", "a " * 400, "line\nbreak", "\u200b"])
def test_any_prompt_can_head_a_figure(prompt):
    picture = Image.new("RGB", (32, 32))
    summary = {"num_tokens": 4, "num_errors": 1, "psnr": math.inf, "num_e_tokens": 1}
    target = {"prompt": prompt, "reference": picture, "reconstruction": picture}
    assert vpt.draw_comparison(target, summary).width > 800


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "f.json"
    vpt.write_json(file, {"a": 1})
    with pytest.raises(RuntimeError), vpt.atomic_write(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_json_is_strict_even_where_a_number_is_infinite(tmp_path):
    vpt.write_json(tmp_path / "f.json", {"psnr": math.inf})
    assert json.loads((tmp_path / "f.json").read_text(), parse_constant=pytest.fail) == {"psnr": None}


def test_rows_are_appended_to_a_table_under_one_header(tmp_path):
    for row in history():
        vpt.append_to_table(tmp_path / "history.csv", row)
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert len(lines) == 1 + len(history()) and lines[0] == ",".join(history()[0])


def test_files_get_the_permissions_that_the_umask_allows(tmp_path):
    vpt.write_tensors(tmp_path / "p.safetensors", {"m": torch.zeros(4)})
    vpt.append_to_table(tmp_path / "history.csv", history()[0])
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert len(modes) == 1


def columns_with_ink(image) -> list[int]:
    """Return the columns of a figure's heading that are not white."""
    heading = np.asarray(image.convert("L"))[: image.height // 8]
    return np.flatnonzero((heading < 200).any(0)).tolist()


@pytest.mark.parametrize("prompt", ["W" * 72, "a " * 36, "猫" * 72])
def test_a_heading_stays_within_the_figure(prompt):
    picture = Image.new("RGB", (32, 32), "white")
    summary = {"num_tokens": 16, "num_errors": 1, "num_e_tokens": 1, "psnr": 20.0}
    image = vpt.draw_comparison({"prompt": prompt, "reference": picture, "reconstruction": picture}, summary)
    ink = columns_with_ink(image)
    assert ink[0] > image.width * 0.01 and ink[-1] < image.width * 0.99


def test_letters_that_matplotlibs_default_font_lacks_come_from_another_font():
    """Draw a circled A, which is in STIXGeneral (Matplotlib has it), and a letter that no font has, drawn as a box."""
    picture = Image.new("RGB", (32, 32), "white")
    summary = {"num_tokens": 16, "num_errors": 1, "num_e_tokens": 1, "psnr": 20.0}
    circled, box = (
        vpt.draw_comparison({"prompt": letter, "reference": picture, "reconstruction": picture}, summary)
        for letter in ("\u24b6", "\U0010fffd")
    )
    assert circled.tobytes() != box.tobytes()


@pytest.mark.parametrize(
    ("prompt", "lines"), [("a cat", 1), ("a cat " * 50, 2), ("猫" * 72, 2), ("W" * 200, 2), ("\u200b", 1)]
)
def test_a_long_prompt_heads_a_figure_in_two_lines(prompt, lines, monkeypatch):
    monkeypatch.setattr(vpt, "render", lambda figure: figure)
    picture = Image.new("RGB", (32, 32), "white")
    summary = {"num_tokens": 16, "num_errors": 1, "num_e_tokens": 1, "psnr": 20.0}
    figure = vpt.draw_comparison({"prompt": prompt, "reference": picture, "reconstruction": picture}, summary)
    heading = figure.get_suptitle().split("\n")
    assert len(heading) == lines and max(map(len, heading)) <= 44
    assert heading[-1].endswith("…") == (len(prompt) > 2 * 44)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_step_axis_of_a_short_run_has_only_whole_numbers(count, monkeypatch):
    monkeypatch.setattr(vpt, "render", lambda figure: figure)
    figure = vpt.draw_training_curves(history(count))
    for axis in figure.axes:
        assert all(float(tick).is_integer() for tick in axis.get_xticks())
