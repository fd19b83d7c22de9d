"""Reference decoding: a target of ``transformers`` that verifies and drafts.

A round emits what it verified and the bonus token after it. *Sequential*: mask tokens
draft, then the target verifies. *Parallel*: one pass verifies the last round's drafts
and, for each number of them that may be accepted, drafts what would come after.

Letters in shapes: B sequences, T new tokens.
"""

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.flexdraft.modeling import FlexDraft
from vllm_budgetdraft.flexdraft.pages import PageSelector
from vllm_budgetdraft.flexdraft.switch import MODES, Mode
from vllm_budgetdraft.flexdraft.target_pass import ContextCache, TargetPass
from vllm_budgetdraft.proposer.draft_length import confident_lengths
from vllm_budgetdraft.proposer.picking import Drafts

#: Rounds of each mode before the faster one is chosen.
TRIALS = 5


@dataclass
class ModeSwitch:
    """Picks the mode whose rounds took less time at a batch size, on this machine."""

    seconds: dict[tuple[int, Mode], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def choose(self, batch_size: int) -> Mode:
        for mode in MODES:
            if len(self.seconds[batch_size, mode]) < TRIALS:
                return mode
        return min(MODES, key=lambda mode: self.median(batch_size, mode))

    def median(self, batch_size: int, mode: Mode) -> float:
        """Seconds of a round."""
        return statistics.median(self.seconds[batch_size, mode])


class FlexDecoder:
    """Greedy decoding and sampling of batches; outputs are the target's own.

    Attributes:
        accepted: drafts accepted in each round, by sequence, of the last ``generate``.
        switch: times of rounds, kept from call to call.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: FlexDraft,
        *,
        num_drafts: int,
        selector: PageSelector | None = None,
        kv_budget: int | None = None,
        confidence_threshold: float = 0.01,
    ) -> None:
        """
        Args:
            num_drafts: k.
            selector: with ``kv_budget``, what mask tokens see of prompts; all of them
                without.
            confidence_threshold: a draft ends where the product of its tokens'
                confidences falls below, each the largest probability of its place
                (FlexDraft's verification length).
        """
        self._drafter, self._device = drafter, target.device
        self._pass = TargetPass(target, drafter, num_drafts)
        self._parts = self._pass.parts
        self._num_drafts, self._threshold = num_drafts, confidence_threshold
        self._selector, self._budget = selector, kv_budget
        self.switch = ModeSwitch()
        self.accepted: list[list[int]] = []

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        mode: Mode | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> list[list[int]]:
        """New tokens of each prompt.

        Args:
            mode: "auto" is what ``switch`` chooses; sequential, if the drafter cannot
                draft blind.

        Raises:
            ConfigurationError: mode "parallel" of such a drafter.
        """
        if not self._drafter.drafts_blind:
            if mode == "parallel":
                raise ConfigurationError(
                    "mode='parallel': this drafter's mask tokens must know the bonus "
                    "token, which verification has yet to find; use 'sequential', or "
                    "train with blind_fraction"
                )
            mode = "sequential"
        device = self._device
        generator = torch.Generator(device).manual_seed(seed)
        # The last round may emit more than was asked for, and is repeated by rows that
        # wait for others.
        longest = max(map(len, prompts)) + max_new_tokens + 2 * self._num_drafts + 2
        cache = self.new_cache(len(prompts), longest)
        for row, prompt in enumerate(prompts):
            self.read(cache.row(row), torch.tensor(prompt[:-1], device=device))
        written: list[list[int]] = [[] for _ in prompts]
        self.accepted = [[] for _ in prompts]
        bonus = torch.tensor([prompt[-1] for prompt in prompts], device=device)
        drafts: Drafts | None = None
        while min(map(len, written)) < max_new_tokens:
            chosen = self.switch.choose(len(prompts)) if mode == "auto" else mode
            begin = time.perf_counter()
            if drafts is None:
                drafts = self.draft(cache, bonus, temperature, generator)
            tokens, accepted, bonus, drafts = self._verify(
                cache, bonus, drafts, temperature, generator, chosen == "parallel"
            )
            counts, following = accepted.tolist(), bonus.tolist()
            self.switch.seconds[len(prompts), chosen].append(
                time.perf_counter() - begin
            )
            for row, count in enumerate(counts):
                if len(written[row]) < max_new_tokens:
                    written[row] += [*tokens[row, :count].tolist(), following[row]]
                    self.accepted[row].append(count)
                else:  # goes along, and stays where it is, until all are at their end
                    cache.lengths[row] -= count + 1
        return [tokens[:max_new_tokens] for tokens in written]

    def new_cache(self, batch_size: int, num_cells: int) -> ContextCache:
        """Room for ``num_cells`` tokens of each sequence."""
        return self._pass.new_cache(batch_size, num_cells)

    @torch.inference_mode()
    def read(
        self, cache: ContextCache, tokens: Tensor, kv_budget: int | None = None
    ) -> None:
        """Reads a prompt [T] into the cache of one sequence; returns what masks see."""
        self.extend(cache, tokens)
        budget = self._budget if kv_budget is None else kv_budget
        if self._selector is None or budget is None or budget >= len(tokens):
            return
        keys = cache.keys[self._pass.split :, :, :, : len(tokens)]
        visible = self._selector.visible(keys, budget)
        cache.hidden_cells[..., : len(tokens)] = ~visible

    @torch.inference_mode()
    def extend(self, cache: ContextCache, tokens: Tensor) -> None:
        """The next tokens [T] into the cache of one sequence."""
        if len(tokens):
            self._pass(cache, tokens[None])
            cache.lengths += len(tokens)

    @torch.inference_mode()
    def draft(
        self,
        cache: ContextCache,
        bonus: Tensor,
        temperature: float,
        generator: torch.Generator,
    ) -> Drafts:
        """After the bonus tokens [B], which are not in the cache."""
        none = bonus[:, None][:, :0]
        known = self._parts.embed(bonus)[:, None]
        _, masks = self._pass(cache, none, cache.lengths[:, None], known)
        return self._pick(masks[:, 0], bonus, temperature, generator)

    def _verify(
        self,
        cache: ContextCache,
        bonus: Tensor,
        drafts: Drafts,
        temperature: float,
        generator: torch.Generator,
        is_parallel: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Drafts | None]:
        """One pass of the target over the bonus tokens [B] and the drafts after them.

        Returns:
            The drafts [B, n], how many are accepted [B], the bonus tokens after them
            [B], and, of a parallel round, the drafts after these.
        """
        lengths = self._lengths(drafts)
        tokens = drafts.tokens[:, : int(lengths.max())]
        fed = torch.cat([bonus[:, None], tokens], 1)
        starts = unknown = None
        if is_parallel:
            # Group i takes i drafts for accepted: its bonus token stands after them.
            groups = torch.arange(fed.shape[1], device=fed.device)
            starts = cache.lengths[:, None] + 1 + groups
            unknown = self._drafter.unknown_bonus(*fed.shape)  # a group for each token
        hidden, masks = self._pass(cache, fed, starts, unknown)
        accepted, following = self._accept(
            hidden, drafts, lengths, temperature, generator
        )
        cache.lengths += accepted + 1
        if not is_parallel:
            return tokens, accepted, following, None
        rows = torch.arange(len(fed), device=fed.device)
        found = self._pick(masks[rows, accepted], following, temperature, generator)
        return tokens, accepted, following, found

    def _pick(
        self,
        masks: Tensor,
        bonus: Tensor,
        temperature: float,
        generator: torch.Generator,
    ) -> Drafts:
        """Drafts from mask tokens [B, k + 1, hidden_size]."""

        picked: list[Tensor] = []
        chances: list[Tensor] = []

        def pick(_: int, logits: Tensor) -> Tensor:
            chances.append((logits.float() / (temperature or 1)).softmax(-1))
            tokens = logits.argmax(-1)
            if temperature:
                drawn = torch.multinomial(chances[-1], 1, generator=generator)
                tokens = drawn[:, 0]
            picked.append(tokens)
            return tokens

        self._drafter.draft(masks[:, 1:], self._parts, bonus, pick)
        tokens, probabilities = torch.stack(picked, 1), torch.stack(chances, 1)
        drawn_from = probabilities if temperature else None
        return Drafts(tokens, probabilities.amax(-1), drawn_from)

    def _lengths(self, drafts: Drafts) -> Tensor:
        """[B] int64, how many drafts are worth verifying: 1 to k."""
        return confident_lengths(drafts.confidences, self._threshold).clamp_min(1)

    def _accept(
        self,
        hidden: Tensor,
        drafts: Drafts,
        lengths: Tensor,
        temperature: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """How many drafts are accepted, and the tokens after them: [B] each.

        With a temperature this is speculative sampling
        (https://arxiv.org/abs/2211.17192).

        Args:
            hidden: [B, n + 1, hidden_size], of the bonus token and n drafts.
            lengths: [B] int64, how many drafts of each are verified, at most n.
        """
        logits = F.linear(hidden, self._parts.head).float()
        count = hidden.shape[1] - 1
        tokens = drafts.tokens[:, :count]
        places = torch.arange(count, device=hidden.device)
        rows = torch.arange(len(hidden), device=hidden.device)
        if drafts.probabilities is None:
            chosen = logits.argmax(-1)
            fits = (tokens == chosen[:, :-1]) & (places < lengths[:, None])
            accepted = fits.cumprod(-1).sum(-1)
            return accepted, chosen[rows, accepted]
        p, q = (logits / temperature).softmax(-1), drafts.probabilities[:, :count]
        index = tokens[..., None]
        chances = (p[:, :-1].gather(-1, index) / q.gather(-1, index)).squeeze(-1)
        draws = torch.rand(chances.shape, generator=generator, device=hidden.device)
        fits = (draws < chances) & (places < lengths[:, None])
        accepted = fits.cumprod(-1).sum(-1)
        # After a refused draft, what q gave too little of; p after the last one.
        was_refused = (accepted < lengths)[:, None]
        refused = q[rows, accepted.clamp_max(count - 1)] * was_refused
        left = (p[rows, accepted] - refused).clamp_min(0)
        return accepted, torch.multinomial(left, 1, generator=generator)[:, 0]
