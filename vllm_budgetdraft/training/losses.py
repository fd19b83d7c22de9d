"""The loss of several views of the same positions, a piece of the logits at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_budgetdraft.training.arguments import ObjectiveArguments
from vllm_budgetdraft.training.objectives import (
    IGNORED,
    OBJECTIVES,
    acceptance,
    ce_loss,
    decayed_weights,
    dpace_weights,
)
from vllm_budgetdraft.training.teacher import Teacher


class ViewMeans(NamedTuple):
    """Of each view, over positions, without gradients: [V] each.

    Attributes:
        losses: what the objective says.
        agreements: share of positions whose likeliest token is the target's.
        acceptances: alpha; 0 for "ce".
    """

    losses: Tensor
    agreements: Tensor
    acceptances: Tensor


def view_losses(
    logits: Tensor,
    teacher: Teacher,
    rows: slice,
    counted: Tensor,
    settings: ObjectiveArguments,
) -> Tensor:
    """Sums over some positions.

    Args:
        logits: [V, n, vocab_size], of V views.
        rows: which of the teacher's positions they are.
        counted: [n] bool, those that count.

    Returns:
        [3, V] in the order of ``ViewMeans``; the losses are differentiable.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    # In bfloat16 the softmax alone is a large part of an objective's gradient.
    logits = logits.to(wide)
    if teacher.temperatures is not None:
        # Drafts are drawn at the same temperature. At 0 q would have no gradient.
        temperatures = teacher.temperatures[rows, None]
        logits = logits / temperatures.where(temperatures > 0, 1)
    log_q = logits.log_softmax(-1)
    labels = teacher.labels(rows).where(counted, IGNORED)
    all_labels = labels.expand(log_q.shape[:-1])
    alphas = log_q.new_zeros(log_q.shape[:-1])
    if settings.objective == "ce":
        losses = ce_loss(log_q, all_labels)
    else:
        some_q, some_p = teacher.compare(rows, log_q)
        some_p = some_p.to(wide)  # of all views
        losses = OBJECTIVES[settings.objective](some_q, some_p)
        alphas = acceptance(some_q.detach(), some_p)
    if settings.position_weights != "uniform":
        losses = losses * _position_weights(log_q, all_labels, settings)
    agrees = log_q.argmax(-1) == all_labels
    return (torch.stack([losses, agrees.to(wide), alphas]) * counted).sum(-1)


def _position_weights(
    log_q: Tensor, labels: Tensor, settings: ObjectiveArguments
) -> Tensor:
    """[V, n], of positions that begin with a draft's first.

    For D-PACE one that does not count is as if it were accepted always.
    """
    block = settings.draft_tokens
    if settings.position_weights == "decay":
        weights = decayed_weights(block, settings.position_decay).to(log_q)
        return weights.repeat(log_q.shape[1] // block)
    known = labels.clamp_min(0)[..., None]
    probabilities = log_q.detach().gather(-1, known).squeeze(-1).exp()
    probabilities = probabilities.where(labels != IGNORED, 1).unflatten(1, (-1, block))
    return dpace_weights(probabilities, settings.dpace_smoothing).flatten(1)


def multi_view_loss(
    hidden: Tensor,
    head: Tensor,
    teacher: Teacher,
    counted: Tensor,
    view_weights: Tensor,
    settings: ObjectiveArguments,
    chunk_tokens: int,
) -> tuple[Tensor, ViewMeans]:
    """Weighted sum over views of the mean loss over positions.

    Logits of teacher and views are held of ``chunk_tokens`` positions at a time:
    gradients are computed together with the loss, and kept instead.

    Args:
        hidden: [V, N, hidden_size], of V views.
        head: [vocab_size, hidden_size], the drafter's output matrix.
        counted: [N] bool, the positions that count.
        view_weights: [V] float32.
        chunk_tokens: a multiple of ``draft_tokens``, which divides N; 0 is all at once,
            by plain autograd.

    Returns:
        A scalar, and means by view.
    """
    size = counted.sum().clamp_min(1)

    def sums_of(piece: Tensor, head: Tensor, rows: slice) -> Tensor:
        logits = F.linear(piece, head)
        return view_losses(logits, teacher, rows, counted[rows], settings)

    if chunk_tokens:
        apply: Callable[..., tuple[Tensor, Tensor]] = _ChunkedLoss.apply
        loss, sums = apply(hidden, head, view_weights / size, sums_of, chunk_tokens)
    else:
        sums = sums_of(hidden, head, slice(0, hidden.shape[1]))
        loss = (sums[0] * view_weights / size).sum()
    return loss, ViewMeans(*(sums.detach() / size))


class _ChunkedLoss(torch.autograd.Function):
    """A weighted sum of views' losses whose gradients are computed piece by piece."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        weights: Tensor,
        sums_of: Callable[[Tensor, Tensor, slice], Tensor],
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        """See ``multi_view_loss``; also returns the sums, without gradients."""
        of_hidden = torch.zeros_like(hidden)
        # The target's own matrix does not learn, and needs none.
        of_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros(3, len(hidden), dtype=torch.float32)
        for start in range(0, hidden.shape[1], chunk_tokens):
            rows = slice(start, min(start + chunk_tokens, hidden.shape[1]))
            with torch.enable_grad():
                piece = hidden[:, rows].detach().requires_grad_()
                matrix = head.detach().requires_grad_(of_head is not None)
                sums = sums_of(piece, matrix, rows)
                loss = (sums[0] * weights).sum()
            inputs = (piece,) if of_head is None else (piece, matrix)
            of_piece, *of_matrix = torch.autograd.grad(loss, inputs)
            of_hidden[:, rows] = of_piece
            if of_head is not None:
                of_head.add_(*of_matrix)
            total += sums.detach()
        ctx.save_for_backward(of_hidden, of_head)
        ctx.mark_non_differentiable(total)
        return (total[0] * weights).sum(), total

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor) -> Any:
        of_hidden, of_head = ctx.saved_tensors
        if of_head is not None:
            of_head = of_outputs[0] * of_head
        return of_outputs[0] * of_hidden, of_head, None, None, None
