"""``budgetdraft check``: whether a drafter fits a target, and what it would bring."""

import signal
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_budgetdraft.command_line import at_least, json_object
from vllm_budgetdraft.errors import ConfigurationError

if TYPE_CHECKING:
    from vllm_budgetdraft.comparison.prompts import Prompt

#: Passages to choose from: more than half the time can be spent on.
MAX_PASSAGES = 20


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("target", help="folder, or name on the hub")
    parser.add_argument("drafter", help="folder")
    parser.add_argument(
        "--speculative-config",
        type=json_object,
        default={},
        help="JSON, more keys as vLLM's option has them",
    )
    parser.add_argument(
        "--engine-args", type=json_object, default={}, help="JSON, of vLLM's LLM"
    )
    parser.add_argument(
        "--seconds",
        type=at_least(0.0),
        default=30.0,
        help="to measure for, at most; 0 for not at all",
    )
    parser.add_argument(
        "--context-tokens",
        type=at_least(1),
        default=4096,
        help="of a prompt to measure with",
    )
    parser.add_argument("--new-tokens", type=at_least(1), default=128)


def run(args: Namespace) -> None:
    """Says each thing as soon as it is known.

    Raises:
        BudgetDraftError: the two do not go together, and why; or there was no time to
            measure.
    """
    from vllm_budgetdraft.comparison.engine_process import preload
    from vllm_budgetdraft.comparison.engines import check_engine
    from vllm_budgetdraft.comparison.measure import prepare_environment

    prepare_environment()
    if args.seconds > 0:
        preload()
    speculative_config = {
        "method": "budgetdraft",
        "model": args.drafter,
        "num_speculative_tokens": 8,
        **args.speculative_config,
    }
    engine_args = {"model": args.target, **args.engine_args}
    _say("checking", "before anything large loads")
    vllm_config = check_engine(
        {**engine_args, "speculative_config": speculative_config}
    )
    target = vllm_config.model_config
    _say("target", f"{args.target}, max_model_len {target.max_model_len}")
    drafter = vllm_config.speculative_config.settings.model
    for name, text in _facts(vllm_config, args.target, drafter).items():
        _say(name, text)
    if args.seconds > 0:
        context = min(args.context_tokens, target.max_model_len - args.new_tokens)
        row, rounds = _measure(args, engine_args, speculative_config, context)
        races = [race for each in rounds for race in each["races"].values()]
        for name, text in _verdict(row, races, context, args.new_tokens).items():
            _say(name, text)
        if coverage := _coverage(vllm_config, rounds):
            _say("coverage", coverage)


def _coverage(vllm_config: Any, rounds: list[dict[str, Any]]) -> str | None:
    """What plain vLLM wrote, against what is drafted."""
    from vllm_budgetdraft.comparison.methods import PLAIN
    from vllm_budgetdraft.diagnosis.drafted_tokens import measure

    config = vllm_config.speculative_config.settings
    if config.drafter_type != "decoder":  # whose output matrix might be smaller
        return None
    written = [each["runs"][PLAIN]["token_ids"] for each in rounds]
    return measure(config, written, vllm_config.model_config)


def _say(name: str, text: str) -> None:
    print(f"{name:<12}  {text}", flush=True)


def _facts(vllm_config: Any, target: str, drafter: str) -> dict[str, str]:
    """What can be said of a pair that fits, without loading weights."""
    from vllm_budgetdraft.attention.backend import default_device
    from vllm_budgetdraft.diagnosis import drafted_tokens
    from vllm_budgetdraft.diagnosis.memory import describe
    from vllm_budgetdraft.drafter.configuration import range_warning
    from vllm_budgetdraft.drafter.folder import read_config
    from vllm_budgetdraft.vllm_integration.speculative_config import (
        compare_vocabularies,
    )

    config = vllm_config.speculative_config.settings
    model = vllm_config.model_config
    facts = {"vocabulary": _vocabulary(target, drafter, model.get_vocab_size())}
    if config.drafter_type == "flexdraft":
        facts["positions"] = "the target's"
    else:
        if config.drafter_type == "decoder":
            note = compare_vocabularies(drafter, model)
            facts["vocabulary"] = note or facts["vocabulary"]
        facts["drafted"] = drafted_tokens.describe(config, model.get_vocab_size())
        found = read_config(drafter)
        facts["positions"] = range_warning(config, found, model.max_model_len) or (
            f"{config.position_mode}, within the {found.max_position_embeddings} "
            "tokens that the drafter was made for"
        )
    is_v2 = getattr(vllm_config, "use_v2_model_runner", False)  # old vLLM has none
    facts["memory"] = describe(
        config,
        max_model_len=model.max_model_len,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        target_dtype=model.dtype,
        device_type=default_device().type,
        vocab_size=model.get_vocab_size(),
        batch_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        is_v2=is_v2,
    )
    facts["model runner"] = "V2" if is_v2 else "V1"
    return facts


