"""What a request's sampling parameters mean for its drafts."""

from typing import Any

#: Temperatures below are greedy to vLLM.
MIN_TEMPERATURE = 1e-5


def draft_temperature(params: Any) -> float:
    """Temperature to draw a request's drafts at; 0 to pick the likeliest instead.

    It is 0 where a draft is withheld, or a token chosen, by what was drawn:

    * vLLM cuts a draft that a grammar forbids before it verifies. Of drawn drafts, the
      rest would no longer have the distribution that vLLM is told.
    * With a seed, the target's token is the same whatever is drafted (see
      ``rejection_sampler._follow_the_seed``), so that the likeliest draft is the
      best one.
    """
    if params is None or params.temperature < MIN_TEMPERATURE:
        return 0.0
    if params.seed is not None or params.structured_outputs is not None:
        return 0.0
    return float(params.temperature)
