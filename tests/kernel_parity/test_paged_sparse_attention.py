"""Attention over pages, in a pool that is NaN wherever nobody may look."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from budgetdraft_kernels import fused, launch_settings, reference
from tests.kernel_parity.tolerances import ROTATED, assert_close
from tests.support.attention_cases import BF16, CASES, FP8, FP16, Case, make


def check_parity(case: Case, device: torch.device, seed: int = 0) -> None:
    arguments, clean = make(case, device, seed)
    out = fused.paged_sparse_attention(**arguments)
    expected = reference.paged_sparse_attention(**clean)
    assert out.dtype == case.dtype
    rounded = case.key_rotary and case.dtype != torch.float32
    times = ROTATED if rounded else 1
    assert_close("attention", out, expected, case.dtype, times)
    # Without rotation, logits are exact products of what is given.
    precision = case.dtype if rounded else torch.float32
    if case.lse:
        found, expected = arguments["lse"], clean["lse"]
        assert torch.equal(found.isneginf(), expected.isneginf())
        sees_some = expected.isfinite()
        assert_close("lse", found[sees_some], expected[sees_some], precision, times)
    if not case.page_attention:
        return
    shares = arguments["page_attention"]
    assert_close("page_attention", shares, clean["page_attention"], precision, times)
    counts = torch.tensor(case.counts, device=device)
    sees = torch.tensor(case.lengths, device=device).repeat_interleave(counts) > 0
    assert_close(
        "sums",
        shares.sum(-1),
        sees.float()[:, None].expand(out.shape[:2]),
        torch.float32,
    )


def cut_into(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """Has each KV head read in so many parts, or in as many as it has tiles."""
    monkeypatch.setattr(
        launch_settings,
        "attention_splits",
        lambda programs, tiles, device: min(parts, tiles),
    )


@pytest.mark.parametrize("parts", [1, 3], ids=["whole", "in_3_parts"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_definition(case, parts, device, monkeypatch):
    cut_into(monkeypatch, parts)
    check_parity(case, device)


@pytest.mark.parametrize(
    "name", ["edges_of_pages", "ragged", "rotary_bf16", "fp8", "empty_requests"]
)
def test_a_part_may_be_a_single_tile(name, device, monkeypatch):
    cut_into(monkeypatch, launch_settings.MAX_SPLITS)
    check_parity(replace(CASES[name], spare_pages=9), device)


def test_a_device_chooses_the_parts(device):
    check_parity(Case((300,), kv_heads=1, page_attention=True), device)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    page_size = draw(st.sampled_from([1, 3, 7, 8, 16, 24, 32]))
    room = min(5 * page_size, 90)
    lengths = draw(st.lists(st.integers(0, room), min_size=1, max_size=4))
    tokens = [
        draw(st.integers(0, min(length, 8) if length else 2)) for length in lengths
    ]
    if not (causal := draw(st.booleans())):
        tokens = [draw(st.integers(0, 8)) for _ in lengths]
    dtype = draw(st.sampled_from([torch.float32, FP16, BF16]))
    stored = st.sampled_from([None, FP8])
    rotary = draw(st.booleans())
    head_dims = [2, 10, 16, 32, 40, 64] if rotary else [1, 10, 16, 33, 64]
    return Case(
        lengths=tuple(lengths),
        tokens=tuple(tokens),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 5)),
        head_dim=draw(st.sampled_from(head_dims)),
        page_size=page_size,
        spare_pages=draw(st.integers(0, 3)) + (max(lengths) == 0),
        dtype=dtype,
        key_type=draw(stored),
        value_type=draw(stored),
        page_list_per_head=draw(st.booleans()),
        shared_pages=draw(st.booleans()),
        key_rotary=rotary,
        page_attention=draw(st.booleans()),
        causal=causal,
        lse=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.3])),
        max_tokens=max(tokens) + draw(st.integers(0, 3)) or 1,
        table_type=draw(st.sampled_from([torch.int32, torch.int64])),
        length_type=draw(st.sampled_from([torch.int32, torch.int64])),
        queries_of_qkv=draw(st.booleans()),
    )


@settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=cases(), seed=st.integers(0, 2**32), parts=st.integers(1, 4))
def test_equals_the_definition_for_any_pages(case, seed, parts, device):
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_into(monkeypatch, parts)
        check_parity(case, device, seed)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("per_head", [False, True])
def test_a_page_outside_the_pool_is_left_out_and_never_read(
    per_head, width, parts, device, monkeypatch
):
    """Attention is what it would be had the request never held such a page."""
    cut_into(monkeypatch, parts)
    case = Case(
        (100, 63),
        tokens=width,
        page_size=8,
        dtype=BF16,
        page_attention=True,
        page_list_per_head=per_head,
    )
    arguments, clean = make(case, device)
    clean["page_table"] = clean["page_table"].clone()
    num_pages, table = len(arguments["key_pages"]), arguments["page_table"]
    outside = [-1, num_pages, -2, num_pages + 1, 10**9]
    spots = [0, 3, 4, 6]  # before the query tokens, which count from the end
    for spot, page in zip(spots, outside[: len(spots)], strict=True):
        table[:, ..., spot] = page
    table[0, ..., 9] = outside[-1]
    lengths = []
    for request, missing in enumerate(([*spots, 9], spots)):
        held = [i for i in range(table.shape[-1]) if i not in missing]
        own = clean["page_table"][request].clone()
        left = own[..., held]
        own[..., : len(held)] = left
        clean["page_table"][request] = own
        lengths.append(case.lengths[request] - len(missing) * case.page_size)
    clean["lengths"] = torch.tensor(lengths, device=device)

    out = fused.paged_sparse_attention(**arguments, validate=False)
    expected = reference.paged_sparse_attention(**clean)
    assert_close("attention", out, expected, case.dtype)
    shares = arguments["page_attention"]
    assert not shares[..., spots].any()
    assert_close(
        "sums", shares.sum(-1), torch.ones(out.shape[:2], device=device), torch.float32
    )


def test_a_length_beyond_the_page_table_reads_nothing_behind_it(device):
    """Even where an entry that would be a page follows within the last tile."""
    arguments, clean = make(Case((80, 80), spare_pages=0), device)
    arguments["page_table"] = torch.cat(
        [arguments["page_table"], torch.zeros(2, 1, dtype=torch.int64, device=device)],
        dim=1,
    )[:, :-1]
    arguments["lengths"] = arguments["lengths"] + 5
    out = fused.paged_sparse_attention(**arguments, validate=False)
    expected = reference.paged_sparse_attention(**clean)
    assert_close("attention", out, expected, torch.float32)


@pytest.mark.parametrize("batch", [0, 2])
def test_without_query_tokens_nothing_comes_out(batch, device):
    pages = torch.zeros(4, 8, 2, 32, device=device)
    shares = torch.empty(0, 4, 2, device=device)
    for module in (reference, fused):
        out = module.paged_sparse_attention(
            torch.empty(0, 4, 32, device=device),
            pages,
            pages.clone(),
            torch.zeros(batch, 2, dtype=torch.int64, device=device),
            torch.full([batch], 9, device=device),
            torch.zeros(batch + 1, dtype=torch.int64, device=device),
            max_query_tokens=1,
            page_attention=shares,
        )
        assert out.shape == (0, 4, 32)


def test_huge_numbers_beyond_a_length_have_no_weight(device):
    arguments, clean = make(Case(), device)
    for name in ("key_pages", "value_pages"):
        arguments[name] = arguments[name].nan_to_num(1e30)
    out = fused.paged_sparse_attention(**arguments)
    expected = reference.paged_sparse_attention(**clean)
    assert_close("attention", out, expected, torch.float32)
