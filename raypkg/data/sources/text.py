"""Texts, or pairs of texts, with labels: parquet, CSV, TSV or JSON lines, tokenised once, when they are imported."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.json as pjson
from pydantic import Field

from raypkg.core.config import DEEPEST
from raypkg.core.errors import UserError, unknown
from raypkg.core.memory import check_read
from raypkg.data.files import (
    LABELS,
    LONGEST_CLASS,
    PREFIXES,
    Place,
    class_numbers,
    identity_of,
    label_column,
    open_input,
    place_of,
    read_parquet,
    reading,
    split_files,
    split_rows,
)
from raypkg.data.split import Split, check_labels
from raypkg.data.store.arrow import Block, Header, Stored
from raypkg.data.store.cache import Cache, stored
from raypkg.data.tokenizer import STORED, Text, encode, padded, tokenizer_at, tokenizer_files, trained, vocabulary_of

from . import dataset

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
USUAL: tuple[tuple[str, ...], ...] = (  # columns of texts; pairs first
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence"),
    ("text_a", "text_b"), ("text",), ("sentence",), ("content",), ("review",), ("question",),
)  # fmt: skip
UNLABELLED = (None, "", "-", "-1")  # spellings of a missing label, such as where annotators disagreed
BLOCK = 1 << 12  # texts tokenised at once

Encoder = tuple[Callable[[Any, np.ndarray], tuple[list[np.ndarray], int]], int, str]

log = logging.getLogger(__name__)


@dataset("text")
def load(
    root: str,
    *,
    split: str,
    cache: Cache,
    tokenizer: str = "",
    vocabulary: Annotated[int, Field(ge=300, le=1 << 20)] = 8192,
    length: Annotated[int, Field(ge=4, le=1 << 16)] = 128,
    columns: Annotated[tuple[str, ...], Field(max_length=2)] = (),
    label: str = "",
    test: Annotated[float, Field(ge=0, lt=1)] = 0.2,
    unlabelled: bool = False,
) -> Split:
    """Texts or pairs of texts in parquet, CSV, TSV or JSON lines named train* and test* in PATH, or one file.

    The tokenizer is that of a Hugging Face model, by name or folder, which `transformers:NAME` sets by itself;
    without one, byte pairs are learned from the train texts. Needs `pip install 'effray[text]'`.

    Args:
        root: PATH; of a single file, the share ``test`` is the test split, drawn by its length alone.
        split: "train" or "test".
        cache: folder of the memory-mapped stores.
        tokenizer: name on the hub, or folder (default: trained on the texts).
        vocabulary: most tokens of a trained tokenizer.
        length: most tokens of a text or pair; longer ones are cut, with a warning.
        columns: one or two columns of texts (default: premise and hypothesis, text, sentence and the like).
        label: column of labels, numbers or texts (default: label and the like).
        test: share of a single file.
        unlabelled: drop rows without a label (none, "", "-" or -1) instead of refusing them.

    Raises:
        UserError: missing, unreadable or wrong files, columns or labels; empty texts; a tokenizer that cannot be read.
    """
    learned = 0 if tokenizer else vocabulary
    # Since 1, a store keeps the tokenizer that was trained; since 2, V exceeds the largest number of a token.
    form = 2 if tokenizer else 1
    key = dict(vocabulary=learned, form=form, columns=columns, label=label, unlabelled=unlabelled)

    def encoder(train: TextTable, rows: np.ndarray) -> Encoder:
        tokens = tokenizer_at(tokenizer) if tokenizer else trained(train.everything(rows), vocabulary)
        own = "" if tokenizer else tokens.to_str()
        return lambda table, rows: encode(tokens, table.texts(rows), length), vocabulary_of(tokens), own

    table = partial(TextTable, columns=columns, label=label, unlabelled=unlabelled)
    return tokenised(root, table, encoder, key, split=split, cache=cache, tokenizer=tokenizer, length=length, test=test)


def tokenised(
    root: str,
    read: Callable[[list[Place]], TextTable],
    encoder: Callable[[Any, np.ndarray], Encoder],
    key: Mapping[str, Any],
    *,
    split: str,
    cache: Cache,
    tokenizer: str,
    length: int,
    test: float,
) -> Split:
    """Return a split of files of texts, which are tokenised once; ``key`` are further options that decide the tokens.

    ``read`` makes a table of the files of a split. From the train split's table and rows, ``encoder`` returns a
    function like ``encode`` of a table and its rows, V, and the tokenizer as JSON if it was trained on the texts.
    """
    place = place_of(root)
    if place.is_file():
        if place.suffix not in SUFFIXES:
            raise UserError(f"text file {str(place)!r} does not end in one of {', '.join(SUFFIXES)}")
        files = {name: [place] for name in PREFIXES}
    else:
        files = {name: split_files(place, name, "text", SUFFIXES) for name in PREFIXES}
    sources = [*files["train"], *files["test"], *tokenizer_files(tokenizer)]

    def build() -> tuple[Header, Iterator[Block]]:
        tables = {name: read(files[name]) for name in PREFIXES}
        train, table = tables["train"], tables[split]
        first = {name: each[0] for name, each in files.items()}
        train_rows = split_rows(first, "train", len(train), test)
        rows = split_rows(first, split, len(table), test)
        for what in ("columns", "label", "class_names"):
            ours, theirs = getattr(table, what), getattr(train, what)
            if ours != theirs:
                raise UserError(f"the {what} of {first[split]}, {ours}, are not those of {first['train']}, {theirs}")
        encode_rows, vocabulary, own = encoder(train, train_rows)
        header = Header("encoded", (length, vocabulary), train.classes, tokenizer=own)

        def blocks() -> Iterator[Block]:
            cut = 0
            unused = np.zeros((1, 1))  # instead of a sample for the statistics
            for chunk in np.split(rows, range(BLOCK, len(rows), BLOCK)):
                encoded, longer = encode_rows(table, chunk)
                cut += longer
                yield Block([each.tobytes() for each in encoded], table.y(chunk, train), unused)
            if cut:
                share = f"{cut} of {len(rows)} {split} texts"
                log.warning("%s: %s are cut at %d tokens (option length)", root, share, length)

        return header, blocks()

    options = {**key, "tokenizer": tokenizer, "length": length, "test": test}
    found = stored(cache, place.resolve().stem, split, sources, build, **options)
    return replace(found.as_split(_tokens), mean=(), std=())


def _tokens(store: Stored, indices: np.ndarray) -> np.ndarray:
    """Gather texts as int64 [b, 2, l], padded to the longest of them."""
    return padded([np.frombuffer(row, STORED).reshape(-1, 2) for row in store.encoded(indices)])


class TextTable:
    """The files of one split, in one format, read as one table of texts or pairs."""

    usual: ClassVar[Sequence[tuple[str, ...]]] = USUAL
    unusual: ClassVar[str] = "set option columns"
    missing: ClassVar[str] = "label: leave such rows out with --set dataset.options.unlabelled=true"

    def __init__(self, files: list[Place], columns: tuple[str, ...], label: str, unlabelled: bool):
        self.files = files
        self._unlabelled = unlabelled
        self._name = str(files[0])
        tables = [_read(file, label) for file in files]
        tables, self.label, self.class_names = self._labelled(tables, label)
        self._table = pa.concat_tables(tables)
        if unlabelled:
            self._table = self._table.filter(pc.invert(_missing(self._table[self.label])))
        if not len(self):
            raise UserError(f"{self._name!r} holds no samples")
        names = self._table.column_names
        others = [name for name in names if name != self.label]
        for name in columns:
            if name not in others:
                raise unknown(f"text column of {self._name!r}", name, others)
        if len(set(columns)) < len(columns):
            raise UserError(f"option columns = {list(columns)}: the two of a pair must differ")
        self.columns = columns or next((usual for usual in self.usual if set(usual) <= set(others)), ())
        if not self.columns:
            listed = ", ".join(names)
            raise UserError(f"{self._name!r} has none of the usual columns of texts among {listed}: {self.unusual}")

    def _labelled(self, tables: list[pa.Table], label: str) -> tuple[list[pa.Table], str, tuple[str, ...]]:
        """Return the tables with their label column, its name, and the class names of the hub's metadata."""
        name, _, classes = label_column(self.files, [table.schema for table in tables], label)
        return tables, name, classes

    @cached_property
    def _labels(self) -> list[int] | list[str]:
        labels = self._table[self.label]
        kind = labels.type
        if not (pa.types.is_integer(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind)):
            raise UserError(f"label column {self.label!r} of {self._name!r} is {kind}, needed are integers or texts")
        if (first := pc.index(_missing(labels), True).as_py()) >= 0:
            raise UserError(f"{self._place(first)} has no {self.missing}")
        if pa.types.is_large_string(kind):
            too_long = pc.greater(pc.binary_length(labels), LONGEST_CLASS)
            if (first := pc.index(too_long, True).as_py()) >= 0:
                raise UserError(f"{self._place(first)} has a label longer than {LONGEST_CLASS:,} bytes")
        return labels.to_pylist()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The class names of the hub's metadata, else the sorted values of the label column."""
        return self.class_names or tuple(map(str, sorted(set(self._labels))))  # type: ignore[type-var]  # all numbers or all texts

    def __len__(self) -> int:
        return len(self._table)

    def texts(self, rows: np.ndarray) -> list[Text]:
        """Return the texts of rows, or the pairs; raises UserError if one is missing or blank."""
        chunk = self._table.select(self.columns).take(rows)
        for name in self.columns:
            texts = chunk[name]
            if not pa.types.is_large_string(texts.type):
                raise UserError(f"text column {name!r} of {self._name!r} is {texts.type}, needed are texts")
            blank = pc.equal(pc.utf8_trim_whitespace(texts), "")
            if (first := pc.index(pc.fill_null(blank, True), True).as_py()) >= 0:
                raise UserError(f"{self._place(int(rows[first]))} has no text in {name!r}")
        columns = [chunk[name].to_pylist() for name in self.columns]
        return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))

    def everything(self, rows: np.ndarray) -> Iterator[str]:
        """Yield every text of rows, both of a pair."""
        for chunk in np.split(rows, range(BLOCK, len(rows), BLOCK)):
            for text in self.texts(chunk):
                yield from (text if isinstance(text, tuple) else (text,))

    def y(self, rows: np.ndarray, train: TextTable) -> np.ndarray:
        """Return the labels of rows as numbers of the train split's classes, int64."""
        labels = [self._labels[row] for row in rows]
        if not self.class_names:
            return class_numbers([str(value) for value in labels], train.classes)
        y = np.array(labels, np.int64)
        check_labels(y, len(train.classes), lambda i: self._place(int(rows[i])))
        return y

    def _place(self, row: int) -> str:
        labelled = " with a label" if self._unlabelled else ""
        several = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"sample {row}{labelled} (from 0) of {self._name!r}{several}"


