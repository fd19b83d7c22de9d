"""What a request's sampling parameters mean for its drafts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_budgetdraft.config import SettledConfig, parse_request_settings
from vllm_budgetdraft.errors import ConfigurationError

#: Temperatures below are greedy to vLLM.
MIN_TEMPERATURE = 1e-5


class DraftSampling(NamedTuple):
    """What drafts of a request are drawn from; the likeliest is picked by default.

    Attributes:
        temperature: 0 to pick the likeliest.
        top_k: how many of the likeliest; 0 for all.
    """

    temperature: float = 0.0
    top_k: int = 0


def is_greedy(params: Any) -> bool:
    """Whether the target's likeliest tokens are taken."""
    return params is None or params.temperature < MIN_TEMPERATURE


def draft_sampling(params: Any) -> DraftSampling:
    """How a request's drafts come about.

    The likeliest is picked where a draft is withheld, or a token chosen, by what was
    drawn:

    * vLLM cuts a draft that a grammar forbids before it verifies. Of drawn drafts, the
      rest would no longer have the distribution that vLLM is told.
    * With a seed, the target's token is the same whatever is drafted (see
      ``v1.seeds``), so that the likeliest draft is the best one.
    """
    if is_greedy(params):
        return DraftSampling()
    if params.seed is not None or params.structured_outputs is not None:
        return DraftSampling()
    # Not top_p and min_p, see ``truncated``; of top_k -1 is none, too.
    return DraftSampling(float(params.temperature), max(params.top_k, 0))


def as_tensors(
    batch: list[DraftSampling], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Temperatures [B] float32 and top-k [B] int64; None where none has any."""
    if not any(each.temperature for each in batch):
        return None, None
    temperatures = torch.tensor([each.temperature for each in batch]).to(device)
    if not any(each.top_k for each in batch):
        return temperatures, None
    return temperatures, torch.tensor([each.top_k for each in batch]).to(device)


def most_drafts(request: Any, config: SettledConfig) -> int:
    """How many drafts of a request are to be verified at once.

    Args:
        request: of vLLM's scheduler.
    """
    if request.prompt_embeds is not None:
        return 0
    params = request.sampling_params
    try:
        asked = parse_request_settings(params and params.extra_args, config)
    except ConfigurationError:  # for which the worker drafts nothing, and says so
        return 0
    limit = asked.num_speculative_tokens
    return config.num_speculative_tokens if limit is None else limit
