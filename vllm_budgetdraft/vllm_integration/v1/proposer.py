"""The proposer of model runner V1: lists and request ids to slots and tensors."""

import time
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from vllm_budgetdraft.drafter.feature_checkpoint import read_feature_config
from vllm_budgetdraft.flexdraft.proposer import MaskProposer
from vllm_budgetdraft.proposer.adaptive_length import AdaptiveLength
from vllm_budgetdraft.proposer.draft_length import doublings, scheduled_length
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.vllm_integration.core_loader import (
    embedding_for,
    finish_core,
    load_core,
    load_mask_core,
)
from vllm_budgetdraft.vllm_integration.flex_rounds import FlexRounds
from vllm_budgetdraft.vllm_integration.patches import table
from vllm_budgetdraft.vllm_integration.step_timing import time_steps
from vllm_budgetdraft.vllm_integration.v1.drafting import Drafting, Request
from vllm_budgetdraft.vllm_integration.v1.feature_drafting import FeatureDrafting
from vllm_budgetdraft.vllm_integration.v1.own_cache_drafting import OwnCacheDrafting
from vllm_budgetdraft.vllm_integration.v1.target_cache_drafting import (
    TargetCacheDrafting,
)


class BudgetDraftProposer:
    """vLLM's "custom_class" contract over a ``DraftProposer``.

    It has no attribute ``model``: the runner takes that for a vLLM module.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._vllm_config = vllm_config
        self._config = vllm_config.speculative_config.settings
        self._num_slots = vllm_config.scheduler_config.max_num_seqs
        self._max_model_len = vllm_config.model_config.max_model_len
        self._is_parallel = vllm_config.parallel_config.tensor_parallel_size > 1
        self._drafting: Drafting
        self._core: DraftProposer | MaskProposer | None = None
        self._runner: Any = None
        self._num_scheduled: dict[str, int] = {}
        self._states: list[Tensor] | None = None
        self._verified: dict[str, int] = {}
        self._last_batch: set[str] = set()
        self._probabilities: tuple[list[str], Tensor] | None = None
        self._adaptive: AdaptiveLength | None = None
        self._flex: FlexRounds | None = None
        table.apply("worker")

    def load_model(self, target: nn.Module) -> None:
        """Allocates everything: only what lives after this does vLLM count as used."""
        embedding = None
        if self.reads_features:
            embedding = embedding_for(self._config.model, target)
        if not self._drafts:
            return
        if self._config.drafter_type == "flexdraft":
            self._core = load_mask_core(self._vllm_config, target)
            drafting = TargetCacheDrafting(self._core, self._num_slots)
            self._drafting = drafting
            self._flex = drafting.allow_rounds(self._vllm_config)
        else:
            self._use(load_core(self._vllm_config, target, embedding=embedding))

    def _use(self, core: DraftProposer) -> None:
        self._core = core
        kind = FeatureDrafting if core.reads_features else OwnCacheDrafting
        self._drafting = kind(core, self._num_slots)

    @property
    def reads_features(self) -> bool:
        """Whether it is to be given what the target thought."""
        return self._config.drafter_type == "eagle3"

    @property
    def aux_layers(self) -> list[int] | None:
        """Of the target, see ``FeatureDrafter``."""
        return read_feature_config(self._config.model).aux_layers

    @property
    def _drafts(self) -> bool:
        """Whether this rank drafts; where the target does, each of its ranks has to."""
        return self._is_leader or self._config.drafter_type == "flexdraft"

    @property
    def _is_leader(self) -> bool:
        """Whether this rank drafts for all of its tensor-parallel group."""
        return not self._is_parallel or get_tp_group().is_first_rank

    def bind(
        self,
        runner: Any,
        verified: dict[str, list[int]],
        num_scheduled: dict[str, int] | None = None,
        states: list[Tensor] | None = None,
    ) -> None:
        """Names the runner whose batch the next ``propose`` is about.

        Args:
            verified: of this step, drafts by request id; negative for none.
            num_scheduled: tokens that were computed, by request id, for a drafter that
                reads features.
            states: of them, of the target's layers, [num_tokens or more, hidden_size]
                each, for such a drafter.
        """
        self._runner = runner
        self._num_scheduled = num_scheduled or {}
        self._states = states if self._is_leader else None
        self._verified = {
            request_id: sum(token >= 0 for token in tokens)
            for request_id, tokens in verified.items()
        }

    def take_probabilities(self) -> tuple[list[str], Tensor] | None:
        """What the last drafts were drawn from, for vLLM's rejection sampler.

        Returns:
            Request ids, and [len(ids), k, V] float32; None if no draft was drawn.
        """
        taken, self._probabilities = self._probabilities, None
        return taken

    def release_ended(self) -> None:
        """Releases what requests hold that are over, as no ``propose`` follows."""
        if not self._drafts or self._runner is None:
            return
        try:
            self._drafting.forget_ended(self._runner.requests)
        except Exception as error:
            self._drafting.reset(error)

    def take_statistics(self) -> dict[str, Any] | None:
        """What was drafted since the last call; None where another rank drafts."""
        if not self._is_leader:
            return None
        self._drafting.observe()
        return self._drafting.statistics.take()

    def time_steps(self, runner: Any) -> None:
        """Begins to adapt the draft length, if it is to; every rank must call it."""
        if isinstance(self._core, MaskProposer):
            assert isinstance(self._drafting, TargetCacheDrafting)
            self._drafting.runner = runner
            num_kinds = len(runner.kv_cache_config.kv_cache_groups)
            finish_core(self._core, self._vllm_config, num_kinds)
        costs = None
        if self._flex is not None:
            costs = self._flex.time_steps(runner)
        elif self._config.adaptive_draft_length:
            costs = time_steps(runner, self._core)
        if self._config.adaptive_draft_length:
            if costs and self._is_leader:
                # Graphs of drafts are of some lengths alone.
                lengths = [0, *doublings(costs.max_length)]
                self._adaptive = AdaptiveLength(
                    costs, lengths if costs.are_uniform else None
                )

    def profile_run(self) -> None:
        if self._drafts:
            self._drafting.warm_up()

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
            0 to k tokens by row; none for a row whose drafting fails: the target goes
            on alone.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        if self._flex is not None:
            self._flex.begin_step()
        if self._drafts:
            with self._drafting.timer.measure():
                try:
                    drafted = self._propose(
                        sampled_token_ids, num_tokens_no_spec, token_ids_cpu
                    )
                    for row, tokens in drafted.items():
                        drafts[row] = tokens
                except Exception as error:
                    # Of no request in particular, so that no cache is known to be good.
                    self._drafting.reset(error)
            self._probabilities = self._drafting.probabilities
        return self._shared(drafts) if self._is_parallel else drafts

    def _shared(self, drafts: list[list[int]]) -> list[list[int]]:
        """The leader's drafts, on every rank.

        Each rank verifies them by itself: with other probabilities, ranks would accept
        other tokens and no longer compute the same model.
        """
        shared: dict[str, Any] = {"drafts": drafts, "probabilities": None}
        if self._probabilities is not None:
            ids, probabilities = self._probabilities
            shared |= {"ids": ids, "probabilities": probabilities.contiguous()}
        shared = get_tp_group().broadcast_tensor_dict(
            shared if self._is_leader else None, src=0
        )
        if shared["probabilities"] is not None:
            self._probabilities = shared["ids"], shared["probabilities"]
        return shared["drafts"]

    def _propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens: np.ndarray,
        token_ids: np.ndarray,
    ) -> dict[int, list[int]]:
        """Drafts by row, where there are any."""
        length = self._choose_length(sampled_token_ids)
        counted = self._drafting.statistics
        counted.set("draft_length", length)
        live = self._runner.requests
        self._drafting.forget_ended(live)
        if length == 0 and not self.reads_features:
            num_sampled = sum(map(bool, sampled_token_ids))
            counted.count("drafts_skipped", num_sampled, "draft_length")
            self._drafting.probabilities = None
            return {}
        counted.count("draft_steps", length > 0)
        # The target samples one more token after the last draft that it accepts.
        room = self._max_model_len - 1 - num_tokens
        batch = self._runner.input_batch
        ids = batch.req_ids
        tables = [each.get_numpy_array() for each in batch.block_table.block_tables]
        limits = [length] * len(ids)
        if self._adaptive is not None:
            limits = self._adaptive.limits()
        requests = []
        num_scheduled = [self._num_scheduled.get(each, 0) for each in ids]
        first_states = [0, *accumulate(num_scheduled)]
        for row, sampled in enumerate(sampled_token_ids):
            state = live[ids[row]]
            why_not = ""
            if state.prompt_embeds is not None:
                why_not = "embeddings"  # its row holds the ids of another request
            elif room[row] <= 0:
                why_not = "max_model_len"
            if why_not:
                counted.count("drafts_skipped", bool(sampled), why_not)
                continue
            request = Request(
                row,
                ids[row],
                state,
                context=token_ids[row, : num_tokens[row]],
                num_computed=int(batch.num_computed_tokens_cpu[row]),
                sampled=bool(sampled),
                # Who reads its prompt is not limited yet.
                max_drafts=min(limits[row] if sampled else length, int(room[row])),
                block_tables=tuple(table[row] for table in tables),
                num_scheduled=num_scheduled[row],
                first_state=first_states[row],
                num_accepted=max(0, len(sampled) - 1),
            )
            requests.append(request)
        is_trial = self._adaptive is not None and self._adaptive.is_trying
        if isinstance(self._drafting, FeatureDrafting) and self._states:
            states = torch.cat([x[: first_states[-1]] for x in self._states], -1)
            self._states = None
            drafts = self._drafting.draft(requests, is_trial, states)
        else:
            drafts = self._drafting.draft(requests, is_trial)
        if self._adaptive is not None:
            self._adaptive.drafted(len(drafts), self._drafting.has_only_drafted)
        if self._flex is not None:
            are_all = all(sampled_token_ids) and self._drafting.has_only_drafted
            outcomes = self._outcomes(sampled_token_ids)
            self._flex.next(ids, outcomes, length, are_undisturbed=are_all)
        return drafts

    def _outcomes(
        self, sampled_token_ids: list[list[int]]
    ) -> dict[str, tuple[int, int]]:
        """Of each request that verified drafts: how many, and how many of them stay."""
        ids = self._runner.input_batch.req_ids
        return {
            request_id: (self._verified[request_id], len(sampled) - 1)
            for request_id, sampled in zip(ids, sampled_token_ids, strict=True)
            if sampled and self._verified.get(request_id)
        }

    def _choose_length(self, sampled_token_ids: list[list[int]]) -> int:
        """Most tokens to draft in this step."""
        batch_size, config = len(sampled_token_ids), self._config
        length = scheduled_length(
            config.num_speculative_tokens_per_batch_size,
            batch_size,
            config.num_speculative_tokens,
        )
        if self._adaptive is None:
            return length
        ids = list(self._runner.input_batch.req_ids)
        if self._last_batch.isdisjoint(ids):
            self._adaptive.forget_step()
        self._last_batch = set(ids)
        self._adaptive.acceptance.record(self._outcomes(sampled_token_ids))
        is_decoding = all(sampled_token_ids)
        return self._adaptive.choose(time.perf_counter(), ids, is_decoding, length)
