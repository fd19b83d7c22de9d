"""What training has in common for every type of drafter."""

import random
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.training.arguments import ObjectiveArguments, ViewArguments
from vllm_budgetdraft.training.losses import ViewMeans, multi_view_loss
from vllm_budgetdraft.training.teacher import Teacher, check_target


class DrafterTraining(nn.Module, ABC):
    """A drafter's loss on a full view and sparse views of the same window.

    Attributes:
        drafter: what is trained; nothing else has parameters here.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        views: ViewArguments,
        objective: ObjectiveArguments,
        view: ViewSettings,
    ) -> None:
        """
        Raises:
            ConfigurationError: settings that do not fit each other, or this target.
        """
        super().__init__()
        _check(views, objective, view)
        check_target(target)
        # In a tuple, so that the frozen target is neither trained nor saved.
        self._target = (target.eval().requires_grad_(False),)
        self._views = views
        self._objective = objective
        self._last: tuple[list[str], ViewMeans] | None = None

    @property
    def num_drafted(self) -> int | None:
        """Tokens of its draft vocabulary; None if all tokens are drafted."""
        return None

    @abstractmethod
    def save_drafter(
        self,
        folder: Path,
        state: dict[str, Tensor],
        dtype: torch.dtype,
        tokenizer_from: str,
    ) -> None:
        """Writes the drafter's folder; ``state`` has its weights, by their names."""

    @abstractmethod
    def load_drafter(self, folder: str | Path) -> None:
        """Takes over the weights of a folder that ``save_drafter`` wrote."""

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last windows, by name; waits for the device."""
        if self._last is None:
            return {}
        names, means = self._last
        found: dict[str, float] = {}
        for metric, values in means._asdict().items():
            if values is not None and values.ndim:
                of_views = zip(names, values.tolist(), strict=True)
                found |= {f"{metric}_{view}": value for view, value in of_views}
            elif values is not None:
                found[metric] = values.item()
        return found

    def _loss(
        self,
        hidden: Tensor,
        head: Tensor,
        teacher: Teacher,
        counted: Tensor,
        names: list[str],
        decay: float = 1.0,
    ) -> Tensor:
        """Equation 4, of views [V, ..., width] whose names ``metrics`` will have.

        Args:
            hidden: of V views, or of K * V: those of K steps of a draft, one after
                another.
            head: of the tokens that are drafted, see ``multi_view_loss``.
            counted: see ``multi_view_loss``.
            decay: of the weights of steps.
        """
        sparse = self._views.sparse_weight / max(1, self._views.views_per_step)
        weights = torch.full((len(names),), sparse, device=hidden.device)
        weights[0] = 1.0
        steps = torch.arange(len(hidden) // len(names), device=hidden.device)
        weights = (decay ** steps[:, None] * weights).flatten()
        names = names + [
            f"{name}_step_{step}" for step in range(1, len(steps)) for name in names
        ]
        loss, means = multi_view_loss(
            hidden.flatten(1, -2),
            head,
            teacher,
            counted,
            weights,
            self._objective,
            self._objective.loss_chunk_tokens,
        )
        self._last = names, means
        return loss

    @property
    def _matches_temperature(self) -> bool:
        objective = self._objective
        return objective.match_temperature and objective.objective != "ce"

    def _draw_budgets(self) -> list[int]:
        """From the global generator, whose state checkpoints keep."""
        settings = self._views
        if not settings.sparse_weight:
            return []
        left = dict(zip(settings.budgets, settings.budget_weights, strict=True))
        drawn = []
        for _ in range(settings.views_per_step):
            (budget,) = random.choices(list(left), list(left.values()))
            drawn.append(budget)
            if len(left) > 1:
                del left[budget]
        return drawn


def _check(
    views: ViewArguments, objective: ObjectiveArguments, view: ViewSettings
) -> None:
    if min(views.budgets) < view.min_budget:
        raise ConfigurationError(
            f"budgets={views.budgets}: the smallest is below {view.min_budget} "
            "tokens, the sinks plus one chunk; raise it or lower sink_tokens"
        )
    if len(views.budgets) != len(views.budget_weights):
        raise ConfigurationError(
            f"{len(views.budgets)} budgets and {len(views.budget_weights)} "
            "budget_weights; give one weight for each budget"
        )
    block, chunk = objective.draft_tokens, objective.loss_chunk_tokens
    if objective.position_weights != "uniform" and chunk % block:
        raise ConfigurationError(
            f"loss_chunk_tokens={chunk} is no multiple of draft_tokens={block}, whose "
            f"positions have weights together; use {chunk // block * block or block}"
        )
