"""Folders, settings and data with something wrong: a clear error, or right work.

A sample of each always runs, and the others where slow tests do. What was found stands
as a case of its own beside the other tests of its module.
"""

import json
from pathlib import Path
from random import Random
from typing import Annotated, Any

import datasets
import pytest
import torch
from pydantic import BaseModel, TypeAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tests.support import books, models
from tests.support.drafting import Requests, build_proposer
from tests.support.fuzzing import check_message, parts, run
from tests.support.junk import spoilt_bytes, spoilt_inside, written
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
from vllm_budgetdraft.generation.chats import (
    ANSWERS,
    ENDS,
    MALFORMED,
    Chat,
    write_chats,
)
from vllm_budgetdraft.generation.engine import Written
from vllm_budgetdraft.proposer.memory import MemoryPlan
from vllm_budgetdraft.training.chats import read_conversations
from vllm_budgetdraft.training.sources import (
    open_source,
    read_continuations,
    read_texts,
)
from vllm_budgetdraft.training.views import View, continuation_hidden
from vllm_budgetdraft.training.windows import TokenWindows

MAX_MODEL_LEN, DRAFTS = 128, 4


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
    "flex_decoding": "sequential",
    "kv_budget": 256,
    "recent_window": 128,
    "page_size": 8,
    "pool_memory_gib": 1.5,
    "snapshot_memory_gib": 0.5,
    "draft_vocabulary_size": 0,
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


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}"
    "{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
WORDS = " ".join(books.WORDS[:12])
ANSWERED = {"role": "assistant", "content": WORDS}
WRITTEN = {
    "prompt": [1, 2, 3, 4],
    "continuation": [5, 6, 7],
    "temperature": 0.5,
    "top_ids": [[5, 9], [6, 9], [7, 9]],
    "top_logprobs": [[-0.5, -2.0]] * 3,
}
#: Rows as each reader takes them.
ROWS: dict[str, list[dict[str, Any]]] = {
    "texts": [{"text": WORDS}, {"text": "w01", "title": "w"}],
    "continuations": [WRITTEN, {k: WRITTEN[k] for k in ("prompt", "continuation")}],
    "conversations": [
        {"messages": [{"role": "user", "content": WORDS}, ANSWERED]},
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "w03"}]},
                *({"role": "user", "content": "w04 w05"}, ANSWERED),
                *({"role": "user", "content": "w06"}, ANSWERED),
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": WORDS},
                {"from": "gpt", "value": WORDS},
            ]
        },
        {"turns": ["w01 w02", "w03"], "category": "words"},
    ],
}


@pytest.fixture(scope="module")
def tokenizer(target: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@parts
def test_rows(seeds, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def case(rng: Random, told: list[Any]) -> None:
        kind = rng.choice([*ROWS, "conversations"])
        rows: list[Any] = [rng.choice(ROWS[kind])] * rng.randint(1, 3)
        rows = rows + rng.choices(ROWS[kind], k=rng.choice((0, 0, 1, 4)))
        for _ in range(rng.choice((1, 1, 2))):
            place = rng.randrange(len(rows))
            rows[place] = spoilt_inside(rng, rows[place])
        content = b"".join(written(row) + b"\n" for row in rows)
        if rng.random() < 0.2:
            content = spoilt_bytes(rng, content)
        told += [kind, content[:2000]]
        # By another name each, for what was read is kept by names.
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        file.write_bytes(content)
        try:
            {
                "texts": train_on_texts,
                "continuations": train_on_continuations,
                "conversations": rng.choice((train_on_chats, generate)),
            }[kind](str(file), tokenizer)
        except ConfigurationError as error:
            check_message(error, str(file), "fewer than the 8 of a window")

    run(seeds, case)


def train_on_texts(file: str, tokenizer: PreTrainedTokenizerBase) -> None:
    read = read_texts([file], tokenizer)
    given = [json.loads(row)["text"] for row in Path(file).read_text().splitlines()]
    expected = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in given
    ]
    assert read["input_ids"] == expected
    check_windows(texts=read, continuations=None)


def train_on_continuations(file: str, tokenizer: PreTrainedTokenizerBase) -> None:
    read = read_continuations([file], models.VOCAB_SIZE)
    given = [json.loads(row) for row in Path(file).read_text().splitlines()]
    for name in ("prompt", "continuation"):
        assert read[name] == [row[name] for row in given], name
    check_windows(texts=None, continuations=read)


def train_on_chats(file: str, tokenizer: PreTrainedTokenizerBase) -> None:
    read = read_conversations([file], tokenizer)
    assert len(read) and all(read["prompt"])
    check_windows(texts=None, continuations=None, conversations=read)


def generate(file: str, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = open_source(file)
    chats = [Chat(row, str(index), 0.0) for index, row in enumerate(rows)]

    def write(prompts: list[list[int]], *_: Any) -> list[Written]:
        assert all(prompts)
        return [Written([1, 2], True, {}) for _ in prompts]

    found, counts = write_chats(chats, tokenizer, write, 100)
    assert sum(counts[end] for end in ENDS) == len(rows)
    assert all(chat.why for chat in chats if chat.end == MALFORMED)
    assert counts[ANSWERS] == len(found)


def check_windows(**data: Any) -> None:
    """As training takes them."""
    windows = TokenWindows(
        prefix_tokens=[4],
        continuation_tokens=4,
        on_policy_fraction=1.0,
        windows_per_step=1,
        num_windows=4,
        seed=0,
        **data,
    )
    for window in windows:
        assert window["prefix_ids"].shape == window["continuation_ids"].shape == (4,)
        for name in ("prefix_ids", "continuation_ids"):
            assert 0 <= int(window[name].min()) <= int(window[name].max()) < 100
        assert bool(window["temperatures"].isfinite().all()), window["temperatures"]
        assert bool((window["temperatures"] >= 0).all()), window["temperatures"]
        if "top_ids" in window:
            assert len(window["top_ids"]) == len(window["top_logprobs"]) == 4
            assert 0 <= int(window["top_ids"].min()), window["top_ids"]
            assert int(window["top_ids"].max()) < models.VOCAB_SIZE
            assert not bool(window["top_logprobs"].isnan().any())
