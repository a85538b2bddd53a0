"""Reconstruction, its measures, the figures and the files."""

import csv
import json
import math
import stat

import numpy as np
import pytest
import torch
from PIL import Image

import verify_proto_tokens as vpt


def history(steps=3):
    keys = ("train/loss", "train/accuracy", "train/top5_accuracy", "train/correct_tokens", "train/best_accuracy")
    keys += ("train/learning_rate", "embeddings/e_t_norm", "embeddings/m_norm", "gradients/grad_norm")
    return [{"step": step} | dict.fromkeys(keys, 1.0 / step) for step in range(1, steps + 1)]


def test_psnr_matches_a_number_worked_by_hand():
    black, grey = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)
    assert vpt.psnr(black, grey) == pytest.approx(20.0)  # -10 log10(0.1 ** 2)


def test_psnr_of_equal_pictures_is_infinite():
    assert vpt.psnr(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2)) == math.inf


def test_codes_decode_in_raster_order(tiny_models):
    pixels = vpt.decode_codes(tiny_models.vq_decoder, torch.tensor([[0, 3, 6, 9]]))
    assert pixels.shape == (1, 3, 8, 8) and pixels.dtype == torch.float32
    assert pixels[0, 0, ::4, ::4].flatten().tolist() == pytest.approx([0, 0.25, 0.5, 0.75])


def test_the_reconstruction_is_the_argmax_of_one_pass(tiny_models):
    proto_tokens = vpt.initial_proto_tokens(1, tiny_models.hidden_size, 0.5, 1, torch.device("cpu"))
    codes = torch.randint(12, (1, 16), generator=torch.Generator().manual_seed(2))
    reconstruction = vpt.reconstruct(tiny_models, proto_tokens, codes, "full")
    hidden_states = vpt.one_pass_hidden_states(tiny_models.generator, proto_tokens, 16)
    logits = tiny_models.generator.lm_head(hidden_states)
    assert torch.equal(reconstruction.predicted_ids, logits.argmax(-1))
    assert torch.equal(reconstruction.wrong, logits.argmax(-1) != codes + 1400)
    assert reconstruction.one_pass_seconds > 0


def test_a_text_id_as_argmax_is_wrong_and_shows_the_likeliest_visual_code(tiny_models):
    proto_tokens = vpt.initial_proto_tokens(1, tiny_models.hidden_size, 0.5, 1, torch.device("cpu"))
    codes = torch.zeros(1, 16, dtype=torch.long)
    full = vpt.reconstruct(tiny_models, proto_tokens, codes, "full")
    visual = vpt.reconstruct(tiny_models, proto_tokens, codes, "visual")
    text = full.predicted_ids < 1400  # a random model prefers a text id nearly everywhere
    assert text.any() and full.wrong[text].all()
    assert torch.equal(full.pixels, visual.pixels)
    assert (visual.predicted_ids >= 1400).all()


@pytest.mark.parametrize(
    ("accuracy", "status"),
    [(100, "success"), (99, "success"), (98.9, "partial_success"), (80, "partial_success"), (79.9, "need_improvement")],
)
def test_status_follows_the_best_accuracy(accuracy, status):
    assert vpt.status_of(accuracy) == status


def test_the_summary_counts_the_errors_of_the_stored_embeddings(tiny_models):
    proto_tokens = vpt.initial_proto_tokens(1, tiny_models.hidden_size, 0.5, 1, torch.device("cpu"))
    codes = torch.zeros(1, 16, dtype=torch.long)
    reference = vpt.Reference(codes, 2.0, vpt.decode_codes(tiny_models.vq_decoder, codes))
    reconstruction = vpt.reconstruct(tiny_models, proto_tokens, codes, "visual")
    result = vpt.Optimisation(proto_tokens, None, proto_tokens, history=history())
    summary = vpt.summarise(reference, result, reconstruction)
    assert summary["num_errors"] == int(reconstruction.wrong.sum())
    assert summary["error_rate"] == 100 * summary["num_errors"] / 16
    assert summary["best_accuracy"] == pytest.approx(100 - summary["error_rate"])
    assert summary["total_params"] == 2 * tiny_models.hidden_size
    assert summary["speedup"] == pytest.approx(2.0 / reconstruction.one_pass_seconds)


def test_wrong_tokens_are_marked_where_they_are():
    white = Image.new("RGB", (64, 64), "white")
    clean = np.asarray(vpt.draw_token_error_map(white, torch.zeros(16, dtype=torch.long)), dtype=int)
    rank = torch.zeros(16, dtype=torch.long)
    rank[3], rank[12] = 2, 900  # top right: nearly; bottom left: far off
    marked = np.asarray(vpt.draw_token_error_map(white, rank), dtype=int)
    rows, columns = np.nonzero(np.abs(marked - clean)[100:780].sum(-1) > 60)
    height, width = clean.shape[:2]
    corner = {(r > height / 2, c > width / 2) for r, c in zip(rows, columns, strict=True)}
    assert corner == {(False, True), (True, False)}


@pytest.mark.parametrize("steps", [1, 2, 500])
def test_curves_can_be_drawn_for_any_number_of_steps(steps):
    assert vpt.draw_training_curves(history(steps)).size == vpt.draw_training_curves(history()).size


@pytest.mark.parametrize("prompt", ["$x^2 \\frac{a}$", "🍎 苹果", "a " * 400, "line\nbreak"])
def test_any_prompt_can_head_a_figure(prompt):
    picture = Image.new("RGB", (32, 32))
    summary = {"num_tokens": 4, "num_errors": 1, "psnr": math.inf}
    assert vpt.draw_comparison(prompt, picture, picture, summary).width > 800


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "f.json"
    vpt.write_json(file, {"a": 1})
    with pytest.raises(RuntimeError), vpt.written_whole(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_json_is_strict_even_where_a_number_is_infinite(tmp_path):
    vpt.write_json(tmp_path / "f.json", {"psnr": math.inf})
    assert json.loads((tmp_path / "f.json").read_text(), parse_constant=pytest.fail) == {"psnr": None}


def test_the_history_reads_back(tmp_path):
    vpt.write_history(tmp_path / "h.csv", history())
    with (tmp_path / "h.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    assert float(rows[2]["train/loss"]) == 1 / 3


def test_files_can_be_read_by_others_as_the_umask_says(tmp_path):
    proto_tokens = vpt.initial_proto_tokens(1, 8, 0.5, 0, torch.device("cpu"))
    vpt.write_proto_tokens(tmp_path / "p.safetensors", proto_tokens, torch.zeros(1, 4), None, {})
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert len(modes) == 1
