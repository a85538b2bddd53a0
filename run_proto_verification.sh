#!/usr/bin/env bash
# Runs the experiment with the settings below. Each can be set in the environment; further arguments go to the script:
#
#   bash run_proto_verification.sh --demo --prompt "a penguin on green grass"
#   USE_WANDB=true NUM_STEPS=500 bash run_proto_verification.sh --wandb-mode offline
#
# Where the current Python lacks the packages, or has older major versions of them, a virtual environment is made in
# .venv (once) from requirements.txt.
set -euo pipefail

IMAGE_SIZE="${IMAGE_SIZE:-256}"
NUM_STEPS="${NUM_STEPS:-1000}"
LEARNING_RATE="${LEARNING_RATE:-}"   # empty: the script's default
SEED="${SEED:-42}"
SAVE_DIR="${SAVE_DIR:-./proto_tokens_exp}"
MODEL_PATH="${MODEL_PATH:-}"         # empty: Daniel0724/SimpleAR-1.5B-RL from the Hugging Face hub
VQ_MODEL_CKPT="${VQ_MODEL_CKPT:-}"   # empty: nvidia/Cosmos-1.0-Tokenizer-DV8x16x16 from the Hugging Face hub
USE_WANDB="${USE_WANDB:-false}"      # true: log to Weights & Biases
export WANDB_PROJECT="${WANDB_PROJECT:-simplear-proto-tokens}"
PYTHON="${PYTHON:-python3}"

script="$(readlink -f "${BASH_SOURCE[0]}" 2>/dev/null || echo "${BASH_SOURCE[0]}")"  # behind links to it
here="$(CDPATH="" cd "$(dirname "$script")" && pwd)"

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "$PYTHON is older than Python 3.11 or missing: set PYTHON to a newer one" >&2
    exit 2
fi

has_packages() {
    "$1" -P - "$here/requirements.txt" <<'PY' 2>/dev/null
import importlib.metadata, sys
for line in open(sys.argv[1]):
    name, pinned, version = line.partition("==")
    if pinned and int(importlib.metadata.version(name).split(".")[0]) < int(version.split(".")[0]):
        sys.exit(1)
PY
}

if ! has_packages "$PYTHON"; then
    if ! has_packages "$here/.venv/bin/python"; then
        echo "Installing the packages of requirements.txt into $here/.venv (once)"
        "$PYTHON" -m venv "$here/.venv"
        "$here/.venv/bin/python" -m pip install --quiet --requirement "$here/requirements.txt"
    fi
    PYTHON="$here/.venv/bin/python"
fi

arguments=(--image-size "$IMAGE_SIZE" --num-steps "$NUM_STEPS" --seed "$SEED"
    --save-dir "$SAVE_DIR" --use-wandb "$USE_WANDB")
if [ -n "$LEARNING_RATE" ]; then arguments+=(--learning-rate "$LEARNING_RATE"); fi
if [ -n "$MODEL_PATH" ]; then arguments+=(--model-path "$MODEL_PATH"); fi
if [ -n "$VQ_MODEL_CKPT" ]; then arguments+=(--vq-model-ckpt "$VQ_MODEL_CKPT"); fi

exec "$PYTHON" "$here/verify_proto_tokens.py" "${arguments[@]}" "$@"
