"""What indices the operations refuse.

To look at indices is to read them back, which waits for the device.
"""

import torch
from torch import Tensor


def check_cells(cells: Tensor, pages: Tensor) -> None:
    num_pages, page_size = pages.shape[:2]
    check_range(
        "cells", cells, num_pages * page_size, f"{num_pages} pages of {page_size} cells"
    )


def check_page_table(
    page_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    num_tokens: int,
    pages: Tensor,
    max_query_tokens: int,
    causal: bool,
) -> None:
    num_pages, page_size = pages.shape[:2]
    held = page_table.shape[-1]
    counts = query_starts.diff()
    check_range(
        "lengths", lengths, held * page_size + 1, f"{held} pages of {page_size} tokens"
    )
    check_range(
        "query tokens of request ",
        counts,
        max_query_tokens + 1,
        f"max_query_tokens={max_query_tokens}",
    )
    if (ends := (int(query_starts[0]), int(query_starts[-1]))) != (0, num_tokens):
        raise ValueError(
            f"query_starts go from {ends[0]} to {ends[1]}, not from 0 to the "
            f"{num_tokens} query tokens"
        )
    excess = (counts > lengths) & (lengths > 0)
    if causal and bool(excess.any()):
        request = int(excess.nonzero()[0])
        raise ValueError(
            f"request {request} has {int(counts[request])} query tokens and "
            f"length {int(lengths[request])}; the length counts its query tokens too"
        )
    read = torch.arange(held, device=lengths.device) < -(-lengths[:, None] // page_size)
    read = read[:, None] if page_table.ndim == 3 else read
    check_range(
        "page_table",
        page_table.masked_fill(~read, 0),
        num_pages,
        f"a pool of {num_pages} pages",
    )


def check_range(name: str, index: Tensor, limit: int, of_what: str) -> None:
    outside = (index < 0) | (index >= limit)
    if bool(outside.any()):
        place = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{name}{place} is {int(index[tuple(place)])}, not from 0 to {limit - 1}: "
            f"{of_what}"
        )
