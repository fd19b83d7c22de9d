"""Multi-view training of BudgetDraft (https://arxiv.org/abs/2606.00144), section 3."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from vllm_budgetdraft.config import EvictionSettings
from vllm_budgetdraft.drafter.checkpoint import load_drafter, save_drafter
from vllm_budgetdraft.drafter.modeling import Drafter
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.eviction.catalogue import make_policy
from vllm_budgetdraft.training.arguments import ViewArguments
from vllm_budgetdraft.training.losses import agreement, ce_loss, kl_loss
from vllm_budgetdraft.training.views import (
    PrefixCache,
    continuation_hidden,
    read_prefix,
)


class MultiViewLoss(nn.Module):
    """The drafter's loss on a full view and a sparse view of the same window."""

    def __init__(
        self,
        drafter: Drafter,
        target: PreTrainedModel,
        views: ViewArguments,
        eviction: EvictionSettings,
    ) -> None:
        """
        Raises:
            ConfigurationError: a budget is too small for the eviction settings.
        """
        super().__init__()
        if min(views.budgets) < eviction.min_budget:
            raise ConfigurationError(
                f"budgets={views.budgets}: the smallest is below {eviction.min_budget} "
                "tokens, the sinks plus one chunk; raise it or lower sink_tokens"
            )
        self.drafter = drafter
        # In a tuple, so that the frozen target is neither trained nor saved.
        self._target = (target.eval().requires_grad_(False),)
        self._views = views
        self._policy = make_policy(eviction)
        self.metrics: dict[str, float] = {}

    def forward(
        self,
        prefix_ids: Tensor,
        continuation_ids: Tensor,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """L_A + sparse_weight * L_C, equations 4 to 7.

        Args:
            prefix_ids: [B, P].
            continuation_ids: [B, C].
            labels: [B, C], the target's next token after each of the continuation,
                where known beforehand: objective "ce" then spares the target's pass.

        Returns:
            ``loss``, a scalar. L_C is 0 where the drawn budget holds the prefix.
        """
        by_label = self._views.objective == "ce"
        if labels is None or not by_label:
            target_logits = self._target_logits(prefix_ids, continuation_ids)
            labels = target_logits.argmax(-1)
        prefix_tokens = prefix_ids.shape[1]
        prefix = read_prefix(self.drafter, prefix_ids, self._policy)

        def view_loss(name: str, cache: PrefixCache) -> Tensor:
            hidden = continuation_hidden(
                self.drafter, continuation_ids, prefix_tokens, cache
            )
            logits = self.drafter.logits(hidden).float()
            self.metrics[f"agreement_{name}"] = agreement(logits, labels).item()
            if by_label:
                return ce_loss(logits, labels)
            return kl_loss(logits, target_logits)

        loss = view_loss("full", prefix)
        # From the global generator, whose state checkpoints keep.
        (budget,) = random.choices(self._views.budgets, self._views.budget_weights)
        if budget < prefix_tokens:
            sparse = prefix.sparse(self._policy, budget)
            loss = loss + self._views.sparse_weight * view_loss("sparse", sparse)
        return {"loss": loss}

    @torch.no_grad()
    def _target_logits(self, prefix_ids: Tensor, continuation_ids: Tensor) -> Tensor:
        """The target's logits on the continuation, [B, C, vocab_size] float32."""
        tokens = torch.cat([prefix_ids, continuation_ids], dim=1)
        kept = continuation_ids.shape[1]
        return self._target[0](tokens, logits_to_keep=kept).logits.float()


class DrafterTrainer(Trainer):
    """Trains a ``MultiViewLoss``; its checkpoints are drafter folders."""

    def __init__(self, *args: Any, tokenizer_from: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tokenizer_from = tokenizer_from

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, **self.model.metrics}, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        save_drafter(
            self.model.drafter,
            folder,
            dtype=torch.float32,
            tokenizer_from=self._tokenizer_from,
        )

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: Any = None
    ) -> None:
        drafter = (model or self.model).drafter
        stored = load_drafter(
            resume_from_checkpoint, max_positions=drafter.rotary_table.shape[1]
        )
        drafter.load_state_dict(stored.state_dict())
