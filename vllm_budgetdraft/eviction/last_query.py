"""The positions that the last token looks at."""

from torch import Tensor

from vllm_budgetdraft.eviction.base import PromptStates, RankingPolicy, chunk_scores


class LastQuery(RankingPolicy):
    """Keeps the sinks and the positions with most attention from the last query.

    Based on TOVA (https://arxiv.org/abs/2401.06104), section 3.2.

    Deviations: the first ``sink_tokens`` always stay; attention is ranked per KV head,
    summed over the query heads that share it, and not over all heads of a layer; a
    prompt is cut down in the end or after every chunk, not after every token, and
    generation gives up its oldest tokens.
    """

    observation_tokens = 1

    def num_recent(self, room: int) -> int:
        return 0

    def scores(self, states: PromptStates, end: int) -> Tensor:
        assert states.queries is not None
        return chunk_scores(
            self.operations, states.keys, states.queries, 1, "attention"
        )[..., :end]
