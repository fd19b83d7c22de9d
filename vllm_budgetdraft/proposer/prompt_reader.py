"""Reading a context before drafting: what of it is read, and what is kept."""

import torch
from torch import Tensor

from vllm_budgetdraft.attention.prompt import PromptAttention
from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.eviction.base import (
    EvictionPolicy,
    PromptStates,
    check_selection,
)
from vllm_budgetdraft.eviction.reading import ReadingPlan


class PromptReader:
    """Reads one context at a time, chunk by chunk, through a buffer for all of them.

    Attributes:
        prompt: the buffer.
        num_seen: tokens of the context that were read or skipped.
    """

    def __init__(
        self,
        drafter: Drafter,
        policy: EvictionPolicy,
        prompt: PromptAttention,
        view: ViewSettings,
        kv_budget: int,
    ) -> None:
        """
        Args:
            kv_budget: most prompt tokens that a request keeps.
        """
        self._drafter = drafter
        self._policy = policy
        self.prompt = prompt
        self._view = view
        self._is_relative = view.position_mode == "cache_relative"
        self._max_budget = self._budget = kv_budget
        self.num_seen = 0
        self._plan = ReadingPlan()
        self._has_chosen = False  # since it last read

    def start(self, num_tokens: int, kv_budget: int | None = None) -> None:
        """Begins another context; of one that was not finished nothing is left.

        Args:
            num_tokens: its length, as far as it is known.
            kv_budget: as given to ``DraftProposer.start_request``.
        """
        self.prompt.restart()
        self._budget = min(kv_budget or self._max_budget, self._max_budget)
        self._has_chosen = False
        self._plan = ReadingPlan.of(
            self._view,
            self._policy,
            native_tokens=self._drafter.config.max_position_embeddings,
            num_tokens=num_tokens,
            budget=self._budget,
        )
        self.num_seen = 0

    def unread(self, end: int) -> range:
        """Positions to be read next, of a context that ends at ``end``."""
        return self._plan.unread(self.num_seen, end)

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> None:
        """Reads the next tokens of a context.

        Args:
            tokens: int64, at the first of the positions that are ``unread``.
        """
        prompt = self.prompt
        position = self.unread(self.num_seen + len(tokens)).start
        while len(tokens):
            choice = self._plan.next_choice(position)
            room = len(tokens) if choice is None else choice - position
            piece, tokens = tokens[:room], tokens[room:]
            start = prompt.num_held if self._is_relative else position
            positions = torch.arange(start, start + len(piece), device=tokens.device)
            self._drafter(piece, prompt.chunk(*self._drafter.rotary(positions)))
            position += len(piece)
            self._has_chosen = position == choice
            if self._has_chosen:
                prompt.keep(self._select())
        self.num_seen = position

    def kept(self) -> Tensor:
        """Rows of the buffer to keep for drafting, [num_layers, num_kv_heads, n].

        Raises:
            ValueError: the policy's choice is none.
        """
        return self._states().all_positions() if self._has_chosen else self._select()

    def _select(self) -> Tensor:
        states = self._states()
        kept = self._policy.select(states, self._budget)
        check_selection(kept, states, self._budget)
        return kept

    def _states(self) -> PromptStates:
        prompt = self.prompt
        keys = prompt.keys_as_read().transpose(1, 2)
        return PromptStates(keys, prompt.last_queries(), prompt.attention)
