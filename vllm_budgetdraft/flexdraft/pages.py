"""Which pages of the target's own cache the mask tokens of a request see.

Letters in shapes: L layers, B sequences, G KV heads, D head size, P tokens per page.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetdraft_kernels import reference
from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.eviction.base import EvictionPolicy, PromptStates
from vllm_budgetdraft.eviction.catalogue import make_policy

#: Those that look at keys alone: the target's attention is not to be had.
POLICIES = ("chunk_retrieval", "sink_window", "keep_all")


class PageSelector:
    """An eviction policy that chooses whole pages of a prompt, of which none moves.

    To the policy a page is one token, whose key is the mean of the page's; the last
    page, which is always kept, has the prompt's last key. So every built-in rule means
    the same, in pages: sinks, the end of the prompt, and between them what scores best
    for each layer and KV head.
    """

    def __init__(self, settings: EvictionSettings, page_size: int) -> None:
        """
        Raises:
            ConfigurationError: a policy that needs more than keys.
        """
        name = settings.eviction_policy
        if name not in POLICIES or settings.chunk_score != "last_key":
            raise ConfigurationError(
                f"eviction_policy={name!r} with chunk_score={settings.chunk_score!r}: "
                f"flexdraft chooses pages by keys alone; use one of "
                f"{', '.join(POLICIES)}, with chunk_score='last_key'"
            )
        self.page_size = page_size
        self.keeps_all = name == "keep_all"
        in_pages = {
            "sink_tokens": -(-settings.sink_tokens // page_size),
            "local_tokens": max(1, settings.local_tokens // page_size),
            "chunk_size": 1,
        }
        self._settings = settings.model_copy(update=in_pages)
        self._policy: EvictionPolicy = make_policy(self._settings, reference)

    def num_pages(self, budget: int) -> int:
        """Pages that a budget in tokens buys: some sink, some end, one between."""
        return max(budget // self.page_size, self._settings.sink_tokens + 2)

    def select(self, keys: Tensor, budget: int) -> Tensor:
        """Pages of a prompt to keep, ascending; the last page is among them.

        Args:
            keys: [..., n, D], rotated, of all the prompt's tokens.
            budget: in tokens.

        Returns:
            [..., num_kept] int64.
        """
        num_pages = -(-keys.shape[-2] // self.page_size)
        whole = keys[..., : (num_pages - 1) * self.page_size, :]
        means = whole.unflatten(-2, (num_pages - 1, self.page_size)).float().mean(-2)
        by_page = torch.cat([means, keys[..., -1:, :].float()], -2)
        states = PromptStates(by_page)
        if self.keeps_all:
            return states.all_positions()
        return self._policy.select(states, self.num_pages(budget))

    def visible(self, keys: Tensor, budget: int) -> Tensor:
        """Which tokens of a prompt the selected pages hold, [..., n] bool."""
        pages = self.select(keys, budget)
        num_tokens = keys.shape[-2]
        num_pages = -(-num_tokens // self.page_size)
        kept = F.one_hot(pages, num_pages).any(-2)
        return kept.repeat_interleave(self.page_size, -1)[..., :num_tokens]
