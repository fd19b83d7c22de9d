#!/usr/bin/env bash
# serve.sh on two GPUs of one machine, each with half of the target.
#
#   TARGET=... DRAFTER=... examples/tensor_parallel.sh
#
# Not run: needs two GPUs. What is known: two ranks on a CPU accept the same drafts, and
# greedy output is the target's own (tests/integration/test_tensor_parallel.py). The first
# rank drafts for both.
set -euo pipefail

: "${TARGET:?give the target; the embedded one has five heads, which two GPUs cannot share}"
: "${DRAFTER:?give its drafter}"
exec "$(dirname "$0")/serve.sh" --tensor-parallel-size 2 "$@"
