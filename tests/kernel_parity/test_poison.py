"""That an output left out shows: kernels that do nothing return nothing but NaN."""

import importlib

import pytest
import torch

from budgetdraft_kernels import fused


class Idle:
    """A kernel that writes nothing."""

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **kwargs: None


def attention(device: torch.device) -> list[torch.Tensor]:
    pages = torch.zeros(3, 8, 2, 32, device=device)
    out = fused.paged_sparse_attention(
        torch.zeros(2, 4, 32, device=device),
        pages,
        pages.clone(),
        torch.zeros(2, 2, dtype=torch.int64, device=device),
        torch.tensor([3, 9], device=device),
        torch.arange(3, device=device),
        max_query_tokens=1,
    )
    return [out]


def cache_write(device: torch.device) -> list[torch.Tensor]:
    pages = torch.zeros(3, 8, 2, 32, device=device)
    angles = torch.zeros(3, 32, device=device)
    queries = fused.paged_cache_write(
        torch.zeros(3, 8, 32, device=device),
        angles,
        angles,
        pages,
        pages.clone(),
        torch.arange(3, device=device),
    )
    return [queries]


def chunk_scores(device: torch.device) -> list[torch.Tensor]:
    keys = torch.zeros(1, 2, 20, 32, device=device)
    return [
        fused.chunk_scores(keys, keys[:, :, None], 8, "attention"),
        fused.chunk_scores(keys, keys[:, :, None], 8, "mean_key"),
    ]


def accumulated(device: torch.device) -> list[torch.Tensor]:
    keys = torch.zeros(20, 2, 32, device=device)
    return [fused.accumulated_attention(keys[-7:], keys)]


def picks(device: torch.device) -> list[torch.Tensor]:
    logits = torch.zeros(3, 5, device=device)
    ones = torch.ones(3, device=device)
    halves = torch.full([3], 0.5, device=device)
    return [*fused.greedy_pick(logits), *fused.sampled_pick(logits, ones, halves)]


def linear(device: torch.device) -> list[torch.Tensor]:
    return [
        fused.linear(torch.zeros(3, 8, device=device), torch.zeros(5, 8, device=device))
    ]


KERNELS = {
    "linear": (linear, ["linear_kernel"]),
    "paged_sparse_attention": (attention, ["attention_kernel", "merge_kernel"]),
    "paged_cache_write": (cache_write, ["cache_write_kernel"]),
    "chunk_scores": (chunk_scores, ["chunk_scores_kernel"]),
    "accumulated_attention": (accumulated, ["row_lse_kernel", "received_kernel"]),
    "token_picks": (
        picks,
        ["pick_part_kernel", "pick_join_kernel", "probabilities_kernel"],
    ),
}


@pytest.mark.parametrize("module", KERNELS)
def test_what_no_kernel_writes_is_poison(module, device, monkeypatch):
    call, kernels = KERNELS[module]
    for name in kernels:
        namespace = importlib.import_module(f"budgetdraft_kernels.{module}")
        monkeypatch.setattr(namespace, name, Idle())
    for output in call(device):
        if output.is_floating_point():
            assert output.isnan().all()
        else:
            assert (output == torch.iinfo(output.dtype).min).all()
