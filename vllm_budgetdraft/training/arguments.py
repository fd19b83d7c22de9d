"""What a training run is told, beside ``transformers.TrainingArguments``."""

from dataclasses import dataclass, field, make_dataclass

from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.training.objectives import OBJECTIVES


@dataclass
class DrafterArguments:
    """Who learns from whom."""

    target: str = field(metadata={"help": "Folder of the target, whose tokenizer too."})
    drafter_type: str = field(
        default="decoder",
        metadata={
            "help": "A decoder of its own; flexdraft, attention of the target's last "
            "layers for mask tokens; or eagle3, a layer that reads its states.",
            "choices": ["decoder", "flexdraft", "eagle3"],
        },
    )
    drafter: str | None = field(
        default=None,
        metadata={"help": "Folder of a drafter or small model to go on from."},
    )
    target_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Begin with these layers of the target, and its embeddings."},
    )
    train_embeddings: bool | None = field(
        default=None,
        metadata={
            "help": "Whether embeddings and output matrix learn, too. Not by default "
            "where the drafter is as wide as the target: a new one begins with the "
            "target's, and keeps them."
        },
    )
    layers_alone: bool = field(
        default=False,
        metadata={
            "help": "Leave the target's embeddings out of what is written in the end; "
            "budgetdraft join adds them."
        },
    )
    draft_vocabulary: str | None = field(
        default=None,
        metadata={
            "help": "Tokens to draft, and no others: a file of budgetdraft vocabulary, "
            "the weights of an EAGLE-3 head, or how many of the likeliest of the data; "
            "0 is all. By default those of the drafter's folder, if it names some."
        },
    )
    hidden_size: int = field(default=192, metadata={"help": "Of a new decoder."})
    intermediate_size: int = field(default=416, metadata={"help": "Of a new decoder."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Of a new decoder."})
    num_attention_heads: int = field(default=6, metadata={"help": "Of a new decoder."})
    num_key_value_heads: int = field(default=2, metadata={"help": "Of a new decoder."})


@dataclass
class FlexDraftArguments:
    """Of drafter_type flexdraft, whose k is ``draft_tokens``."""

    mask_layers: int = field(
        default=0,
        metadata={
            "help": "Last layers of the target that masks go through; 0 is a third of "
            "them, at most 10."
        },
    )
    calibration_rank: int = field(
        default=256,
        metadata={"help": "Width of what corrects drafts by the bonus token; 0: none."},
    )
    sees_bonus: bool = field(
        default=False,
        metadata={
            "help": "Whether mask tokens know the bonus token from the start, which "
            "drafting after verification can tell them."
        },
    )
    blind_fraction: float = field(
        default=0.0,
        metadata={
            "help": "With sees_bonus, share of drafts whose mask tokens are not told: "
            "above 0, the drafter can draft along with verification, too."
        },
    )
    chains: bool = field(
        default=False,
        metadata={
            "help": "Whether calibration goes by the token before each draft, not by "
            "the bonus token."
        },
    )
    anchors_per_window: int = field(
        default=32, metadata={"help": "Drafts of each window that are trained on."}
    )
    selection_page_size: int = field(
        default=16,
        metadata={"help": "Tokens per page that a sparse view keeps or drops."},
    )


@dataclass
class FeatureArguments:
    """Of drafter_type eagle3."""

    ttt_steps: int = field(
        default=5,
        metadata={
            "help": "Tokens of each draft that is made in training (training-time "
            "test): the first reads the target's states, the others the head's own."
        },
    )
    ttt_decay: float = field(
        default=0.8, metadata={"help": "Weight of each step's loss in the last one's."}
    )
    aux_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Layers that the target has passed when its states are read; of a "
            "new head those that vLLM takes by itself: 2, half of them, all but 3."
        },
    )


@dataclass
class DataArguments:
    """Where windows come from, and how they are cut."""

    texts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Globs of JSONL, Parquet or text files (packed or not), folders, "
            "or names of Hugging Face datasets."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Of the text."})
    unwrap_lines: bool = field(
        default=False, metadata={"help": "Join the hard-wrapped lines of paragraphs."}
    )
    conversations: list[str] = field(
        default_factory=list,
        metadata={
            "help": "The same, of rows with messages (OpenAI), conversations "
            "(ShareGPT) or turns; what assistants said counts."
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "Of conversations: a file, in place of the target's own."},
    )
    continuations: list[str] = field(
        default_factory=list,
        metadata={"help": "The same, of what budgetdraft generate wrote."},
    )
    on_policy_fraction: float = field(
        default=0.5,
        metadata={"help": "Share of windows of continuations, if there are others."},
    )
    prefix_tokens: list[int] = field(
        default_factory=lambda: [3840],
        metadata={"help": "Prefix lengths, one drawn per step. 0: no sparse view."},
    )
    continuation_tokens: int = field(
        default=256, metadata={"help": "Tokens after the prefix that are trained on."}
    )


