"""The drafter: one Llama-family decoder for training and for serving.

Where tokens stand and where keys and values live is not its business. Each layer hands
its queries, keys and values to ``attend``, which norms and rotates them, stores what it
wants and returns the attention: over pages when drafting, over the prompt when
ingesting, over views when training.

Letters in shapes: B sequences, T tokens, H query heads, G KV heads, D head size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from budgetdraft_kernels.reference_projections import Norms, linear_by, normed_heads
from vllm_budgetdraft.drafter.configuration import head_dim, rotary_frequencies

#: ``attend(layer, qkv [B, T, H + 2 * G, D], norms)``, the query, key and value heads of
#: each token, and norms that go over them first, if any, returns [B, T, H, D], or None
#: where the layer's output has no reader.
Attend = Callable[[int, Tensor, Norms], Tensor | None]
#: ``reference.linear``, or its like for packed matrices or of one kernel, unchecked.
Linear = Callable[..., Tensor]
PLAIN: Linear = partial(linear_by, F.linear)


class AttentionProjections(nn.Module):
    """The matrices of one attention layer; matrices that share their input are fused.

    Weights are parameters of the layer itself, for the calls of a module for each would
    be a measurable part of a small drafter's time on a CPU.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        #: ``F.linear``, or its like for packed matrices.
        self.multiply: Any = F.linear
        self.head_dim = head_dim(config)
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        self.eps = config.rms_norm_eps
        hidden = config.hidden_size
        q_rows, kv_rows = (heads * self.head_dim for heads in self.heads)
        attention_bias = getattr(config, "attention_bias", False)
        # Qwen2 biases its q, k and v by definition, with no key in its config.
        qkv_bias = attention_bias or config.model_type == "qwen2"
        self.qkv_weight = new_matrix(q_rows + 2 * kv_rows, hidden)
        self.qkv_bias = _bias(q_rows + 2 * kv_rows, qkv_bias)
        self.has_qk_norms = config.model_type == "qwen3"
        if self.has_qk_norms:
            self.q_norm, self.k_norm = new_norm(self.head_dim), new_norm(self.head_dim)
        self.o_weight = new_matrix(hidden, q_rows)
        self.o_bias = _bias(hidden, attention_bias)

    @property
    def norms(self) -> Norms:
        """Of query and key heads."""
        return (self.q_norm, self.k_norm, self.eps) if self.has_qk_norms else None

    def project(self, h: Tensor) -> Tensor:
        """Normed hidden states [..., hidden_size] to heads [..., H + 2 * G, D]."""
        qkv = self.multiply(h, self.qkv_weight, self.qkv_bias)
        heads: Tensor = qkv.unflatten(-1, (-1, self.head_dim))
        return normed_heads(heads, self.heads[1], self.norms)

    def output(self, attended: Tensor) -> Tensor:
        """[..., H, D] to [..., hidden_size]."""
        out: Tensor = self.multiply(attended.flatten(-2), self.o_weight, self.o_bias)
        return out


