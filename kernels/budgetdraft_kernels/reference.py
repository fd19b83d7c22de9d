"""The operations in plain PyTorch.

Letters in shapes: B requests, T query tokens of all of them, H query heads, G KV heads,
D head size, N pages per request, P tokens per page, L layers.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from budgetdraft_kernels.checks import (
    check_accumulated_attention,
    check_attention,
    check_cache_write,
    check_chunk_scores,
    check_compaction,
)
from budgetdraft_kernels.reference_picks import greedy_pick as greedy_pick
from budgetdraft_kernels.reference_picks import sampled_pick as sampled_pick
from budgetdraft_kernels.reference_projections import Norms, normed_heads
from budgetdraft_kernels.reference_projections import linear as linear

#: Largest finite number of float8_e4m3fn.
FP8_MAX = 448.0
#: Of ``accumulated_attention`` at a time: their logits fit into a CPU's cache.
QUERY_TOKENS = 32


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (RoFormer, https://arxiv.org/abs/2104.09864), half-split form.

    Args:
        x: [..., num_heads, D].
        cos: [..., 1, D], the angles of both halves, as Hugging Face Llama has them.
        sin: [..., 1, D], with the first half negated.

    Returns:
        [..., num_heads, D].
    """
    half = x.shape[-1] // 2
    return (x * cos + x.roll(half, -1) * sin).to(x.dtype)


