"""What a drafter is measured on while it is trained: prompts that it does not learn."""

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from vllm_budgetdraft.config import SettledConfig, ViewSettings, valid
from vllm_budgetdraft.conversations import set_chat_template
from vllm_budgetdraft.drafter.configuration import check_native_range
from vllm_budgetdraft.evaluation.acceptance import HeldOutAcceptance, passages
from vllm_budgetdraft.evaluation.flexdraft_acceptance import FlexDraftAcceptance
from vllm_budgetdraft.training.arguments import (
    AcceptanceArguments,
    DataArguments,
)
from vllm_budgetdraft.training.questions import questions
from vllm_budgetdraft.training.sources import read_texts

logger = logging.get_logger(__name__)

#: Prompts that are the first questions of conversations, by this name.
CHAT = "chat"
SEED = 0


def held_out_acceptance(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    acceptance: AcceptanceArguments,
    data: DataArguments,
    view: ViewSettings,
    drafter: PretrainedConfig,
    page_size: int | None = None,
) -> HeldOutAcceptance | None:
    """Measures drafters of a target; None where there is nothing to measure them on.

    Args:
        page_size: of FlexDraft's budget, if the drafters are that.

    Raises:
        ConfigurationError: see ``open_source``, ``passages``, ``questions`` and
            ``check_native_range``; or a budget is below what the policy needs.
    """
    longest = target.config.get_text_config().max_position_embeddings
    longest -= acceptance.eval_new_tokens + acceptance.eval_draft_tokens + 2
    prompts = _prompts(acceptance, data, tokenizer, longest)
    if not prompts:
        return None
    settings = {
        "num_speculative_tokens": acceptance.eval_draft_tokens,
        **view.model_dump(),
    }
    longest = max(len(each) for some in prompts.values() for each in some)
    for budget in acceptance.eval_budgets:  # now, and not when all is trained
        config = valid(
            SettledConfig,
            {**settings, "model": "the drafter", "kv_budget": budget},
            "settings to measure acceptance with",
        )
        check_native_range(config, drafter, longest + acceptance.eval_new_tokens)
    kind: Callable[..., HeldOutAcceptance] = HeldOutAcceptance
    if page_size is not None:
        kind = partial(FlexDraftAcceptance, page_size=page_size)
    ends = target.generation_config.eos_token_id
    return kind(
        target,
        prompts,
        budgets=acceptance.eval_budgets,
        temperatures=acceptance.eval_temperatures,
        new_tokens=acceptance.eval_new_tokens,
        settings=settings,
        end_tokens=[ends] if isinstance(ends, int) else ends or [],
        seed=SEED,
    )


def _prompts(
    acceptance: AcceptanceArguments,
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
) -> dict[int | str, list[list[int]]]:
    prompts: dict[int | str, list[list[int]]] = {}
    count = acceptance.eval_prompts
    if acceptance.eval_texts:
        texts: Any = read_texts(
            acceptance.eval_texts,
            tokenizer,
            column=data.text_column,
            unwraps_lines=data.unwrap_lines,
        )
        for length in acceptance.eval_contexts:
            prompts[length] = passages(texts, length, count, SEED)
    if acceptance.eval_conversations:
        set_chat_template(tokenizer, data.chat_template)
        prompts[CHAT] = [
            question
            for source in acceptance.eval_conversations
            for question in questions(
                tokenizer,
                source,
                longest=longest,
                count=count,
                rng=Random(SEED),
                uses_template=True,
                tell=logger.warning,
            )
        ]
    return prompts