class DecoderLayer(AttentionProjections):
    """Attention and gated MLP, with their norms."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.linear = PLAIN
        hidden, inner = config.hidden_size, config.intermediate_size
        mlp_bias = getattr(config, "mlp_bias", False)
        self.input_norm = new_norm(hidden)
        self.mlp_norm = new_norm(hidden)
        self.gate_up_weight = new_matrix(2 * inner, hidden)
        self.gate_up_bias = _bias(2 * inner, mlp_bias)
        self.down_weight = new_matrix(hidden, inner)
        self.down_bias = _bias(hidden, mlp_bias)

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor | None:
        linear, norm = self.linear, self.input_norm
        qkv = linear(x, self.qkv_weight, self.qkv_bias, norm=norm, eps=self.eps)
        return self.after(attend, layer, qkv, x)

    def after(
        self, attend: Attend, layer: int, qkv: Tensor, x: Tensor
    ) -> Tensor | None:
        """What follows the first product: attention, and the MLP.

        Args:
            qkv: [..., (H + 2 * G) * D].
            x: [..., hidden_size], to which both are added.
        """
        linear = self.linear
        attended = attend(layer, qkv.unflatten(-1, (-1, self.head_dim)), self.norms)
        if attended is None:
            return None
        attended = attended.flatten(-2)
        x = linear(attended, self.o_weight, self.o_bias, residual=x)

        weight, bias, norm = self.gate_up_weight, self.gate_up_bias, self.mlp_norm
        h = linear(x, weight, bias, norm=norm, eps=self.eps, gated=True)
        return linear(h, self.down_weight, self.down_bias, residual=x)


def new_matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns))


def _bias(size: int, used: bool) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(size)) if used else None


def new_norm(size: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(size))


class Drafter(nn.Module):
    """A Llama-family decoder over tokens and explicit positions.

    A sliding window that the config names is not applied: what a token sees is up to
    ``attend``.

    Attributes:
        draft_ids: [draft_vocab_size] int64, all different, the token of each logit;
            None if these are all ids below ``draft_vocab_size``.
    """

    def __init__(self, config: PretrainedConfig, max_positions: int) -> None:
        """
        Args:
            max_positions: rows of the rotary table; positions stay below.
        """
        super().__init__()
        self.linear = PLAIN  # of the output matrix
        self.is_packed = False
        self.config = config
        self.num_layers = config.num_hidden_layers
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = head_dim(config)
        self.rotary_table: Tensor
        self.draft_ids: Tensor | None
        self.register_buffer("draft_ids", None, persistent=False)
        self.draft_vocab_size = config.vocab_size
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nn.Parameter(torch.empty(shape))
        self.layers = nn.ModuleList(
            DecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Parameter(torch.empty(shape))
        self.register_buffer(
            "rotary_table", rotary_table(config, max_positions), persistent=False
        )

    def multiply_by(self, linear: Linear) -> None:
        """Has the layers do so; the output matrix stays with PyTorch."""
        layers: Any = self.layers
        for layer in layers:
            layer.linear = linear

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of ``positions`` [...], as ``rotate`` takes them: [..., D]."""
        cos, sin = self.rotary_table[:, positions]
        return cos, sin

    @property
    def rotary_rows(self) -> tuple[Tensor, Tensor]:
        """cos and sin of every position of the table, [max_positions, D] each."""
        cos, sin = self.rotary_table
        return cos, sin

    def forward(
        self, tokens: Tensor, attend: Attend, *, checkpoints: bool = False
    ) -> Tensor | None:
        """Final normed hidden states.

        Args:
            tokens: [B, T] int64.
            attend: see ``Attend``; layers after one that it answers with None do not
                run.
            checkpoints: whether each layer runs again for its gradients, and keeps no
                activations until then; ``attend`` must then have no side effects.

        Returns:
            [B, T, hidden_size], or None if ``attend`` ended the pass.
        """
        x = F.embedding(tokens, self.embedding)
        for index, layer in enumerate(self.layers):
            if checkpoints:
                x = checkpoint(layer, x, index, attend, use_reentrant=False)
            else:
                x = layer(x, index, attend)
            if x is None:
                return None
        shape, eps = self.norm.shape, self.config.rms_norm_eps
        return torch.rms_norm(x, shape, self.norm, eps)

    def step(self, tokens: Tensor, features: Tensor | None, attend: Attend) -> Any:
        """What a drafter that reads features is fed and says: see ``FeatureDrafter``.

        Returns:
            Final normed hidden states, and None; None if ``attend`` ended the pass.
        """
        hidden = self(tokens, attend)
        return None if hidden is None else (hidden, None)

    @property
    def head(self) -> Tensor:
        """[vocab_size, hidden_size], the output matrix.

        [draft_vocab_size, hidden_size] after ``keep_rows``.
        """
        return self.embedding if self.lm_head is None else self.lm_head

    def keep_rows(self, draft_ids: Tensor) -> None:
        """Keeps the rows of some tokens of the output matrix, for drafting alone.

        Args:
            draft_ids: [n] int64, sorted.
        """
        self.lm_head = nn.Parameter(self.head.detach()[draft_ids])
        self.draft_ids, self.draft_vocab_size = draft_ids, len(draft_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] to [..., draft_vocab_size]."""
        logits = self.linear(hidden, self.head)
        return logits[..., : self.draft_vocab_size]


def initialise(drafter: Drafter) -> None:
    """Random matrices as Llama has them, N(0, initializer_range)."""
    for parameter in drafter.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=drafter.config.initializer_range)


def rotary_table(config: PretrainedConfig, max_positions: int) -> Tensor:
    """[2, max_positions, D]: cos, and sin with its first half negated."""
    inv_freq, scaling = rotary_frequencies(config)
    angles = torch.outer(torch.arange(max_positions).float(), inv_freq)
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
