#!/usr/bin/env bash
# From a base run to the picture of a sweep, on a CPU: which batch does this model bear?
#
#   bash docs/examples/sweep.sh [folder]
#
# STEPS, TOKENS and KS make it longer or shorter.
set -euo pipefail
out=${1:-sweep}
mkdir -p "$out"

# 1. A base run, which leaves a checkpoint with its optimizer's state.
python -m pytest_gputrain.reference.train --dataset text --depth 2 --width 64 \
    --sequence_length 64 --total_batch_size 8 --lr 2e-3 --steps "${STEPS:-200}" --device cpu --out "$out/base.pt"

# 2. Branches with k times its batch and sqrt(k) times its rate, of which each sees the same tokens.
gputrain branches plan --k ${KS:-1 2 4 8 16} --base-batch 8 --base-lr 1e-3 --block-size 64 \
    --tokens "${TOKENS:-32768}" --max-device-batch 16 --out "$out/configs"

# 3. All of them from that checkpoint. The model comes with the checkpoint, the rest from the configurations.
gputrain branches run "$out/configs" --checkpoint "$out/base.pt" --out "$out/results" --device cpu --yes \
    -m -- pytest_gputrain.reference.train --dataset text
