"""An engine's part in drafting, and a slow twin of the drafter's."""

from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.models import VOCAB_SIZE, random_tokens
from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.proposer import building
from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.picking import Drafts
from vllm_budgetdraft.proposer.prompt_reader import TokensOf


def build_proposer(
    folder: Path,
    *,
    num_slots: int = 1,
    max_model_len: int = 512,
    dtype: torch.dtype = torch.float32,
    vocab_size: int | None = None,
    seed: int = 0,
    tells_logits: bool = False,
    **settings: Any,
) -> DraftProposer:
    """A proposer in ``dtype`` throughout, unless ``draft_dtype`` says otherwise."""
    settings = {"num_speculative_tokens": 4, "draft_dtype": "float32", **settings}
    config = BudgetDraftConfig(model=str(folder), **settings)
    return building.build_proposer(
        config,
        num_slots=num_slots,
        max_model_len=max_model_len,
        dtype=dtype,
        device="cpu",
        vocab_size=vocab_size,
        seed=seed,
        tells_logits=tells_logits,
    )


def ingested(proposer: DraftProposer, tokens: Tensor, slot: int = 0) -> None:
    proposer.start_request(slot)
    proposer.ingest(slot, tokens)


def positions_of(*contexts: Tensor) -> TokensOf:
    """What hands a reader the contexts of slots 0 and on."""

    def tokens_of(pieces: list[tuple[int, range]]) -> Tensor:
        return torch.cat([contexts[slot][list(piece)] for slot, piece in pieces])

    return tokens_of


def held_by(proposer: DraftProposer, slot: int, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` keys and values of a slot, [layers, count, G, D] each."""
    cache = proposer.cache
    cells = cache.page_table.cells(
        torch.tensor([slot]), torch.arange(count)[None], cache.page_size
    )[0]
    pages = (cache.pool.keys, cache.pool.values)
    keys, values = (pages.flatten(1, 2)[:, cells] for pages in pages)
    return keys, values


class Requests:
    """Requests in slots, and a verification that accepts drafts at random.

    What a request is given depends on its seed alone, not on when or with whom.
    """

    def __init__(self, proposer: DraftProposer) -> None:
        self.proposer = proposer
        self.contexts: dict[int, list[int]] = {}
        self._random: dict[int, Random] = {}

    def start(self, slot: int, prompt_tokens: int, seed: int = 0) -> None:
        """A request whose context, prompt and first token, is that long."""
        context = random_tokens(prompt_tokens, seed)
        ingested(self.proposer, context[:-FIRST_WIDTH], slot)
        self.contexts[slot] = context.tolist()
        self._random[slot] = Random(seed)

    def release(self, slot: int) -> None:
        self.proposer.release_request(slot)
        del self.contexts[slot]

    def draft(
        self, slots: list[int], num_drafts: int | None = None
    ) -> dict[int, list[int]]:
        drafts = self.drafts(slots, num_drafts)
        return dict(zip(slots, drafts.tokens.tolist(), strict=True))

    def drafts(
        self,
        slots: list[int],
        num_drafts: int | None = None,
        temperatures: list[float] | None = None,
        top_k: list[int] | None = None,
    ) -> Drafts:
        """A copy of what the proposer says."""
        contexts = [self.contexts[slot] for slot in slots]
        tokens, confidences, probabilities = self.proposer.draft(
            torch.tensor(slots),
            torch.tensor([context[-FIRST_WIDTH:] for context in contexts]),
            torch.tensor([len(context) for context in contexts]),
            num_drafts,
            None if temperatures is None else torch.tensor(temperatures),
            None if top_k is None else torch.tensor(top_k),
        )
        if probabilities is not None:
            probabilities = probabilities.clone()
        return Drafts(tokens.clone(), confidences.clone(), probabilities)

    def append(self, starts: dict[int, int], width: int) -> None:
        """Feeds ``width`` tokens from position ``starts[slot]`` on, to each slot."""
        tokens = [self.contexts[slot][s : s + width] for slot, s in starts.items()]
        self.proposer.append(
            torch.tensor(list(starts)),
            torch.tensor(tokens),
            torch.tensor(list(starts.values())),
        )

    def verify(self, slot: int, drafts: list[int]) -> None:
        """Accepts none, some or all; the target's own token follows."""
        rng = self._random[slot]
        accepted = rng.choice([0, len(drafts), rng.randint(0, len(drafts))])
        bonus = rng.randrange(VOCAB_SIZE)
        if accepted < len(drafts) and bonus == drafts[accepted]:
            bonus = (bonus + 1) % VOCAB_SIZE
        self.contexts[slot] += [*drafts[:accepted], bonus]


def is_greedy(model: PreTrainedModel, context: list[int], drafts: list[int]) -> bool:
    """Whether each draft is the model's own choice after all that is before it."""
    tokens = torch.tensor([context + drafts[:-1]])
    with torch.inference_mode():
        logits = model(tokens).logits[0, len(context) - 1 :]
    return logits.argmax(-1).tolist() == drafts
