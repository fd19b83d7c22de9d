"""The data of a run, and the windows that are cut from it."""

from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.training.arguments import DataArguments
from vllm_budgetdraft.training.chats import read_conversations
from vllm_budgetdraft.training.sources import read_continuations, read_texts
from vllm_budgetdraft.training.windows import TokenWindows


class Inputs(NamedTuple):
    """Rows of each kind of data, None of a kind that was not given."""

    texts: Dataset | None
    continuations: Dataset | None
    conversations: Dataset | None

    @property
    def learnt(self) -> list[tuple[Dataset, str]]:
        """Rows, and the column of the tokens that a drafter learns to draft.

        Those that the target wrote say best what it writes: others count only where
        there are none.
        """
        if self.continuations is not None:
            return [(self.continuations, "continuation")]
        named = ((self.texts, "input_ids"), (self.conversations, "continuation"))
        return [(rows, column) for rows, column in named if rows is not None]


def read_inputs(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> Inputs:
    """All of the data, looked at once.

    Args:
        vocab_size: the target's.

    Raises:
        ConfigurationError: there is none; or see ``read_texts``,
            ``read_continuations`` and ``read_conversations``.
    """
    if not (data.texts or data.conversations or data.continuations):
        raise ConfigurationError(
            "there is nothing to train on; give --texts, --conversations or "
            "--continuations"
        )
    texts = continuations = conversations = None
    if data.texts:
        texts = read_texts(
            data.texts,
            tokenizer,
            column=data.text_column,
            unwraps_lines=data.unwrap_lines,
        )
    if data.continuations:
        continuations = read_continuations(data.continuations, vocab_size)
    if data.conversations:
        conversations = read_conversations(
            data.conversations, tokenizer, data.chat_template
        )
    return Inputs(texts, continuations, conversations)


def cut_windows(
    inputs: Inputs, data: DataArguments, arguments: TrainingArguments
) -> TokenWindows:
    """The windows of all steps.

    Raises:
        ConfigurationError: see ``TokenWindows``.
    """
    per_step = windows_per_step(arguments)
    return TokenWindows(
        inputs.texts,
        inputs.continuations,
        prefix_tokens=data.prefix_tokens,
        continuation_tokens=data.continuation_tokens,
        on_policy_fraction=data.on_policy_fraction,
        windows_per_step=per_step,
        num_windows=per_step * arguments.max_steps,
        seed=arguments.data_seed,
        conversations=inputs.conversations,
    )


def windows_per_step(arguments: TrainingArguments) -> int:
    """Of an optimizer step, on all ranks together."""
    num_windows: int = (
        arguments.train_batch_size
        * arguments.gradient_accumulation_steps
        * arguments.world_size
    )
    return num_windows
