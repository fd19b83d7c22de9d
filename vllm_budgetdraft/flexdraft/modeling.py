"""Mask tokens that go through a target's last layers and come out as a draft.

They have attention projections of their own, and see the target's keys and values and
each other; norms, MLPs, embeddings and output matrix are the target's, unchanged.

Letters in shapes: T mask tokens, H query heads, G KV heads, D head size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from vllm_budgetdraft.drafter.modeling import AttentionProjections, rotary_table
from vllm_budgetdraft.drafter.packing import multiply_packed

#: ``attend(layer, qkv [..., T, H + 2 * G, D])``, normed, returns [..., T, H, D].
Attend = Callable[[int, Tensor], Tensor]


class TargetParts:
    """What mask tokens use of a target, by the names that its modules have.

    ``transformers`` and vLLM have the same ones for the Llama family.
    """

    def __init__(
        self,
        model: Any,
        num_layers: int,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """
        Args:
            num_layers: how many of the last layers.
            gather: joins the logits [..., n] of all ranks, where each has a part of the
                output matrix.
        """
        self._gather = gather
        #: A copy of the output matrix that is faster on a CPU, see ``packing``.
        self.packed_head: Any = None
        decoder = model.model
        self.layers = list(decoder.layers)[-num_layers:]
        # As they are now: see ``parallel_round``.
        self.mlps = [layer.mlp.forward for layer in self.layers]
        self.norm: Callable[[Tensor], Tensor] = decoder.norm
        self.embed = decoder.embed_tokens
        self._vocab_size = model.config.vocab_size
        self._head = model.lm_head

    @property
    def head(self) -> Tensor:
        """[vocab_size, hidden_size]; vLLM's has rows of padding."""
        weight: Tensor = self._head.weight
        return weight[: self._vocab_size]

    def logits(self, hidden: Tensor) -> Tensor:
        """Of normed hidden states [..., hidden_size], [..., vocab_size]."""
        if self.packed_head is not None:
            return multiply_packed(hidden, self.packed_head, None)
        if self._gather is None:
            return F.linear(hidden, self.head)
        logits = self._gather(F.linear(hidden, self._head.weight))
        return logits[..., : self._vocab_size]


