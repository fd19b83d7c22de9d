"""The drafter: one Llama-family decoder for training and for serving.

Where keys and values live is not its business. Each layer hands its rotated queries,
keys and values to ``attend``, which stores what it wants and returns the attention:
over pages when drafting, over the prompt when ingesting, over views when training.

Letters in shapes: B sequences, T tokens, H query heads, G KV heads, D head size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from budgetdraft_kernels.reference import rotate
from vllm_budgetdraft.drafter.configuration import head_dim, rotary_frequencies

#: ``attend(layer, queries [B, T, H, D], keys [B, T, G, D], values [B, T, G, D])``
#: returns [B, T, H, D], or None where the layer's output has no reader.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]
#: cos and sin of every token's position, as ``rotate`` takes them.
Rotary = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Fused query, key and value projections; bias and q/k norms where configured."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = head_dim(config)
        hidden = config.hidden_size
        bias = getattr(config, "attention_bias", False)
        # Qwen2 biases its q, k and v by definition, with no key in its config.
        qkv_bias = bias or config.model_type == "qwen2"
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(hidden, rows, bias=qkv_bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=bias)
        self.has_norms = config.model_type == "qwen3"
        if self.has_norms:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: Rotary, layer: int, attend: Attend
    ) -> Tensor | None:
        qkv = self.qkv_proj(x).view(*x.shape[:2], -1, self.head_dim)
        rotated = self.num_heads + self.num_kv_heads
        qk = qkv[..., :rotated, :]
        heads = (self.num_heads, self.num_kv_heads)
        if self.has_norms:
            q, k = qk.split(heads, -2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], -2)
        q, k = rotate(qk, *rotary).split(heads, -2)
        attended = attend(layer, q, k, qkv[..., rotated:, :])
        return (
            None if attended is None else self.o_proj(attended.view(*x.shape[:2], -1))
        )


class DecoderLayer(nn.Module):
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(
        self, x: Tensor, rotary: Rotary, layer: int, attend: Attend
    ) -> Tensor | None:
        attended = self.self_attn(self.input_layernorm(x), rotary, layer, attend)
        if attended is None:
            return None
        x = x + attended
        gate, up = self.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, -1)
        return x + self.down_proj(F.silu(gate) * up)


class Drafter(nn.Module):
    """A Llama-family decoder over tokens and explicit positions.

    A sliding window that the config names is not applied: what a token sees is up to
    ``attend``.
    """

    def __init__(self, config: PretrainedConfig, max_positions: int) -> None:
        """
        Args:
            max_positions: rows of the rotary table; positions stay below.
        """
        super().__init__()
        self.config = config
        self.num_layers = config.num_hidden_layers
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = head_dim(config)
        self.rotary_table: Tensor
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer(
            "rotary_table", _rotary_table(config, max_positions), persistent=False
        )

    def rotary(self, positions: Tensor) -> Rotary:
        """cos and sin of ``positions`` [B, T], for ``rotate``: [B, T, 1, D] each."""
        cos, sin = self.rotary_table[:, positions, None]
        return cos, sin

    def forward(self, tokens: Tensor, rotary: Rotary, attend: Attend) -> Tensor | None:
        """Final normed hidden states.

        Args:
            tokens: [B, T] int64.
            rotary: [B, T, 1, D] each, ``self.rotary(positions)``.
            attend: see ``Attend``; layers after one that it answers with None do not
                run.

        Returns:
            [B, T, hidden_size], or None if ``attend`` ended the pass.
        """
        x = self.embed_tokens(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, index, attend)
            if x is None:
                return None
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] to [..., vocab_size]."""
        return self.lm_head(hidden)


def initialise(drafter: Drafter) -> None:
    """Random weights as Llama has them, N(0, initializer_range); zero biases."""
    for module in drafter.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=drafter.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _rotary_table(config: PretrainedConfig, max_positions: int) -> Tensor:
    """[2, max_positions, D]: cos, and sin with its first half negated."""
    inv_freq, scaling = rotary_frequencies(config)
    angles = torch.outer(torch.arange(max_positions).float(), inv_freq)
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
