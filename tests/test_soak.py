"""Run the soak test in short: a sweep and two agents, one of them killed with its run. Long form: `tools/soak.py`."""

import sys

import pytest
from tools.soak import soak


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_sweep_loses_at_most_the_run_of_a_killed_agent(tmp_path):
    outcome = soak(tmp_path, runs=3, kills=1)
    assert not outcome.problems
    assert outcome.handed_out == 3 and outcome.complete >= 2 and len(outcome.killed) <= 1
    assert outcome.run_memory[-1] < 1.1 * max(outcome.run_memory[:-1])
