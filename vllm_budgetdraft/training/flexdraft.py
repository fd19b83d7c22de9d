"""What is trained of FlexDraft: drafts of many anchors of a window, packed."""

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from budgetdraft_kernels.reference import rotate
from vllm_budgetdraft.config import ViewSettings
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.flexdraft.checkpoint import load_flexdraft, save_flexdraft
from vllm_budgetdraft.flexdraft.modeling import FlexDraft, TargetParts
from vllm_budgetdraft.flexdraft.pages import PageSelector
from vllm_budgetdraft.training.arguments import (
    FlexDraftArguments,
    ObjectiveArguments,
    ViewArguments,
)
from vllm_budgetdraft.training.base import DrafterTraining
from vllm_budgetdraft.training.teacher import LiveTeacher


class FlexDraftModel(DrafterTraining):
    """FlexDraft's loss on a full view and sparse views of the target's own cache.

    An anchor is the position of a bonus token. Its mask tokens see what they do when
    drafting: the target's keys and values before the anchor and each other, but no
    other anchor's. The k predictions are compared with what the target, which knows
    the tokens between, says of the same positions. Neither the paper's loss nor its
    choice of anchors is published; these are ours.
    """

    def __init__(
        self,
        drafter: FlexDraft,
        target: PreTrainedModel,
        views: ViewArguments,
        objective: ObjectiveArguments,
        view: ViewSettings,
        flexdraft: FlexDraftArguments,
        settings: dict[str, Any],
    ) -> None:
        """
        Args:
            objective: its ``draft_tokens`` is k.
            settings: see ``save_flexdraft``.

        Raises:
            ConfigurationError: settings that do not fit each other, or this target.
        """
        super().__init__(target, views, objective, view)
        self.drafter = drafter
        self._selector = PageSelector(view, flexdraft.selection_page_size)
        self._parts = TargetParts(target, drafter.num_layers)
        self._num_anchors = flexdraft.anchors_per_window
        self._blind_fraction = flexdraft.blind_fraction
        self._settings = settings

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Raises ConfigurationError: few activations are held as it is."""
        raise ConfigurationError(
            "gradient_checkpointing: flexdraft has gradients in a few layers, of its "
            "mask tokens alone; leave it out, or lower anchors_per_window"
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
        """L_A + sparse_weight * L_C over drafts, equation 4 of BudgetDraft.

        Arguments are a batch of ``TokenWindows``; the target is always asked, for its
        keys and values are what masks read.
        """
        target, objective = self._target[0], self._objective
        num_drafts, length = objective.draft_tokens, continuation_ids.shape[1]
        tokens = torch.cat([prefix_ids, continuation_ids], 1)
        hidden, keys, values = target_states(target, tokens, self.drafter.num_layers)

        # In the continuation; the last draft of the last anchor is its last token.
        count = min(self._num_anchors, length - num_drafts)
        anchors = torch.tensor(random.sample(range(length - num_drafts), count))
        anchors = anchors.sort().values.to(tokens.device)
        drafts = torch.arange(num_drafts, device=tokens.device)
        predicting = (anchors[:, None] + drafts).flatten()  # positions, in the teacher
        drawn_at = None
        if temperatures is not None and self._matches_temperature:
            drawn_at = temperatures[:, predicting].flatten()
        rows = hidden[:, prefix_ids.shape[1] :][:, predicting]
        teacher = LiveTeacher(
            rows.flatten(0, 1), target.get_output_embeddings(), drawn_at
        )

        seen, names = self._seen(keys, prefix_ids.shape[1])
        parts = self._parts
        bonus = parts.embed(continuation_ids[:, anchors])
        # The mask tokens of some drafts are not told the bonus token.
        is_told = torch.rand(len(anchors)) >= self._blind_fraction
        found = mask_hidden(
            self.drafter,
            parts,
            keys,
            values,
            anchors + prefix_ids.shape[1],
            bonus * is_told.to(bonus)[:, None],
            num_drafts + 1,
            seen,
        )
        found = found[..., 1:, :]  # [V, B, A, k, hidden_size]
        known = bonus[:, :, None]
        if self.drafter.chains:  # the tokens before, as the text has them
            before = continuation_ids[:, predicting]
            known = parts.embed(before).unflatten(1, (-1, num_drafts))
        features = self.drafter.features(found, known.expand_as(found))
        # What calibration adds is one product with what the target's matrix does.
        found = torch.cat([found, features.to(found.dtype)], -1)
        head = torch.cat([parts.head, self.drafter.calibration_out], -1)
        if self.drafter.calibration_rank:
            found = F.pad(found, (0, 1), value=1.0)
            head = torch.cat([head, self.drafter.calibration_out_bias[:, None]], -1)
        is_counted = counted[:, predicting].flatten()
        loss = self._loss(found, head, teacher, is_counted, names)
        return {"loss": loss}

    def _seen(
        self, keys: list[Tensor], length: int
    ) -> tuple[list[list[Tensor] | None], list[str]]:
        """By view and layer, [B, G, length] bool of the prefix; the full view first."""
        seen: list[list[Tensor] | None] = [None]
        names = ["full"]
        for budget in self._draw_budgets():
            if budget < length:
                seen.append(
                    [self._selector.visible(k[:, :, :length], budget) for k in keys]
                )
                names.append(f"budget_{budget}")
        return seen, names

    def save_drafter(
        self,
        folder: Path,
        state: dict[str, Tensor],
        dtype: torch.dtype,
        tokenizer_from: str,
    ) -> None:
        save_flexdraft(self.drafter, folder, self._settings, dtype=dtype, state=state)

    def load_drafter(self, folder: str | Path) -> None:
        max_positions = self.drafter.rotary_table.shape[1]
        stored = load_flexdraft(folder, self._target[0], max_positions=max_positions)
        self.drafter.load_state_dict(stored.state_dict())


@torch.no_grad()
def target_states(
    target: PreTrainedModel, tokens: Tensor, num_layers: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Hidden states [B, T, hidden_size] of contexts; keys and values of last layers.

    Returns:
        Keys, rotated, and values are [B, G, T, D] by layer.
    """
    cache = DynamicCache()
    output = target.base_model(tokens, past_key_values=cache, use_cache=True)
    layers = cache.layers[-num_layers:]
    keys, values = [each.keys for each in layers], [each.values for each in layers]
    return output.last_hidden_state, keys, values


