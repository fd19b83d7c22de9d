"""Sampled tokens of an engine, and the distribution that they should have."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.support.engines import ENGINE_ARGS, Job
from tests.support.processes import nothing, vllm_process


@dataclass(frozen=True)
class Sampled:
    """What came of a job.

    Attributes:
        num_drafts: how often a request's draft was verified.
        accepted: how often its first token was accepted, its second, and so on.
    """

    token_ids: list[list[int]]
    num_drafts: int
    num_draft_tokens: int
    accepted: list[int]


class SamplingEngine:
    """An engine in a process of its own, whose noise begins anew with every job."""

    def __init__(self, processes: ProcessPoolExecutor) -> None:
        self._processes = processes

    def sample(
        self,
        job: Job,
        altered: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Sampled:
        """Runs a job, within ``altered()``, a function of some module's top level."""
        return self._processes.submit(_sample, job, altered).result()


@contextmanager
def sampling_engine(
    engine_args: dict[str, Any], prepare: Callable[[], None] = nothing
) -> Iterator[SamplingEngine]:
    """
    Args:
        prepare: what its process does first.
    """
    with vllm_process(prepare) as process:
        process.submit(_start, ENGINE_ARGS | engine_args).result()
        yield SamplingEngine(process)


_llm: Any


def _start(engine_args: dict[str, Any]) -> None:
    global _llm
    from vllm import LLM

    _llm = LLM(**engine_args, disable_log_stats=False)


def _sample(job: Job, altered: Callable[[], AbstractContextManager]) -> Sampled:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def params(settings: dict[str, Any]) -> Any:
        settings = {"detokenize": False, "ignore_eos": True, **settings}
        if regex := settings.pop("regex", None):
            settings["structured_outputs"] = StructuredOutputsParams(regex=regex)
        return SamplingParams(**settings)

    _restart_noise()
    before = _verified()
    sampling = job.sampling
    with altered():
        outputs = _llm.generate(
            [{"prompt_token_ids": prompt} for prompt in job.prompts],
            [params(each) for each in sampling]
            if isinstance(sampling, list)
            else params(sampling),
            use_tqdm=False,
        )
    counts = [now - then for now, then in zip(_verified(), before, strict=True)]
    token_ids = [list(output.outputs[0].token_ids) for output in outputs]
    return Sampled(token_ids, counts[0], counts[1], counts[2:])


def _restart_noise() -> None:
    torch.manual_seed(0)
    runner = _llm.llm_engine.model_executor.driver_worker.worker.model_runner
    if hasattr(runner, "speculator"):  # model runner V2
        drafter = runner.speculator
    else:
        drafter = runner.drafter._drafting
    drafter = getattr(drafter, "_core", drafter)
    if generator := getattr(drafter, "_generator", None):
        generator.manual_seed(0)


def _verified() -> list[int]:
    """Drafts so far, their tokens, and accepted ones by position."""
    prefix = "vllm:spec_decode_num_"
    found = {metric.name.removeprefix(prefix): metric for metric in _llm.get_metrics()}
    counts = [found[name].value for name in ("drafts", "draft_tokens")]
    return counts + found["accepted_tokens_per_pos"].values


@torch.inference_mode()
def next_logits(
    model: PreTrainedModel, prompt: list[int], num_tokens: int
) -> list[Tensor]:
    """Logits after a prompt and every possible output of 0 to ``num_tokens`` - 1.

    Returns:
        float64 [V], [V, V], ..., the last dimension being the next token.
    """
    size = model.config.vocab_size
    outputs = torch.cartesian_prod(*[torch.arange(size)] * (num_tokens - 1))
    outputs = outputs.reshape(-1, num_tokens - 1)
    sequences = torch.cat([torch.tensor(prompt).expand(len(outputs), -1), outputs], 1)
    logits = model.double()(sequences).logits[:, len(prompt) - 1 :]
    # Outputs that begin alike follow each other.
    return [
        logits[:: size ** (num_tokens - 1 - n), n].reshape([size] * (n + 1))
        for n in range(num_tokens)
    ]


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """What vLLM samples from: of the likeliest tokens, as few as reach ``top_p``.

    Before that, tokens go that have less than ``min_p`` of what the likeliest has.
    """
    kept = (logits / temperature).softmax(-1)
    if min_p > 0:
        kept = _cut(kept, kept / kept.amax(-1, keepdim=True) - min_p)
    if top_p < 1:
        ordered, tokens = kept.sort(-1, descending=True)
        likelier = ordered.cumsum(-1) - ordered
        kept = _cut(kept, top_p - torch.zeros_like(kept).scatter(-1, tokens, likelier))
    return kept


def _cut(x: Tensor, merits: Tensor) -> Tensor:
    """Probabilities without the entries whose merit is negative."""
    nearest = merits[x > 0].abs().min()
    assert nearest > 1e-6, f"float32 may cut elsewhere: {nearest}"
    kept = x.masked_fill(merits < 0, 0)
    return kept / kept.sum(-1, keepdim=True)


def joint(conditionals: list[Tensor]) -> Tensor:
    """Of the first token, the second after it and so on: the tokens together."""
    return reduce(lambda before, each: before[..., None] * each, conditionals)


def p_value(outputs: list[list[int]], expected: Tensor) -> float:
    """Of Pearson's chi-square test; 0 where a token came that has no probability.

    Args:
        outputs: token sequences, independent of each other.
        expected: [V, ..., V] float64, their distribution. Cells with fewer than 5
            expected are taken together.
    """
    cells = torch.zeros(len(outputs), dtype=torch.int64)
    for tokens in torch.tensor(outputs).T:
        cells = cells * expected.shape[-1] + tokens
    counts = cells.bincount(minlength=expected.numel()).double()
    expected, order = (expected.flatten() * len(outputs)).sort()
    counts = counts[order]
    if counts[expected == 0].any():
        return 0.0
    counts, expected = counts[expected > 0], expected[expected > 0]
    num_pooled = int(max((expected < 5).sum(), (expected.cumsum(0) < 5).sum() + 1))
    counts, expected = (
        torch.cat([x[:num_pooled].sum()[None], x[num_pooled:]])
        for x in (counts, expected)
    )
    assert len(counts) > 1, "one cell tells nothing"
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def write_tokenizer(folder: Path, letters: str) -> None:
    """A tokenizer of letters, one token each, and then one that ends an output."""
    end = "</s>"
    tokens = {token: i for i, token in enumerate([*letters, end])}
    tokenizer = Tokenizer(WordLevel(tokens, unk_token=end))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(
        folder
    )
