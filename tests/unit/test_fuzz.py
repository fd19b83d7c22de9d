"""Folders, settings and data with something wrong: a clear error, or right work.

A sample of each always runs, and the others where slow tests do. What was found stands
as a case of its own beside the other tests of its module.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType
from typing import Annotated, Any

import pytest
import torch
from pydantic import BaseModel, TypeAdapter
from transformers import AutoModelForCausalLM

from tests.support import books, models
from tests.support.drafting import Requests, build_proposer
from tests.support.junk import spoilt_inside
from tests.support.spoilt_folders import Files, files_of, spoil
from vllm_budgetdraft.config import (
    BudgetDraftConfig,
    RequestSettings,
    ViewSettings,
    parse_request_settings,
    parse_speculative_config,
    settle,
)
from vllm_budgetdraft.drafter.checkpoint import check_weights
from vllm_budgetdraft.drafter.configuration import read_drafter_config, trained_view
from vllm_budgetdraft.drafter.vocabulary import check_vocabulary
from vllm_budgetdraft.errors import BudgetDraftError, ConfigurationError
from vllm_budgetdraft.eviction.catalogue import make_policy
from vllm_budgetdraft.proposer.memory import MemoryPlan
from vllm_budgetdraft.training.views import View, continuation_hidden

#: Of each kind of thing; a part of them in one test.
CASES, SAMPLE, PART = 2000, 50, 100
#: Seconds that one may take.
LONGEST = 5.0
MAX_MODEL_LEN, DRAFTS = 128, 4

parts = pytest.mark.parametrize(
    "seeds",
    [
        range(SAMPLE),
        *(
            pytest.param(range(first, first + PART), marks=pytest.mark.slow)
            for first in range(0, CASES, PART)
        ),
    ],
    ids=lambda seeds: f"{seeds.start}-{seeds.stop}",
)


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(seeds: range, case: Callable[[Random, list[Any]], None]) -> None:
    """Every case; fails with all that went wrong, by their seeds."""
    wrong = []
    for seed in seeds:
        told: list[Any] = []
        try:
            with no_longer_than(LONGEST):
                case(Random(seed), told)
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {str(error)[:200]}"
            wrong.append(f"seed {seed}, {str(told)[:300]}: {what}")
    if wrong:
        pytest.fail(f"{len(wrong)} of {seeds}:\n" + "\n".join(wrong), pytrace=False)


def check_message(error: BudgetDraftError, *names: str) -> None:
    """One paragraph, of a length that can be read, which names what is wrong."""
    message = str(error)
    blank = [line for line in message.splitlines() if not line.strip()]
    assert not blank, f"several paragraphs: {message}"
    message.encode()  # as logs and servers do
    assert 0 < len(message) < 3000, f"{len(message)} characters: {message}"
    assert any(name in message for name in names), f"names nothing: {message}"


@pytest.fixture(scope="module")
def drafter_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("drafter")
    return files_of(books.write_target(folder))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return books.write_target(tmp_path_factory.mktemp("target"), vocab_size=101)


@parts
def test_drafter_folders(seeds, drafter_files, target, tmp_path):
    def case(rng: Random, told: list[Any]) -> None:
        files = dict(drafter_files)
        told += spoil(rng, files)
        folder = tmp_path / "drafter"
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            check_before_the_target_loads(folder, target)
        except BudgetDraftError as error:
            check_message(error, str(folder), "config.json", "vocab_size")
            return
        try:
            drafter_that_drafts(folder)
        except BudgetDraftError as error:  # weights are read only now
            check_message(error, "not finite")

    run(seeds, case)


def check_before_the_target_loads(folder: Path, target: Path) -> None:
    """As vLLM's front end does."""
    config = settings_of(folder)
    drafter = read_drafter_config(folder)
    settled = settle(config, trained_view(drafter))
    make_policy(settled)
    check_vocabulary(folder, 101, str(target))
    MemoryPlan.of(
        settled,
        drafter,
        num_slots=1,
        max_model_len=MAX_MODEL_LEN,
        dtype=torch.float32,
    )
    check_weights(folder, drafter)


def settings_of(folder: Path) -> Any:
    settings = {"kv_budget": 64, "recent_window": 64, "page_size": 16}
    return parse_speculative_config(
        {"model": str(folder), "num_speculative_tokens": DRAFTS, **settings}
    )


