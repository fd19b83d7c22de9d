"""How much of its drafts a target accepts, measured with the real draft loop.

The drafts are those of serving, from a ``DraftProposer``; the target is a plain
``transformers`` model on the same tokens, and verifies as vLLM does.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vllm_budgetdraft.config import parse_speculative_config
from vllm_budgetdraft.errors import ConfigurationError
from vllm_budgetdraft.evaluation.target_reader import TargetReader
from vllm_budgetdraft.proposer.building import build_proposer
from vllm_budgetdraft.proposer.draft_loop import FIRST_WIDTH
from vllm_budgetdraft.proposer.memory import resolve_dtype
from vllm_budgetdraft.proposer.picking import Drafts


@dataclass(frozen=True)
class AcceptanceRow:
    """Of one context length, budget and temperature.

    Attributes:
        context: tokens of each prompt, or the name of prompts of other lengths.
        acceptance_length: tokens that a step emits, the bonus token among them.
        acceptance_rate: accepted drafts over all drafts.
    """

    context: int | str
    budget: int
    temperature: float
    acceptance_length: float
    acceptance_rate: float


class Verifier(Protocol):
    def __call__(self, drafts: Tensor, probabilities: Tensor | None) -> tuple[int, int]:
        """How many drafts [k] are accepted, and the token after them.

        Args:
            probabilities: [k, V], what the drafts were drawn from; None if greedily.
        """


class Drafter(Protocol):
    """What of a ``DraftProposer`` is used here; its slot is 0."""

    @property
    def device(self) -> torch.device: ...

    def start_request(self, slot: int, kv_budget: int) -> None: ...

    def ingest(self, slot: int, tokens: Tensor, kv_budget: int) -> None: ...

    def draft(
        self,
        slots: Tensor,
        tokens: Tensor,
        ends: Tensor,
        num_drafts: int | None = None,
        temperatures: Tensor | None = None,
    ) -> Drafts: ...

    def release_request(self, slot: int) -> None: ...


class GreedyVerifier:
    """Accepts what the target wrote when it chose the likeliest tokens."""

    def __init__(self, written: list[int]) -> None:
        """
        Args:
            written: what follows the prompt and its first new token, and as many more
                as may be drafted.
        """
        self._written = written

    def __call__(self, drafts: Tensor, probabilities: Tensor | None) -> tuple[int, int]:
        accepted = 0
        for draft, token in zip(drafts.tolist(), self._written, strict=False):
            if draft != token:
                break
            accepted += 1
        following = self._written[accepted]
        self._written = self._written[accepted + 1 :]
        return accepted, following


class SamplingVerifier:
    """Speculative sampling (https://arxiv.org/abs/2211.17192) at a temperature."""

    def __init__(
        self,
        target: PreTrainedModel,
        cache: DynamicCache,
        last_token: int,
        temperature: float,
        seed: int,
    ) -> None:
        """
        Args:
            cache: the target's, of all of the context but its last token; it grows.
        """
        self._target, self._temperature = target, temperature
        self._generator = torch.Generator(target.device).manual_seed(seed)
        self._cache = cache
        self._last = torch.tensor([last_token], device=target.device)

    def __call__(self, drafts: Tensor, probabilities: Tensor | None) -> tuple[int, int]:
        assert probabilities is not None
        fed = torch.cat([self._last, drafts])[None]
        logits = self._target(fed, past_key_values=self._cache, use_cache=True).logits
        p = (logits[0].float() / self._temperature).softmax(-1)
        chances = (p[:-1] / probabilities).gather(-1, drafts[:, None]).squeeze(-1)
        draws = torch.rand(len(drafts), generator=self._generator, device=drafts.device)
        accepted = int((draws < chances).cumprod(0).sum())
        left = p[accepted]
        if accepted < len(drafts):
            left = (left - probabilities[accepted]).clamp_min(0)
        following = torch.multinomial(left, 1, generator=self._generator)
        if accepted < len(drafts):
            self._cache.crop(accepted - len(drafts))  # takes tokens away
        self._last = following
        return accepted, int(following)


def speculate(
    proposer: Drafter,
    context: list[int],
    verify: Verifier,
    *,
    new_tokens: int,
    kv_budget: int,
    temperature: float,
    end_tokens: Collection[int] = (),
) -> list[int]:
    """Drafts accepted in each step, until the answer has its number of tokens, or ends.

    Args:
        context: the prompt and the first new token.
        kv_budget: of the drafter's cache, at most the proposer's.
    """
    device = proposer.device
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    temperatures = None if not temperature else slots + float(temperature)
    read = torch.tensor(context[:-FIRST_WIDTH], device=device)
    proposer.start_request(0, kv_budget)
    proposer.ingest(0, read, kv_budget)
    context, end = list(context), len(context) + new_tokens
    steps = []
    while len(context) < end:
        last = torch.tensor([context[-FIRST_WIDTH:]], device=device)
        drafts = proposer.draft(slots, last, slots + len(context), None, temperatures)
        tokens, q = drafts.tokens[0], drafts.probabilities
        accepted, following = verify(tokens, None if q is None else q[0])
        emitted = [*tokens[:accepted].tolist(), following]
        context += emitted
        steps.append(accepted)
        if not set(end_tokens).isdisjoint(emitted):
            break
    proposer.release_request(0)
    return steps


class HeldOutAcceptance:
    """Measures drafters of one target on the same held-out prompts.

    Attributes:
        settings: of the drafters' ``BudgetDraftConfig``; may be changed in between.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        prompts: Mapping[int | str, list[list[int]]],
        *,
        budgets: list[int],
        temperatures: list[float],
        new_tokens: int,
        settings: dict[str, Any],
        end_tokens: Collection[int] = (),
        seed: int = 0,
    ) -> None:
        """
        Args:
            prompts: token ids, by the tokens of each, or by name if lengths differ.
            new_tokens: after each prompt, at most.
            settings: of a ``BudgetDraftConfig``, less model and kv_budget.
            end_tokens: what ends an answer.
        """
        self._target, self.settings = target, dict(settings)
        self._budgets, self._temperatures = sorted(budgets), temperatures
        self._new_tokens, self._seed = new_tokens, seed
        self._num_drafts = settings["num_speculative_tokens"]
        self._prompts, self._ends = prompts, end_tokens
        longest = max(len(each) for some in prompts.values() for each in some)
        self._longest = longest + new_tokens + self._num_drafts + 2
        self._written: dict[int | str, list[list[int]]] = {}

    def measure(self, drafter: Path) -> dict[str, float]:
        """Of a drafter's folder: ``acceptance_length``, and the same by case.

        The mean is geometric, so that each case counts alike.
        """
        rows = self.rows(drafter)
        found = {
            case_name(row.context, row.budget, row.temperature): row.acceptance_length
            for row in rows
        }
        lengths = torch.tensor([row.acceptance_length for row in rows])
        return {"acceptance_length": lengths.log().mean().exp().item(), **found}

    @torch.no_grad()
    def rows(self, drafter: Path) -> list[AcceptanceRow]:
        """Of every context, budget and temperature."""
        proposer = self._proposer(drafter)
        steps: dict[tuple[int | str, int, float], list[int]] = {
            (context, budget, temperature): []
            for context in self._prompts
            for budget in self._budgets
            for temperature in self._temperatures
        }
        for context, prompts in self._prompts.items():
            for prompt, written in zip(prompts, self.answers(context), strict=True):
                cache = DynamicCache()
                if any(self._temperatures):
                    tokens = torch.tensor([prompt], device=self._target.device)
                    self._target.base_model(tokens, past_key_values=cache)
                for budget in self._budgets:
                    for temperature in self._temperatures:
                        steps[context, budget, temperature] += self._steps(
                            proposer, prompt, written, cache, budget, temperature
                        )
        return [self._row(*case, accepted) for case, accepted in steps.items()]

    def _row(
        self, context: int | str, budget: int, temperature: float, accepted: list[int]
    ) -> AcceptanceRow:
        # Where every answer is an end and nothing else, nothing is drafted.
        mean = sum(accepted) / max(1, len(accepted))
        return AcceptanceRow(
            context, budget, temperature, 1 + mean, mean / self._num_drafts
        )

    def _steps(
        self,
        proposer: Drafter,
        prompt: list[int],
        written: list[int],
        cache: DynamicCache,
        budget: int,
        temperature: float,
    ) -> list[int]:
        if written[0] in self._ends:
            return []
        verify: Verifier = GreedyVerifier(written[1:])
        if temperature:
            if more := cache.get_seq_length() - len(prompt):
                cache.crop(-more)
            verify = SamplingVerifier(
                self._target, cache, written[0], temperature, self._seed
            )
        return speculate(
            proposer,
            [*prompt, written[0]],
            verify,
            new_tokens=self._new_tokens,
            kv_budget=budget,
            temperature=temperature,
            end_tokens=self._ends,
        )

    def answers(self, context: int | str) -> list[list[int]]:
        """What the target writes after each prompt, and as much as may be drafted."""
        if context not in self._written:
            longest = self._new_tokens + self._num_drafts + 2
            self._written[context] = [
                greedy_continuation(self._target, prompt, longest)
                for prompt in self._prompts[context]
            ]
        return self._written[context]

    def _proposer(self, drafter: Path) -> Drafter:
        config = parse_speculative_config(
            self.settings | {"model": str(drafter), "kv_budget": self._budgets[-1]}
        )
        device = self._target.device
        dtype = resolve_dtype(config, device.type, self._target.dtype)
        embedding = self._target.get_input_embeddings().weight.detach()
        proposer = build_proposer(
            config,
            num_slots=1,
            max_model_len=self._longest,
            dtype=dtype,
            device=device,
            vocab_size=self._target.config.vocab_size,
            seed=self._seed,
            embedding=embedding.to(dtype),
        )
        if proposer.reads_features:
            return TargetReader(proposer, self._target)
        return proposer


def case_name(context: int | str, budget: int, temperature: float) -> str:
    """What an acceptance length is called in a log."""
    prompts = context if isinstance(context, str) else f"context_{context}"
    return f"acceptance_length_{prompts}_budget_{budget}_temperature_{temperature:g}"


def passages(texts: Any, length: int, count: int, seed: int) -> list[list[int]]:
    """Passages of rows with ``input_ids``, each of another row if there are enough.

    Raises:
        ConfigurationError: no row is as long.
    """
    rng = Random(f"{seed} passages of {length}")
    rows = [row for row in texts["input_ids"] if len(row) > length]
    if not rows:
        raise ConfigurationError(
            f"no held-out text has more than {length} tokens; give longer ones, or "
            "shorten eval_contexts"
        )
    rng.shuffle(rows)
    found = []
    for index in range(count):
        row = rows[index % len(rows)]
        start = rng.randrange(len(row) - length)
        found.append([int(token) for token in row[start : start + length]])
    return found


@torch.no_grad()
def greedy_continuation(
    target: PreTrainedModel, prompt: list[int], new_tokens: int
) -> list[int]:
    """The ``new_tokens`` likeliest next tokens; an end of text ends nothing."""
    cache = DynamicCache()
    fed = torch.tensor([prompt], device=target.device)
    written: list[int] = []
    while len(written) < new_tokens:
        output = target(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        fed = output.logits[:, -1].argmax(-1, keepdim=True)
        written.append(int(fed))
    return written
