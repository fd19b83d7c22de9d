"""One request's draft cache as lists of keys and values, with no page and no batch."""

from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetdraft_kernels.reference import accumulated_attention, rotate
from budgetdraft_kernels.reference_projections import Norms, normed_heads
from vllm_budgetdraft.eviction.base import PromptStates
from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer

#: Pages whose attention is that close may be told apart by rounding.
TIE = 1e-4


@dataclass
class Layer:
    """
    Attributes:
        keys, values: [num_held, G, D]; keys are rotated unless positions are relative.
        queries: [num_read, H, D], like the keys.
        received: [G, num_held], attention of the prompt.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    received: Tensor


class ListTwin:
    """Reads a context in the chunks that it is told, and knows what is drafted then.

    It shares weights and policy with a ``DraftProposer``, and neither cache nor
    attention. Less of a twin than ``SlowTwin``, and much faster: it is told the drafts,
    and looks whether each is its own choice after those before it.

    Attributes:
        by_page: attention that each page has received.
        num_tokens: of the context to be read.
        most_held: of these at once.
        num_seen: tokens read, skipped or fed.
        known: the context that it drafted for last, and the drafts that came of it.
        num_known: how long the context was when drafts were asked for last.
    """

    def __init__(
        self, core: DraftProposer, kv_budget: int | None, num_tokens: int
    ) -> None:
        """
        Args:
            kv_budget: of the request; the configured one if None.
            num_tokens: of the context to be read.
        """
        drafter, policy, config = core.drafter, core.policy, core.config
        self._drafter, self._policy, self._config = drafter, policy, config
        longest, native = core.max_model_len, drafter.config.max_position_embeddings
        self._budget = config.budget(longest) if kv_budget is None else kv_budget
        self._num_pages = config.cache_capacity(longest, kv_budget) // config.page_size
        self._is_relative = config.position_mode == "cache_relative"
        keeps_all = config.eviction_policy == "keep_all"
        self._streams = config.draft_prefill == "streaming" and not keeps_all
        self._piece = self._later = config.draft_prefill_chunk
        if self._is_relative:  # as many as find positions beside what is held
            self._piece = min(self._piece, native)
            self._later = min(self._later, native - self._budget)
        self.num_tokens = self.most_held = num_tokens
        if self._streams:
            most = max(self._piece, self._budget + self._later)
            self.most_held = min(num_tokens, most)
        self._num_unchosen = 0  # tokens read since the policy chose
        self._skipped = range(0)
        if self._streams:
            self._skipped = policy.unread(num_tokens, self._budget)
        empty = drafter.embedding.new_zeros(0, drafter.num_heads, drafter.head_dim)
        keys = empty[:, : drafter.num_kv_heads]
        self._layers = [
            Layer(keys, keys, empty, keys[..., 0].T.float())
            for _ in range(drafter.num_layers)
        ]
        self.by_page = empty.new_zeros(self._num_pages)
        self._is_undecided = False
        self.num_seen = self.num_known = 0
        self.known: list[int] = []

    @property
    def _num_held(self) -> int:
        return len(self._layers[0].keys)

    @property
    def _num_evicted(self) -> int:
        return self.num_seen - self._num_held

    def read(self, context: list[int], count: int) -> None:
        """Reads ``count`` more tokens of a context."""
        self._skip()
        while count:
            chunk = min(count, self._piece - self._num_unchosen)
            self._run(context[self.num_seen : self.num_seen + chunk], reading=True)
            count -= chunk
            self._num_unchosen += chunk
            is_before_gap = self._skipped and self.num_seen == self._skipped.start
            if is_before_gap or self._num_unchosen == self._piece:
                self._num_unchosen, self._piece = 0, self._later
                if self._streams:
                    self._select()
        self._skip()

    def finish(self, context: list[int]) -> None:
        """Keeps what the policy does of the context, which has been read."""
        self.known, self.num_known = list(context), len(context)
        if self._num_held and (self._num_unchosen or not self._streams):
            self._select()
        for layer in self._layers:
            self._count(layer.received.sum(0))

    def goes_on(self, context: list[int], samples: bool) -> bool:
        """Whether a context is as long as the last one; longer, if it samples."""
        return len(context) >= self.num_known + samples

    def num_cached(self, context: list[int]) -> int:
        """How many of its first tokens it has seen and knows to be those."""
        same = (a == b for a, b in zip(self.known, context, strict=False))
        return min(sum(takewhile(bool, same)), self.num_seen)

    def append(self, context: list[int], start: int, width: int) -> bool:
        """Feeds some of a context; returns whether it lacked them, and none before."""
        if start != self.num_cached(context):
            return False
        self._feed(start, context[start : start + width], start + width)
        self.known = context[: start + width]
        return True

    def agrees(self, context: list[int], drafts: list[int], num_given: int) -> bool:
        """Whether it holds what belongs to a context, and would draft these.

        Args:
            num_given: how many of them may be accepted.
        """
        start, end = len(context) - FIRST_WIDTH, len(context) + len(drafts) - 1
        if self.num_cached(context) < start:
            return False
        choices = self._feed(start, context[start:] + drafts[:-1], end)
        self.known, self.num_known = context + drafts[:num_given], len(context)
        return self._is_undecided or choices[FIRST_WIDTH - 1 :] == drafts

    def _feed(self, start: int, tokens: list[int], end: int) -> list[int]:
        """Forgets what is after ``start``, makes room up to ``end``, and runs."""
        num_held = start - self._num_evicted
        assert num_held >= 0, (start, self._num_evicted)
        self._cut(list(range(num_held)))
        self.num_seen = start
        self._make_room(end)
        return self._run(tokens)

    def _skip(self) -> None:
        if self._skipped and self.num_seen == self._skipped.start:
            self.num_seen = self._skipped.stop

    def _select(self) -> None:
        keys = [self._as_read(layer.keys) for layer in self._layers]
        states = PromptStates(
            torch.stack(keys).transpose(1, 2),
            self._last_queries(),
            torch.stack([layer.received for layer in self._layers]),
        )
        self._keep(self._policy.select(states, self._budget))

    def _last_queries(self) -> Tensor | None:
        """Of each KV head's query heads, as they stand at the end of what is held."""
        count = self._policy.observation_tokens
        if not count:
            return None
        last = []
        for layer in self._layers:
            queries = layer.queries[-min(count, self._num_held) :]
            queries = self._as_read(queries, self._num_held - len(queries))
            last.append(queries.unflatten(1, (layer.keys.shape[1], -1)))
        return torch.stack(last).permute(0, 2, 3, 1, 4)

    def _keep(self, kept: Tensor) -> None:
        """Positions [L, G, num_kept] of what is held."""
        for layer, index in zip(self._layers, kept, strict=True):
            layer.received = layer.received.gather(1, index)
            rows = index.T[..., None].expand(-1, -1, layer.keys.shape[2])
            layer.keys = layer.keys.gather(0, rows)
            layer.values = layer.values.gather(0, rows)

    def _make_room(self, end: int) -> None:
        """Gives up pages if positions up to ``end`` are more than it may hold."""
        size, config = self._config.page_size, self._config
        if end - self._num_evicted <= self._num_pages * size:
            return
        count = -(-(config.num_speculative_tokens + 1) // size)
        first = -(-self._policy.protected_tokens(self._budget) // size)
        victims = list(range(first, self._num_pages))
        if self._policy.accumulates_attention:
            older = victims[: max(len(victims) // 2, count)]
            victims = sorted(older, key=lambda page: float(self.by_page[page]))
            shares = self.by_page[victims]
            self._is_undecided |= bool((shares[count:] - shares[count - 1] < TIE).any())
        victims = victims[:count]
        stay = [page for page in range(self._num_pages) if page not in victims]
        self.by_page = F.pad(self.by_page[stay], (0, count))
        self._cut([i for i in range(self._num_held) if i // size not in victims])

    def _count(self, received: Tensor) -> None:
        """Adds attention [num_held] to that of the pages."""
        pages = torch.arange(len(received)) // self._config.page_size
        self.by_page.index_add_(0, pages, received.double())

    def _cut(self, stay: list[int]) -> None:
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[stay], layer.values[stay]

    def _run(self, tokens: list[int], reading: bool = False) -> list[int]:
        """Feeds tokens after those held; the likeliest one after each."""
        start = self._num_held if self._is_relative else self.num_seen
        positions = torch.arange(start, start + len(tokens))
        cos, sin = (x[:, None] for x in self._drafter.rotary(positions))

        def attend(index: int, qkv: Tensor, norms: Norms) -> Tensor:
            layer = self._layers[index]
            num_kv_heads, head_dim = layer.keys.shape[1:]
            qkv = normed_heads(qkv, num_kv_heads, norms)
            unturned, keys, values = qkv.split(
                (qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), 1
            )
            queries = rotate(unturned, cos, sin)
            if not self._is_relative:
                unturned, keys = queries, rotate(keys, cos, sin)
            layer.keys = torch.cat([layer.keys, keys])
            layer.values = torch.cat([layer.values, values])
            layer.queries = torch.cat([layer.queries, unturned])
            keys = self._as_read(layer.keys)
            grouped = queries.unflatten(1, (num_kv_heads, -1))
            logits = torch.einsum("tgqd,sgd->gqts", grouped, keys) * head_dim**-0.5
            later = torch.ones(logits.shape[2:], dtype=torch.bool)
            later = later.triu(1 + len(keys) - len(queries))
            weights = logits.masked_fill(later, -torch.inf).softmax(-1)
            if reading:
                received = accumulated_attention(queries, keys, validate=False)
                layer.received = received + F.pad(layer.received, (0, len(queries)))
            else:
                self._count(weights.sum((0, 1, 2)))
            attended = torch.einsum("gqts,sgd->tgqd", weights, layer.values)
            return attended.flatten(1, 2)

        hidden = self._drafter(torch.tensor(tokens), attend)
        self.num_seen += len(tokens)
        return self._drafter.logits(hidden).argmax(-1).tolist()

    def _as_read(self, states: Tensor, start: int = 0) -> Tensor:
        """[n, heads, D] from index ``start`` on, rotated if they are not yet."""
        if not self._is_relative:
            return states
        positions = torch.arange(start, start + len(states))
        cos, sin = (x[:, None] for x in self._drafter.rotary(positions))
        return rotate(states, cos, sin)
