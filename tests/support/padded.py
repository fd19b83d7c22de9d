"""Models of one tokenizer whose vocabularies are padded to different sizes."""

from pathlib import Path
from typing import Any

from tests.support import models
from tests.support.distributions import write_tokenizer
from tests.support.tiny_pair import LETTERS

#: Rows of the one model and of the other, for 8 tokens.
FEWER, MORE = 11, 16


def write_padded(folder: Path, letters: str = LETTERS, **sizes: Any) -> Path:
    """A random model, also in the rows that no token has."""
    config = models.llama(**{"eos_token_id": len(LETTERS), **sizes})
    models.write_model(folder, config, seed=config.vocab_size)
    write_tokenizer(folder, letters)
    return folder


def write_cut(folder: Path, model: Path, vocab_size: int) -> Path:
    """A model without its last rows."""
    whole = models.read_model(model)
    whole.resize_token_embeddings(vocab_size)
    whole.save_pretrained(folder)
    return folder
