"""Rows of every layout, and what a chat template makes of them."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.support.engines import TARGET
from vllm_budgetdraft.conversations import (
    MalformedConversationError,
    answers,
    messages_of,
    prompt_tokens,
    reasons_of,
    set_chat_template,
)
from vllm_budgetdraft.errors import ConfigurationError

CHATML = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
#: As Llama 2's: a space before an answer, another before its end.
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system here') }}{% elif m['role'] == 'user' %}"
    "[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }} {{ eos_token }}"
    "{% endif %}{% endfor %}"
)
#: As reasoning models': earlier thoughts are left out, and an answer begins with one.
THINKING = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'].split('</think>')[-1] }}"
    "{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
WHY = {"role": "user", "content": "Why?"}
SO = {"role": "assistant", "content": "So."}
AND = {"role": "user", "content": "And?"}
END = {"role": "assistant", "content": "No."}


def make_tokenizer(template: str | None, **changes: Any) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(TARGET, **changes)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [SYSTEM, WHY, SO]}, [SYSTEM, WHY, SO]),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Why?"},
                    {"from": "gpt", "value": "So."},
                ]
            },
            [SYSTEM, WHY, SO],
        ),
        ({"turns": ["Why?", "And?"]}, [WHY, AND]),
        ({"turns": [WHY, SO]}, [WHY, SO]),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "Wh"},
                            {"type": "text", "text": "y?"},
                        ],
                    }
                ]
            },
            [WHY],
        ),
        # As data sets have rows of which some lack a column.
        ({"messages": None, "turns": ["Why?"], "text": "a book"}, [WHY]),
        ({"messages": []}, []),
        ({"text": "a book"}, []),
    ],
)
def test_every_layout_is_read(row, expected):
    assert messages_of(row) == expected


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "tool", "content": "4"}, "a message by 'tool'"),
        ({"content": "4"}, "a message by None"),
        ({"role": "assistant", "content": None}, "without text"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "image_url"),
        ({"role": "user", "content": ["Why?"]}, "a part of the type 'str'"),
        ({"role": "user", "content": [{"type": "text"}]}, "a part without text"),
        ({"role": ["user"], "content": "Why?"}, "a message by"),
        (["user", "Why?"], "a list for a message"),
    ],
)
def test_what_is_no_conversation_is_named(message, why):
    with pytest.raises(MalformedConversationError, match=why):
        messages_of({"messages": [WHY, message]})


@pytest.mark.parametrize("column", ["messages", "conversations", "turns"])
@pytest.mark.parametrize("given", ["Why?", WHY])
def test_what_is_no_list_is_no_conversation(column, given):
    with pytest.raises(MalformedConversationError, match="for a list of messages"):
        messages_of({column: given})


def texts(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> list[tuple[str, str]]:
    return [
        (tokenizer.decode(prompt), tokenizer.decode(answer))
        for prompt, answer in answers(tokenizer, messages)
    ]


def test_each_answer_comes_after_all_before_it():
    tokenizer = make_tokenizer(CHATML)
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    first = f"{begin}<system>Be brief.{end}\n<user>Why?{end}\n<assistant>"
    second = f"{first}So.{end}\n<user>And?{end}\n<assistant>"
    found = texts(tokenizer, [SYSTEM, WHY, SO, AND, END])
    assert found == [(first, f"So.{end}"), (second, f"No.{end}")]
    prompt = prompt_tokens(tokenizer, [SYSTEM, WHY])
    assert tokenizer.decode(prompt) == first
    # The template begins with it; the tokenizer does not once more.
    assert prompt.count(tokenizer.bos_token_id) == 1


def test_what_a_template_writes_around_an_answer_is_the_answers():
    tokenizer = make_tokenizer(SPACED)
    ((_, answer),) = texts(tokenizer, [WHY, SO])
    assert answer == f" So. {tokenizer.eos_token}"


def test_a_template_that_refuses_a_turn_makes_the_row_malformed():
    tokenizer = make_tokenizer(SPACED)
    with pytest.raises(MalformedConversationError, match="no system here"):
        prompt_tokens(tokenizer, [SYSTEM, WHY])


def test_thoughts_are_in_an_answer_and_in_no_prompt():
    tokenizer = make_tokenizer(THINKING)
    end = tokenizer.eos_token
    thought = [{**m, "content": f"<think>Hm.</think>{m['content']}"} for m in (SO, END)]
    (first, second) = texts(tokenizer, [WHY, thought[0], AND, thought[1]])
    assert first == (
        f"<user>Why?{end}\n<assistant><think>",
        f"Hm.</think>So.{end}",
    )
    assert second[0] == (
        f"<user>Why?{end}\n<assistant>So.{end}\n<user>And?{end}\n<assistant><think>"
    )
    with pytest.raises(MalformedConversationError, match="begins an answer with '<thi"):
        answers(tokenizer, [WHY, SO])


def test_without_an_end_of_text_an_answer_ends_with_its_words():
    tokenizer = make_tokenizer(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.eos_token = None
    assert texts(tokenizer, [WHY, SO]) == [("<user>Why?\n<assistant>", "So.")]


def test_an_answer_ends_with_another_special_token_than_the_end_of_text():
    # As Gemma's and Phi's do.
    tokenizer = make_tokenizer(CHATML.replace("{{ eos_token }}", "<end_of_turn>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    assert texts(tokenizer, [WHY, SO])[0][1] == "So.<end_of_turn>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages[0]['content'].index('x') }}",
        "{{ raise_exception('no' * 5000) }}",
    ],
)
def test_a_template_that_fails_makes_the_row_malformed(template):
    tokenizer = make_tokenizer(template)
    with pytest.raises(
        MalformedConversationError, match="the template refuses it"
    ) as refusal:
        prompt_tokens(tokenizer, [WHY])
    assert len(str(refusal.value)) < 300


def test_an_assistant_that_begins_answers_nothing():
    """As in rows of ShareGPT; what it said stands before what it answers later."""
    tokenizer = make_tokenizer(CHATML)
    assert not answers(tokenizer, [SO])
    ((prompt, answer),) = answers(tokenizer, [SO, WHY, END])
    assert "So." in tokenizer.decode(prompt)
    assert tokenizer.decode(answer).startswith("No.")


def test_reasons_are_told_the_commonest_first_and_few_of_them():
    left_out = Counter({f"of kind {kind}": kind + 1 for kind in range(12)})
    said = reasons_of(left_out)
    assert said.startswith("12 of kind 11, 11 of kind 10, ")
    assert said.endswith("5 of kind 4, 10 for other reasons")
    assert reasons_of(Counter({"without an answer": 2})) == "2 without an answer"
    with pytest.raises(MalformedConversationError) as refusal:
        messages_of({"messages": [{"role": "x" * 5000, "content": "a"}]})
    assert len(str(refusal.value)) < 100


def test_a_template_can_be_given(tmp_path: Path):
    tokenizer = make_tokenizer(None)
    with pytest.raises(ConfigurationError, match="has no chat template"):
        prompt_tokens(tokenizer, [WHY])
    with pytest.raises(ConfigurationError, match="'cml.jinja' is no file"):
        set_chat_template(tokenizer, "cml.jinja")
    file = tmp_path / "given.jinja"
    file.write_text(CHATML)
    for given in (str(file), CHATML):
        set_chat_template(tokenizer, given)
        assert tokenizer.chat_template == CHATML
    # Some tokenizers have several, by name.
    tokenizer.chat_template = {"tools": CHATML}
    with pytest.raises(ConfigurationError, match="has no chat template"):
        set_chat_template(tokenizer)
    tokenizer.chat_template = {"tools": "", "default": CHATML}
    assert prompt_tokens(tokenizer, [WHY])
