"""What is trained: the drafter, through its loss on several views of a window."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.drafter.checkpoint import load_drafter, save_drafter
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.eviction.catalogue import make_policy
from vllm_budgetdraft.training.arguments import ObjectiveArguments, ViewArguments
from vllm_budgetdraft.training.losses import ViewMeans, multi_view_loss
from vllm_budgetdraft.training.teacher import (
    LiveTeacher,
    StoredTeacher,
    Teacher,
    check_target,
    last_hidden,
)
from vllm_budgetdraft.training.teacher_cache import TeacherCache
from vllm_budgetdraft.training.views import PrefixViews, View, continuation_hidden


class MultiViewModel(nn.Module):
    """The drafter's loss on a full view and sparse views of the same window."""

    def __init__(
        self,
        drafter: Drafter,
        target: PreTrainedModel,
        views: ViewArguments,
        objective: ObjectiveArguments,
        eviction: EvictionSettings,
        cache: TeacherCache | None = None,
    ) -> None:
        """
        Args:
            cache: where the target is asked only about windows that are not in it.

        Raises:
            ConfigurationError: settings that do not fit each other, or this target.
        """
        super().__init__()
        _check(views, objective, eviction)
        check_target(target)
        self.drafter = drafter
        # In a tuple, so that the frozen target is neither trained nor saved.
        self._target = (target.eval().requires_grad_(False),)
        self._cache = cache
        self._views = views
        self._objective = objective
        self._policy = make_policy(eviction)
        self._checkpoints = False
        self._last: tuple[list[str], ViewMeans] | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last windows, by name; waits for the device."""
        if self._last is None:
            return {}
        names, means = self._last
        return {
            f"{metric}_{view}": value
            for metric, values in means._asdict().items()
            for view, value in zip(names, values.tolist(), strict=True)
        }

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """As ``Trainer`` asks for it with ``gradient_checkpointing``."""
        self._checkpoints = True

    def forward(
        self,
        window: Tensor,
        prefix_ids: Tensor,
        continuation_ids: Tensor,
        counted: Tensor,
        temperatures: Tensor | None = None,
        next_ids: Tensor | None = None,
        top_ids: Tensor | None = None,
        top_logprobs: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """L_A + sparse_weight * L_C, equations 4 to 7.

        Arguments are a batch of ``TokenWindows``. The target is asked only if what is
        stored of it does not say what the objective needs.

        Returns:
            ``loss``, a scalar. A view whose budget holds the prefix adds nothing.
        """
        needs_labels_only = self._objective.objective == "ce"
        is_enough = needs_labels_only or (
            top_ids is not None and self._objective.teacher == "stored"
        )
        drawn_at = None
        if temperatures is not None and self._matches_temperature:
            drawn_at = temperatures.flatten()
        teacher: Teacher
        if next_ids is not None and is_enough:
            ids, logprobs = (
                x if x is None else x.flatten(0, 1) for x in (top_ids, top_logprobs)
            )
            teacher = StoredTeacher(next_ids.flatten(), ids, logprobs, drawn_at)
        else:
            hidden = self._target_hidden(window, prefix_ids, continuation_ids)
            teacher = LiveTeacher(
                hidden.flatten(0, 1), self._target[0].get_output_embeddings(), drawn_at
            )

        views, names = self._views_of(prefix_ids)
        hidden = continuation_hidden(
            self.drafter, continuation_ids, views, checkpoints=self._checkpoints
        )
        loss = self._loss(hidden, self.drafter.head, teacher, counted, names)
        return {"loss": loss}

    def _loss(
        self,
        hidden: Tensor,
        head: Tensor,
        teacher: Teacher,
        counted: Tensor,
        names: list[str],
    ) -> Tensor:
        """Equation 4, of views [V, ..., width] whose names ``metrics`` will have."""
        sparse = self._views.sparse_weight / max(1, self._views.views_per_step)
        weights = torch.full((len(names),), sparse, device=hidden.device)
        weights[0] = 1.0
        loss, means = multi_view_loss(
            hidden.flatten(1, -2),
            head,
            teacher,
            counted.flatten(),
            weights,
            self._objective,
            self._objective.loss_chunk_tokens,
        )
        self._last = names, means
        return loss

    def save_drafter(
        self,
        folder: Path,
        state: dict[str, Tensor],
        dtype: torch.dtype,
        tokenizer_from: str,
    ) -> None:
        """Writes the drafter's folder; ``state`` has its weights, by their names."""
        save_drafter(
            self.drafter,
            folder,
            dtype=dtype,
            tokenizer_from=tokenizer_from,
            state=state,
        )

    def load_drafter(self, folder: str | Path) -> None:
        """Takes over the weights of such a folder."""
        max_positions = self.drafter.rotary_table.shape[1]
        stored = load_drafter(folder, max_positions=max_positions)
        self.drafter.load_state_dict(stored.state_dict())

    @property
    def _matches_temperature(self) -> bool:
        objective = self._objective
        return objective.match_temperature and objective.objective != "ce"

    def _target_hidden(
        self, window: Tensor, prefix: Tensor, continuation: Tensor
    ) -> Tensor:
        """[B, C, hidden_size] of the target."""
        cached = self._cache.read(window) if self._cache else None
        if cached is not None:
            return cached.to(self._target[0].dtype)
        tokens = torch.cat([prefix, continuation], 1)
        hidden = last_hidden(self._target[0], tokens, continuation.shape[1])
        if self._cache:
            self._cache.write(window, hidden)
        return hidden

    def _views_of(self, prefix: Tensor) -> tuple[list[View], list[str]]:
        """The full view first."""
        settings = self._views
        with torch.set_grad_enabled(
            settings.prefix_gradient and torch.is_grad_enabled()
        ):
            found = PrefixViews(
                self.drafter,
                self._policy,
                prefix,
                is_relative=settings.position_mode == "cache_relative",
                streams=settings.draft_prefill == "streaming",
                chunk_tokens=settings.draft_prefill_chunk,
            )
            views, names = [found.full()], ["full"]
            for budget in self._draw_budgets():
                if budget < prefix.shape[1]:
                    views.append(found.sparse(budget))
                    names.append(f"budget_{budget}")
        return views, names

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
    views: ViewArguments, objective: ObjectiveArguments, eviction: EvictionSettings
) -> None:
    if min(views.budgets) < eviction.min_budget:
        raise ConfigurationError(
            f"budgets={views.budgets}: the smallest is below {eviction.min_budget} "
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
