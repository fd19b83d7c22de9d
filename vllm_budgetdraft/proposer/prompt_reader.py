"""Reading a context before drafting: what of it is read, and what is kept."""

import torch
from torch import Tensor

from vllm_budgetdraft.attention.prompt import PromptAttention
from vllm_budgetdraft.config import BudgetDraftConfig
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.eviction.base import (
    EvictionPolicy,
    PromptStates,
    check_selection,
)


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
        config: BudgetDraftConfig,
        kv_budget: int,
    ) -> None:
        """
        Args:
            config: settled, see ``settle``.
            kv_budget: most prompt tokens that a request keeps.
        """
        self._drafter = drafter
        self._policy = policy
        self.prompt = prompt
        self._streams = config.draft_prefill == "streaming"
        self._is_relative = config.position_mode == "cache_relative"
        self._max_budget = self._budget = kv_budget
        self.num_seen = 0
        self._skipped = range(0)

    def start(self, num_tokens: int, kv_budget: int | None = None) -> None:
        """Begins another context; of one that was not finished nothing is left.

        Args:
            num_tokens: its length, as far as it is known.
            kv_budget: as given to ``DraftProposer.start_request``.
        """
        self.prompt.restart()
        self._budget = self._max_budget if kv_budget is None else kv_budget
        self._skipped = range(0)
        if self._streams:
            self._skipped = self._policy.unread(num_tokens, self._budget)
        self.num_seen = 0
        self._skip()

    def unread(self, end: int) -> range:
        """Positions to be read next, of a context that ends at ``end``."""
        before_gap = self.num_seen < self._skipped.start
        return range(self.num_seen, self._skipped.start if before_gap else end)

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> None:
        """Reads the next tokens of a context.

        Args:
            tokens: int64, at the first of the positions that are ``unread``.
        """
        prompt = self.prompt
        while len(tokens):
            room = prompt.max_tokens - prompt.num_held
            assert room > 0, (prompt.max_tokens, len(tokens))
            chunk, tokens = tokens[:room], tokens[room:]
            start = prompt.num_held if self._is_relative else self.num_seen
            positions = torch.arange(start, start + len(chunk), device=tokens.device)
            self._drafter(chunk, prompt.chunk(*self._drafter.rotary(positions)))
            self.num_seen += len(chunk)
            if self._streams:
                prompt.keep(self._select())
        self._skip()

    def kept(self) -> Tensor:
        """Rows of the buffer to keep for drafting, [num_layers, num_kv_heads, n].

        Raises:
            ValueError: the policy's choice is none.
        """
        # Streaming has chosen after every chunk.
        return self._states().all_positions() if self._streams else self._select()

    def _skip(self) -> None:
        if self._skipped and self.num_seen == self._skipped.start:
            self.num_seen = self._skipped.stop

    def _select(self) -> Tensor:
        states = self._states()
        kept = self._policy.select(states, self._budget)
        check_selection(kept, states, self._budget)
        return kept

    def _states(self) -> PromptStates:
        prompt = self.prompt
        keys = prompt.keys_as_read().transpose(1, 2)
        return PromptStates(keys, prompt.last_queries(), prompt.attention)