def mask_hidden(
    drafter: FlexDraft,
    target: TargetParts,
    keys: list[Tensor],
    values: list[Tensor],
    anchors: Tensor,
    bonus: Tensor,
    block: int,
    seen: list[list[Tensor] | None],
) -> Tensor:
    """Hidden states of the mask tokens of all anchors, for each view.

    Args:
        keys, values: the target's, by layer, [B, G, S, D].
        anchors: [A] int64, positions in the context, the same for each sequence.
        bonus: [B, A, hidden_size], embeddings of the tokens there.
        block: mask tokens of an anchor.
        seen: by view, all of the context (None), or by layer which tokens of the
            beginning are seen, [B, G, n] bool; what follows is.

    Returns:
        [V, B, A, block, hidden_size].
    """
    _, num_kv_heads, num_tokens, _ = keys[0].shape
    group = drafter.num_heads // num_kv_heads
    device = anchors.device
    positions = (anchors[:, None] + torch.arange(block, device=device)).flatten()
    of_anchor = torch.arange(len(anchors), device=device).repeat_interleave(block)
    before = torch.arange(num_tokens, device=device) < anchors[of_anchor][:, None]
    own = of_anchor == of_anchor[:, None]
    rotary = drafter.rotary(positions)
    sizes = (drafter.num_heads, num_kv_heads, num_kv_heads)

    def mask(view: list[Tensor] | None, layer: int) -> Tensor:
        """What masks see, [A * block, S + A * block], or that by head: [B, H, ...]."""
        if view is None:
            return torch.cat([before, own], -1)
        part = view[layer]
        part = F.pad(part, (0, num_tokens - part.shape[-1]), value=True)
        visible = before & part.repeat_interleave(group, 1)[:, :, None]
        return torch.cat([visible, own.expand(*visible.shape[:2], -1, -1)], -1)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        heads_first = qkv.transpose(-2, -3)  # [V, B, heads, T, D]
        q, k, v = heads_first.split(sizes, 2)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        attended = []
        for index, view in enumerate(seen):
            attended.append(
                F.scaled_dot_product_attention(
                    q[index],
                    torch.cat([keys[layer].to(k.dtype), k[index]], 2),
                    torch.cat([values[layer].to(v.dtype), v[index]], 2),
                    attn_mask=mask(view, layer),
                    enable_gqa=True,
                )
            )
        return torch.stack(attended).transpose(-2, -3)

    x = drafter.masks(bonus, block).flatten(1, 2).expand(len(seen), -1, -1, -1)
    hidden: Tensor = drafter(x, target, attend).unflatten(2, (len(anchors), block))
    return hidden
