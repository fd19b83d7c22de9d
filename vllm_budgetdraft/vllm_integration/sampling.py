"""What a request's sampling parameters mean for its drafts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Logit of a token that is not drafted; finite, for it is scaled by temperatures.
NEVER = -1e30
#: Temperatures below are greedy to vLLM.
MIN_TEMPERATURE = 1e-5


class DraftSampling(NamedTuple):
    """What drafts of a request are drawn from; the likeliest is picked by default.

    Attributes:
        temperature: 0 to pick the likeliest.
        top_k: 0 for none.
        top_p: 1 for none.
        min_p: 0 for none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def is_cut(self) -> bool:
        return self[1:] != DraftSampling()[1:]


def draft_sampling(params: Any) -> DraftSampling:
    """What vLLM will compare a request's drafts with, as far as the drafter has it.

    The likeliest is picked where a draft is withheld, or a token chosen, by what was
    drawn:

    * vLLM cuts a draft that a grammar forbids before it verifies. Of drawn drafts, the
      rest would no longer have the distribution that vLLM is told.
    * With a seed, the target's token is the same whatever is drafted (see
      ``rejection_sampler._follow_the_seed``), so that the likeliest draft is the
      best one.
    """
    if params is None or params.temperature < MIN_TEMPERATURE:
        return DraftSampling()
    if params.seed is not None or params.structured_outputs is not None:
        return DraftSampling()
    return DraftSampling(
        float(params.temperature),
        max(params.top_k, 0),  # -1 is none, too
        float(params.top_p),
        float(params.min_p),
    )


def as_tensors(
    batch: list[DraftSampling], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Temperatures [B] and cuts [B, 3], see ``truncated``; None where none has any."""
    if not any(each.temperature for each in batch):
        return None, None
    columns = torch.tensor(batch, dtype=torch.float32).to(device)
    are_cut = any(each.is_cut for each in batch)
    return columns[:, 0].contiguous(), columns[:, 1:] if are_cut else None


def as_logits(probabilities: Tensor, temperatures: Tensor) -> Tensor:
    """What vLLM, dividing by a request's temperature [B], has of [B, k, V] again."""
    logits = probabilities.log().mul_(temperatures[:, None, None])
    return logits.nan_to_num_(NEVER, NEVER, NEVER)
