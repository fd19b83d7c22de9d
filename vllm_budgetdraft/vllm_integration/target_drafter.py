"""Drafts by the target itself: FlexDraft's mask tokens over the target's own cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_budgetdraft.config import (
    RequestSettings,
    SettledConfig,
    parse_request_settings,
)
from vllm_budgetdraft.errors import UnsupportedVllmError
from vllm_budgetdraft.flexdraft.attention import MaskAttention
from vllm_budgetdraft.flexdraft.modeling import FlexDraft, TargetParts
from vllm_budgetdraft.flexdraft.pages import PageSelector
from vllm_budgetdraft.proposer.truncation import truncated
from vllm_budgetdraft.vllm_integration.draft_lists import NOT_FINITE, confident, marked
from vllm_budgetdraft.vllm_integration.faults import FaultLog
from vllm_budgetdraft.vllm_integration.observation import DraftTimer
from vllm_budgetdraft.vllm_integration.request_drafter import (
    Request,
    max_drafts,
)
from vllm_budgetdraft.vllm_integration.sampling import (
    DraftSampling,
    as_tensors,
    draft_sampling,
)
from vllm_budgetdraft.vllm_integration.statistics import DraftStatistics
from vllm_budgetdraft.vllm_integration.target_cache import pages_of


@dataclass
class Served:
    """A request that drafts.

    Attributes:
        state: vLLM's object for it.
        pages: by layer and KV head, the pages of its prompt that mask tokens see,
            [L, G, num_kept] int64, by their order in the prompt; None for all pages.
        prompt_pages: how many the prompt has.
    """

    state: Any
    settings: RequestSettings
    sampling: DraftSampling
    pages: Tensor | None = None
    prompt_pages: int = 0


class TargetDrafter:
    """What ``RequestDrafter`` is, without a cache of its own: nothing is read twice.

    Attributes:
        statistics, timer, probabilities, has_only_drafted: see ``RequestDrafter``.
    """

    def __init__(
        self,
        config: SettledConfig,
        target: Any,
        drafter: FlexDraft,
        operations: ModuleType,
        seed: int,
    ) -> None:
        """
        Args:
            target: vLLM's model.
            operations: see ``select_operations``.
        """
        self._config, self._drafter = config, drafter
        self._parts = TargetParts(target, drafter.num_layers)
        self._operations = operations
        self._device = drafter.mask_embedding.device
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._pages: list[tuple[Tensor, Tensor]] = []
        self._selector: PageSelector
        self._served: dict[str, Served] = {}
        self._given_up: dict[str, Any] = {}
        self._batch: list[Request] = []
        self.statistics = DraftStatistics()
        self._faults = FaultLog(self.statistics)
        self.timer = DraftTimer(self._device)
        self.probabilities: tuple[list[str], Tensor] | None = None
        self.has_only_drafted = True

    def observe(self) -> None:
        """Notes what drafting took; there is no draft cache."""
        self.statistics.count("draft_seconds", self.timer.take())

    def warm_up(self) -> None:
        """Nothing: there is no cache to read before vLLM has measured its memory."""

    def reset(self, error: Exception) -> None:
        """After a failure of no request in particular; see ``RequestDrafter``."""
        if self._faults.report_every(error):
            states = {each.request_id: each.state for each in self._batch}
            self._given_up.update(states)
        self._served.clear()
        self._pages = []
        self.probabilities = None

    def forget_ended(self, live: Mapping[str, Any]) -> None:
        """Forgets requests that are over, or another one of the same id by now."""
        for known in (self._served, self._given_up):
            for request_id, each in list(known.items()):
                state = each.state if isinstance(each, Served) else each
                if live.get(request_id) is not state:
                    del known[request_id]

    def draft(
        self, requests: list[Request], is_trial: bool = False
    ) -> dict[int, list[int]]:
        """Drafts by row, of the rows that have sampled and do not fail."""
        self.probabilities = None
        self._batch = [
            each for each in requests if each.request_id not in self._given_up
        ]
        if self._batch and not self._pages:
            self._find_pages(self._batch[0])
        ready = []
        for request in requests:
            if not request.sampled or request.request_id in self._given_up:
                continue
            try:
                served = self._served_request(request)
                if max_drafts(request, served.settings):
                    ready.append((request, served))
            except Exception as error:
                self._give_up(request, error)
        drafts = self._draft(ready) if ready else {}
        if drafts:
            self._faults.drafted()
        for request in requests:
            if request.sampled and not drafts.get(request.row):
                self.statistics.count("drafts_skipped", label=self._why_not(request))
        return drafts

    def _why_not(self, request: Request) -> str:
        """Why a request that sampled has no drafts."""
        if request.request_id in self._given_up:
            return "failed"
        settings = self._served[request.request_id].settings
        return "not_confident" if max_drafts(request, settings) else "off"

    def _find_pages(self, request: Request) -> None:
        """Once the engine has its cache; any of its requests will do."""
        if len(request.block_tables) != 1:
            raise UnsupportedVllmError(
                f"the target has {len(request.block_tables)} kinds of cache; "
                "flexdraft drafts for targets with full attention in every layer"
            )
        layers = self._parts.layers
        self._pages = [pages_of(layer.self_attn.attn) for layer in layers]
        self._selector = PageSelector(self._config, self._pages[0][0].shape[1])

    def _served_request(self, request: Request) -> Served:
        served = self._served.get(request.request_id)
        if served is not None and served.state is request.state:
            return served
        params, config = request.state.sampling_params, self._config
        settings = parse_request_settings(params and params.extra_args, config)
        sampling = DraftSampling()
        if config.draft_sample_method == "probabilistic":
            sampling = draft_sampling(params)
        served = Served(request.state, settings, sampling)
        budget = settings.kv_budget or config.kv_budget
        num_tokens = request.state.num_prompt_tokens
        if not self._selector.keeps_all and num_tokens > budget:
            served.pages = self._choose(request, num_tokens, budget)
            served.prompt_pages = -(-num_tokens // self._selector.page_size)
        self._served[request.request_id] = served
        return served

    def _choose(self, request: Request, num_tokens: int, budget: int) -> Tensor:
        """Pages of a prompt that is in the cache, [L, G, num_kept]."""
        num_pages = -(-num_tokens // self._selector.page_size)
        blocks = self._blocks(request, num_pages)
        chosen = []
        for key_pages, _ in self._pages:
            keys = key_pages[blocks].flatten(0, 1)[:num_tokens].transpose(0, 1)
            chosen.append(self._selector.select(keys, budget))
        return torch.stack(chosen)

    def _draft(self, ready: list[tuple[Request, Served]]) -> dict[int, list[int]]:
        contexts = [request.context for request, _ in ready]
        num_drafts = max(max_drafts(request, each.settings) for request, each in ready)
        block = num_drafts + 1
        # The bonus token is the last of the context, and not in the cache yet.
        ends = self._tensor([len(context) - 1 for context in contexts])
        bonus = self._tensor([int(context[-1]) for context in contexts])
        offsets = torch.arange(block, device=self._device)
        tables, lengths = self._page_tables(ready)
        attend = MaskAttention(
            self._operations,
            self._pages,
            tables,
            lengths,
            self._drafter.rotary((ends[:, None] + offsets).flatten()),
            block,
        )
        masks = self._drafter.masks(self._parts.embed(bonus), block).flatten(0, 1)
        hidden = self._drafter(masks, self._parts, attend)
        hidden = hidden.unflatten(0, (-1, block))[:, 1:]
        samplings = [served.sampling for _, served in ready]
        temperatures, top_k = as_tensors(samplings, self._device)

        def pick(logits: Tensor) -> tuple[Tensor, ...]:
            if temperatures is None:
                return self._operations.greedy_pick(logits, validate=False)
            if top_k is not None:
                logits = truncated(logits, top_k)
            uniforms = torch.rand(
                len(logits), generator=self._generator, device=self._device
            )
            return self._operations.sampled_pick(
                logits, temperatures, uniforms, validate=False
            )

        picked = self._drafter.draft(hidden, self._parts, bonus, pick)
        tokens, confidences, *probabilities = (
            torch.stack(each, 1) for each in zip(*picked, strict=True)
        )
        if probabilities:
            ids = [request.request_id for request, _ in ready]
            self.probabilities = ids, probabilities[0]
        threshold = self._config.draft_confidence_threshold
        drafts = marked(tokens, confidences, threshold)
        found = {}
        for (request, served), drafted in zip(ready, drafts, strict=True):
            if NOT_FINITE in drafted:
                self._give_up(request, FloatingPointError("logits are not finite"))
            else:
                limit = max_drafts(request, served.settings)
                found[request.row] = confident(drafted)[:limit]
        return found

    def _page_tables(
        self, ready: list[tuple[Request, Served]]
    ) -> tuple[list[Tensor], Tensor]:
        """Of each layer [B, N] or [B, G, N]; and the tokens in them, [B] int64.

        All pages of a list are full but the last one, where the context ends.
        """
        size = self._selector.page_size
        window = -(-self._config.recent_window // size)
        rows, lengths = [], []
        for request, served in ready:
            num_tokens = len(request.context) - 1
            num_pages = -(-num_tokens // size)
            blocks = self._blocks(request, num_pages)
            if served.pages is None:
                row = blocks
            else:
                first = max(served.prompt_pages, num_pages - window)
                later = blocks[first:].expand(*served.pages.shape[:2], -1)
                row = torch.cat([blocks[served.pages], later], -1)
            rows.append(row)
            lengths.append(row.shape[-1] * size - (num_pages * size - num_tokens))
        longest = max(row.shape[-1] for row in rows)
        padded = [F.pad(row, (0, longest - row.shape[-1])) for row in rows]
        num_layers = len(self._pages)
        if all(row.ndim == 1 for row in rows):
            tables = [torch.stack(padded)] * num_layers
        else:
            sizes = (num_layers, self._drafter.num_kv_heads, longest)
            tables = list(torch.stack([row.expand(sizes) for row in padded], 1))
        return tables, self._tensor(lengths)

    def _blocks(self, request: Request, num_pages: int) -> Tensor:
        """Where vLLM has the first pages of a request, [num_pages] int64."""
        return self._tensor(request.block_tables[0][:num_pages])

    def _tensor(self, data: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(data, dtype=dtype).to(self._device)

    def _give_up(self, request: Request, error: Exception) -> None:
        self._given_up[request.request_id] = request.state
        self._faults.report(f"request {request.request_id}", error)
