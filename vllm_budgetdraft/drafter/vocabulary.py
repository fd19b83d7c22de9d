"""Whether a drafter's token ids are its target's, and which tokens it drafts."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_budgetdraft.drafter.configuration import read_drafter_config
from vllm_budgetdraft.errors import UnsupportedDrafterError, short


def check_vocabulary(
    drafter: str | Path, vocab_size: int, tokenizer: str, **options: Any
) -> str | None:
    """Compares tokenizers where the vocabularies are of different sizes.

    Some families pad the vocabulary of their larger models further than that of the
    smaller ones, with rows that no token has.

    Args:
        drafter: its folder.
        vocab_size: the target's.
        tokenizer: the target's, a folder or a name on the hub.
        options: of ``AutoTokenizer.from_pretrained``, for the target's.

    Returns:
        What is drafted, for people; None where the sizes are equal.

    Raises:
        UnsupportedDrafterError: see ``read_drafter_config``; or the sizes differ, and
            so may what token ids mean.
    """
    own = read_drafter_config(drafter).vocab_size
    if own == vocab_size:
        return None
    fewer = min(own, vocab_size)
    if why := _why_not(Path(drafter), fewer, tokenizer, options):
        raise UnsupportedDrafterError(
            f"the drafter's vocab_size={own} differs from the target's {vocab_size}, "
            f"and {why}; use a drafter with this target's tokenizer in its folder"
        )
    return (
        f"vocab_size={own} in the drafter, {vocab_size} in the target, of equal "
        f"tokenizers: ids from {fewer} on are never drafted"
    )


def _why_not(
    drafter: Path, rows: int, tokenizer: str, options: dict[str, Any]
) -> str | None:
    """Why ids may mean different tokens, or have none of the rows; None if not so."""
    # Without it some families get a tokenizer of next to no tokens, and no error.
    if not (drafter / "tokenizer.json").is_file():
        return f"{drafter} has no tokenizer.json to compare"
    read = []
    for name, given in ((str(drafter), {}), (tokenizer, options)):
        try:
            read.append(AutoTokenizer.from_pretrained(name, **given).get_vocab())
        except Exception as error:  # each kind of tokenizer has its own
            return f"the tokenizer of {name} cannot be read ({short(error)})"
    ours, theirs = read
    if different := {place for _, place in ours.items() ^ theirs.items()}:
        first = min(different)
        named = [{i: token for token, i in each.items()}.get(first) for each in read]
        return (
            f"the tokenizers differ in {len(different)} ids, the first of them "
            f"{first}: {named[0]!r} is not {named[1]!r}"
        )
    if (last := max(ours.values())) >= rows:
        return f"their tokenizers have ids up to {last}, where one model has no row"
    return None
