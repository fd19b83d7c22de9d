"""Where training's data comes from: files, folders and names, and what is in them."""

import glob
import math
import re
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from vllm_budgetdraft.errors import ConfigurationError, short

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
            reason = short(error)
    raise ConfigurationError(
        f"{source!r} names no file here, and no dataset on the hub ({reason}); give a "
        "file, a glob, a folder, or a dataset's name"
    )


def _read(
    source: str, files: list[str], reader: str, options: dict[str, str]
) -> Dataset:
    try:
        rows = load_dataset(reader, data_files=files, split="train", **options)
        rows.data.validate(full=True)  # of the texts, which may be of no UTF-8
        return rows
    except Exception as error:  # of the library's many kinds
        if len(files) > 1:
            for file in files:  # to name the one that cannot be read
                _read(file, [file], reader, options)
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ConfigurationError(
            f"{source!r} cannot be read as {reader} ({type(cause).__name__}: "
            f"{short(cause)}); give files in UTF-8 whose rows all have columns of "
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
            something else, or another number of likeliest tokens than others do.
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
            tokens = pc.list_flatten(_column(rows, column))
            _check_tokens(tokens, source, column, vocab_size)
        found.append(rows)
    shared = set.intersection(*(set(rows.column_names) for rows in found))
    wanted = {"prompt", "continuation"}
    if {"top_ids", "top_logprobs"} <= shared:
        wanted |= {"top_ids", "top_logprobs"}
        count = None
        for source, rows in zip(sources, found, strict=True):
            count = _check_likeliest(rows, source, vocab_size, count)
    if "temperature" in shared:
        wanted |= {"temperature"}
        for source, rows in zip(sources, found, strict=True):
            _check_temperatures(rows, source)
    return concatenate_datasets([rows.select_columns(sorted(wanted)) for rows in found])


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_token_list(kind: pa.DataType) -> bool:
    # A list that is empty in every row is one of nulls.
    return _is_list(kind, pa.types.is_integer) or _is_list(kind, pa.types.is_null)


def _is_list(kind: pa.DataType, is_item: Callable[[pa.DataType], bool]) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(is_list and is_item(kind.value_type))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _check_column(
    rows: Dataset,
    source: str,
    column: str,
    wanted: str,
    is_wanted: Callable[[pa.DataType], bool],
) -> None:
    values = _column(rows, column)
    if is_wanted(values.type) and not values.null_count:
        return
    kind = list if is_wanted is _is_token_list else str
    row, value = next(
        (each for each in enumerate(rows[column]) if not isinstance(each[1], kind)),
        (0, rows[column][0]),
    )
    raise _of_row(source, column, row, value, wanted)


def _of_row(
    source: str, column: str, row: int, value: Any, wanted: str
) -> ConfigurationError:
    return ConfigurationError(
        f"{source!r} has {str(value)[:60]!r} in the column {column!r} of row {row}, "
        f"where {wanted} is wanted; mend the row, or leave it out"
    )


def _column(rows: Dataset, column: str) -> pa.ChunkedArray:
    return rows.flatten_indices().data.column(column)


def _check_likeliest(
    rows: Dataset, source: str, vocab_size: int | None, count: int | None
) -> int:
    """Of each token of a continuation as many ids and logprobs.

    Args:
        count: how many other sources have; None for the first one.

    Returns:
        How many there are.
    """
    written = pc.list_value_length(_column(rows, "continuation"))
    for name, is_number in (
        ("top_ids", pa.types.is_integer),
        ("top_logprobs", _is_number),
    ):
        lists = _column(rows, name)
        if _is_list(lists.type, partial(_is_list, is_item=is_number)):
            inner = pc.list_flatten(lists)
            numbers, sizes = pc.list_flatten(inner), pc.list_value_length(inner)
            count = count or pc.max(sizes).as_py()
            if (
                not lists.null_count + inner.null_count + numbers.null_count
                and pc.all(pc.equal(pc.list_value_length(lists), written)).as_py()
                and pc.unique(sizes).to_pylist() == [count]
                and not pc.any(pc.is_nan(numbers)).as_py()
            ):
                continue
        wanted = f"{count or 'a number of'} numbers for each token of the continuation"
        sized = zip(rows[name], rows["continuation"], strict=True)
        row = next((n for n, x in enumerate(sized) if not _fits(*x, count)), 0)
        raise _of_row(source, name, row, rows[row][name], wanted)
    numbers = pc.list_flatten(pc.list_flatten(_column(rows, "top_ids")))
    _check_tokens(numbers, source, "top_ids", vocab_size)
    return count or 0


def _fits(likeliest: Any, written: list[int], count: int | None) -> bool:
    return (
        isinstance(likeliest, list)
        and len(likeliest) == len(written)
        and all(isinstance(each, list) and len(each) == count for each in likeliest)
        and all(
            type(each) in (int, float) and not math.isnan(each)
            for each in chain.from_iterable(likeliest)
        )
    )


def _check_temperatures(rows: Dataset, source: str) -> None:
    values = _column(rows, "temperature")
    if _is_number(values.type) and not values.null_count:
        first, last = (pc.min_max(values)[each].as_py() for each in ("min", "max"))
        if 0 <= first and last < math.inf and not pc.any(pc.is_nan(values)).as_py():
            return
    row, value = next(
        (
            (n, x)
            for n, x in enumerate(rows["temperature"])
            if type(x) not in (int, float) or not 0 <= x < math.inf
        ),
        (0, f"{rows[0]['temperature']}, read as {values.type}"),
    )
    raise _of_row(source, "temperature", row, value, "a number from 0 on")


def _check_tokens(
    tokens: pa.ChunkedArray, source: str, column: str, vocab_size: int | None
) -> None:
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