class FlexDraft(nn.Module):
    """Tuned attention of the last layers, one mask embedding, and calibration.

    A draft of k tokens takes k + 1 mask tokens: the first stands where the bonus token
    does, which is not known yet when masks go along with verification, and comes out
    unused. The others predict the tokens at their own positions. Calibration then adds
    W2 SiLU(W1 [embedding of the bonus token; hidden] + b1) + b2 to their logits.

    Two additions are ours. Where masks come after verification, they may know the bonus
    token from the start (``sees_bonus``): W0 times its embedding is added to the mask
    embedding, and nothing where it is unknown. And calibration may go by the token
    before each draft, which is the bonus token for the first alone (``chains``): then a
    draft is no longer blind to the one before it, at the cost of k small products, one
    after the other.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        num_layers: int,
        calibration_rank: int,
        sees_bonus: bool = False,
        drafts_blind: bool = True,
        chains: bool = False,
        max_positions: int,
    ) -> None:
        """
        Args:
            config: the target's.
            num_layers: how many of its last layers mask tokens go through.
            calibration_rank: width of the calibration; 0 for none.
            sees_bonus: whether mask tokens enter with the bonus token's embedding.
            drafts_blind: whether they were trained to draft without it, too, as they
                must along with verification.
            chains: whether calibration goes by the token before, not the bonus token.
            max_positions: rows of the rotary table; positions stay below.
        """
        super().__init__()
        self.config = config
        #: ``F.linear``, or its like for packed matrices, of the calibration.
        self.multiply: Any = F.linear
        #: Sums over ranks what each has of it; see ``sharding``.
        self.reduce: Callable[[Tensor], Tensor] = lambda x: x
        self.num_layers, self.calibration_rank = num_layers, calibration_rank
        self.sees_bonus, self.drafts_blind = sees_bonus, drafts_blind
        self.chains = chains
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        hidden = config.hidden_size
        self.mask_embedding = nn.Parameter(torch.empty(hidden))
        # Empty, and adding nothing, where it is not wanted; so is the calibration.
        self.bonus_in = nn.Parameter(torch.empty(hidden, hidden if sees_bonus else 0))
        self.layers = nn.ModuleList(
            AttentionProjections(config) for _ in range(num_layers)
        )
        self.calibration_in, self.calibration_out = (
            nn.Parameter(torch.empty(shape))
            for shape in (
                (calibration_rank, 2 * hidden),
                (config.vocab_size, calibration_rank),
            )
        )
        self.calibration_in_bias, self.calibration_out_bias = (
            nn.Parameter(torch.empty(size))
            for size in (calibration_rank, config.vocab_size * (calibration_rank > 0))
        )
        self.rotary_table: Tensor
        self.register_buffer(
            "rotary_table", rotary_table(config, max_positions), persistent=False
        )

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of ``positions`` [...], as ``rotate`` takes them: [..., D]."""
        cos, sin = self.rotary_table[:, positions]
        return cos, sin

    def masks(self, bonus: Tensor, block: int) -> Tensor:
        """Mask tokens as they enter the first of the layers.

        Args:
            bonus: embeddings of the bonus tokens, [..., hidden_size], 0 where they are
                unknown; of no account unless the drafter ``sees_bonus``.
            block: mask tokens of each.

        Returns:
            [..., block, hidden_size].
        """
        known = bonus[..., : self.bonus_in.shape[1]]
        x = self.mask_embedding + F.linear(known, self.bonus_in)
        return x[..., None, :].expand(*x.shape[:-1], block, -1)

    def unknown_bonus(self, *shape: int) -> Tensor:
        """What ``masks`` takes for bonus tokens that nobody knows yet."""
        return self.mask_embedding.new_zeros(*shape, len(self.mask_embedding))

    def forward(self, x: Tensor, target: TargetParts, attend: Attend) -> Tensor:
        """Mask tokens [..., T, hidden_size] to normed hidden states of that shape."""
        for index, layer in enumerate(target.layers):
            x = self.attended(index, x, layer, attend)
            x = x + target.mlps[index](layer.post_attention_layernorm(x))
        return target.norm(x)

    def attended(self, index: int, x: Tensor, layer: Any, attend: Attend) -> Tensor:
        """The first half of one of the layers; the MLP is the other."""
        own: Any = self.layers[index]
        qkv = own.project(layer.input_layernorm(x))
        return x + self.reduce(own.output(attend(index, qkv)))

    def features(self, hidden: Tensor, known: Tensor) -> Tensor:
        """SiLU(W1 [embedding of a known token; hidden] + b1), [..., calibration_rank].

        Args:
            hidden: [..., hidden_size].
            known: the token's embedding, of that shape.
        """
        inputs = torch.cat([known, hidden], -1)
        multiply = self.multiply
        return F.silu(multiply(inputs, self.calibration_in, self.calibration_in_bias))

    def correction(self, features: Tensor) -> Tensor:
        """W2 features + b2, [..., vocab_size], which is added to logits."""
        bias = self.calibration_out_bias if self.calibration_rank else None
        out: Tensor = self.multiply(features, self.calibration_out, bias)
        return out

    def draft(
        self,
        hidden: Tensor,
        target: TargetParts,
        bonus: Tensor,
        pick: Callable[[int, Tensor], Tensor],
    ) -> None:
        """Has drafts picked from hidden states [B, k, hidden_size], first to last.

        Args:
            bonus: [B] int64, the bonus tokens.
            pick: is told a place of k and its logits [B, vocab_size], and returns the
                tokens [B] that it picks.
        """
        logits = target.logits(hidden)
        known = target.embed(bonus)
        if not self.chains:
            features = self.features(hidden, known[:, None].expand_as(hidden))
            logits = logits + self.correction(features)
        for place in range(hidden.shape[1]):
            here = logits[:, place]
            if self.chains:
                features = self.features(hidden[:, place], known)
                here = here + self.correction(features)
            tokens = pick(place, here)
            if self.chains and place + 1 < hidden.shape[1]:
                known = target.embed(tokens)


@torch.no_grad()
def begin_as_target(drafter: FlexDraft, target: Any) -> None:
    """Weights to begin training with: the target's own projections, no calibration."""
    layers = list(target.model.layers)[-drafter.num_layers :]
    tuned: Any = drafter.layers
    for own, theirs in zip(tuned, layers, strict=True):
        attention = theirs.self_attn
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        own.qkv_weight.copy_(torch.cat([part.weight for part in parts]))
        own.o_weight.copy_(attention.o_proj.weight)
        if own.qkv_bias is not None:
            own.qkv_bias.copy_(torch.cat([part.bias for part in parts]))
        if own.o_bias is not None:
            own.o_bias.copy_(attention.o_proj.bias)
        if own.has_qk_norms:
            own.q_norm.copy_(attention.q_norm.weight)
            own.k_norm.copy_(attention.k_norm.weight)
    nn.init.normal_(drafter.mask_embedding, std=0.02)
    nn.init.zeros_(drafter.bonus_in)
    nn.init.normal_(drafter.calibration_in, std=drafter.config.initializer_range)
    nn.init.zeros_(drafter.calibration_out)
    nn.init.zeros_(drafter.calibration_in_bias)
    nn.init.zeros_(drafter.calibration_out_bias)
