"""An engine's part in drafting, and a slow twin of the drafter's."""

from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tests.support.models import VOCAB_SIZE, random_tokens
from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.eviction.base import EvictionPolicy
from vllm_budgetdraft.proposer.draft_proposer import FIRST_WIDTH, DraftProposer


def build_proposer(
    folder: Path,
    *,
    num_slots: int = 1,
    max_model_len: int = 512,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> DraftProposer:
    config = BudgetDraftConfig(
        model=str(folder), **{"num_speculative_tokens": 4, **settings}
    )
    return DraftProposer.build(
        config,
        num_slots=num_slots,
        max_model_len=max_model_len,
        dtype=dtype,
        device="cpu",
    )


def ingested(proposer: DraftProposer, tokens: Tensor, slot: int = 0) -> None:
    proposer.start_request(slot)
    proposer.ingest(slot, tokens)


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

    def draft(self, slots: list[int]) -> dict[int, list[int]]:
        contexts = [self.contexts[slot] for slot in slots]
        drafts, _ = self.proposer.draft(
            torch.tensor(slots),
            torch.tensor([context[-FIRST_WIDTH:] for context in contexts]),
            torch.tensor([len(context) for context in contexts]),
        )
        return dict(zip(slots, drafts.tolist(), strict=True))

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


class SlowTwin:
    """Drafts for one request by ``transformers``, over an explicit list of keys.

    Keys and values of each layer, [G, num_held, D], lie in the order of the draft
    cache: what the policy kept of the prompt, then all later tokens. Room is made by
    cutting the oldest pages after the protected ones out of the list.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: EvictionPolicy,
        config: BudgetDraftConfig,
        max_model_len: int,
    ) -> None:
        self._model, self._policy, self._config = model, policy, config
        self._capacity = config.cache_capacity(max_model_len)
        self._held: list[tuple[Tensor, Tensor]] = []
        self.num_evicted = 0

    @torch.inference_mode()
    def ingest(self, tokens: Tensor) -> None:
        if not len(tokens):
            return
        prompt = DynamicCache()
        self._model(tokens[None], past_key_values=prompt)
        self._held = [
            self._kept(layer.keys[0], layer.values[0]) for layer in prompt.layers
        ]
        self.num_evicted = len(tokens) - self._held[0][0].shape[1]

    @torch.inference_mode()
    def ingest_streaming(self, tokens: Tensor) -> None:
        """Keeps the budget after every chunk."""
        start = 0
        for chunk in tokens.split(self._config.draft_prefill_chunk):
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(self._held):
                cache.update(keys[None], values[None], layer)
            positions = torch.arange(start, start + len(chunk))[None]
            self._model(chunk[None], position_ids=positions, past_key_values=cache)
            self._held = [
                self._kept(layer.keys[0], layer.values[0]) for layer in cache.layers
            ]
            start += len(chunk)
        self.num_evicted = start - self._held[0][0].shape[1]

    def _kept(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        kept = self._policy.select(keys, None, self._config.kv_budget)
        return (
            torch.stack([k[own] for k, own in zip(keys, kept, strict=True)]),
            torch.stack([v[own] for v, own in zip(values, kept, strict=True)]),
        )

    @torch.inference_mode()
    def draft(self, context: list[int]) -> list[int]:
        num_drafts, end = self._config.num_speculative_tokens, len(context)
        # Rejected drafts are forgotten, and the tokens fed first are computed again.
        known = end - FIRST_WIDTH - self.num_evicted
        self._cut(slice(known, None))
        if end + num_drafts - 1 - self.num_evicted > self._capacity:
            self._evict(growth=num_drafts + 1)

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._held):
            cache.update(keys[None], values[None], layer)
        drafts: list[int] = []
        fed, position = context[-FIRST_WIDTH:], end - FIRST_WIDTH
        for _ in range(num_drafts):
            positions = torch.arange(position, position + len(fed))[None]
            out = self._model(
                torch.tensor([fed]), position_ids=positions, past_key_values=cache
            )
            drafts.append(int(out.logits[0, -1].argmax()))
            fed, position = drafts[-1:], position + len(fed)
        self._held = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        return drafts

    def _evict(self, growth: int) -> None:
        page_size = self._config.page_size
        protected = self._policy.protected_tokens(self._config.kv_budget)
        first = -(-protected // page_size) * page_size
        count = -(-growth // page_size) * page_size
        self._cut(slice(first, first + count))
        self.num_evicted += count

    def _cut(self, span: slice) -> None:
        for layer, (keys, values) in enumerate(self._held):
            stay = torch.ones(keys.shape[1], dtype=torch.bool)
            stay[span] = False
            self._held[layer] = (keys[:, stay], values[:, stay])
