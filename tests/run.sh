#!/usr/bin/env bash
# The one test command: sets up .venv, checks the style, runs every test.
#
#   bash tests/run.sh               # all, a worker a core
#   bash tests/run.sh -k wandb      # arguments go to pytest
#   bash tests/run.sh -p no:xdist   # in one process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --requirement requirements.txt --requirement tests/requirements.txt
.venv/bin/ruff format --check .
.venv/bin/ruff check .
# The tests' models are tiny: more threads would mostly wait, for one another and for other processes.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
case " $* " in
*" no:xdist "*) exec .venv/bin/python -m pytest tests "$@" ;;
*) exec .venv/bin/python -m pytest tests -n auto --dist loadgroup "$@" ;;
esac
