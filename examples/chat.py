"""A chat with a server: the answer as it comes, then how fast it came.

    examples/serve.sh --dtype float32
    python examples/chat.py "It was a dark night, and"

--kv-budget 128 has this answer drafted from a smaller cache: the text is the same.

Run on 2 shared cores of a server CPU, no GPU, one thread, other work beside it, with
the embedded pair: 256 tokens in 0.7 s, 356 tokens/s; time to first token 0.05 s. The
target of 9 M parameters makes it that fast, and its text is easy to draft.
"""

import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

from openai import OpenAI


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        description=__doc__,
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("message")
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--model", help="without it the server's first")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--kv-budget", type=int, help="of this request, at most the server's"
    )
    args = parser.parse_args(argv)

    client = OpenAI(base_url=args.base_url, api_key="unused")
    # vLLM has what OpenAI's API does not in vllm_xargs.
    asked = {} if args.kv_budget is None else {"kv_budget": args.kv_budget}
    model = args.model or client.models.list().data[0].id
    start = time.perf_counter()
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": args.message}],
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        stream=True,
        # The last chunk says how many tokens there were: one chunk may hold several.
        stream_options={"include_usage": True},
        extra_body={"vllm_xargs": asked} if asked else {},
    )
    first, num_tokens = 0.0, 0
    for chunk in chunks:
        if chunk.choices and (text := chunk.choices[0].delta.content):
            first = first or time.perf_counter() - start
            print(text, end="", flush=True)
        if chunk.usage:
            num_tokens = chunk.usage.completion_tokens
    whole = time.perf_counter() - start
    print(f"\n\ntime to first token: {first:.3f} s")
    print(f"{num_tokens} tokens in {whole:.2f} s: {num_tokens / whole:.0f} tokens/s")


if __name__ == "__main__":
    main()
