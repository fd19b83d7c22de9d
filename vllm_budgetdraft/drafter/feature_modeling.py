"""The drafter that reads its target's mind: an EAGLE-3 head.

One decoder layer over each token and what the target thought before it: the hidden
states of three of its layers at the position before, joined by one matrix
(https://arxiv.org/abs/2503.01840, section 3). Where the target has not been yet, the
head's own state takes their place. Attention, cache, policies and draft vocabulary are
those of every drafter.

Letters in shapes: N target layers that are read, the rest as in ``modeling``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from vllm_budgetdraft.drafter.modeling import (
    Attend,
    DecoderLayer,
    Drafter,
    new_matrix,
    new_norm,
)


class FeatureLayer(DecoderLayer):
    """A decoder layer whose input is twice as wide: an embedding, and a feature."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.qkv_weight = new_matrix(len(self.qkv_weight), 2 * config.hidden_size)
        self.hidden_norm = new_norm(config.hidden_size)
        self.adds_normed = config.norm_before_residual

    def of_features(
        self, embedded: Tensor, features: Tensor, layer: int, attend: Attend
    ) -> Tensor | None:
        """Embeddings and features [..., hidden_size] to the next features."""
        shape, eps = self.hidden_norm.shape, self.eps
        embedded = torch.rms_norm(embedded, shape, self.input_norm, eps)
        normed = torch.rms_norm(features, shape, self.hidden_norm, eps)
        both = torch.cat([embedded, normed], -1)
        qkv = self.linear(both, self.qkv_weight, self.qkv_bias)
        residual = normed if self.adds_normed else features
        return self.after(attend, layer, qkv, residual)


class FeatureDrafter(Drafter):
    """An EAGLE-3 head, with embeddings that may be its target's.

    Attributes:
        shares_embedding: whether its embeddings are its target's.
        aux_layers: how many of the target's layers were passed before each state that
            it reads, ascending; None for those that vLLM takes by itself.
    """

    def __init__(self, config: PretrainedConfig, max_positions: int) -> None:
        """
        Args:
            config: see ``read_feature_config``.
        """
        super().__init__(config, max_positions)
        first = FeatureLayer(config)
        self.layers[0] = first
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.shares_embedding = False
        self.aux_layers: list[int] | None = config.aux_layers
        count, width = config.num_aux_layers, config.target_hidden_size
        self.fc_weight = new_matrix(hidden, count * width)
        self.fc_norms = new_norm(count * width) if config.fc_norm else None
        self.input_norm = new_norm(count * width) if config.norm_before_fc else None
        self._num_aux, self._eps = count, eps
        self._tells_normed = config.norm_output
        if self.lm_head is not None:
            self.lm_head = new_matrix(config.draft_vocab_size, hidden)
            self.draft_vocab_size = config.draft_vocab_size

    def combined(self, states: Tensor) -> Tensor:
        """Features of what the target thought.

        Args:
            states: [..., N * target_hidden_size], of its layers, one after another.

        Returns:
            [..., hidden_size].
        """
        if self.input_norm is not None:
            states = torch.rms_norm(
                states, self.input_norm.shape, self.input_norm, self._eps
            )
        if self.fc_norms is not None:
            parts = states.unflatten(-1, (self._num_aux, -1))
            parts = torch.rms_norm(parts, parts.shape[-1:], eps=self._eps)
            states = parts.flatten(-2) * self.fc_norms
        return self.linear(states, self.fc_weight)

    def step(self, tokens: Tensor, features: Tensor | None, attend: Attend) -> Any:
        """Final normed hidden states, and the features of the positions after.

        Args:
            tokens: [..., ] int64.
            features: [..., hidden_size], of the position before each token: combined
                states of the target, or what this returned.

        Returns:
            [..., hidden_size] each, or None if ``attend`` ended the pass.
        """
        assert features is not None
        layers: Any = self.layers
        x = F.embedding(tokens, self.embedding)
        for index, layer in enumerate(layers):
            if index == 0:
                x = layer.of_features(x, features, index, attend)
            else:
                x = layer(x, index, attend)
            if x is None:
                return None
        normed = torch.rms_norm(x, self.norm.shape, self.norm, self._eps)
        return normed, normed if self._tells_normed else x


def default_aux_layers(num_layers: int) -> list[int]:
    """The layers of a target that vLLM takes by itself: early, half way and late."""
    return [2, num_layers // 2, num_layers - 3]


@torch.no_grad()
def target_thoughts(
    target: PreTrainedModel,
    tokens: Tensor,
    layers: list[int],
    cache: DynamicCache | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden states of the last layer [B, T, size] and of N layers [B, T, N * size].

    Args:
        tokens: [B, T] int64.
        layers: how many were passed before each, as vLLM counts them.
        cache: of what comes before the tokens; it grows.
    """
    output = target.base_model(
        tokens,
        past_key_values=cache,
        use_cache=cache is not None,
        output_hidden_states=True,
    )
    states = [output.hidden_states[layer] for layer in layers]
    return output.last_hidden_state, torch.cat(states, -1)
