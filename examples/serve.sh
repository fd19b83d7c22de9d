#!/usr/bin/env bash
# vLLM's OpenAI server with budgetdraft.
#
#   examples/serve.sh                       the embedded pair, on port 8000
#   examples/serve.sh --dtype float32       the same on a CPU, in its best precision
#   TARGET=... DRAFTER=... PORT=8001 examples/serve.sh --max-model-len 16384
#
# Whatever follows goes to vLLM. Run with --dtype float32 on 2 shared cores of a server
# CPU, no GPU: up after 60 s. What came out of it is in chat.py.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
target=${TARGET:-$root/models/books-9m}
drafter=${DRAFTER:-$root/models/books-9m-drafter}
speculative_config=$(
    printf '{"method": "budgetdraft", "model": "%s", ' "$drafter"
    printf '"num_speculative_tokens": 8, "kv_budget": 512}'
)

options=()
if [[ $target == "$root/models/books-9m" ]]; then
    # Its tokenizer has no chat template.
    options+=(--chat-template "$root/examples/chat.jinja")
fi

exec vllm serve "$target" --port "${PORT:-8000}" \
    --speculative-config "$speculative_config" "${options[@]}" "$@"
