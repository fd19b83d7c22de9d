"""The proposer of model runner V1: lists and request ids to slots and tensors."""

import logging
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig

from vllm_budgetdraft.proposer.draft_proposer import (
    FIRST_WIDTH,
    DraftProposer,
    MemoryPlan,
    resolve_dtype,
)
from vllm_budgetdraft.vllm_integration.patches import runner_v1
from vllm_budgetdraft.vllm_integration.request_slots import Holding, RequestSlots

# Under vLLM's own logger, the only one that it configures.
logger = logging.getLogger("vllm.budgetdraft")


class BudgetDraftProposer:
    """vLLM's "custom_class" contract over a ``DraftProposer``.

    It has no attribute ``model``: the runner takes that for a vLLM module.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._config = vllm_config.speculative_config.settings
        self._num_slots = vllm_config.scheduler_config.max_num_seqs
        self._max_model_len = vllm_config.model_config.max_model_len
        self._target_dtype = vllm_config.model_config.dtype
        self._slots = RequestSlots(self._num_slots)
        self._core: DraftProposer
        self._runner: Any
        self._num_failures = 0
        runner_v1.apply(type(self))

    def load_model(self, target: nn.Module) -> None:
        """Allocates everything: only what lives after this does vLLM count as used."""
        device = next(target.parameters()).device
        dtype = resolve_dtype(self._config, device.type, self._target_dtype)
        self._core = DraftProposer.build(
            self._config,
            num_slots=self._num_slots,
            max_model_len=self._max_model_len,
            dtype=dtype,
            device=device,
        )
        self._core.warm_up()
        self._log_memory(dtype)

    def bind(self, runner: Any) -> None:
        """Names the runner whose batch the next ``propose`` is about."""
        self._runner = runner

    def profile_run(self) -> None:
        self._core.warm_up()

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for every row that has just sampled.

        Args:
            sampled_token_ids: by row; empty while a prompt is still being prefilled.
            num_tokens_no_spec: [max_num_reqs], context lengths with what was sampled.
            token_ids_cpu: [max_num_reqs, max_model_len], the contexts.

        Returns:
            0 to k tokens by row. None for any row if drafting fails: the target goes
            on alone.
        """
        rows = [
            row
            for row, sampled in enumerate(sampled_token_ids)
            # The target samples one more token after the last draft that it accepts.
            if sampled and num_tokens_no_spec[row] < self._max_model_len - 1
        ]
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        try:
            contexts = [token_ids_cpu[row, : num_tokens_no_spec[row]] for row in rows]
            for row, tokens in zip(rows, self._draft(rows, contexts), strict=True):
                room = self._max_model_len - 1 - int(num_tokens_no_spec[row])
                drafts[row] = tokens[:room]
        except Exception:
            self._give_up()
            return [[] for _ in sampled_token_ids]
        return drafts

    def _draft(self, rows: list[int], contexts: list[np.ndarray]) -> list[list[int]]:
        request_ids = self._runner.input_batch.req_ids
        requests = self._runner.requests
        for request_id in self._slots.ended(requests):
            self._release(request_id)
        if not rows:
            return []

        holdings = self._caught_up(
            [(request_ids[row], requests[request_ids[row]]) for row in rows], contexts
        )
        device = self._core.device
        tokens = torch.from_numpy(np.stack([c[-FIRST_WIDTH:] for c in contexts]))
        drafts = self._core.draft(
            torch.tensor([holding.slot for holding in holdings], device=device),
            tokens.to(device, torch.int64),
            torch.tensor([len(context) for context in contexts], device=device),
        ).tolist()
        for holding, context, drafted in zip(holdings, contexts, drafts, strict=True):
            holding.num_tokens, holding.drafts = len(context), drafted
        return drafts

    def _caught_up(
        self, requests: list[tuple[str, Any]], contexts: list[np.ndarray]
    ) -> list[Holding]:
        """Slots whose caches hold all of each context but its last two tokens."""
        holdings = [self._slots.get(*request) for request in requests]
        new = sum(holding is None for holding in holdings)
        batch = {request_id for request_id, _ in requests}
        for idle in self._slots.idle(batch, wanted=new):
            self._release(idle)
        caught_up = []
        for (request_id, state), holding, context in zip(
            requests, holdings, contexts, strict=True
        ):
            if holding is None or not holding.continues(context):
                if holding is not None:
                    self._release(request_id)
                holding = self._slots.take(request_id, state)
                self._core.start_request(holding.slot)
                past = torch.from_numpy(context[:-FIRST_WIDTH].astype(np.int64))
                self._core.ingest(holding.slot, past.to(self._core.device))
            caught_up.append(holding)
        return caught_up

    def _release(self, request_id: str) -> None:
        self._core.release_request(self._slots.release(request_id))

    def _give_up(self) -> None:
        """Drops every cache, since none is known to be good, and says so sparingly."""
        self._num_failures += 1
        if self._num_failures & (self._num_failures - 1) == 0:
            logger.exception(
                "drafting failed (%d times so far); generation goes on without drafts",
                self._num_failures,
            )
        self._core.release_all()
        self._slots = RequestSlots(self._num_slots)

    def _log_memory(self, dtype: torch.dtype) -> None:
        core, mib = self._core, 2**20
        plan = MemoryPlan.of(
            self._config,
            core.drafter.config,
            num_slots=self._num_slots,
            max_model_len=self._max_model_len,
            dtype=dtype,
        )
        weights = sum(p.nbytes for p in core.drafter.parameters())
        logger.info(
            "BudgetDraft memory: drafter weights %.1f MiB, draft cache %.1f MiB "
            "(%d requests x %d tokens, %.1f KiB each; the drafter's full cache would "
            "take %.1f KiB each), prompt scratch %.1f MiB",
            weights / mib,
            core.cache.pool.num_bytes / mib,
            self._num_slots,
            core.cache.capacity,
            plan.cache_per_request / 1024,
            plan.full_cache_per_request / 1024,
            plan.prompt_scratch / mib,
        )
