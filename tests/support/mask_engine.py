"""A target of ``transformers`` whose mask tokens draft over pages, as in vLLM."""

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from budgetdraft_kernels import reference
from tests.support import models
from tests.support.flex_twin import NUM_LAYERS, random_drafter, twin_logits
from vllm_budgetdraft.config import SettledConfig
from vllm_budgetdraft.flexdraft.proposer import MaskProposer
from vllm_budgetdraft.training.flexdraft import target_states

NUM_SLOTS, NUM_DRAFTS, PAGE_SIZE, MAX_MODEL_LEN = 3, 4, 4, 160
NUM_PAGES = NUM_SLOTS * MAX_MODEL_LEN // PAGE_SIZE + 1
SETTINGS: dict[str, Any] = {
    "num_speculative_tokens": NUM_DRAFTS,
    "kv_budget": 24,
    "sink_tokens": 3,
    "local_tokens": 8,
    "recent_window": 36,
}


class Engine:
    """A target of ``transformers``, and a cache of pages that lie anywhere.

    Attributes:
        contexts: token ids of each slot's context; the last is the bonus token.
        prompts: tokens of each slot's prompt.
    """

    def __init__(self, operations: ModuleType = reference, **settings: Any) -> None:
        self.target = models.random_model(models.llama())
        self.drafter = random_drafter(
            self.target, sees_bonus=True, drafts_blind=True, chains=True
        )
        self.core = MaskProposer(
            self.drafter,
            self.target,
            SettledConfig(model="", **SETTINGS | settings),
            operations,
            num_slots=NUM_SLOTS,
            max_model_len=MAX_MODEL_LEN,
            seed=0,
        )
        _, keys, _ = target_states(self.target, torch.tensor([[1]]), NUM_LAYERS)
        shape = (NUM_PAGES, PAGE_SIZE, *keys[0].shape[1::2])
        self.pages = [(torch.zeros(shape), torch.zeros(shape)) for _ in keys]
        self.core.bind(self.pages)
        order = torch.randperm(NUM_PAGES - 1) + 1
        self.blocks = order.view(NUM_SLOTS, -1)
        self.contexts: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}

    def start(self, slot: int, num_prompt: int, budget: int | None = None) -> None:
        tokens = models.random_tokens(num_prompt, seed=num_prompt).tolist()
        self.contexts[slot], self.prompts[slot] = tokens, num_prompt
        self.write(slot, tokens)
        self.core.choose(slot, self.blocks[slot], num_prompt, budget)
        tokens.append(7)

    def grow(self, slot: int, count: int) -> None:
        """The target writes on, by any tokens."""
        context = self.contexts[slot]
        context += models.random_tokens(count, seed=len(context)).tolist()
        self.write(slot, context[:-1])

    def write(self, slot: int, tokens: list[int]) -> None:
        _, keys, values = target_states(self.target, torch.tensor([tokens]), NUM_LAYERS)
        places = torch.arange(len(tokens))
        cells = self.blocks[slot][places // PAGE_SIZE] * PAGE_SIZE + places % PAGE_SIZE
        for layer, pages in enumerate(self.pages):
            for half, states in zip(pages, (keys, values), strict=True):
                half.flatten(0, 1)[cells] = states[layer][0].transpose(0, 1)

    def draft(self, slots: list[int], num_drafts: int = 4, **draws: Any) -> Any:
        rows = torch.tensor(slots)
        self.core.place(rows, self.blocks[rows])
        last = torch.tensor([[self.contexts[slot][-1]] for slot in slots])
        ends = torch.tensor([len(self.contexts[slot]) for slot in slots])
        drafts = self.core.draft(rows, last, ends, num_drafts, **draws)
        return [None if x is None else x.clone() for x in drafts]

    def seen(self, slot: int, budget: int = 24, window: int = 36) -> Tensor | None:
        """[layers, G, n] of the context before the bonus token."""
        count, context = self.prompts[slot], self.contexts[slot][:-1]
        prompt = torch.tensor([context[:count]])
        _, keys, _ = target_states(self.target, prompt, NUM_LAYERS)
        visible = [torch.ones(k.shape[1:3], dtype=torch.bool) for k in keys]
        if count > budget:
            chosen = self.core.loop.lists.selector
            visible = [chosen.visible(k, budget)[0] for k in keys]
        last = -(-len(context) // PAGE_SIZE)
        later = torch.arange(count, len(context)) // PAGE_SIZE
        first = max(last - window // PAGE_SIZE, -(-count // PAGE_SIZE))
        is_recent = (later >= first) | (later < -(-count // PAGE_SIZE))
        both = [torch.cat([v, is_recent.expand(len(v), -1)], -1) for v in visible]
        return torch.stack(both)

    def expected(self, slot: int, seen: Tensor | None, is_told: bool = True) -> Tensor:
        context = self.contexts[slot]
        return twin_logits(
            self.target,
            self.drafter,
            context[:-1],
            context[-1],
            NUM_DRAFTS,
            seen,
            is_told=is_told,
        ).argmax(-1)


def settings_of_engine(enforce_eager: bool, **speculation: Any) -> Any:
    """What is asked of vLLM's config."""
    settings = SettledConfig(model="", **SETTINGS | speculation)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            enforce_eager=enforce_eager,
            max_model_len=MAX_MODEL_LEN,
            dtype=torch.float32,
            seed=0,
        ),
        scheduler_config=SimpleNamespace(
            max_num_seqs=NUM_SLOTS, max_num_batched_tokens=512
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        speculative_config=SimpleNamespace(settings=settings),
    )
