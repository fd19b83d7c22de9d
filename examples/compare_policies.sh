#!/usr/bin/env bash
# Every built-in eviction policy on the same prompts, beside plain vLLM.
#
#   examples/compare_policies.sh [folder] [options of budgetdraft evaluate]
#
# The folder then has report.html, results.json and results.csv. With --target, --drafter
# and --data it compares them on models and texts of your own.
#
# Run on 2 shared cores of a server CPU, no GPU, one thread, other work beside it: 3
# minutes. Acceptance length at a budget of 256 of 2,048 tokens, 2 prompts of each task:
#
#                          books   summary
#   chunk_retrieval         5.52      5.18
#   observation_window      5.77      4.88
#   heavy_hitter            6.17      4.70
#   sink_window             5.77      5.40
#   keep_all                5.88      5.18
#
# (last_query and key_diversity came later and are not in this table.)
#
# Every output was plain vLLM's. So few prompts rank no policies, and the embedded pair is
# easy on all of them: see models/books-9m-drafter.
set -euo pipefail

output=${1:-runs/policies}
root=$(cd "$(dirname "$0")/.." && pwd)
shift $(($# > 0))

budgetdraft evaluate --methods budgetdraft --output "$output" \
    --target "$root/models/books-9m" --drafter "$root/models/books-9m-drafter" \
    --eviction-policies \
    chunk_retrieval observation_window heavy_hitter last_query key_diversity sink_window \
    keep_all \
    --context-tokens 2048 --kv-budgets 256 --prompts 2 --new-tokens 128 \
    --engine-args '{"enforce_eager": true}' "$@"
