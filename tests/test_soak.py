"""The soak's short form: a sweep and two agents, one of them killed with its run. `tools/soak.py` is the long one."""

import sys

import pytest
from tools.soak import soak


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_sweep_whose_agent_is_killed_loses_that_agents_run_at_most(tmp_path):
    outcome = soak(tmp_path, runs=3, kills=1)
    assert not outcome.problems
    assert outcome.handed_out == 3 and outcome.complete >= 2 and len(outcome.killed) <= 1
    assert outcome.run_memory[-1] < 1.1 * max(outcome.run_memory[:-1])