def _vocabulary(target: str, drafter: str, size: int) -> str:
    """Whether token ids mean the same, of which the sizes alone are checked by vLLM."""
    from transformers import AutoTokenizer

    if not (Path(drafter) / "tokenizer.json").is_file():
        return f"{size} tokens in both; the drafter has no tokenizer.json to compare"
    ours, theirs = (
        AutoTokenizer.from_pretrained(model).get_vocab() for model in (drafter, target)
    )
    if different := len(ours.items() ^ theirs.items()):
        return (
            f"{size} tokens in both, but {different} entries of the tokenizers differ: "
            "drafts of these are never right; use a drafter of this target's tokenizer"
        )
    return f"{size} tokens in both, of equal tokenizers"


def _measure(
    args: Namespace,
    engine_args: dict[str, Any],
    speculative_config: dict[str, Any],
    context_tokens: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ours beside plain vLLM: its row, and the rounds that it is of.

    An interruption ends it with what there is so far.
    """
    from transformers import AutoTokenizer

    from vllm_budgetdraft.comparison import measure
    from vllm_budgetdraft.comparison.engines import running, together_or_in_turn
    from vllm_budgetdraft.comparison.methods import PLAIN, Method
    from vllm_budgetdraft.comparison.prompts import EXCERPT, build_prompts
    from vllm_budgetdraft.comparison.room import memory_at_hand
    from vllm_budgetdraft.comparison.summary import summarise

    tell = partial(_say, "engines")
    prompts = build_prompts(
        AutoTokenizer.from_pretrained(args.target),
        {"books": str(EXCERPT)},
        lengths=[context_tokens],
        count=MAX_PASSAGES,
    )
    ours = Method("budgetdraft", engine_args={"speculative_config": speculative_config})
    methods = [Method(PLAIN), ours]
    sampling = {"temperature": 0.0, "max_tokens": args.new_tokens, "ignore_eos": True}
    # As long as the prompts need: a cache for more would leave no room for two engines.
    longest = {"max_model_len": context_tokens + args.new_tokens}
    shared = measure.SHARED_ENGINE_ARGS | longest | engine_args
    memory = memory_at_hand()
    rounds: dict[int, dict[str, Any]] = {}
    ends = ""
    try:
        for group in together_or_in_turn(methods, shared, memory, tell):
            tell(f"{', '.join(m.name for m in group)}: loading and compiling")
            with running(group, shared, memory, tell) as engines:
                share = args.seconds * len(group) / len(methods)
                _rounds(engines, prompts, sampling, share, rounds)
    except KeyboardInterrupt:
        ends = "interrupted"
    whole = [each for each in rounds.values() if len(each["runs"]) == len(methods)]
    if not whole:
        if ends:
            raise KeyboardInterrupt("nothing was measured yet")
        raise ConfigurationError(
            f"no prompt of {context_tokens} tokens was done in --seconds "
            f"{args.seconds:g}; give more, or fewer --context-tokens or --new-tokens"
        )
    if ends:
        _say("interrupted", f"what follows is of {len(whole)} prompts")
    return summarise(methods, whole)[-1], whole


def _rounds(
    engines: dict[str, Any],
    prompts: list["Prompt"],
    sampling: dict[str, Any],
    seconds: float,
    rounds: dict[int, dict[str, Any]],
) -> None:
    """Adds to ``rounds``, by prompt, until the time is over or there are no more."""
    from vllm_budgetdraft.comparison import measure

    end = time.monotonic() + seconds
    with suppress(_TimeOverError), _limited(seconds):
        measure.warm_up(engines, prompts[0], sampling)
        for turn, prompt in enumerate(prompts):
            found = measure.a_round(
                engines, prompt, turn, sampling, earlier=rounds.get(turn)
            )
            rounds[turn] = found
            taken = ", ".join(
                f"{name} {found['runs'][name]['seconds']:.1f} s" for name in engines
            )
            _say("measuring", f"prompt {turn + 1}: {taken}")
            if time.monotonic() > end:
                break


class _TimeOverError(Exception):
    """The time to measure for."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises _TimeOverError where it takes longer, whatever is being waited for.

    0 is no limit.
    """

    def stop(*_: object) -> None:
        raise _TimeOverError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _verdict(
    row: dict[str, Any], races: list[dict[str, Any]], context: int, new_tokens: int
) -> dict[str, str]:
    from vllm_budgetdraft.comparison.races import describe

    verdict = {
        "speed-up": f"{row['speedup']:.2f}x of a request, {row['decode_speedup']:.2f}x "
        f"after the first token: medians of {row['num_runs']} prompts of {context} "
        f"tokens, {new_tokens} new ones, one request at a time",
        "acceptance": f"{row['acceptance_length'] or 1:.2f} tokens per step, the "
        "target's own among them",
        "outputs": "equal, token for token",
    }
    if row["output_identical"] < 1:
        verdict["outputs"] = f"{row['output_identical']:.0%} equal, token for token; "
        if races:
            widest = max(races, key=lambda race: race["gap"])
            verdict["outputs"] += (
                f"{row['output_ties']} of {len(races)} others part at a tie within "
                f"rounding; the widest gap: {describe(widest)}"
            )
            if row["output_ties"] < len(races):
                verdict["outputs"] += (
                    '; compare with --engine-args \'{"dtype": "float32"}\''
                )
        else:
            verdict["outputs"] += "in this precision no tie explains the others"
    return verdict
