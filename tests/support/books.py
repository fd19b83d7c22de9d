"""A made-up book and a target that can read it."""

import json
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.support import models

WORDS = [f"w{index:02}" for index in range(models.VOCAB_SIZE)]


def write_target(folder: Path, **sizes: Any) -> Path:
    """Folder of a random model with a tokenizer of one token per word."""
    sizes = {"num_hidden_layers": 1, **sizes}
    models.write_model(folder, models.llama(**sizes), seed=1)
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def write_books(path: Path, num_words: int = 2000) -> Path:
    """Two books of as many words."""
    rng = Random(0)
    books = [" ".join(rng.choices(WORDS, k=num_words)) for _ in range(2)]
    path.write_text("".join(json.dumps({"text": book}) + "\n" for book in books))
    return path
