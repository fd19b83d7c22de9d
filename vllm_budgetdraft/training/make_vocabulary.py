"""``budgetdraft vocabulary``: has a drafter draft what its target writes, and no more.

Counts the tokens of what the target wrote, or of texts like it, and writes the
likeliest to ``draft_vocabulary.st`` in the drafter's folder, whoever trained
it. Drafts then take less time, and memory. What is left out is never drafted: the
target writes it all the same.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_budgetdraft.command_line import at_least

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

#: One row in this number is held out, to see how well the others foretell it.
HELD_OUT = 10
SMALLEST_SIZE = 1024


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("drafter", help="folder, to which the file is written")
    parser.add_argument("--target", required=True, help="folder, or name on the hub")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--continuations",
        nargs="+",
        help="what the target wrote, as budgetdraft generate writes it",
    )
    source.add_argument(
        "--conversations", nargs="+", help="of which answers are counted"
    )
    source.add_argument(
        "--texts", nargs="+", help="as training's: files, folders, names"
    )
    parser.add_argument("--chat-template", help="in place of the target's")
    parser.add_argument("--text-column", default="text")
    parser.add_argument(
        "--size",
        type=at_least(1),
        default=16384,
        help="tokens of the vocabulary, or all if there are fewer",
    )


def run(args: Namespace) -> None:
    """
    Raises:
        ConfigurationError: see ``likeliest_tokens``, and what reads the sources.
        UnsupportedDrafterError: see ``check_vocabulary``.
    """
    from datasets import disable_progress_bars
    from transformers import AutoConfig, AutoTokenizer

    from vllm_budgetdraft.drafter.configuration import folder_of, read_drafter_config
    from vllm_budgetdraft.drafter.draft_vocabulary import FILE, write_draft_vocabulary
    from vllm_budgetdraft.drafter.join import of_target
    from vllm_budgetdraft.drafter.vocabulary import check_vocabulary
    from vllm_budgetdraft.training.vocabulary_counts import (
        count_tokens,
        kept_tokens,
        likeliest_tokens,
    )

    disable_progress_bars()
    folder = folder_of(args.drafter)
    config = of_target(args.target, AutoConfig.from_pretrained)
    vocab_size = config.get_text_config().vocab_size
    tokenizer = of_target(args.target, AutoTokenizer.from_pretrained)
    check_vocabulary(folder, vocab_size, args.target)
    vocab_size = min(vocab_size, read_drafter_config(folder).vocab_size)
    rows, column = _rows(args, tokenizer, vocab_size)
    kept = [token for token in kept_tokens(tokenizer) if token < vocab_size]
    counts = count_tokens(rows, column, vocab_size)
    args.size = min(args.size, vocab_size)
    ids = likeliest_tokens(counts, kept, args.size)
    write_draft_vocabulary(Path(folder), ids)

    print(
        f"{int(counts.sum()):,} tokens in {len(rows):,} rows, of which "
        f"{int(counts.count_nonzero()):,} of {vocab_size:,} are different; "
        f"{len(kept)} control tokens and numbers are kept in any case.\n"
    )
    held_out = range(0, len(rows), HELD_OUT) if len(rows) >= HELD_OUT else ()
    tenth = rows.select(held_out) if held_out else rows
    seen = count_tokens(tenth, column, vocab_size)
    ordered = likeliest_tokens(counts - seen if held_out else counts, kept)
    print(f"{'size':>9}  coverage")
    for size, share in coverages(ordered, seen, args.size):
        written = "  written" if size == args.size else ""
        print(f"{size:>9,}  {share:>7.2%}{written}")
    of_what = (
        "of a tenth of the rows, by counts of the others"
        if held_out
        else ("of the counted text itself, for it has few rows")
    )
    print(f"\nCoverage is {of_what}.\nWritten to {Path(folder) / FILE}.")


def coverages(
    ordered: "Tensor", counts: "Tensor", chosen: int
) -> list[tuple[int, float]]:
    """The share of a text's tokens that vocabularies of several sizes have.

    Args:
        ordered: [vocab_size] int64 token ids, the likeliest first.
        counts: [vocab_size] int64, of each token in that text.
        chosen: a size beside the powers of two.
    """
    vocab_size = len(ordered)
    sizes, size = {chosen, vocab_size}, SMALLEST_SIZE
    while size < vocab_size:
        sizes.add(size)
        size *= 2
    shares = counts[ordered].cumsum(0) / counts.sum().clamp_min(1)
    return [(size, float(shares[size - 1])) for size in sorted(sizes)]


def _rows(args: Namespace, tokenizer: Any, vocab_size: int) -> tuple["Dataset", str]:
    """What is counted, and the column that has its token ids."""
    from vllm_budgetdraft.training.chats import read_conversations
    from vllm_budgetdraft.training.sources import read_continuations, read_texts

    if args.continuations:
        return read_continuations(args.continuations, vocab_size), "continuation"
    if args.conversations:
        rows = read_conversations(args.conversations, tokenizer, args.chat_template)
        return rows, "continuation"
    return read_texts(args.texts, tokenizer, column=args.text_column), "input_ids"
