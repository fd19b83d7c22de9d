"""The speculator of model runner V2 for FlexDraft: the target drafts for itself."""

from typing import Any

import torch
from torch import Tensor, nn

from vllm_budgetdraft.flexdraft.proposer import MaskProposer
from vllm_budgetdraft.proposer.drawn_logits import DrawnLogits
from vllm_budgetdraft.proposer.picking import Drafts
from vllm_budgetdraft.vllm_integration.core_loader import finish_core, load_mask_core
from vllm_budgetdraft.vllm_integration.flex_rounds import rounds_for
from vllm_budgetdraft.vllm_integration.v2.progress import Progress, rows_of
from vllm_budgetdraft.vllm_integration.v2.speculator import Speculator
from vllm_budgetdraft.vllm_integration.v2.without_module import GIVEN


class TargetSpeculator(Speculator):
    """Drafts from the target's cache: there is nothing to read, and nothing to feed.

    Of a request ``Progress`` says whether what it sees of its prompt is chosen
    (``is_read``); it can be once the prompt is in the target's cache.

    In this runner ``flex_decoding`` "auto" is sequential: what drafts of either mode
    are accepted only the device knows, and the scheduler.
    """

    def _load_core(
        self, target_model: nn.Module, embedding: Tensor | None
    ) -> DrawnLogits | None:
        self._masks = load_mask_core(self.vllm_config, target_model, tells_logits=True)
        self._batch: Any = None
        num_slots = self.vllm_config.scheduler_config.max_num_seqs
        # By slot, the row of its last accepted token in the pass.
        self._last_rows = torch.zeros(num_slots, dtype=torch.int64, device=self.device)
        self._rounds = rounds_for(
            self._masks,
            self.vllm_config,
            self._faults,
            self._tokens_of_pass,
            can_choose=False,
        )
        return self._masks.drawn_logits

    def note_batch(self, batch: Any) -> None:
        """Takes vLLM's InputBatch of the pass that comes next."""
        self._batch = batch

    def _tokens_of_pass(self) -> tuple[Tensor, Tensor] | None:
        """See ``FlexRounds``."""
        batch, self._batch = self._batch, None
        if batch is None or batch.has_prefill:
            return None
        for index in batch.idx_mapping_np.tolist():
            progress = self._progress.get(index)
            if progress is None or not (progress.is_read or progress.why_not):
                return None
        slots, count = batch.idx_mapping, batch.num_tokens
        starts = batch.query_start_loc[: batch.num_reqs + 1]
        row = torch.repeat_interleave(starts.diff(), output_size=count)
        self._masks.place(slots, self._blocks[slots])
        return slots[row], batch.positions[:count]

    def time_steps(self, runner: Any) -> None:
        """See ``Speculator``; the engine has its cache by now."""
        num_kinds = len(runner.kv_cache_config.kv_cache_groups)
        finish_core(self._masks, self.vllm_config, num_kinds)
        # [max_num_reqs, max_pages], by index.
        self._blocks = runner.block_tables.block_tables[0].gpu
        if self._rounds is None:
            super().time_steps(runner)
        elif (costs := self._rounds.time_steps(runner)) and (
            self._config.adaptive_draft_length
        ):
            self._step_costs = costs

    @property
    def _drafts(self) -> bool:
        """Every rank drafts, for each holds a part of the target."""
        return True

    @property
    def _timed_core(self) -> MaskProposer:
        return self._masks

    def propose(self, *args: Any, **kwargs: Any) -> Tensor:
        """See ``Speculator``."""
        if kwargs.get("is_profile"):
            self._masks.warm_up_head()
        if self._rounds is not None:
            self._rounds.begin_step()
        given = dict(zip(GIVEN, args, strict=False)) | kwargs
        self._passed = given["input_batch"], given["num_sampled"]
        return super().propose(*args, **kwargs)

    def _observe(self) -> None:
        self._statistics.set("cuda_graphs", self._masks.num_graphs)

    def _begin(self, index: int, progress: Progress, request: Any) -> None:
        """Nothing: its prompt is not in the target's cache yet."""

    def _end(self, index: int, progress: Progress) -> None:
        del self._progress[index]

    def _release(self, index: int) -> None:
        self._progress.pop(index, None)

    def _reset(self, error: Exception) -> None:
        """See ``Speculator``: there is no cache that might be at fault."""
        if self._faults.report_every(error):
            for progress in self._progress.values():
                progress.why_not = progress.why_not or "failed"

    def _ready(self, batch: Any, length: int) -> list[int]:
        """Rows that draft now: those that sampled."""
        rows = []
        for row, (index, num_prefilled, num_drafts) in enumerate(rows_of(batch)):
            progress = self._progress.get(index)
            if progress is None or not progress.step(num_prefilled, num_drafts):
                continue
            if not (progress.why_not or progress.is_read):
                try:
                    self._choose(index, progress)
                except Exception as error:
                    self._drop(index, progress, error)
            if progress.why_not or not length:
                reason = progress.why_not or "draft_length"
                self._statistics.count("drafts_skipped", label=reason)
            else:
                rows.append(row)
        return rows

    def _choose(self, index: int, progress: Progress) -> None:
        blocks, count = self._blocks[index], progress.num_prefill
        self._masks.choose(index, blocks, count, progress.kv_budget)
        progress.is_read = True

    def _draft(
        self,
        slots: Tensor,
        length: int,
        temperatures: Tensor | None,
        top_k: Tensor | None,
    ) -> Drafts:
        states = self._states
        ends = states.total_len.gpu[slots].long()
        last = states.all_token_ids.gpu[slots, ends - 1].long()
        hidden = None
        if self._rounds is not None:
            batch, num_sampled = self._passed
            last_rows = batch.query_start_loc[: batch.num_reqs] + num_sampled - 1
            self._last_rows[batch.idx_mapping] = last_rows.long()
            hidden = self._rounds.take(self._last_rows[slots], length)
        if hidden is not None:
            return self._masks.pick(hidden, slots, last, temperatures, top_k)
        self._masks.place(slots, self._blocks[slots])
        return self._masks.draft(
            slots, last[:, None], ends, length, temperatures, top_k
        )
