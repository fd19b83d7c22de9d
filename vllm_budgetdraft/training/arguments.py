"""What a training run is told, beside ``transformers.TrainingArguments``."""

from dataclasses import dataclass, field, make_dataclass

from vllm_budgetdraft.config import EvictionSettings


@dataclass
class DrafterArguments:
    """Who learns from whom."""

    target: str = field(metadata={"help": "Folder of the target, whose tokenizer too."})
    drafter: str | None = field(
        default=None,
        metadata={"help": "Folder of a drafter to go on from; a new one if unset."},
    )
    hidden_size: int = field(default=192, metadata={"help": "Of a new drafter."})
    intermediate_size: int = field(default=416, metadata={"help": "Of a new drafter."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Of a new drafter."})
    num_attention_heads: int = field(default=6, metadata={"help": "Of a new drafter."})
    num_key_value_heads: int = field(default=2, metadata={"help": "Of a new drafter."})


@dataclass
class DataArguments:
    """Where windows come from, and how they are cut."""

    books: str = field(metadata={"help": "Glob of JSONL (.xz) files with 'text'."})
    continuations: str | None = field(
        default=None,
        metadata={"help": "Glob of JSONL files with 'prompt' and 'continuation' ids."},
    )
    on_policy_fraction: float = field(
        default=0.5, metadata={"help": "Share of windows that are continuations."}
    )
    prefix_tokens: list[int] = field(
        default_factory=lambda: [3840],
        metadata={"help": "Prefix lengths, one drawn per batch. 0: no sparse view."},
    )
    continuation_tokens: int = field(
        default=256, metadata={"help": "Tokens after the prefix that are trained on."}
    )


@dataclass
class ViewArguments:
    """The views and their loss: L = L_A + sparse_weight * L_C (BudgetDraft, eq. 4)."""

    objective: str = field(
        default="ce", metadata={"help": "Loss of both views.", "choices": ["ce", "kl"]}
    )
    sparse_weight: float = field(default=0.5, metadata={"help": "lambda of eq. 4."})
    budgets: list[int] = field(
        default_factory=lambda: [256, 512, 1024, 2048],
        metadata={"help": "KV budgets, one drawn per step (eq. 7)."},
    )
    budget_weights: list[float] = field(
        default_factory=lambda: [0.4, 0.3, 0.2, 0.1],
        metadata={"help": "Probabilities of the budgets."},
    )


#: Who chooses the sparse view: serving's own settings, under the same names.
EvictionArguments = make_dataclass(
    "EvictionArguments",
    [
        (
            name,
            info.annotation,
            field(default=info.default, metadata={"help": info.description}),
        )
        for name, info in EvictionSettings.model_fields.items()
    ],
)
