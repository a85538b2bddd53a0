"""The tools, each in the form that this machine has time for."""

import json
import sys

import pytest
from support.processes import ROOT, ended, start
from tools import bench, study


def test_the_study_fits_a_power_law_and_says_how_sure_it_is():
    exact = study.line_through([128, 256, 512], [3 * width**0.5 for width in (128, 256, 512)])
    assert exact["b"] == pytest.approx(0.5) and exact["b_error"] == pytest.approx(0, abs=1e-6)
    assert study.predicted(exact, 1024) == pytest.approx((96, 96, 96))
    rough = study.line_through([128, 256, 512], [100, 300, 400])
    # By hand: log2 of the values rises by 1 a step on average, and misses by 1/3 log2(9 / 4) at the middle.
    assert rough["b"] == pytest.approx(1)
    near, far = study.predicted(rough, 256), study.predicted(rough, 1536)
    assert near[1] < 300 < near[2] and far[2] / far[1] > near[2] / near[1]


def test_the_law_is_of_models_that_differ_in_width_alone():
    names = ("hidden128_layers6_512px", "hidden256_layers6_512px", "hidden256_layers3_512px")
    models = [{"name": name} for name in names]
    assert study.differ_in_width_alone(models) == models[:2]


def test_what_is_checked_on_a_gpu_holds_on_a_cpu(tmp_path):
    command = [sys.executable, ROOT / "tests" / "tools" / "gpu_check.py", "--device", "cpu"]
    end = ended(start(command, tmp_path))
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert end.code == 0, [finding for finding in found["findings"] if not finding["holds"]]
    assert len(found["findings"]) == 9 and all(row["steps/s"] > 0 for row in found["figures"])
    assert "| demo | 16 | off |" in end.out


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
