"""Engines of one model runner on random weights, beside each other on the GPU.

    python -m benchmarks.gpu_check.engines RESULT.jsonl --runner V1

Each check is a line of the result as soon as it is known.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.engine_checks import Checks, Gap
from benchmarks.gpu_check.rows import append
from benchmarks.gpu_check.sizes import FULL, TINY, Sizes
from vllm_budgetdraft.comparison.engine_process import EngineProcess


def write_models(folder: Path, shape: dict[str, int]) -> tuple[str, str]:
    """A random target, and a drafter that agrees with it now and then; their folders.

    The drafter lacks the target's last layer. Attention is sharp: with the usual random
    weights it is so even that hardly an output would show a wrong position.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.normal_(std=1.4 / shape["hidden_size"] ** 0.5)
    model.save_pretrained(folder / "target")
    model.model.layers = model.model.layers[:-1]
    model.config.num_hidden_layers -= 1
    model.save_pretrained(folder / "drafter")
    return str(folder / "target"), str(folder / "drafter")


def gap_of(target: str) -> Gap:
    """By the target in float64 on the CPU."""

    def gap(context: list[int], token: int, other: int) -> float:
        import torch
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float64)
        with torch.inference_mode():
            (logits,) = model(torch.tensor([context]), logits_to_keep=1).logits[0]
        return float(logits[token] - logits[other])

    return gap


def engine_args(
    sizes: Sizes, target: str, drafter: str, *, is_gpu: bool, has_half: bool
) -> dict[str, dict[str, Any]]:
    """Arguments of vLLM's ``LLM`` by name of an engine."""
    common: dict[str, Any] = {
        "model": target,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": sizes.max_model_len,
        "max_num_seqs": len(sizes.prompts),
        "max_num_batched_tokens": 2 * sizes.max_model_len,
        "seed": 0,
    }
    if is_gpu:
        common |= {
            # Each takes that and no more: they start beside each other.
            "kv_cache_memory_bytes": 1 << 29,
            "gpu_memory_utilization": 0.05,
            # FLASH_ATTN takes no float32.
            "attention_config": {"backend": "TRITON_ATTN"},
        }
    else:
        common["enforce_eager"] = True  # or a compiler would run for minutes
    ours = {
        "method": "budgetdraft",
        "num_speculative_tokens": 4,
        "adaptive_draft_length": False,
    }
    of_itself = ours | {
        "model": target,
        "eviction_policy": "keep_all",
        # In one step: the drafts of who is still reading would be wrong.
        "draft_prefill_chunk": 2 * sizes.max_model_len,
    }
    budgeted = ours | {
        "model": drafter,
        "kv_budget": sizes.kv_budget,
        "recent_window": sizes.recent_window,
        "local_tokens": sizes.kv_budget // 4,
        "page_size": sizes.page_size,
    }
    found = {
        "plain": common,
        "self": common | {"speculative_config": of_itself},
        "budgeted": common | {"speculative_config": budgeted},
    }
    if is_gpu:
        found["eager"] = found["budgeted"] | {"enforce_eager": True}
    if is_gpu and has_half:
        half = {"dtype": "bfloat16", "attention_config": {"backend": "FLASH_ATTN"}}
        found["half"] = found["self"] | half
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--runner", choices=("V1", "V2"), required=True)
    parser.add_argument(
        "--half", action="store_true", help="one engine in bfloat16, too"
    )
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    import torch

    from vllm_budgetdraft.comparison.measure import prepare_environment

    os.environ |= {
        "VLLM_USE_V2_MODEL_RUNNER": "1" if args.runner == "V2" else "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # which is compiled at first use
        "VLLM_LOGGING_LEVEL": "INFO",  # which says how many graphs there are
        "HF_HUB_OFFLINE": "1",
    }
    prepare_environment()
    is_gpu, sizes = torch.cuda.is_available(), TINY if args.tiny else FULL

    def log_of(name: str) -> Path:
        return args.result.with_name(f"{args.result.stem}-{name}.log")

    with tempfile.TemporaryDirectory(dir=args.result.parent) as folder:
        target, drafter = write_models(Path(folder), sizes.target)
        wanted = engine_args(sizes, target, drafter, is_gpu=is_gpu, has_half=args.half)
        # They are daemons, and end with this process.
        engines = {
            name: EngineProcess(each, log_of(name)) for name, each in wanted.items()
        }
        checks = Checks(
            engines,
            sizes,
            args.runner,
            gap_of(target),
            lambda name: log_of(name).read_text(encoding="utf-8", errors="replace"),
        )
        for row in checks.rows(is_gpu=is_gpu):
            print(row, flush=True)
            append(args.result, row)


if __name__ == "__main__":
    main()
