"""Settings of the engines that play scripts, in both model runners."""

from tests.support.engines import DRAFTER

MAX_MODEL_LEN = 1024
NUM_DRAFTS = 5

FEW_BLOCKS = {
    "block_size": 32,
    "num_gpu_blocks_override": 50,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "scheduling_policy": "priority",
}
COMMON = {
    "max_model_len": MAX_MODEL_LEN,
    "structured_outputs_config": {
        "disable_any_whitespace": True,
        "backend": "xgrammar",
    },
}
BUDGETED = {
    "model": DRAFTER,
    "eviction_policy": "heavy_hitter",
    "draft_prefill": "streaming",
    "draft_prefill_chunk": 150,
    "kv_budget": 96,
    "recent_window": 48,
}


def draft(**settings: object) -> dict[str, object]:
    fixed = {"num_speculative_tokens": NUM_DRAFTS, "adaptive_draft_length": False}
    settings = fixed | settings
    return {"speculative_config": {"method": "budgetdraft", **settings}}
