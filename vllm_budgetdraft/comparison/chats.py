"""Questions to a chat model, in its own chat template."""

from typing import Any

from vllm_budgetdraft.comparison.prompts import EXCERPT, Prompt
from vllm_budgetdraft.conversations import encode, prompt_tokens
from vllm_budgetdraft.errors import ConfigurationError

SHORT_QUESTIONS = (
    "Why is the sky blue?",
    "How do I make a simple vegetable soup?",
    "Give me three tips for a good night's sleep.",
    "Explain how a bicycle stays upright.",
    "Write a short letter to a friend about a trip to the sea.",
)
QUESTION = (
    "{passage}\n\nWhat happens in this part of a novel? Answer in a few sentences."
)
SHORT, ABOUT_A_TEXT = "short chat", "long text"


def short_chats(tokenizer: Any, count: int) -> list[Prompt]:
    """At most ``count`` questions without a text.

    Raises:
        ConfigurationError: see ``chat_tokens``.
    """
    rows = [chat_tokens(tokenizer, each) for each in SHORT_QUESTIONS[:count]]
    longest = max(map(len, rows))
    return [Prompt(SHORT, longest, index, row) for index, row in enumerate(rows)]


def questions_about_texts(tokenizer: Any, length: int, count: int) -> list[Prompt]:
    """Questions about passages of the excerpt, which follow one another in it.

    Args:
        length: tokens of a prompt; it has fewer where the passage's last word has more
            than fit.

    Raises:
        ConfigurationError: the excerpt is too short; see also ``chat_tokens``.
    """
    tokens = encode(tokenizer, EXCERPT.read_text(encoding="utf-8"))
    room = length - len(chat_tokens(tokenizer, QUESTION.format(passage="")))
    if room < 1 or count * room > len(tokens):
        raise ConfigurationError(
            f"{count} passages for prompts of {length} tokens do not come from an "
            f"excerpt of {len(tokens)}, with {length - room} for question and chat "
            "template; ask for fewer prompts, or others"
        )
    prompts = []
    for index in range(count):
        passage = tokens[index * room : (index + 1) * room]
        while len(row := _about(tokenizer, passage)) > length:
            passage.pop()  # cut words can take more tokens than they had
        prompts.append(Prompt(ABOUT_A_TEXT, length, index, row))
    return prompts


def _about(tokenizer: Any, passage: list[int]) -> list[int]:
    return chat_tokens(tokenizer, QUESTION.format(passage=tokenizer.decode(passage)))


def chat_tokens(tokenizer: Any, question: str) -> list[int]:
    """A conversation that begins with a question, up to where the model answers.

    Raises:
        ConfigurationError: the tokenizer has no chat template.
    """
    return prompt_tokens(tokenizer, [{"role": "user", "content": question}])
