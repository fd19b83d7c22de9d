"""Drafting with a head where there is no engine: its target is run beside it."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vllm_budgetdraft.drafter.feature_modeling import (
    FeatureDrafter,
    default_aux_layers,
    target_thoughts,
)
from vllm_budgetdraft.proposer.draft_loop import Fed
from vllm_budgetdraft.proposer.draft_proposer import DraftProposer
from vllm_budgetdraft.proposer.picking import Drafts


class TargetReader:
    """A ``DraftProposer`` of an EAGLE-3 head, with the face of a decoder's.

    What the target thinks of the tokens that it is told is computed here. A context
    that is read again, for another budget or temperature, is not computed again.
    """

    def __init__(self, proposer: DraftProposer, target: PreTrainedModel) -> None:
        """
        Args:
            target: of the head, on the same device.
        """
        assert isinstance(proposer.drafter, FeatureDrafter)
        self.device = proposer.device
        self._core, self._target = proposer, target
        num_layers = target.config.get_text_config().num_hidden_layers
        self._layers = proposer.drafter.aux_layers or default_aux_layers(num_layers)
        self._context: list[int] = []
        self._context_features = proposer.blank_features(0)
        self._cache = DynamicCache()
        self._unfed: Tensor  # features that were computed, and not fed
        self._told: Tensor  # the last draft, after the token that it began with

    def start_request(self, slot: int, kv_budget: int) -> None:
        self._core.start_request(slot, kv_budget)

    @torch.inference_mode()
    def ingest(self, slot: int, tokens: Tensor, kv_budget: int) -> None:
        """See ``DraftProposer.ingest``.

        The last of them is fed by the next ``draft``, for what follows it is not known.
        """
        if tokens.tolist() != self._context:
            self._cache = DynamicCache()
            self._context = tokens.tolist()
            self._context_features = self._features(tokens)
        features = self._context_features
        if more := self._cache.get_seq_length() - len(features):
            self._cache.crop(-more)
        end = max(0, len(tokens) - 1)
        self._core.reader.start(slot, end, kv_budget)
        failed = self._core.reader.read_pieces(
            lambda pieces: tokens[1:][pieces[0][1].start : pieces[0][1].stop],
            lambda pieces: features[pieces[0][1].start : pieces[0][1].stop],
            {slot: end},
        )
        for error in failed.values():
            raise error
        self._unfed, self._told = features[-1:], tokens[:0]

    @torch.inference_mode()
    def draft(
        self,
        slots: Tensor,
        tokens: Tensor,
        ends: Tensor,
        num_drafts: int | None = None,
        temperatures: Tensor | None = None,
    ) -> Drafts:
        """See ``DraftProposer.draft``; every slot of a draft is asked for.

        What the target accepted of the last draft is read by it first.
        """
        core, last = self._core, tokens[0, -1:]
        if not len(self._told):
            self._told = tokens[0, :1]
        verified = self._told[: int(ends) - 1 - self._cache.get_seq_length()]
        features = torch.cat([self._unfed, self._features(verified)])
        count, width = len(features), core.first_width
        # Each feature goes with the token after its own.
        following = torch.cat([verified, last])[-count:]
        fed = core.blank_fed(1)
        assert fed is not None
        fed.features[0, :count] = features
        padded = following.new_zeros((1, width))
        padded[0, :count] = following
        drafts = core.draft(
            slots,
            padded,
            ends - 1,
            num_drafts,
            temperatures,
            fed=Fed(fed.features, fed.counts + (count - 1)),
        )
        self._unfed = features[:0]
        self._told = torch.cat([last, drafts.tokens[0]])
        return drafts

    def release_request(self, slot: int) -> None:
        self._core.release_request(slot)

    def _features(self, tokens: Tensor) -> Tensor:
        """Of tokens that come next, [T, hidden_size]."""
        drafter = self._core.drafter
        assert isinstance(drafter, FeatureDrafter)
        if not len(tokens):
            return self._core.blank_features(0)
        _, states = target_thoughts(
            self._target, tokens[None], self._layers, self._cache
        )
        return drafter.combined(states[0].to(drafter.norm.dtype))
