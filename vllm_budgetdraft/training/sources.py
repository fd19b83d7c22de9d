"""Where training's data comes from: files, folders and names, and what is in them."""

import glob
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from vllm_budgetdraft.errors import ConfigurationError

#: Readers of the ``datasets`` library by suffix; it unpacks .gz, .xz and .zst.
READERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".txt": "text",
    ".arrow": "arrow",
}
PACKED = (".gz", ".xz", ".zst")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def open_source(source: str) -> Dataset:
    """Rows of a glob of files, of a folder that ``save_to_disk`` wrote, or of a name.

    Raises:
        ConfigurationError: there is nothing of that name, or of no known format; or a
            file cannot be read, or is empty.
    """
    if (Path(source) / "dataset_info.json").is_file():
        return load_from_disk(source)
    if files := _files(source):
        reader = _reader(files[0])
        if reader is None:
            raise ConfigurationError(
                f"{files[0]} has no known suffix; use one of {', '.join(READERS)}, "
                f"packed ({', '.join(PACKED)}) or not"
            )
        # Plain text is one document a file, and not one a line.
        options = {"sample_by": "document"} if reader == "text" else {}
        return _read(source, files, reader, options)
    reason = "it is no name of one"
    if HUB_NAME.fullmatch(source) and _reader(source) is None:
        try:
            return load_dataset(source, split="train")
        except Exception as error:  # of the library's many kinds, and the network's
            reason = str(error)
    raise ConfigurationError(
        f"{source!r} names no file here, and no dataset on the hub ({reason}); give a "
        "file, a glob, a folder, or a dataset's name"
    )


def _read(
    source: str, files: list[str], reader: str, options: dict[str, str]
) -> Dataset:
    try:
        return load_dataset(reader, data_files=files, split="train", **options)
    except Exception as error:  # of the library's many kinds
        if len(files) > 1:
            for file in files:  # to name the one that cannot be read
                _read(file, [file], reader, options)
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ConfigurationError(
            f"{source!r} cannot be read as {reader} ({type(cause).__name__}: "
            f"{str(cause)[:200]}); give files in UTF-8 whose rows all have columns of "
            "the same types"
        ) from error


def _files(source: str) -> list[str]:
    if not Path(source).is_dir():
        return sorted(glob.glob(source))
    inside = sorted(str(path) for path in Path(source).iterdir())
    by_reader = [[f for f in inside if _reader(f) == r] for r in READERS.values()]
    return next(filter(None, by_reader), inside)


def _reader(file: str) -> str | None:
    suffixes = [suffix for suffix in Path(file).suffixes if suffix not in PACKED]
    return READERS.get(suffixes[-1] if suffixes else "")


def unwrap(text: str) -> str:
    """Joins the hard-wrapped lines of prose paragraphs; verse keeps its lines."""

    def join(paragraph: str) -> str:
        lines = paragraph.split("\n")
        body = lines[:-1]
        prose = body and all(len(x) > 50 and not x.startswith(" ") for x in body)
        return " ".join(lines) if prose else paragraph

    return "\n\n".join(map(join, text.split("\n\n")))


def read_texts(
    sources: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    column: str = "text",
    unwraps_lines: bool = False,
) -> Dataset:
    """Documents with ``input_ids``, each ended by the tokenizer's end of text, if any.

    Tokens are kept in the library's cache, and are not computed again.

    Raises:
        ConfigurationError: see ``open_source``; or a source has no such column, or a
            row in it no text.
    """
    found = []
    for source in sources:
        rows = open_source(source)
        if column not in rows.column_names:
            raise ConfigurationError(
                f"{source!r} has the columns {rows.column_names}, but no {column!r}; "
                "name the column of the text with text_column, or give conversations "
                "with --conversations"
            )
        _check_column(rows, source, column, "text", _is_text)
        encode = partial(
            _encode, tokenizer=tokenizer, column=column, unwraps_lines=unwraps_lines
        )
        names = rows.column_names
        found.append(
            rows.map(encode, batched=True, batch_size=16, remove_columns=names)
        )
    return concatenate_datasets(found)


def _encode(
    batch: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    unwraps_lines: bool,
) -> dict[str, list[Any]]:
    texts = map(unwrap, batch[column]) if unwraps_lines else batch[column]
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return {"input_ids": [np.array(each + end, dtype=np.int32) for each in ids]}


def read_continuations(sources: list[str], vocab_size: int | None = None) -> Dataset:
    """What the target wrote: ``prompt`` and ``continuation`` of each row.

    Where every source has them, ``top_ids`` and ``top_logprobs`` are the likeliest
    tokens at each position of the continuation, [len(continuation), n], and
    ``temperature`` is what it was written at.

    Args:
        vocab_size: the target's; token ids are below.

    Raises:
        ConfigurationError: see ``open_source``; or a column is missing, or holds
            something else.
    """
    found = []
    for source in sources:
        rows = open_source(source)
        missing = {"prompt", "continuation"} - set(rows.column_names)
        if missing:
            raise ConfigurationError(
                f"{source!r} lacks the columns {sorted(missing)}; budgetdraft generate "
                "writes such files"
            )
        for column in ("prompt", "continuation"):
            _check_column(rows, source, column, "a list of token ids", _is_token_list)
            _check_tokens(rows, source, column, vocab_size)
        found.append(rows)
    shared = set.intersection(*(set(rows.column_names) for rows in found))
    wanted = {"prompt", "continuation"}
    for optional in ({"top_ids", "top_logprobs"}, {"temperature"}):
        wanted |= optional if optional <= shared else set()
    return concatenate_datasets([rows.select_columns(sorted(wanted)) for rows in found])


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_token_list(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    # A list that is empty in every row is one of nulls.
    return is_list and bool(
        pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type)
    )


def _check_column(
    rows: Dataset,
    source: str,
    column: str,
    wanted: str,
    is_wanted: Callable[[pa.DataType], bool],
) -> None:
    values = rows.flatten_indices().data.column(column)
    if is_wanted(values.type) and not values.null_count:
        return
    kind = list if is_wanted is _is_token_list else str
    row, value = next(
        (each for each in enumerate(rows[column]) if not isinstance(each[1], kind)),
        (0, rows[column][0]),
    )
    raise ConfigurationError(
        f"{source!r} has {str(value)[:60]!r} in the column {column!r} of row {row}, "
        f"where {wanted} is wanted; mend the row, or leave it out"
    )


def _check_tokens(
    rows: Dataset, source: str, column: str, vocab_size: int | None
) -> None:
    lists = rows.flatten_indices().data.column(column)
    tokens = pc.list_flatten(lists)
    if not len(tokens):
        if column == "prompt":
            return
        raise ConfigurationError(
            f"every {column} of {source!r} is empty; there is nothing to learn"
        )
    first, last = (pc.min_max(tokens)[each].as_py() for each in ("min", "max"))
    limit = (vocab_size or 2**31) - 1
    if tokens.null_count or first < 0 or last > limit:
        found = "null" if tokens.null_count else f"{first} to {last}"
        raise ConfigurationError(
            f"{source!r} has the token ids {found} in the column {column!r}; the "
            f"target's are 0 to {limit}: have this target write the continuations"
        )