@dataclass
class ViewArguments:
    """The views: L = L_A + sparse_weight * L_C (BudgetDraft, eq. 4)."""

    sparse_weight: float = field(
        default=0.5, metadata={"help": "lambda of eq. 4; 0 is the full view alone."}
    )
    budgets: list[int] = field(
        default_factory=lambda: [256, 512, 1024, 2048],
        metadata={"help": "KV budgets, drawn for each sparse view (eq. 7)."},
    )
    budget_weights: list[float] = field(
        default_factory=lambda: [0.4, 0.3, 0.2, 0.1],
        metadata={"help": "Probabilities of the budgets."},
    )
    views_per_step: int = field(
        default=1, metadata={"help": "Sparse views, of different budgets if possible."}
    )
    prefix_gradient: bool = field(
        default=False,
        metadata={"help": "Train through the prefix's keys and values too."},
    )


@dataclass
class ObjectiveArguments:
    """What is compared with the target, and where."""

    objective: str = field(
        default="kl",
        metadata={"help": "Loss of every view.", "choices": ["ce", *OBJECTIVES]},
    )
    position_weights: str = field(
        default="uniform",
        metadata={
            "help": "Of the positions of a draft: all alike, decay ** i, or D-PACE.",
            "choices": ["uniform", "decay", "dpace"],
        },
    )
    draft_tokens: int = field(
        default=8,
        metadata={"help": "Positions of a draft, for position_weights and flexdraft."},
    )
    position_decay: float = field(
        default=0.8, metadata={"help": "decay of position_weights."}
    )
    dpace_smoothing: float = field(default=0.5, metadata={"help": "a of D-PACE."})
    teacher: str = field(
        default="stored",
        metadata={
            "help": "What p is: as stored with continuations, where it was, or the "
            "target asked live. The likeliest tokens alone are not all of a p that is "
            "broad.",
            "choices": ["stored", "live"],
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps what a live target said, for runs on the same "
            "windows: continuation_tokens x its hidden size x 2 bytes of each window."
        },
    )
    match_temperature: bool = field(
        default=True,
        metadata={
            "help": "Compare p and q at the temperature that a text was written at: "
            "greedy text is then learnt as it was chosen, drawn text as it was drawn."
        },
    )
    loss_chunk_tokens: int = field(
        default=1024,
        metadata={"help": "Positions whose logits are held at once; 0 is all."},
    )


@dataclass
class AcceptanceArguments:
    """What ``eval_strategy`` measures: drafts that a target really verifies."""

    eval_texts: list[str] = field(
        default_factory=list, metadata={"help": "Held-out texts, as --texts."}
    )
    eval_conversations: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Held-out conversations, as --conversations, or questions as of "
            "HumanEval or GSM8K: the target answers the first of each."
        },
    )
    eval_contexts: list[int] = field(
        default_factory=lambda: [1024, 4096],
        metadata={"help": "Of texts, prompt lengths."},
    )
    eval_budgets: list[int] = field(
        default_factory=lambda: [128, 512], metadata={"help": "KV budgets."}
    )
    eval_temperatures: list[float] = field(
        default_factory=lambda: [0.0], metadata={"help": "Of the target; 0: greedy."}
    )
    eval_prompts: int = field(
        default=6, metadata={"help": "Of each length, and source."}
    )
    eval_new_tokens: int = field(default=128, metadata={"help": "Of each, at most."})
    eval_draft_tokens: int = field(default=8, metadata={"help": "Drafted per step."})


#: What a budget keeps, and of what: serving's own settings, under the same names.
ViewSettingsArguments = make_dataclass(
    "ViewSettingsArguments",
    [
        (
            name,
            info.annotation,
            field(default=info.default, metadata={"help": info.description}),
        )
        for name, info in ViewSettings.model_fields.items()
    ],
)