def split_rotated(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, of fused projections.

    Args:
        qkv: [..., H + 2 * G, D], the query, key and value heads of each token.
        cos, sin: [..., D], of each token's position, as ``rotate`` takes them.

    Returns:
        [..., H, D], [..., G, D] and [..., G, D].
    """
    num_heads = qkv.shape[-2] - 2 * num_kv_heads
    qk, values = qkv.split((num_heads + num_kv_heads, num_kv_heads), -2)
    qk = rotate(qk, cos.unsqueeze(-2), sin.unsqueeze(-2))
    queries, keys = qk.split((num_heads, num_kv_heads), -2)
    return queries, keys, values


def paged_cache_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    cells: Tensor,
    *,
    rotate_keys: bool = True,
    norms: Norms = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    validate: bool = True,
) -> Tensor:
    """Norms and rotates queries and keys, stores keys and values in one layer's pages.

    Args:
        qkv: [T, H + 2 * G, D], the query, key and value heads of each token.
        cos, sin: [T, D], of each token's position, as ``rotate`` takes them.
        key_pages, value_pages: [num_pages, P, G, D], written in place.
        cells: [T] int64, page * P + offset in the page; distinct.
        rotate_keys: False leaves keys as they are, for ``key_rotary`` at reading.
        norms: see ``normed_heads``.
        key_scale, value_scale: [G] float32, what one unit of float8 pages stands for.
        validate: whether to check the arguments; reads indices back, which waits for
            the device.

    Returns:
        [T, H, D], the rotated queries.

    Raises:
        ValueError: sizes, strides or devices that do not fit; a cell outside the pages.
        TypeError: a tensor of another type.
    """
    if validate:
        check_cache_write(
            qkv, cos, sin, key_pages, value_pages, cells, norms, key_scale, value_scale
        )
    num_kv_heads = key_pages.shape[2]
    qkv = normed_heads(qkv, num_kv_heads, norms)
    queries, keys, values = split_rotated(qkv, cos, sin, num_kv_heads)
    if not rotate_keys:
        keys = qkv[:, -2 * num_kv_heads : -num_kv_heads]
    _write_rows(key_pages, cells, _stored(keys, key_scale, key_pages.dtype))
    _write_rows(value_pages, cells, _stored(values, value_scale, value_pages.dtype))
    return queries


def paged_sparse_attention(
    queries: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    *,
    max_query_tokens: int,
    scale: float | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    key_rotary: tuple[Tensor, Tensor] | None = None,
    page_attention: Tensor | None = None,
    causal: bool = True,
    lse: Tensor | None = None,
    validate: bool = True,
) -> Tensor:
    """Attention of each request's last tokens over the pages that it holds.

    A request's query tokens are the last ones of its ``length`` tokens; each sees the
    tokens up to and with itself. A request without tokens attends to nothing: zeros.

    Args:
        queries: [T, H, D], request after request; H is a multiple of G.
        key_pages, value_pages: [num_pages, P, G, D], finite; float8_e4m3fn, or the type
            of ``queries``.
        page_table: [B, N] or, one list for each KV head, [B, G, N]; int32 or int64.
            What lies beyond a request's length is not read.
        lengths: [B] int32 or int64, tokens of each request, in the order of its pages.
        query_starts: [B + 1] int32 or int64, where each request's query tokens start in
            ``queries``; the first is 0 and the last T.
        max_query_tokens: most query tokens of one request.
        scale: of the logits; D ** -0.5 if None.
        key_scale, value_scale: [G] float32, what one unit of float8 pages stands for.
        key_rotary: cos and sin, [N * P, D] or longer, as ``rotate`` takes them: keys
            are rotated by their index in the request's pages when they are read.
        page_attention: [T, H, N] float32, receives the share of each query head's
            attention that goes to each page.
        causal: False where query tokens are none of the request's, and each sees all of
            its tokens.
        lse: [T, H] float32, receives the logarithm of the sum of each query head's
            exponentiated logits, by which attention to other tokens can be merged in;
            -inf where there are none.
        validate: whether to check the arguments; reads indices back, which waits for
            the device. Without, a page outside the pool is never read, but what comes
            out is undefined.

    Returns:
        [T, H, D].

    Raises:
        ValueError: sizes, strides or devices that do not fit; an index out of range.
        TypeError: a tensor of another type.
    """
    if validate:
        check_attention(
            queries,
            key_pages,
            value_pages,
            page_table,
            lengths,
            query_starts,
            max_query_tokens,
            key_scale,
            value_scale,
            key_rotary,
            page_attention,
            lse,
            causal,
        )
    if not len(queries):
        return torch.empty_like(queries)
    num_kv_heads, head_dim = key_pages.shape[2:]
    num_requests, width = len(lengths), max_query_tokens
    # Entries that nobody reads may hold anything.
    page_table = page_table.clamp(0, key_pages.shape[0] - 1)
    keys = _gathered(key_pages, page_table, key_scale, queries.dtype)
    values = _gathered(value_pages, page_table, value_scale, queries.dtype)
    num_cells = keys.shape[2]
    if key_rotary is not None:
        keys = rotate(keys, *(x[:num_cells] for x in key_rotary))

    counts, places = None, None
    if len(queries) != num_requests * width:
        # Fewer query tokens in some requests: padded to as many as the longest has.
        counts = query_starts.diff()
        places = torch.arange(width, device=queries.device) < counts[:, None]
        padded = queries.new_zeros(num_requests, width, *queries.shape[1:])
        padded[places] = queries
        queries = padded

    # The query heads that share a KV head become rows of one product: [B, G, rows, D],
    # a query token's heads side by side.
    grouped = queries.view(num_requests, width, num_kv_heads, -1, head_dim)
    rows = grouped.transpose(1, 2).reshape(num_requests, num_kv_heads, -1, head_dim)
    seen = lengths  # tokens that each row sees
    if width > 1 and causal:
        group = grouped.shape[3]
        row = torch.arange(width * group, device=lengths.device)
        first = lengths + 1 - (width if counts is None else counts)
        seen = first[:, None] + row // group
    cell = torch.arange(num_cells, device=lengths.device)
    visible = cell < seen.view(num_requests, 1, -1, 1)  # [B, 1, rows, num_cells]

    def by_token(x: Tensor) -> Tensor:
        """[B, G, rows, ...] to [T, H, ...]."""
        if width > 1:
            x = x.unflatten(2, (width, -1)).transpose(1, 2)
        x = x.reshape(num_requests * width, -1, x.shape[-1])
        return x if places is None else x[places.flatten()]

    if page_attention is None and lse is None:
        attended = F.scaled_dot_product_attention(
            rows, keys, values, attn_mask=visible, scale=scale
        )
        return by_token(attended)
    logits = rows.float() @ keys.float().mT
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    logits = logits.masked_fill(~visible, -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    if lse is not None:
        lse.copy_(by_token(logits.logsumexp(-1, keepdim=True)).squeeze(-1))
    if page_attention is not None:
        by_page = weights.unflatten(-1, (-1, key_pages.shape[1])).sum(-1)
        page_attention.copy_(by_token(by_page))
    return by_token((weights @ values.float()).to(queries.dtype))


def chunk_scores(
    keys: Tensor,
    queries: Tensor,
    chunk_size: int,
    score: Literal["mean_key", "attention"],
) -> Tensor:
    """How much each chunk of a prompt matters to some queries.

    Args:
        keys: [L, G, num_tokens, D].
        queries: [L, G, heads, num_queries, D], of the last tokens of ``keys``.
        chunk_size: tokens per chunk; the last chunk holds what is left.
        score: "mean_key", a query against the mean of the chunk's keys (BudgetDraft's
            and TriForce's retrieval, https://arxiv.org/abs/2404.11912); or "attention",
            the share of a query's attention that goes to the chunk, of the keys up to
            its own. Each is averaged over the queries and heads.

    Returns:
        [L, G, num_chunks] float32.

    Raises:
        ValueError: sizes, strides or devices that do not fit.
        TypeError: a tensor of another type.
    """
    check_chunk_scores(keys, queries, chunk_size, score)
    num_tokens, num_queries = keys.shape[2], queries.shape[3]
    logits = queries.flatten(2, 3).float() @ keys.float().mT
    logits = logits.unflatten(2, (-1, num_queries))
    remainder = -num_tokens % chunk_size
    if score == "attention":
        later = torch.ones_like(logits[0, 0, 0], dtype=torch.bool)
        later = later.triu(num_tokens - num_queries + 1)
        logits = (logits * keys.shape[-1] ** -0.5).masked_fill(later, -torch.inf)
        logits = logits.softmax(-1)
    by_token = logits.mean((-3, -2))
    chunks = F.pad(by_token, (0, remainder)).unflatten(-1, (-1, chunk_size))
    sums: Tensor = chunks.sum(-1)
    if score == "attention":
        return sums
    starts = torch.arange(0, num_tokens, chunk_size, device=keys.device)
    return sums / (num_tokens - starts).clamp(max=chunk_size)


def page_compaction(
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    cells: Tensor,
    *,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    validate: bool = True,
) -> None:
    """Copies the kept keys and values of a prompt into pages, for all layers at once.

    Args:
        keys, values: [L, num_tokens, G, D].
        kept: [L, G, num_kept] int64, positions in the prompt.
        key_pages, value_pages: [L, num_pages, P, G, D], written in place.
        cells: [num_kept] int64, page * P + offset in the page; distinct.
        key_scale, value_scale: [L, G] float32, what one unit of float8 pages stands
            for.
        validate: whether to check the arguments; reads indices back, which waits for
            the device.

    Raises:
        ValueError: sizes, strides or devices that do not fit; a position outside the
            prompt, or a cell outside the pages.
        TypeError: a tensor of another type.
    """
    if validate:
        check_compaction(
            keys, values, kept, key_pages, value_pages, cells, key_scale, value_scale
        )

    def rows(states: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        index = kept.transpose(1, 2)[..., None].expand(-1, -1, -1, states.shape[-1])
        scale = None if scale is None else scale[:, None]
        return _stored(states.gather(1, index), scale, dtype)

    _write_rows(key_pages, cells, rows(keys, key_scale, key_pages.dtype), dim=1)
    _write_rows(value_pages, cells, rows(values, value_scale, value_pages.dtype), dim=1)


def accumulated_attention(
    queries: Tensor, keys: Tensor, *, validate: bool = True
) -> Tensor:
    """The attention that each key has received (H2O, https://arxiv.org/abs/2306.14048).

    Causal, with logits scaled by D ** -0.5: a query token sees the keys up to and with
    its own.

    Args:
        queries: [T, H, D], of the last T of the S tokens; H is a multiple of G.
        keys: [S, G, D], of the type of ``queries``.
        validate: whether to check the arguments.

    Returns:
        [G, S] float32, summed over the query tokens and over the H / G query heads that
        share a KV head; each of these gives 1 in all.

    Raises:
        ValueError: sizes, strides or devices that do not fit.
        TypeError: a tensor of another type.
    """
    if validate:
        check_accumulated_attention(queries, keys)
    num_keys, num_kv_heads, head_dim = keys.shape
    received = keys.new_zeros(num_kv_heads, num_keys, dtype=torch.float32)
    rows = (queries.float() * head_dim**-0.5).unflatten(1, (num_kv_heads, -1))
    keys = keys.float().transpose(0, 1)  # [G, S, D]
    seen = num_keys - len(queries)
    for block in rows.split(QUERY_TOKENS):
        width = len(block)
        seen += width
        # A query token's heads side by side: [G, width * H / G, seen].
        logits = block.transpose(0, 1).flatten(1, 2) @ keys[:, :seen].mT
        later = torch.ones(width, width, dtype=torch.bool, device=keys.device).triu(1)
        by_token = logits[..., seen - width :].unflatten(1, (-1, block.shape[2]))
        by_token.masked_fill_(later[:, None], -torch.inf)
        received[:, :seen] += logits.softmax(-1).sum(-2)
    return received


def _gathered(
    pages: Tensor, page_table: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Rows of the pages that each request holds: [B, G, N * P, D]."""
    bits = _bits(pages)
    if page_table.ndim == 3:
        heads = torch.arange(pages.shape[2], device=pages.device)[:, None]
        rows = bits[page_table, :, heads].flatten(2, 3)
    else:
        rows = bits.index_select(0, page_table.view(-1))
        rows = rows.view(len(page_table), -1, *pages.shape[2:]).transpose(1, 2)
    if bits is not pages:
        rows = rows.view(pages.dtype).to(dtype)
    return rows if scale is None else (rows.float() * scale[:, None, None]).to(dtype)


def _bits(x: Tensor) -> Tensor:
    """The same memory, as a type that indexing supports on every device."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _stored(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[..., G, D] in the type of the pages; ``scale`` is [..., G]."""
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    if scale is not None:
        x = x.float() / scale[..., None]
    return x.clamp(-FP8_MAX, FP8_MAX).to(dtype)


def _write_rows(pages: Tensor, cells: Tensor, rows: Tensor, dim: int = 0) -> None:
    """Rows [..., num_cells, G, D] to their cells of pages [..., num_pages, P, G, D]."""
    _bits(pages).flatten(dim, dim + 1).index_copy_(dim, cells, _bits(rows))