def new_texts(file: Place, columns: tuple[str, ...]) -> list[Text]:
    """Return the texts or pairs of a file without labels: lines of ``.txt``, or columns, by default usual ones."""
    if file.suffix == ".txt":
        with reading(file):
            check_read(f"texts {str(file)!r}", identity_of(file)[1])
            lines = re.split(r"\r?\n", open_input(file).read().decode("utf-8-sig"))  # texts may hold other breaks
            return lines if lines[-1] else lines[:-1]
    table = _read(file, "")
    names = tuple(table.column_names)
    chosen = columns or next((usual for usual in USUAL if set(usual) <= set(names)), names if len(names) == 1 else ())
    if not chosen:
        raise UserError(f"{str(file)!r} has none of the usual columns of texts among {', '.join(names)}: name it text")
    for name in chosen:
        if name not in table.column_names:
            raise unknown(f"text column of {str(file)!r}", name, table.column_names)
        if not pa.types.is_large_string(table[name].type) or table[name].null_count:
            raise UserError(f"text column {name!r} of {str(file)!r} holds no text in some rows")
    texts = [table[name].to_pylist() for name in chosen]
    return texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))


def _read(file: Place, label: str) -> pa.Table:
    with reading(file):
        check_read(f"table {str(file)!r}", identity_of(file)[1])
        match file.suffix:
            case ".parquet":
                return read_parquet(file)
            case ".csv" | ".tsv":
                is_quoted = file.suffix == ".csv"
                parsing = pcsv.ParseOptions(
                    delimiter="," if is_quoted else "\t",
                    quote_char='"' if is_quoted else False,
                    newlines_in_values=is_quoted,
                )
                names = pcsv.open_csv(open_input(file), parse_options=parsing).schema.names
                # A text may read "NA" or "12", so types are inferred only for columns that may hold labels.
                labels = {label} if label else set(LABELS)
                texts = {name: pa.large_string() for name in names if name not in labels}
                convert = pcsv.ConvertOptions(column_types=texts)
                table = pcsv.read_csv(open_input(file), parse_options=parsing, convert_options=convert)
            case _:
                # Arrow's parser calls itself for every level: too many exceed the stack.
                brackets = re.sub(rb'"(?:[^"\\]|\\.)*"|[^][{}"]+|"', b"", open_input(file).read())
                opening = np.isin(np.frombuffer(brackets, np.uint8), list(b"[{"))
                if np.where(opening, 1, -1).cumsum().max(initial=0) > DEEPEST:
                    raise UserError(f"table {str(file)!r} has values nested more than {DEEPEST} deep")
                table = pjson.read_json(open_input(file))
                table.validate(full=True)  # texts are UTF-8
        # Texts become large strings, which may exceed 2 GiB together.
        large = [each.with_type(pa.large_string()) if pa.types.is_string(each.type) else each for each in table.schema]
        return table.cast(pa.schema(large))


def _missing(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_nested(labels.type) or pa.types.is_binary(labels.type):
        return labels.is_null()
    return pc.is_in(labels.cast(pa.large_string()), pa.array(UNLABELLED, pa.large_string()))
