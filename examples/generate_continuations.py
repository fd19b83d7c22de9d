"""Let the target write greedy continuations of book passages, for training.

On-policy text is what a drafter meets when it serves, and a greedy continuation is
its own label: the next token is the target's argmax by construction.

Hardware: 2 CPU cores. Time and result: see the drafter's model card.

    python examples/generate_continuations.py --target models/books-9m \
        --books 'books/train-*.jsonl.xz' --output continuations.jsonl \
        --prompts 256:2000,1024:1000,3840:500
"""

import argparse
import json
import random

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

from vllm_budgetdraft.training.data import read_books


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--books", required=True, help="glob of book shards")
    parser.add_argument("--output", required=True)
    parser.add_argument("--prompts", default="256:2000,1024:1000,3840:500")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128, help="prompts per write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    texts = read_books(args.books)
    lengths = []
    for part in args.prompts.split(","):
        length, count = map(int, part.split(":"))
        lengths += [length] * count
    rng.shuffle(lengths)

    llm = LLM(
        args.target,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_seqs=args.batch,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=args.new_tokens, ignore_eos=True
    )
    with open(args.output, "a", encoding="utf-8") as output:
        for first in range(0, len(lengths), args.batch):
            prompts = []
            for length in lengths[first : first + args.batch]:
                text = rng.choice(texts)
                start = rng.randrange(max(1, len(text) - 6 * length))
                passage = text[start : start + 6 * length]
                tokens = tokenizer(passage, add_special_tokens=False)["input_ids"]
                prompts.append({"prompt_token_ids": tokens[:length]})
            for result in llm.generate(prompts, sampling):
                record = {
                    "prompt": list(result.prompt_token_ids),
                    "continuation": list(result.outputs[0].token_ids),
                }
                output.write(json.dumps(record) + "\n")
            output.flush()


if __name__ == "__main__":
    main()
