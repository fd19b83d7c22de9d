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
    OUTSIDE,
    acceptance,
    ce_loss,
    decayed_weights,
    dpace_weights,
    kl_loss,
    lk_hybrid_loss,
    renormalised,
)
from vllm_budgetdraft.training.teacher import Comparison, Teacher

#: Objectives that count the positions alone whose label is drafted: their p is that of
#: the draft vocabulary, of which it says too little where its likeliest token is not.
OF_DRAFTED_LABELS = ("ce", "kl")
#: Rows of ``view_losses``, and the one that counts positions whose label is drafted.
NUM_SUMS, DRAFTED = 5, 3


class ViewMeans(NamedTuple):
    """Over the positions that count, without gradients.

    Attributes:
        losses: [V], of each view, what the objective says.
        agreements: [V], share of positions whose likeliest token is the target's.
        acceptances: [V], alpha; 0 for "ce".
        label_coverage: [], share of positions whose label is drafted; None where all
            tokens are.
        coverage: [], of p that is known to be on the draft vocabulary; None for "ce",
            too.
    """

    losses: Tensor
    agreements: Tensor
    acceptances: Tensor
    label_coverage: Tensor | None
    coverage: Tensor | None


def view_losses(
    logits: Tensor,
    teacher: Teacher,
    rows: slice,
    counted: Tensor,
    settings: ObjectiveArguments,
) -> Tensor:
    """Sums over some positions.

    Args:
        logits: [V, n, number of tokens that are drafted], of V views.
        rows: which of the teacher's positions they are.
        counted: [n] bool, those that count; or [V, n], of each view.

    Returns:
        [NUM_SUMS, V] in the order of ``ViewMeans``; the losses are differentiable.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    # In bfloat16 the softmax alone is a large part of an objective's gradient.
    logits = logits.to(wide)
    if teacher.temperatures is not None:
        # Drafts are drawn at the same temperature. At 0 q would have no gradient.
        temperatures = teacher.temperatures[rows, None]
        logits = logits / temperatures.where(temperatures > 0, 1)
    log_q = logits.log_softmax(-1)
    labels = teacher.labels(rows)
    all_labels = labels.where(counted, IGNORED).expand(log_q.shape[:-1])
    alphas = coverages = log_q.new_zeros(log_q.shape[:-1])
    is_drafted = all_labels != OUTSIDE
    if settings.objective == "ce":
        losses = ce_loss(log_q, all_labels.where(is_drafted, IGNORED))
    else:
        found = teacher.compare(rows, log_q)
        found = found._replace(log_p=found.log_p.to(wide))  # of all views
        losses = _distances(settings.objective, found, labels != OUTSIDE)
        alphas = acceptance(found.log_q.detach(), found.log_p)
        if found.share is not None:
            coverages = found.log_p.exp().sum(-1).expand_as(alphas)
    if settings.position_weights != "uniform":
        losses = losses * _position_weights(log_q, all_labels, settings)
    agrees = log_q.argmax(-1) == all_labels
    sums = [losses, agrees.to(wide), alphas, is_drafted.to(wide), coverages]
    return (torch.stack(sums) * counted).sum(-1)


def _distances(objective: str, found: Comparison, is_drafted: Tensor) -> Tensor:
    """[V, n].

    Args:
        is_drafted: [n] bool, whether the label is; KL is 0 where it is not.
    """
    log_q, log_p, share = found
    if share is not None and objective in ("kl", "lk_hybrid"):
        of_drafted = renormalised(log_p, share.to(log_p).where(is_drafted, 0))
        if objective == "kl":
            return kl_loss(log_q, of_drafted)
        return lk_hybrid_loss(log_q, log_p, of_drafted)
    return OBJECTIVES[objective](log_q, log_p)


def _position_weights(
    log_q: Tensor, labels: Tensor, settings: ObjectiveArguments
) -> Tensor:
    """[V, n], of positions that begin with a draft's first.

    For D-PACE one that does not count is as if it were accepted always, and one whose
    label is not drafted as what it is, a token of probability 0. What comes after it in
    a draft then has the smoothing's part of its weight, as after any token that a
    drafter does not expect: it is the beginning of the next draft, and no less learnt.
    """
    block = settings.draft_tokens
    if settings.position_weights == "decay":
        weights = decayed_weights(block, settings.position_decay).to(log_q)
        return weights.repeat(log_q.shape[1] // block)
    known = labels.clamp_min(0)[..., None]
    probabilities = log_q.detach().gather(-1, known).squeeze(-1).exp()
    never, always = labels == OUTSIDE, labels == IGNORED
    probabilities = probabilities.masked_fill(never, 0).masked_fill(always, 1)
    probabilities = probabilities.unflatten(1, (-1, block))
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

    Where views differ in the positions that count, the first has the most, and the
    sums of all are divided by how many these are.

    Args:
        hidden: [V, N, hidden_size], of V views.
        head: [number of tokens that are drafted, hidden_size], the drafter's output
            matrix, or those of its rows.
        counted: [N] bool, the positions that count; or [V, N], of each view.
        view_weights: [V] float32.
        chunk_tokens: a multiple of ``draft_tokens``, which divides N; 0 is all at once,
            by plain autograd.

    Returns:
        A scalar, and means by view. Those of the objectives ``OF_DRAFTED_LABELS`` are
        over the positions that count and have such a label.
    """
    sizes = counted.expand(len(hidden), -1).sum(-1).clamp_min(1)

    def loss_sizes(sums: Tensor) -> Tensor:
        """[V], how many positions the losses are the sums of."""
        if settings.objective in OF_DRAFTED_LABELS:
            return sums.detach()[DRAFTED].clamp_min(1)
        return sizes

    def size_of(sums: Tensor) -> Tensor:
        return loss_sizes(sums)[0]

    def sums_of(piece: Tensor, head: Tensor, rows: slice) -> Tensor:
        logits = F.linear(piece, head)
        return view_losses(logits, teacher, rows, counted[..., rows], settings)

    if chunk_tokens:
        apply: Callable[..., tuple[Tensor, Tensor]] = _ChunkedLoss.apply
        loss, sums = apply(hidden, head, view_weights, sums_of, size_of, chunk_tokens)
    else:
        sums = sums_of(hidden, head, slice(0, hidden.shape[1]))
        loss = (sums[0] * view_weights / size_of(sums)).sum()
    losses = sums[0].detach() / loss_sizes(sums)
    _, agreements, acceptances, label_coverage, coverage = sums.detach() / sizes
    means = ViewMeans(losses, agreements, acceptances, None, None)
    if teacher.vocabulary is not None:  # the same for each view, or nearly so
        means = means._replace(label_coverage=label_coverage[0])
        if settings.objective != "ce":
            means = means._replace(coverage=coverage[0])
    return loss, means


class _ChunkedLoss(torch.autograd.Function):
    """A weighted sum of views' losses whose gradients are computed piece by piece."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        weights: Tensor,
        sums_of: Callable[[Tensor, Tensor, slice], Tensor],
        size_of: Callable[[Tensor], Tensor],
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        """See ``multi_view_loss``; also returns the sums, without gradients.

        Args:
            size_of: of all sums, what is to be divided by; known when all are.
        """
        of_hidden = torch.zeros_like(hidden)
        # The target's own matrix does not learn, and needs none.
        of_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros(NUM_SUMS, len(hidden), dtype=torch.float32)
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
        size = size_of(total)
        of_hidden /= size
        if of_head is not None:
            of_head /= size
        ctx.save_for_backward(of_hidden, of_head)
        ctx.mark_non_differentiable(total)
        return (total[0] * weights / size).sum(), total

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor) -> Any:
        of_hidden, of_head = ctx.saved_tensors
        if of_head is not None:
            of_head = of_outputs[0] * of_head
        return of_outputs[0] * of_hidden, of_head, None, None, None, None