def drafter_that_drafts(folder: Path) -> None:
    """And says what ``transformers`` says of the same folder, if it loads it."""
    proposer = build_proposer(
        folder,
        max_model_len=MAX_MODEL_LEN,
        num_speculative_tokens=DRAFTS,
        kv_budget=64,
        recent_window=64,
    )
    requests = Requests(proposer)
    requests.start(0, 90)
    drafts = requests.drafts([0])
    assert drafts.tokens.shape == (1, DRAFTS)
    assert bool(((drafts.tokens >= 0) & (drafts.tokens < models.VOCAB_SIZE)).all())
    if any("_scale" in name for name in check_weights(folder, proposer.drafter.config)):
        return  # which it would not read
    if any(float(each.abs().max()) > 1e9 for each in proposer.drafter.parameters()):
        return  # finite, and squares of it are not
    tokens = models.random_tokens(20)[None]
    with torch.inference_mode():
        (hidden,) = continuation_hidden(proposer.drafter, tokens, [View([], [], 0)])
        found = proposer.drafter.logits(hidden)
        try:
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            expected = theirs(tokens).logits
        except Exception:
            return
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < 1e-3, f"differs from transformers by {error}"


#: Of no setting the default, and all of them right.
SETTINGS: dict[str, Any] = {
    "model": "folder/of/a-drafter",
    "drafter_type": "decoder",
    "num_speculative_tokens": 6,
    "draft_sample_method": "greedy",
    "draft_confidence_threshold": 0.25,
    "num_speculative_tokens_per_batch_size": [[1, 8, 6], [9, 32, 2], [33, 256, 0]],
    "adaptive_draft_length": True,
    "kv_budget": 256,
    "recent_window": 128,
    "page_size": 8,
    "pool_memory_gib": 1.5,
    "attention_backend": "torch",
    "draft_dtype": "float32",
    "eviction_policy": "observation_window",
    "sink_tokens": 4,
    "local_tokens": 64,
    "chunk_size": 16,
    "chunk_score": "last_queries",
    "observation_tokens": 8,
    "pooling_size": 7,
    "position_mode": "cache_relative",
    "draft_prefill": "streaming",
    "draft_prefill_chunk": 400,
}
REQUEST = {"kv_budget": 64, "num_speculative_tokens": 3, "of_others": [1]}


def test_every_setting_is_spoilt():
    assert SETTINGS.keys() == BudgetDraftConfig.model_fields.keys()


@parts
def test_settings(seeds):
    def case(rng: Random, told: list[Any]) -> None:
        needed = {"model", "num_speculative_tokens"}
        few = {k: v for k, v in SETTINGS.items() if k in needed or rng.random() < 0.5}
        asked = {k: v for k, v in REQUEST.items() if rng.random() < 0.8}
        trained = ViewSettings(eviction_policy="heavy_hitter").model_dump()
        which = rng.randrange(4)
        for _ in range(rng.choice((1, 1, 2, 3))):
            if which < 2:
                few = spoilt_inside(rng, few)
            elif which == 2:
                asked = spoilt_inside(rng, asked)
            else:
                trained = spoilt_inside(rng, trained)
        told += [(few, asked, trained)[max(0, which - 1)]]
        try:
            config = parse_speculative_config(few)
            check_fields(config, few)
            settled = settle(config, trained)
            check_fields(settled, trained | few)
            check_fields(parse_request_settings(asked, settled), asked)
        except ConfigurationError as error:
            check_message(error, *SETTINGS, *(repr(str(key)[:20])[:-1] for key in few))

    run(seeds, case)


def check_fields(found: BaseModel, given: dict[str, Any]) -> None:
    """They are as they are declared, and what was given as it was."""
    for name, field in type(found).model_fields.items():
        value = getattr(found, name)
        declared: Any = field.annotation
        if field.metadata:
            declared = Annotated[declared, *field.metadata]
        TypeAdapter(declared).validate_python(value, strict=True)
        wanted = given.get(name, value)
        if name == "num_speculative_tokens_per_batch_size" and wanted:
            wanted = sorted(map(tuple, wanted))
        if isinstance(found, RequestSettings):
            wanted = value if wanted is None else int(wanted)  # some send texts alone
        assert value == wanted, (name, value)
        assert type(value) is type(wanted) or isinstance(value, float), (name, value)
