"""Test the tools, each in a short form."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
from support.contract import CAPTIONS
from support.processes import ROOT, ended, start
from tools import bench, small_models, study


def test_the_study_fits_a_power_law_and_estimates_its_errors():
    exact = study.power_law([3 * width**0.5 for width in (128, 256, 512)], [128, 256, 512])
    assert exact["power"] == pytest.approx(0.5) and exact["error"] == pytest.approx(0, abs=1e-6)
    assert study.predicted(exact, 1024) == pytest.approx((96, 96, 96))
    rough = study.power_law([100, 300, 400], [128, 256, 512])
    # By hand: the slope is log 2 per doubling; residuals -1/3, 2/3, -1/3 times log(9 / 4) / 2; one degree of freedom.
    spread = math.sqrt(6 / 9) * math.log(9 / 4) / 2
    assert rough["power"] == pytest.approx(1) and rough["spread"] == pytest.approx(spread)
    assert rough["error"] == pytest.approx(spread / (math.sqrt(2) * math.log(2)))
    middle, low, high = study.predicted(rough, 256)
    assert math.log(high / middle) == pytest.approx(12.71 * spread * math.sqrt(1 + 1 / 3)) == math.log(middle / low)


def test_a_line_is_fitted_to_models_that_differ_only_in_width_or_only_in_training():
    names = (
        "hidden128_layers6_steps9",
        "hidden256_layers6_steps9",
        "hidden256_layers3_steps9",
        "hidden256_layers6_steps3",
    )
    models = [{"name": name} for name in names]
    assert study.differ_only_in("hidden", models) == models[:2]
    assert study.differ_only_in("steps", models) == [models[1], models[3]]


def test_small_models_learn_the_captions_of_the_law_but_not_its_unlearned_things():
    captions = study.pictures.all_captions()
    learned = {captions[row] for row in small_models.rows_of_things(captions, 64)}
    assert learned >= set(CAPTIONS) and len(learned) == 64 * 8
    assert set(study.UNLEARNED_CAPTIONS) <= set(captions) - learned


def test_the_runs_of_the_study_all_have_different_names_and_problems():
    models = [Path(f"hidden{width}_layers6_512px_steps9") for width in (128, 256, 384)]
    args = argparse.Namespace(folder=Path("study"), num_steps=9, capacity_steps=9, seeds=(42, 43), models=models)
    first, then = study.runs_of_tables(args)
    runs = first + then + study.runs_of_law(args)
    assert len({run.name for run in runs}) == len(runs)
    random = [run for run in runs if "--capacity" in run.options and "random" in run.options]
    assert len({run.options for run in random}) == len(random) == 16


def test_models_that_no_line_can_be_fitted_to_are_refused_before_any_run(capsys, monkeypatch, tmp_path):
    a, b, c = "hidden128_layers6_steps9", "hidden256_layers6_steps9", "hidden384_layers3_steps9"
    for names in (["demo", a, b], [a, a, b], [a, b, "others"], [a, b, c]):
        monkeypatch.setattr(sys, "argv", ["study.py", str(tmp_path), "--models", *names])
        with pytest.raises(SystemExit):
            study.main()
        assert "--models" in capsys.readouterr().err


def test_the_gpu_check_passes_on_a_cpu(tmp_path):
    command = [sys.executable, ROOT / "tests" / "tools" / "gpu_check.py", "--device", "cpu"]
    end = ended(start(command, tmp_path))
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert end.code == 0, [finding for finding in found["findings"] if not finding["holds"]]
    assert len(found["findings"]) == 9 and all(row["steps/s"] > 0 for row in found["figures"])
    assert "| demo | float32 | 16 |" in end.out


def test_the_benches_of_step_and_decoding_give_ratios_to_their_peers(capsys, monkeypatch):
    monkeypatch.setattr(bench, "product_rate", lambda args: 1e12)  # of large products, which take seconds
    monkeypatch.setattr(bench, "read_rate", lambda args: 1e10)
    monkeypatch.setattr(sys, "argv", ["bench.py", "step", "--shape", "demo", "--num-tokens", "16", "--repeats", "1"])
    bench.main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("ours", "usual", "stock", "floor", "of the peak"))
    monkeypatch.setattr(sys, "argv", ["bench.py", "decode", "--shape", "demo", "--num-tokens", "8", "--repeats", "1"])
    bench.main()
    assert "8 of 8 greedy tokens are those of `generate`" in capsys.readouterr().out
