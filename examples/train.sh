#!/usr/bin/env bash
# Trains a drafter on a text of one's own, measures it, and says how to serve it.
#
#   examples/train.sh novel.txt [folder]
#
# TARGET, LAYERS (of the target, that the drafter begins as) and STEPS are as below if not
# set. 100 kB of text is for trying it out: a good drafter takes thousands of prompts.
#
# Run with vllm_budgetdraft/comparison/excerpt.txt on 2 shared cores of a server CPU, one
# thread, other work beside it: 9 minutes, of which 4 are training. Acceptance length on
# the held-out tenth, greedy, 8 draft tokens, contexts of 512, budget 128: 1.41 at the
# start, 4.09 after 100 steps, 4.75 after 200.
set -euo pipefail

text=${1:?give a plain text file, and after it a folder for the results if you like}
output=${2:-runs/my-drafter}
root=$(cd "$(dirname "$0")/.." && pwd)
target=${TARGET:-$root/models/books-9m}

mkdir -p "$output"
# The last tenth is held out: acceptance is measured on it.
python3 - "$text" "$output" << 'END'
import pathlib, sys

text, output = pathlib.Path(sys.argv[1]).read_text(), pathlib.Path(sys.argv[2])
cut = len(text) * 9 // 10
(output / "train.txt").write_text(text[:cut])
(output / "held-out.txt").write_text(text[cut:])
END

# The target writes on from the text, greedily and drawn: that is what a drafter meets.
generate=(
    budgetdraft generate --target "$target" --texts "$output/train.txt"
    --prompts 256:96 1024:32 --new-tokens 128 --top-logprobs 64
    # A quick start, for a CPU; leave it out on a GPU.
    --engine-args '{"dtype": "float32", "enforce_eager": true}'
)
"${generate[@]}" --output "$output/greedy"
"${generate[@]}" --output "$output/drawn" --temperature 1 --seed 1

read -ra layers <<< "${LAYERS:-0 5}"
# The drafter begins as two layers of the target, whose width and vocabulary it has.
budgetdraft train --target "$target" --target_layers "${layers[@]}" \
    --continuations "$output/greedy" "$output/drawn" \
    --prefix_tokens 256 1024 --continuation_tokens 128 \
    --budgets 64 128 256 512 --budget_weights 0.25 0.25 0.25 0.25 \
    --per_device_train_batch_size 4 --max_steps "${STEPS:-200}" \
    --learning_rate 5e-4 --lr_scheduler_type cosine --warmup_steps 10 \
    --eval_strategy steps --eval_steps 100 --eval_on_start true \
    --eval_texts "$output/held-out.txt" \
    --eval_contexts 512 --eval_budgets 128 --eval_prompts 4 --eval_new_tokens 64 \
    --logging_steps 20 --save_total_limit 2 --output_dir "$output/drafter"

echo "The drafter is in $output/drafter. Serve it:"
echo "    TARGET=$target DRAFTER=$output/drafter examples/serve.sh"
