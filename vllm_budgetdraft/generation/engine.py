"""The target in vLLM, which writes."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_budgetdraft.errors import ConfigurationError


@dataclass(frozen=True)
class Written:
    """What the target wrote after one prompt.

    Attributes:
        has_ended: whether it ended by itself.
        top: columns of the likeliest tokens of each position, if they are stored.
    """

    token_ids: list[int]
    has_ended: bool
    top: dict[str, list[list[Any]]]

    def row(self, prompt: list[int], temperature: float) -> dict[str, Any]:
        """As training reads it."""
        return {
            "prompt": prompt,
            "continuation": self.token_ids,
            "temperature": temperature,
            **self.top,
        }


#: Of prompts, and of the temperature and the seed of each.
Write = Callable[[list[list[int]], list[float], list[int]], list[Written]]


class Engine:
    """vLLM's, for one run."""

    def __init__(self, args: Namespace, max_model_len: int, *, draws: bool) -> None:
        """
        Args:
            draws: whether anything is written at a temperature above 0.

        Raises:
            ConfigurationError: vLLM does not start.
        """
        from vllm_budgetdraft.comparison.measure import prepare_environment

        prepare_environment()
        from vllm import LLM

        self._count, self._new_tokens = args.top_logprobs, args.new_tokens
        engine_args = {
            "max_model_len": max_model_len,
            "max_num_seqs": args.max_num_seqs,
            "enable_prefix_caching": False,
            "max_logprobs": max(1, self._count),
            **(_of_whole_prompts(max_model_len) if draws else {}),
            **args.engine_args,
        }
        try:
            self._llm = LLM(args.target, **engine_args)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"vLLM cannot serve {args.target!r} so: {error}"
            ) from error

    def write(
        self, prompts: list[list[int]], temperatures: list[float], seeds: list[int]
    ) -> list[Written]:
        """What follows each prompt; seeds matter where the temperature is above 0."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=temperature,
                max_tokens=self._new_tokens,
                logprobs=self._count or None,
                detokenize=False,
                seed=seed if temperature else None,
            )
            for temperature, seed in zip(temperatures, seeds, strict=True)
        ]
        found = []
        for result in self._generate(prompts, params):
            output = result.outputs[0]
            top = _likeliest(output.logprobs, self._count) if self._count else {}
            has_ended = output.finish_reason == "stop"
            found.append(Written(list(output.token_ids), has_ended, top))
        return found

    def read(self, prompts: list[list[int]]) -> list[dict[str, list[list[Any]]]]:
        """The likeliest tokens at each of the last ``new_tokens`` of each prompt."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, prompt_logprobs=self._count, detokenize=False
        )
        results = self._generate(prompts, params)
        return [
            _likeliest(result.prompt_logprobs[-self._new_tokens :], self._count)
            for result in results
        ]

    def _generate(self, prompts: list[list[int]], params: Any) -> Any:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        try:
            return self._llm.generate(inputs, params)
        except KeyboardInterrupt:
            # What its process has to say comes before what this one does.
            self._llm.llm_engine.engine_core.shutdown()
            raise


def _of_whole_prompts(longest: int) -> dict[str, Any]:
    """On a CPU, a seeded request whose prompt is read in parts ends vLLM's engine."""
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, longest),
    }


def _likeliest(positions: Any, count: int) -> dict[str, list[list[Any]]]:
    """Of vLLM's dictionaries, which also have the token that came next."""
    ids, logprobs = [], []
    for by_token in positions:
        ranked = sorted(by_token.items(), key=lambda item: item[1].rank)[:count]
        ids.append([token for token, _ in ranked])
        logprobs.append([each.logprob for _, each in ranked])
    return {"top_ids": ids, "top_logprobs": logprobs}
