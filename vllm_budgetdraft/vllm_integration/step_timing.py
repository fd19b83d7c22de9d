"""Times of steps at start-up, for ``StepCosts``: no request pays for learning them."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_budgetdraft.proposer.draft_length import doublings
from vllm_budgetdraft.proposer.step_costs import StepCosts
from vllm_budgetdraft.vllm_integration.faults import logger

#: The largest pass of the target and the largest batch of drafts that are timed. Beyond
#: them both are bound by arithmetic, and go on as they rose.
MAX_TOKENS, MAX_BATCH = 512, 64
#: After a pass as long no larger one is timed: start-up must end, too.
LONG_PASS_SECONDS = 0.25
NUM_SAMPLES = 4


class Core(Protocol):
    """What drafts, with a cache of its own or without."""

    def draft_for_nobody(self, batch: int, num_drafts: int) -> Tensor:
        """Tokens of a draft over caches as full as they get, to be timed."""


@torch.inference_mode()
def time_steps(runner: Any, core: Core | None) -> StepCosts | None:
    """Times the target of a vLLM model runner, and a drafter, when all is compiled.

    Args:
        runner: of either version. Every rank must call it.
        core: None where this rank does not draft, or drafts cannot be timed.

    Returns:
        None if it fails, which is logged: draft lengths are then fixed.

    Raises:
        Exception: it fails where ranks are parallel, which would wait for each other.
    """
    config = runner.vllm_config
    is_parallel = config.parallel_config.world_size > 1
    longest = config.speculative_config.num_speculative_tokens
    max_num_seqs = config.scheduler_config.max_num_seqs
    most = min(max_num_seqs * (longest + 1), runner.max_num_tokens, MAX_TOKENS)

    def verify(num_tokens: int) -> float:
        def run() -> Tensor:
            hidden, _ = runner._dummy_run(num_tokens, skip_eplb=True)
            logits: Tensor = runner.model.compute_logits(hidden[:num_tokens])
            return logits

        return _seconds(run)

    start = time.perf_counter()
    try:
        target: dict[int, float] = {}
        for num_tokens in doublings(most):
            target[num_tokens] = verify(num_tokens)
            # Ranks must agree, and their clocks do not.
            if target[num_tokens] > LONG_PASS_SECONDS and not is_parallel:
                break
        draft = {}
        if core is not None:
            sizes = doublings(min(max_num_seqs, MAX_BATCH))
            draft = {
                length: {size: _draft_seconds(core, size, length) for size in sizes}
                for length in sorted({1, longest})
            }
        graphs = config.compilation_config.cudagraph_mode
        costs = StepCosts(target, draft, longest, graphs.has_full_cudagraphs())
    except Exception as error:
        if is_parallel:  # other ranks wait for this one
            raise
        logger.warning(
            "BudgetDraft drafts at a fixed length: timing steps at start-up failed "
            "with %s: %s",
            type(error).__name__,
            error,
        )
        return None
    without, *_, with_drafts = (1000 * costs.by_length(1)).tolist()
    logger.info(
        "BudgetDraft timed a step of one request: %.2f ms without drafts, %.2f ms "
        "with %d; that took %.0f s",
        without,
        with_drafts,
        longest,
        time.perf_counter() - start,
    )
    return costs


def _draft_seconds(core: Core, size: int, length: int) -> float:
    return _seconds(lambda: core.draft_for_nobody(size, length))


def _seconds(run: Callable[[], Tensor]) -> float:
    """The least of some runs, after one that may load or compile what it needs."""

    def timed() -> float:
        start = time.perf_counter()
        run().flatten()[0].item()  # waits for the device
        return time.perf_counter() - start

    timed()
    return min(timed() for _ in range(NUM_SAMPLES))
