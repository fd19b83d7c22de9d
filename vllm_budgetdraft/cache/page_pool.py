"""Where drafter keys and values live."""

import torch

from vllm_budgetdraft.errors import PagePoolExhaustedError


class PagePool:
    """Pages of keys and values, allocated once, and the list of the free ones.

    Attributes:
        keys, values: [num_layers, num_pages + 1, page_size, num_kv_heads, head_dim]. A
            page is the same one in every layer.
        layers: keys and values [num_pages + 1, page_size, num_kv_heads, head_dim] of
            each layer; the same memory.
        spare_page: one that is nobody's, for what is written and not read.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_pages + 1, page_size, num_kv_heads, head_dim)
        # Zeroed, not empty: attention multiplies a masked value by a weight of zero,
        # which stays zero only if the value is finite. Also makes the memory resident
        # on a CPU, where vLLM sizes its own cache by what the process holds.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))
        self.num_pages = self.spare_page = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def bytes_per_page(self) -> int:
        return self.num_bytes // (self.num_pages + 1)

    def take(self, num_pages: int) -> list[int]:
        """Takes pages off the free list.

        Raises:
            PagePoolExhaustedError: fewer than ``num_pages`` are free; takes none.
        """
        if num_pages > len(self._free):
            raise PagePoolExhaustedError(
                f"{num_pages} pages asked for, {len(self._free)} of {self.num_pages} "
                "free: the request drafts when others have ended; raise "
                "pool_memory_gib, or leave it out to have room for max_num_seqs"
            )
        return [self._free.pop() for _ in range(num_pages)]

    def give_back(self, pages: list[int]) -> None:
        # Neighbours are taken together again, whoever gave them back in between.
        self._free = sorted(self._free + pages, reverse=True)

    def free_pages(self) -> list[int]:
        return list(self._free)
