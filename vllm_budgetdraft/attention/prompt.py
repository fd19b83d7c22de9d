"""Attention over a prompt, chunk by chunk, through one shared scratch buffer."""

from types import ModuleType

import torch
from torch import Tensor

from budgetdraft_kernels.reference import rotate
from vllm_budgetdraft.attention.packed import select_packed_attention


class PromptAttention:
    """The ``attend`` of a drafter that reads a prompt.

    The prompt's keys and values stay in a scratch buffer until the policy has chosen;
    one prompt is read at a time. The last layer's attention is never computed: at the
    end of a prompt only keys and values have readers.

    Attributes:
        num_held: tokens in the buffer, the current chunk's among them.
    """

    def __init__(
        self,
        operations: ModuleType,
        *,
        num_layers: int,
        max_tokens: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        observation_tokens: int,
        accumulates_attention: bool,
        key_rotary: tuple[Tensor, Tensor] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            operations: see ``select_operations``.
            observation_tokens: last tokens of the prompt whose queries are kept.
            accumulates_attention: whether to count what each key receives.
            key_rotary: cos and sin of every index of the buffer, [max_tokens, D] or
                longer, where keys are stored as they are and rotated when read; None
                where they are stored rotated.
        """
        self._operations = operations
        self._attend = select_packed_attention(
            num_heads, num_kv_heads, head_dim, dtype, device
        )
        shape = (num_layers, max_tokens, num_kv_heads, head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._received: Tensor | None = None
        if accumulates_attention:
            self._received = torch.zeros(
                (num_layers, num_kv_heads, max_tokens), device=device
            )
        self._key_rotary = key_rotary
        self.max_tokens = max_tokens
        self.num_held = 0
        self._observation_tokens = observation_tokens
        self._queries: list[Tensor | None] = [None] * num_layers

    @property
    def num_bytes(self) -> int:
        received = 0 if self._received is None else self._received.nbytes
        return self._keys.nbytes + self._values.nbytes + received

    @property
    def keys(self) -> Tensor:
        """[num_layers, num_held, num_kv_heads, head_dim], as the pool stores them."""
        return self._keys[:, : self.num_held]

    @property
    def values(self) -> Tensor:
        return self._values[:, : self.num_held]

    @property
    def attention(self) -> Tensor | None:
        """[num_layers, num_kv_heads, num_held] float32, what each key has received."""
        return None if self._received is None else self._received[..., : self.num_held]

    def restart(self) -> None:
        self.num_held = 0
        self._queries = [None] * len(self._queries)

    def chunk(self, cos: Tensor, sin: Tensor) -> "PromptAttention":
        """The next chunk of the prompt, whose positions' cos and sin are [T, D]."""
        start = self.num_held
        self.num_held += len(cos)
        assert self.num_held <= self.max_tokens, (self.num_held, self.max_tokens)
        self._rotary = cos, sin
        self._cells = torch.arange(start, self.num_held, device=cos.device)
        if self._received is not None:
            self._received[..., start : self.num_held] = 0
        return self

    def keep(self, kept: Tensor) -> None:
        """Drops all but some rows of the buffer.

        Args:
            kept: [num_layers, num_kv_heads, num_kept] int64, ascending.
        """
        num_kept = kept.shape[2]
        if num_kept == self.num_held:
            return
        index = kept.transpose(1, 2)[..., None].expand(-1, -1, -1, self._keys.shape[3])
        for states in (self._keys, self._values):
            states[:, :num_kept] = states.gather(1, index)
        if self._received is not None:
            self._received[..., :num_kept] = self._received.gather(2, kept)
        self.num_held = num_kept

    def __call__(self, layer: int, qkv: Tensor) -> Tensor | None:
        """A chunk in one layer, [T, H + 2 * G, D] to [T, H, D]."""
        keys, values = self._keys[layer], self._values[layer]
        queries = self._operations.paged_cache_write(
            qkv,
            *self._rotary,
            keys[None],  # one page, as long as the longest prompt
            values[None],
            self._cells,
            rotate_keys=self._key_rotary is None,
            validate=False,
        )
        held, is_last = self.num_held, layer == len(self._queries) - 1
        if self._observation_tokens:
            unrotated = qkv[:, : queries.shape[1]]
            self._observe(layer, queries if self._key_rotary is None else unrotated)
        if is_last and self._received is None:
            return None
        keys = self._as_read(keys[:held])
        if self._received is not None:
            self._received[layer, :, :held] += self._operations.accumulated_attention(
                queries, keys, validate=False
            )
        if is_last:
            return None
        return self._attend(queries, keys, values[:held], [len(queries)], [held])

    def keys_as_read(self) -> Tensor:
        """[num_layers, num_held, num_kv_heads, head_dim], rotated."""
        return self._as_read(self.keys)

    def last_queries(self) -> Tensor | None:
        """[num_layers, G, H / G, observation_tokens or less, D]; None if not kept."""
        if not self._observation_tokens:
            return None
        queries = torch.stack(
            [q[-self.num_held :] for q in self._queries if q is not None]
        )
        queries = self._as_read(queries, start=self.num_held - queries.shape[1])
        num_kv_heads = self._keys.shape[2]
        # [layers, W, G, H / G, D]
        grouped: Tensor = queries.unflatten(2, (num_kv_heads, -1))
        return grouped.permute(0, 2, 3, 1, 4).contiguous()

    def _observe(self, layer: int, queries: Tensor) -> None:
        last = queries[-self._observation_tokens :]
        previous = self._queries[layer]
        if previous is not None:
            last = torch.cat([previous, last])[-self._observation_tokens :]
        self._queries[layer] = last.clone()  # a view would keep the whole chunk

    def _as_read(self, states: Tensor, start: int = 0) -> Tensor:
        """Rotates [..., T, heads, D], stored as they are, from index ``start`` on."""
        if self._key_rotary is None:
            return states
        end = start + states.shape[-3]
        cos, sin = (x[start:end, None] for x in self._key_rotary)
        return rotate(states, cos, sin)
