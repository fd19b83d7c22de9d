"""Drafting spelled out by ``transformers``, with no page and no kernel."""

import copy

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from vllm_budgetdraft.config import SettledConfig
from vllm_budgetdraft.eviction.base import EvictionPolicy, PromptStates
from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH


class SlowTwin:
    """Drafts for one request over an explicit list of keys.

    Keys and values of each layer, [G, num_held, D], lie in the order of the draft
    cache: what the policy kept of the prompt, then all later tokens. Room is made by
    cutting pages out of the list. With cache_relative positions, keys are turned by as
    much as their index moves.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: EvictionPolicy,
        config: SettledConfig,
        max_model_len: int,
    ) -> None:
        self._model = copy.deepcopy(model)
        self._model.set_attn_implementation("eager")  # which shows its attention
        self._policy, self._config = policy, config
        self._budget = config.budget(max_model_len)
        self._capacity = config.cache_capacity(max_model_len)
        self._is_relative = config.position_mode == "cache_relative"
        self._held: list[tuple[Tensor, Tensor]] = []
        self._received: list[Tensor] = []  # of each layer, [G, num_held]
        self._by_page = torch.zeros(self._capacity // config.page_size)
        self._num_seen = 0

    @property
    def attention(self) -> Tensor:
        """What each page has received, [pages]."""
        return self._by_page

    @property
    def num_held(self) -> int:
        return self._held[0][0].shape[1] if self._held else 0

    @property
    def num_evicted(self) -> int:
        return self._num_seen - self.num_held

    @torch.inference_mode()
    def ingest(self, tokens: Tensor) -> None:
        if not len(tokens):
            return
        streams = self._config.draft_prefill == "streaming"
        unread = self._policy.unread(len(tokens), self._budget) if streams else range(0)
        positions = torch.arange(len(tokens))
        size = self._config.draft_prefill_chunk if streams else len(tokens)
        native = self._model.config.max_position_embeddings
        for stretch in (positions[: unread.start], positions[unread.stop :]):
            while len(stretch):
                room = size
                if self._is_relative and streams:
                    room = min(size, native - (self._budget if self.num_held else 0))
                chunk, stretch = stretch[:room], stretch[room:]
                self._num_seen = int(chunk[0])
                self._run(tokens[chunk].tolist())
                self._keep()
        received = torch.stack(self._received).sum((0, 1))
        self._by_page.index_add_(0, self._pages(len(received)), received)

    def _keep(self) -> None:
        keys, values = (torch.stack(x) for x in zip(*self._held, strict=True))
        received = torch.stack(self._received)
        states = PromptStates(keys, None, received)
        kept = self._policy.select(states, self._budget)
        index = kept[..., None].expand(-1, -1, -1, keys.shape[-1])
        keys, values = keys.gather(2, index), values.gather(2, index)
        if self._is_relative:
            keys = self._turn(keys, torch.arange(kept.shape[-1]) - kept)
        self._held = list(zip(keys, values, strict=True))
        self._received = list(received.gather(2, kept))

    @torch.inference_mode()
    def append(self, context: list[int], start: int, width: int) -> None:
        """Feeds tokens of a context, whose first ``start`` ones have been seen."""
        self._go_back(start)
        self._make_room(start + width)
        self._run(context[start : start + width], counts_pages=True)

    @torch.inference_mode()
    def draft(self, context: list[int], num_drafts: int | None = None) -> list[int]:
        num_drafts = num_drafts or self._config.num_speculative_tokens
        end = len(context)
        # Rejected drafts are forgotten, and the tokens fed first are computed again.
        self._go_back(end - FIRST_WIDTH)
        self._make_room(end + num_drafts - 1)
        drafts: list[int] = []
        fed = context[-FIRST_WIDTH:]
        for _ in range(num_drafts):
            drafts.append(self._run(fed, counts_pages=True))
            fed = drafts[-1:]
        return drafts

    def _run(self, tokens: list[int], counts_pages: bool = False) -> int:
        """Feeds tokens after those held; the model's next one."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._held):
            cache.update(keys[None], values[None], layer)
        start = self.num_held if self._is_relative else self._num_seen
        out = self._model(
            torch.tensor([tokens]),
            position_ids=torch.arange(start, start + len(tokens))[None],
            past_key_values=cache,
            output_attentions=True,
        )
        self._num_seen += len(tokens)
        self._held = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        num_kv_heads = self._held[0][0].shape[0]
        # [H, T, num_held] of each layer to [G, num_held].
        new = [
            a[0].unflatten(0, (num_kv_heads, -1)).sum((1, 2)) for a in out.attentions
        ]
        old = self._received or [x.new_zeros(num_kv_heads, 0) for x in new]
        pad = torch.nn.functional.pad
        self._received = [
            x + pad(y, (0, x.shape[1] - y.shape[1]))
            for x, y in zip(new, old, strict=True)
        ]
        if counts_pages:
            pages = self._pages(self.num_held)
            self._by_page.index_add_(0, pages, torch.stack(new).sum((0, 1)))
        return int(out.logits[0, -1].argmax())

    def _pages(self, num_tokens: int) -> Tensor:
        return torch.arange(num_tokens) // self._config.page_size

    def _go_back(self, end: int) -> None:
        known = end - self.num_evicted
        self._num_seen -= self.num_held - known
        self._cut(range(known, self.num_held))

    def _make_room(self, end: int) -> None:
        if end - self.num_evicted <= self._capacity:
            return
        size = self._config.page_size
        first = -(-self._policy.protected_tokens(self._budget) // size)
        count = -(-(self._config.num_speculative_tokens + 1) // size)
        pages = list(range(first, len(self._by_page)))
        if self._policy.accumulates_attention:
            older = pages[: max(len(pages) // 2, count)]
            victims = sorted(older, key=lambda page: float(self._by_page[page]))[:count]
        else:
            victims = pages[:count]
        stay = [page for page in range(len(self._by_page)) if page not in victims]
        self._by_page = torch.cat([self._by_page[stay], torch.zeros(count)])
        for page in sorted(victims, reverse=True):
            self._cut(range(page * size, (page + 1) * size))

    def _cut(self, span: range) -> None:
        stay = torch.tensor([i for i in range(self.num_held) if i not in span])
        stay = stay.to(torch.int64)
        for layer, (keys, values) in enumerate(self._held):
            keys, values = keys[:, stay], values[:, stay]
            if self._is_relative:
                keys = self._turn(keys, torch.arange(len(stay)) - stay)
            self._held[layer] = (keys, values)
            self._received[layer] = self._received[layer][:, stay]

    def _turn(self, keys: Tensor, by: Tensor) -> Tensor:
        """Rotates keys [..., num_tokens, D] by so many positions, [..., num_tokens]."""
        angles = by[..., None] * self._model.model.rotary_emb.inv_freq
        angles = torch.cat([angles, angles], -1)
        return keys * angles.cos() + rotate_half(keys) * angles.sin()
