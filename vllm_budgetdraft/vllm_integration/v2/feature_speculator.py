"""The speculator of model runner V2 for a drafter that reads what its target thought.

See ``v1.feature_drafting`` for what such a drafter is fed, and when. Here the host
knows how far prompts are, and the device alone how many drafts were accepted.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_budgetdraft.drafter.feature_checkpoint import read_feature_config
from vllm_budgetdraft.drafter.feature_modeling import FeatureDrafter
from vllm_budgetdraft.errors import PagePoolExhaustedError
from vllm_budgetdraft.proposer.draft_loop import Fed
from vllm_budgetdraft.vllm_integration.remembering import start_reading_features
from vllm_budgetdraft.vllm_integration.v2.own_cache_speculator import OwnCacheSpeculator
from vllm_budgetdraft.vllm_integration.v2.progress import Progress, rows_of
from vllm_budgetdraft.vllm_integration.v2.without_module import GIVEN


class FeatureSpeculator(OwnCacheSpeculator):
    """Feeds each step's tokens with the target's states, and drafts."""

    reads_features = True

    def load_model(self, target_model: nn.Module) -> None:
        super().load_model(target_model)
        if not self._is_leader:
            return
        num_slots = self.vllm_config.scheduler_config.max_num_seqs
        # ``_first_known``, on the device.
        self._origins = torch.zeros(num_slots, dtype=torch.int64, device=self.device)
        width = self._core.first_width
        self._places = torch.arange(width, device=self.device)

    @property
    def aux_layers(self) -> list[int] | None:
        """Of the target, see ``FeatureDrafter``."""
        return read_feature_config(self._config.model).aux_layers

    def _start_reading(self, index: int, progress: Progress, num_computed: int) -> None:
        end = progress.num_to_read
        origin = start_reading_features(
            self._core,
            self._statistics,
            index,
            end,
            kv_budget=progress.kv_budget,
            num_computed=num_computed,
            remembered=progress.remembered,
        )
        self._know_from(index, origin)
        progress.num_to_read = end - origin

    def _end_of_cache(self, index: int, progress: Progress) -> Tensor:
        """See ``OwnCacheSpeculator``: every step's tokens are fed in it."""
        return self._states.total_len.gpu[index] - 1

    def _know_from(self, index: int, position: int) -> None:
        self._first_known[index] = position
        self._origins[index] = position

    def propose(self, *args: Any, **kwargs: Any) -> Tensor:
        """See ``OwnCacheSpeculator``."""
        if self._is_leader:
            given = dict(zip(GIVEN, args, strict=False)) | kwargs
            self._states_of_step = given["aux_hidden_states"]
            self._num_rejected = given["num_rejected"]
        return super().propose(*args, **kwargs)

    def _propose(self, input_batch: Any, last_tokens: Tensor, length: int) -> None:
        """Feeds every row that holds a cache, and drafts for the rows that sampled."""
        self.drafted = set()
        self.release_ended()
        drafter, dtype = self._core.drafter, self._core.cache.pool.keys.dtype
        assert isinstance(drafter, FeatureDrafter)
        states = [x[: input_batch.num_tokens] for x in self._states_of_step]
        features = drafter.combined(torch.cat(states, -1).to(dtype))
        del self._states_of_step
        rows, just_read = self._feed_prompts(input_batch, features, length)
        indices = input_batch.idx_mapping
        batch = [self._progress.get(i) for i in input_batch.idx_mapping_np.tolist()]
        is_told = length > 0 and not all(
            progress and progress.is_greedy for progress in batch
        )
        if len(rows) < input_batch.num_reqs:
            self._output.repeat(indices, last_tokens, is_told)
        if not rows:
            return
        where = async_tensor_h2d(rows, device=self.device, dtype=torch.int64)
        slots = indices[where]
        tokens, ends, fed = self._fed(input_batch, features, rows, where, just_read)
        if not length:
            self._core.append(slots, tokens, ends - fed.counts, fed.features)
            return
        drafting = [progress for row in rows if (progress := batch[row])]
        temperatures = top_k = None
        if is_told and self.draft_logits is not None:
            temperatures = self._temperatures[slots]
        if any(progress.is_cut for progress in drafting):
            top_k = self._top_k[slots]
        drafted = self._core.draft(
            slots, tokens, ends, length, temperatures, top_k, fed
        )
        self._output.fill(where, slots, drafted, last_tokens[where], temperatures)
        self.drafted = {progress.request_id for progress in drafting}
        self._faults.drafted()

    def _feed_prompts(
        self, batch: Any, features: Tensor, length: int
    ) -> tuple[list[int], set[int]]:
        """Reads what this step computed of prompts.

        Returns:
            Rows that sampled and hold all before it, and those of them that have just
            read.
        """
        held = [
            (row, index, progress, progress.step(num_prefilled, num_drafts))
            for row, (index, num_prefilled, num_drafts) in enumerate(rows_of(batch))
            if (progress := self._progress.get(index))
        ]
        began: set[int] = set()
        for row, index, progress, has_sampled in held:
            if not (progress.waits and has_sampled):
                continue
            if not self._core.has_room(progress.kv_budget):
                progress.why_not = "no_pages"
                continue
            try:
                self._begin_with_the_last(index, progress)
                began.add(row)
            except Exception as error:
                self._drop(index, progress, error)
        reading = {
            index: (row, progress)
            for row, index, progress, _ in held
            if progress.is_reading
        }
        just_read = began | self._read_pieces(batch, features, reading)
        rows = []
        for row, _, progress, has_sampled in held:
            if not has_sampled:
                continue
            is_ready = progress.is_read and not progress.why_not
            if length:
                self._statistics.count_wait(progress, is_ready)
            if is_ready:
                rows.append(row)
            if not is_ready or not length:
                reason = progress.why_not or ("reading" if length else "draft_length")
                self._statistics.count("drafts_skipped", label=reason)
        return rows, just_read

    def _begin_with_the_last(self, index: int, progress: Progress) -> None:
        """Gives a request that waited its pages: it knows its last token alone."""
        # The host waits for the device here, once for a request that waited itself.
        num_tokens = int(self._states.total_len.gpu[index])
        progress.begin(num_tokens, has_sampled=True)
        self._core.start_request(index, progress.kv_budget)
        self._know_from(index, num_tokens - 2)
        progress.is_read = True

    def _read_pieces(
        self, batch: Any, features: Tensor, reading: dict[int, tuple[int, Progress]]
    ) -> set[int]:
        """Rows whose contexts are now read to the end."""
        computed, starts = batch.num_computed_tokens_np, batch.query_start_loc_np
        scheduled, ends = batch.num_scheduled_tokens, {}
        for index, (row, progress) in reading.items():
            end = int(computed[row] + scheduled[row]) - self._first_known[index]
            ends[index] = min(end, progress.num_to_read)

        def tokens_of(pieces: list[tuple[int, range]]) -> Tensor:
            ids, parts = self._states.all_token_ids.gpu, []
            for index, piece in pieces:
                first = self._first_known[index] + 1
                parts.append(ids[index, first + piece.start : first + piece.stop])
            return torch.cat(parts).to(torch.int64)

        def features_of(pieces: list[tuple[int, range]]) -> Tensor:
            parts = []
            for index, piece in pieces:
                row, _ = reading[index]
                shift = int(starts[row] - computed[row]) + self._first_known[index]
                parts.append(features[shift + piece.start : shift + piece.stop])
            return torch.cat(parts)

        failed = self._core.reader.read_pieces(tokens_of, features_of, ends)
        finished = set()
        for index, (row, progress) in reading.items():
            if error := failed.get(index):
                self._drop(index, progress, error)
            elif self._core.reader.lacks(index, ends[index]):
                error = PagePoolExhaustedError("no room to read a prompt")
                self._faults.report(f"request {progress.request_id}", error)
                self._release(index)
                progress.why_not, progress.waits = "no_pages", True
                self._progress[index] = progress
            elif not self._core.reader.is_reading(index):
                progress.is_read = True
                finished.add(row)
        return finished

    def _fed(
        self,
        batch: Any,
        features: Tensor,
        rows: list[int],
        where: Tensor,
        just_read: set[int],
    ) -> tuple[Tensor, Tensor, Fed]:
        """Tokens [B, W], ends [B] and what is fed beside them.

        Of a row that has just read it is its last token alone, else what was verified.
        """
        scheduled = batch.num_scheduled_tokens.tolist()
        skipped = [scheduled[row] - 1 if row in just_read else 0 for row in rows]
        given = [[scheduled[row] for row in rows], skipped]
        num_scheduled, first = async_tensor_h2d(
            given, device=self.device, dtype=torch.int64
        )
        slots, states = batch.idx_mapping[where], self._states
        counts = (num_scheduled - self._num_rejected[where]).clamp_min(1)
        counts = counts.where(first == 0, 1).to(torch.int64)
        ends = states.total_len.gpu[slots].to(torch.int64) - 1
        places = self._places.minimum(counts[:, None] - 1)
        positions = (ends - counts)[:, None] + 1 + places
        tokens = states.all_token_ids.gpu[slots[:, None], positions].to(torch.int64)
        starts = batch.query_start_loc[where] + first
        found = features[starts[:, None] + places]
        return tokens, ends - self._origins[slots], Fed(found, counts)
