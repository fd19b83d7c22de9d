"""What drafts are drawn from: logits by slot, for a verifier that reads logits."""

import torch
from torch import Tensor

#: The logit of what is not drafted; and the logit of what is drafted for certain, which
#: is finite, for it is divided by a temperature, and leaves no softmax to the others.
NEVER, CERTAIN = -torch.inf, 1e30


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of logits that a drafter of a type computed: the smallest that holds them all.

    float16 has no room for ``CERTAIN``.
    """
    return dtype if dtype == torch.bfloat16 else torch.float32


class DrawnLogits:
    """A buffer of logits that drafts are drawn from.

    Attributes:
        logits: [num_slots + 1, k, V]. Over its temperature, the softmax of a token's is
            what it was drawn from. The last slot is the cache's spare one.
    """

    def __init__(
        self,
        num_slots: int,
        num_drafts: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        draft_ids: Tensor | None = None,
    ) -> None:
        """
        Args:
            dtype: the drafter's.
            draft_ids: [n] int64, the token of each logit to be stored; if None, these
                are of the first tokens.
        """
        shape = (num_slots + 1, num_drafts, vocab_size)
        self.logits = torch.zeros(shape, dtype=logits_dtype(dtype), device=device)
        if draft_ids is not None:
            self.logits.fill_(NEVER)
            self.logits[..., draft_ids] = 0  # a softmax has something of every slot
        self._steps = torch.arange(num_drafts, device=device)
        self._draft_ids = draft_ids
        # Tokens that were made certain, of which there may be others than draft_ids.
        self._certain = torch.zeros(shape[:2], dtype=torch.int64, device=device)

    def begin(self, slots: Tensor) -> None:
        """To be called before what slots [B] draft is stored."""
        if self._draft_ids is not None:
            cells = slots[:, None], self._steps, self._certain[slots]
            self.logits[cells] = NEVER

    def store(self, slots: Tensor, step: int, logits: Tensor) -> Tensor:
        """Stores logits [B, n], and returns them as they are stored.

        A token must be drawn from these: less the largest, they are rounded anew, so
        that a low temperature leaves them their differences. A row whose largest is not
        finite has ``NEVER`` alone.
        """
        logits = logits.to(self.logits.dtype)
        logits = logits - logits.amax(-1, keepdim=True)
        logits.nan_to_num_(NEVER, NEVER, NEVER)
        if self._draft_ids is not None:
            self.logits[slots[:, None], step, self._draft_ids] = logits
            return logits
        vocab_size = logits.shape[1]
        self.logits[slots, step, :vocab_size] = logits
        if vocab_size < self.logits.shape[2]:
            self.logits[slots, step, vocab_size:] = NEVER
        return logits

    def make_certain(self, slots: Tensor, tokens: Tensor, where: Tensor) -> None:
        """Stores of some tokens [B, k] that nothing else might have been drafted.

        Args:
            where: [B, k] or [B, 1] bool.
        """
        cells = slots[:, None], self._steps[: tokens.shape[1]]
        self._certain[cells] = tokens
        logits = self.logits[*cells, tokens]
        self.logits[*cells, tokens] = logits.masked_fill(where, CERTAIN)

    def store_certain(self, slots: Tensor, tokens: Tensor) -> None:
        """Stores tokens [B, k] that nobody drew."""
        self.logits[slots] = NEVER
        cells = slots[:, None], self._steps[: tokens.shape[1]]
        self._certain[cells] = tokens
        self.logits[*cells, tokens] = CERTAIN
