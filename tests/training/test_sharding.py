"""Weights spread over ranks (FSDP) give the loss and the gradients of whole ones."""

from pathlib import Path

import torch
import torch.multiprocessing
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.support import models
from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.drafter.checkpoint import load_drafter, save_drafter
from vllm_budgetdraft.training.arguments import ObjectiveArguments, ViewArguments
from vllm_budgetdraft.training.model import MultiViewModel
from vllm_budgetdraft.training.trainer import gradient_norm

RANKS = 2
PREFIX, CONTINUATION = models.random_tokens(2 * 152).view(2, 152).split((120, 32), 1)


def model_of(drafter_folder: Path) -> MultiViewModel:
    drafter = load_drafter(drafter_folder, max_positions=256)
    return MultiViewModel(
        drafter.train().requires_grad_(True),
        models.random_model(models.llama(num_hidden_layers=2), seed=1),
        ViewArguments(budgets=[64], budget_weights=[1.0]),
        ObjectiveArguments(objective="lk_hybrid"),
        ViewSettings(),
    )


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    counted = torch.ones_like(CONTINUATION, dtype=torch.bool)
    return model(torch.tensor([0, 1]), PREFIX, CONTINUATION, counted)["loss"]


def train_a_part(rank: int, drafter_folder: Path, output: Path) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{output / 'rendezvous'}"
    distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=RANKS
    )
    model = model_of(drafter_folder)
    mesh = distributed.init_device_mesh("cpu", (RANKS,))
    sharded = fully_shard(model, mesh=mesh)
    loss = loss_of(sharded)
    loss.backward()
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    gradients = {n: p.grad.full_tensor() for n, p in sharded.named_parameters()}
    norm = gradient_norm(sharded)
    if rank:  # whose part alone is bad
        next(sharded.parameters()).grad.to_local().fill_(float("nan"))
    assert not gradient_norm(sharded).isfinite()
    whole = get_model_state_dict(
        sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if rank == 0:
        state = {name.removeprefix("drafter."): x for name, x in whole.items()}
        save_drafter(model.drafter, output / "saved", dtype=torch.float32, state=state)
        found = {"loss": loss.detach(), "gradients": gradients, "norm": norm}
        torch.save(found, output / "found.pt")
    distributed.destroy_process_group()


def test_sharded_weights_give_the_same_loss_gradients_and_folder(
    drafter_folder, tmp_path
):
    torch.multiprocessing.spawn(
        train_a_part, args=(drafter_folder, tmp_path), nprocs=RANKS
    )
    found = torch.load(tmp_path / "found.pt")
    model = model_of(drafter_folder)
    loss = loss_of(model)
    loss.backward()
    torch.testing.assert_close(found["loss"], loss.detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found["gradients"][name], parameter.grad, msg=name)
    assert 0 < found["norm"] < float("inf")
    saved = load_drafter(tmp_path / "saved", max_positions=256).state_dict()
    for name, weight in model.drafter.state_dict().items():
        assert torch.equal(saved[name], weight), name
