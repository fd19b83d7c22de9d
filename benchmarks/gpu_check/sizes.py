"""How large models, prompts and caches are, on a GPU and in small."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Of models, prompts and caches, in tokens where they are not of models."""

    target: dict[str, int]
    prompts: tuple[int, ...]
    new_tokens: int
    max_model_len: int
    kv_budget: int
    recent_window: int
    page_size: int = 16


def llama(width: int, layers: int, heads: int, vocab_size: int) -> dict[str, int]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 11 * width // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    }


FULL = Sizes(
    target=llama(512, 8, 8, 4096),
    prompts=(17, 300, 900, 2000, 3000, 64, 129, 512),
    new_tokens=96,
    max_model_len=4096,
    kv_budget=256,
    recent_window=64,
)
TINY = Sizes(
    target=llama(128, 2, 2, 512),
    prompts=(3, 17, 70, 100),
    new_tokens=20,
    max_model_len=256,
    kv_budget=32,
    recent_window=16,
    page_size=4,
)
