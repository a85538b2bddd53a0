"""The tools, each in the form that this machine has time for."""

import json
import sys

from support.processes import ROOT, ended, start
from tools import bench


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
