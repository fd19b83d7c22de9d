"""Seeds that give the output that they give without speculation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Generator, Tensor

#: Where vLLM expects no token.
NO_TOKEN = -1


class SeededRows(dict[int, Generator]):
    """A batch's generators by row; a row with drafts has its generator past them.

    The token after the last draft is sampled before the drafts are verified. With the
    generators past the drafts it gets the noise that it gets without speculation.
    """

    _before: dict[int, Tensor]
    _draw: Callable[[Tensor, Generator], Tensor]

    def sample(
        self,
        output: Tensor,
        draft_token_ids: Tensor,
        num_draft_tokens: list[int],
        target_logits: Tensor,
        bonus_token_ids: Tensor,
    ) -> None:
        """Samples tokens of rows with seeds one by one, with the noise of their turn.

        Drafts are accepted as far as they are the same. Generators end past the last
        token that is emitted.

        Args:
            output: [B, k + 1], of which these rows are written.
            draft_token_ids: [n], of all rows.
            num_draft_tokens: by row.
            target_logits: [n, V], of drafts.
            bonus_token_ids: [B, 1], what follows the last drafts.
        """
        ends = list(accumulate(num_draft_tokens))
        vocab_size = target_logits.shape[1]
        for row, state in self._before.items():
            drafts = slice(ends[row] - num_draft_tokens[row], ends[row])
            generator = self[row]
            generator.set_state(state)
            sampled = self._draw(target_logits[drafts], generator)
            tokens = torch.cat([sampled, bonus_token_ids[row]])
            same = sampled == draft_token_ids[drafts]
            num_emitted = 1 + int(same.cumprod(0).sum())
            output[row] = NO_TOKEN
            output[row, :num_emitted] = tokens[:num_emitted]
            generator.set_state(state)
            self._draw(target_logits.new_zeros(num_emitted, vocab_size), generator)


def past_drafts(
    sampler: Any, num_draft_tokens: list[int], logits: Tensor, sampling_metadata: Any
) -> Any:
    """vLLM's sampling metadata, with ``SeededRows`` where a row with drafts has a seed.

    Args:
        sampler: vLLM's own, of top-k and top-p.
        logits: [n + B, V], for their type and width.
    """
    generators = sampling_metadata.generators
    if not any(num_draft_tokens[row] for row in generators):
        return sampling_metadata
    rows = SeededRows(generators)
    rows._before, rows._draw = {}, _Draw(sampler)
    for row, generator in generators.items():
        if num_drafts := num_draft_tokens[row]:
            rows._before[row] = generator.get_state()
            rows._draw(logits.new_zeros(num_drafts, logits.shape[1]), generator)
    return replace(sampling_metadata, generators=rows)


@dataclass(frozen=True)
class _Draw:
    """vLLM's own sampler, with one request's noise."""

    sampler: Any

    def __call__(self, logits: Tensor, generator: Generator) -> Tensor:
        """Samples tokens [n] of logits [n, V], one after the other."""
        generators = dict.fromkeys(range(len(logits)), generator)
        tokens, _ = self.sampler(logits.clone(), generators, None, None)
        return tokens
