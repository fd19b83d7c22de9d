"""What is trained: the drafter, through its loss on several views of a window."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.drafter.checkpoint import load_drafter, save_drafter
from vllm_budgetdraft.drafter.draft_vocabulary import FILE, write_draft_vocabulary
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.eviction.catalogue import make_policy
from vllm_budgetdraft.training.arguments import ObjectiveArguments, ViewArguments
from vllm_budgetdraft.training.base import DrafterTraining
from vllm_budgetdraft.training.draft_vocabulary import DraftVocabulary
from vllm_budgetdraft.training.teacher import (
    LiveTeacher,
    StoredTeacher,
    Teacher,
    last_hidden,
)
from vllm_budgetdraft.training.teacher_cache import TeacherCache
from vllm_budgetdraft.training.views import (
    PrefixViews,
    Read,
    View,
    continuation_hidden,
)


class MultiViewModel(DrafterTraining):
    """The drafter's loss on a full view and sparse views of the same window."""

    def __init__(
        self,
        drafter: Drafter,
        target: PreTrainedModel,
        views: ViewArguments,
        objective: ObjectiveArguments,
        view: ViewSettings,
        cache: TeacherCache | None = None,
        draft_ids: Tensor | None = None,
    ) -> None:
        """
        Args:
            cache: where the target is asked only about windows that are not in it.
            draft_ids: [n] int64, the tokens to draft, the likeliest first; all if None.

        Raises:
            ConfigurationError: settings that do not fit each other, or this target.
        """
        super().__init__(target, views, objective, view)
        self.drafter = drafter
        self._view = view
        self._cache = cache
        self._vocabulary: DraftVocabulary | None = None
        if draft_ids is not None:
            size = drafter.config.vocab_size
            self._vocabulary = DraftVocabulary(draft_ids, size)
        self._policy = make_policy(view)
        self._checkpoints = False

    @property
    def num_drafted(self) -> int | None:
        return None if self._vocabulary is None else len(self._vocabulary.ids)

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
        teacher = self._teacher(
            lambda: self._target_hidden(window, prefix_ids, continuation_ids),
            temperatures,
            next_ids,
            top_ids,
            top_logprobs,
        )
        views, names = self._views_of(prefix_ids, continuation_ids.shape[1])
        hidden = continuation_hidden(
            self.drafter, continuation_ids, views, checkpoints=self._checkpoints
        )
        head = self.drafter.head
        if self._vocabulary is not None:
            head = head.index_select(0, self._vocabulary.ids)
        loss = self._loss(hidden, head, teacher, counted.flatten(), names)
        return {"loss": loss}

    def save_drafter(
        self,
        folder: Path,
        state: dict[str, Tensor],
        dtype: torch.dtype,
        tokenizer_from: str,
    ) -> None:
        save_drafter(
            self.drafter,
            folder,
            dtype=dtype,
            tokenizer_from=tokenizer_from,
            state=state,
        )
        if self._vocabulary is not None:
            write_draft_vocabulary(folder, self._vocabulary.ids.cpu())
        else:  # an earlier run's
            (folder / FILE).unlink(missing_ok=True)

    def load_drafter(self, folder: str | Path) -> None:
        max_positions = self.drafter.rotary_table.shape[1]
        stored = load_drafter(folder, max_positions=max_positions)
        self.drafter.load_state_dict(stored.state_dict())

    def _teacher(
        self,
        hidden: Callable[[], Tensor],
        temperatures: Tensor | None,
        next_ids: Tensor | None,
        top_ids: Tensor | None,
        top_logprobs: Tensor | None,
    ) -> Teacher:
        """What is stored of the target, if that is enough; or the target itself.

        Args:
            hidden: gives the target's hidden states, [B, C, hidden_size].
        """
        needs_labels_only = self._objective.objective == "ce"
        is_enough = needs_labels_only or (
            top_ids is not None and self._objective.teacher == "stored"
        )
        drawn_at = None
        if temperatures is not None and self._matches_temperature:
            drawn_at = temperatures.flatten()
        if next_ids is not None and is_enough:
            ids, logprobs = (
                x if x is None else x.flatten(0, 1) for x in (top_ids, top_logprobs)
            )
            return StoredTeacher(
                next_ids.flatten(), ids, logprobs, drawn_at, self._vocabulary
            )
        return LiveTeacher(
            hidden().flatten(0, 1),
            self._target[0].get_output_embeddings(),
            drawn_at,
            self._vocabulary,
        )

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

    def _views_of(
        self, prefix: Tensor, continuation_tokens: int, read: Read | None = None
    ) -> tuple[list[View], list[str]]:
        """The full view first.

        Args:
            read: see ``PrefixViews``.
        """
        settings = self._views
        with torch.set_grad_enabled(
            settings.prefix_gradient and torch.is_grad_enabled()
        ):
            found = PrefixViews(
                self.drafter,
                self._policy,
                prefix,
                self._view,
                continuation_tokens=continuation_tokens,
                read=read,
            )
            views, names = [found.full()], ["full"]
            for budget in self._draw_budgets():
                if budget < prefix.shape[1]:
                    views.append(found.sparse(budget))
                    names.append(f"budget_{budget}")
        return views, names
