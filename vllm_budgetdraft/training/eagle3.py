"""What is trained of an EAGLE-3 head: the drafts it makes from each position.

The head's position p takes the token after p and what the target thought at p, and
says what comes after that token. Rows are the teacher's: row j is of the continuation's
token j, whose feature is that of the position before.

Letters in shapes: V views, B sequences, P prefix tokens, C continuation tokens, K steps
of a draft, N target layers that are read.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from budgetdraft_kernels.reference_projections import Norms
from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.drafter.feature_checkpoint import (
    load_feature_drafter,
    save_feature_drafter,
)
from vllm_budgetdraft.drafter.feature_modeling import (
    FeatureDrafter,
    target_thoughts,
)
from vllm_budgetdraft.drafter.modeling import Attend
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.training.arguments import (
    FeatureArguments,
    ObjectiveArguments,
    ViewArguments,
)
from vllm_budgetdraft.training.model import MultiViewModel
from vllm_budgetdraft.training.views import View, ViewAttention, extend


class FeatureModel(MultiViewModel):
    """A head's loss on drafts from every row, on a full view and on sparse ones.

    A draft is made in training as it is in serving (training-time test, section 3 of
    https://arxiv.org/abs/2503.01840): its first step reads what the target thought, and
    each further one what the step before made of it. The tokens are the text's.
    """

    drafter: FeatureDrafter

    def __init__(
        self,
        drafter: FeatureDrafter,
        target: PreTrainedModel,
        views: ViewArguments,
        objective: ObjectiveArguments,
        view: ViewSettings,
        features: FeatureArguments,
        *,
        with_embedding: bool = False,
    ) -> None:
        """
        Args:
            drafter: its ``aux_layers`` are known.
            with_embedding: whether its embeddings are its own, and saved.

        Raises:
            ConfigurationError: see ``MultiViewModel``.
        """
        ids = drafter.draft_ids
        super().__init__(drafter, target, views, objective, view, draft_ids=ids)
        self._features = features
        self._with_embedding = with_embedding

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Raises ConfigurationError: it is one layer."""
        raise ConfigurationError(
            "gradient_checkpointing: an EAGLE-3 head is one layer; leave it out, or "
            "lower ttt_steps or continuation_tokens"
        )

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
        """L_A + sparse_weight * L_C over steps of drafts, each ttt_decay of the last.

        Arguments are a batch of ``TokenWindows``; the target is always asked, once, for
        its states are what the head reads.
        """
        drafter, steps = self.drafter, self._features.ttt_steps
        length = continuation_ids.shape[1]
        tokens = torch.cat([prefix_ids, continuation_ids], 1)
        assert drafter.aux_layers is not None
        hidden, states = target_thoughts(self._target[0], tokens, drafter.aux_layers)
        teacher = self._teacher(
            lambda: hidden[:, -length:],
            temperatures,
            next_ids,
            top_ids,
            top_logprobs,
        )

        def features(start: int, stop: int) -> Tensor:
            """Of rows, [B, stop - start, hidden_size]."""
            states_before = states[:, start:stop].to(drafter.fc_weight.dtype)
            return drafter.combined(states_before).to(drafter.norm.dtype)

        def read(rows: Tensor, attend: Attend) -> Any:
            start, stop = int(rows[0, 0]), int(rows[0, -1]) + 1
            seen = tokens[:, start + 1 : stop + 1]
            return drafter.step(seen, features(start, stop), attend)

        # The first token has none before it that the target could have thought at.
        rows = torch.arange(prefix_ids.shape[1] - 1, device=tokens.device)
        rows = rows.expand(len(tokens), -1)
        views, names = self._views_of(rows, length, read)
        found = drafted_hidden(
            drafter,
            continuation_ids,
            features(rows.shape[1], rows.shape[1] + length),
            views,
            steps,
        )
        # A draft's step i is made where there are i rows before.
        is_made = torch.ones(steps, length, dtype=torch.bool).triu().to(tokens.device)
        is_counted = counted.flatten() & is_made.repeat(1, len(tokens))
        loss = self._loss(
            found.flatten(0, 1),
            drafter.head,
            teacher,
            is_counted.repeat_interleave(len(views), 0),
            names,
            self._features.ttt_decay,
        )
        return {"loss": loss}

    def save_drafter(
        self,
        folder: Path,
        state: dict[str, Tensor],
        dtype: torch.dtype,
        tokenizer_from: str,
    ) -> None:
        """Writes what ``load_feature_drafter`` reads, without tokenizer."""
        save_feature_drafter(
            self.drafter,
            folder,
            dtype=dtype,
            state=state,
            with_embedding=self._with_embedding,
        )

    def load_drafter(self, folder: str | Path) -> None:
        stored = load_feature_drafter(
            folder,
            max_positions=self.drafter.rotary_table.shape[1],
            embedding=self.drafter.embedding.detach(),
        )
        self.drafter.load_state_dict(stored.state_dict())


def drafted_hidden(
    drafter: FeatureDrafter,
    tokens: Tensor,
    features: Tensor,
    views: list[View],
    steps: int,
) -> Tensor:
    """Hidden states of each step of drafts that end at each row.

    Step i at row j is of a draft whose first step was at row j - i. It sees what the
    target thought up to there, and the draft's own steps: what the head made of it.

    Args:
        tokens: [B, C] int64.
        features: [B, C, hidden_size], of the target, for the first step.
        views: of the prefix.
        steps: K.

    Returns:
        [K, V, B, C, hidden_size]; rows below i of step i say nothing.
    """
    batch, length = tokens.shape
    attention = ViewAttention(drafter, views, batch, length)
    rows = torch.arange(length, device=tokens.device)
    distances = rows[:, None] - rows
    all_keys: list[Tensor] = []
    all_values: list[Tensor] = []
    tokens, features = tokens.repeat(len(views), 1), features.repeat(len(views), 1, 1)
    found = []
    for step in range(steps):
        own = [distances == step - before for before in range(1, step + 1)]
        mask = torch.cat([distances >= step, *own], -1)

        def attend(
            layer: int, qkv: Tensor, norms: Norms, mask: Tensor = mask
        ) -> Tensor:
            queries, keys, values = attention.heads(qkv, norms)
            keys = extend(all_keys, layer, keys)
            values = extend(all_values, layer, values)
            return attention.attend(layer, queries, keys, values, mask)

        made = drafter.step(tokens, features, attend)
        assert made is not None
        found.append(made[0].unflatten(0, (len(views), batch)))
        features = F.pad(made[1][:, :-1], (0, 0, 1, 0))
    return torch.stack(found)
