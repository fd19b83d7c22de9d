"""Plain vLLM and budgetdraft on the same prompts, compared token by token.

    python examples/offline.py

On a CPU set VLLM_CPU_KVCACHE_SPACE=1, in GiB, if memory is short.

Run on 2 shared cores of a server CPU, no GPU, one thread, other work beside it: 2.5
minutes, most of which two engines take to start, in processes of their own. Outputs
equal to plain vLLM's: 4 of 4; acceptance length 6.34.
"""

from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
TARGET = str(ROOT / "models" / "books-9m")
EXCERPT = ROOT / "vllm_budgetdraft" / "comparison" / "excerpt.txt"
#: For prompts of this length the drafter's cache keeps about a fourth.
PROMPT_CHARACTERS = 6000
BUDGETDRAFT = {
    "method": "budgetdraft",
    "model": str(ROOT / "models" / "books-9m-drafter"),
    "num_speculative_tokens": 8,
    "kv_budget": 512,
}


def prompts(count: int = 4) -> list[str]:
    """Passages of a novel."""
    text = EXCERPT.read_text(encoding="utf-8")
    starts = range(0, count * PROMPT_CHARACTERS, PROMPT_CHARACTERS)
    return [text[start : start + PROMPT_CHARACTERS] for start in starts]


def generate(**engine_args: Any) -> tuple[list[Any], dict[str, float]]:
    """Outputs of an engine that ends here, and its counters."""
    llm = LLM(
        TARGET,
        # In bfloat16 vLLM itself can break a near tie of two tokens another way when
        # it verifies several at once; in float32 outputs are equal.
        dtype="float32",
        # Starts sooner. Leave it out to serve: compiled, vLLM is faster.
        enforce_eager=True,
        disable_log_stats=False,
        **engine_args,
    )
    outputs = llm.generate(prompts(), SamplingParams(temperature=0, max_tokens=128))
    values = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return [output.outputs[0] for output in outputs], values


def compare(speculative_config: dict[str, Any]) -> None:
    """Exits with status 1 unless every token is plain vLLM's."""
    plain, _ = generate()
    ours, values = generate(speculative_config=speculative_config)
    drafts = values["vllm:spec_decode_num_drafts"]
    accepted = values["vllm:spec_decode_num_accepted_tokens"]
    print(ours[0].text)
    print(f"tokens: {sum(len(output.token_ids) for output in ours)}")
    print(f"acceptance length: {1 + accepted / drafts:.2f}")
    same = [a.token_ids == b.token_ids for a, b in zip(plain, ours, strict=True)]
    print(f"outputs equal to plain vLLM's: {sum(same)} of {len(same)}")
    raise SystemExit(0 if all(same) else 1)


# vLLM starts processes that import this file again.
if __name__ == "__main__":
    compare(BUDGETDRAFT)
