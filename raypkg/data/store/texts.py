"""A table of texts, or of pairs of them, with labels, in files of any of the usual forms."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.json as pjson
import pyarrow.parquet as pq

from raypkg.core.errors import UserError, unknown
from raypkg.data.files import Place, open_input
from raypkg.data.split import check_labels
from raypkg.data.tokenizer import Text

from .hub import LABELS, class_names
from .rows import check_distinct, class_numbers, reading

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
)
SINGLE = ("text", "sentence", "content", "review", "question")
UNLABELLED = (None, "", "-", "-1")  # what data sets write where annotators did not agree
BLOCK = 1 << 12  # texts tokenised at once


@dataclass(frozen=True)
class TextTable:
    """The files of one split, read as one table.

    Attributes:
        files: of one form, with the same columns.
        chosen_columns: of texts; none = the usual ones.
        chosen_label: column of labels; "" = the usual one.
        unlabelled: whether rows without a label are left out.
    """

    files: list[Place]
    chosen_columns: tuple[str, ...]
    chosen_label: str
    unlabelled: bool

    @cached_property
    def _table(self) -> pa.Table:
        tables = [_read(file, self.chosen_label) for file in self.files]
        first = tables[0].schema
        for file, table in zip(self.files, tables, strict=True):
            if not table.schema.equals(first):
                raise UserError(f"the columns of {str(file)!r} differ from those of {self._name!r}")
        table = pa.concat_tables(tables)
        if not self.unlabelled:
            return table
        labels = table[self._label_of(table.column_names)]
        return table.filter(pc.invert(_missing(labels)))

    @property
    def _name(self) -> str:
        return str(self.files[0])

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns of texts, one or two."""
        names = self._table.column_names
        if self.chosen_columns:
            others = [name for name in names if name != self.label]
            strange = [name for name in self.chosen_columns if name not in others]
            if strange:
                raise unknown(f"text column of {self._name!r}", strange[0], others)
            if len(set(self.chosen_columns)) < len(self.chosen_columns):
                raise UserError(f"option columns = {list(self.chosen_columns)}: the two of a pair must differ")
            return self.chosen_columns
        usual = (*PAIRS, *((name,) for name in SINGLE))
        found = next((columns for columns in usual if set(columns) <= set(names)), None)
        if found is None:
            listed = ", ".join(names)
            raise UserError(f"{self._name!r} has none of the usual columns of texts among {listed}: set option columns")
        return found

    @cached_property
    def label(self) -> str:
        """The column of labels."""
        return self._label_of(self._table.column_names)

    def _label_of(self, names: Sequence[str]) -> str:
        wanted = (self.chosen_label,) if self.chosen_label else LABELS
        found = next((name for name in wanted if name in names), None)
        if found is None:
            raise unknown(f"label column of {self._name!r}", wanted[0], names)
        return found

    @cached_property
    def _labels(self) -> list[int] | list[str]:
        labels = self._table[self.label]
        kind = labels.type
        if not (pa.types.is_integer(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind)):
            raise UserError(f"label column {self.label!r} of {self._name!r} is {kind}, needed are integers or texts")
        first = pc.index(_missing(labels), True).as_py()
        if first >= 0:
            raise UserError(
                f"{self._place(first)} has no label: leave such rows out with --set dataset.options.unlabelled=true"
            )
        return labels.to_pylist()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The class names of the hub's metadata, else the sorted values of the label column."""
        return self._names or tuple(map(str, sorted(set(self._labels))))  # type: ignore[type-var]  # all numbers or all texts

    @cached_property
    def _names(self) -> tuple[str, ...]:
        if not pa.types.is_integer(self._table[self.label].type):
            return ()
        return class_names(self._table.schema, self.label, self.files[0])

    def __len__(self) -> int:
        return len(self._table)

    def check_like(self, train: "TextTable") -> None:
        """Refuse other columns or class names than those of the train split."""
        pairs = {
            "text columns": (self.columns, train.columns),
            "label column": (self.label, train.label),
            "class names": (self._names, train._names),
        }
        for what, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise UserError(f"the {what} of {self._name!r}, {ours}, are not those of {train._name!r}, {theirs}")

    def texts(self, rows: np.ndarray) -> list[Text]:
        """Return the texts of rows, or the pairs.

        Raises:
            UserError: one is missing or blank.
        """
        chunk = self._table.select(self.columns).take(rows)
        for name in self.columns:
            self._check_filled(chunk[name], name, rows)
        columns = [chunk[name].to_pylist() for name in self.columns]
        return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))

    def everything(self, rows: np.ndarray) -> Iterator[str]:
        """Yield every text of rows, of pairs both."""
        for chunk in np.split(rows, range(BLOCK, len(rows), BLOCK)):
            for text in self.texts(chunk):
                yield from (text if isinstance(text, tuple) else (text,))

    def y(self, rows: np.ndarray, train: "TextTable") -> np.ndarray:
        """Return the labels of rows as numbers of the train split's classes, int64."""
        labels = [self._labels[row] for row in rows]
        if not self._names:
            return class_numbers([str(value) for value in labels], train.classes)
        y = np.array(labels, np.int64)
        check_labels(y, len(train.classes), lambda i: self._place(int(rows[i])))
        return y

    def _check_filled(self, texts: pa.ChunkedArray, name: str, rows: np.ndarray) -> None:
        if not pa.types.is_large_string(texts.type):
            raise UserError(f"text column {name!r} of {self._name!r} is {texts.type}, needed are texts")
        blank = pc.equal(pc.utf8_trim_whitespace(texts), "")
        first = pc.index(pc.fill_null(blank, True), True).as_py()
        if first >= 0:
            raise UserError(f"{self._place(int(rows[first]))} has no text in {name!r}")

    def _place(self, row: int) -> str:
        kept = " with a label" if self.unlabelled else ""
        several = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"sample {row}{kept} (from 0) of {self._name!r}{several}"


def _read(file: Place, label: str) -> pa.Table:
    with reading(file):
        match file.suffix:
            case ".parquet":
                table = pq.ParquetFile(open_input(file)).read()
                table.validate(full=True)  # texts are UTF-8
            case ".csv" | ".tsv":
                table = _read_lines(file, label)
            case _:
                table = pjson.read_json(open_input(file))
        check_distinct(table.column_names, file)
        return table.cast(pa.schema([_plain(field) for field in table.schema], metadata=table.schema.metadata))


def _read_lines(file: Place, label: str) -> pa.Table:
    delimiter = "\t" if file.suffix == ".tsv" else ","
    parsing = pcsv.ParseOptions(delimiter=delimiter, quote_char=False if delimiter == "\t" else '"')
    if delimiter == ",":
        parsing.newlines_in_values = True
    names = pcsv.open_csv(open_input(file), parse_options=parsing).schema.names
    # A text such as "NA" or "12" is one: only the columns that may hold labels are read by their values.
    labels = {label} if label else set(LABELS)
    texts = {name: pa.large_string() for name in names if name not in labels}
    convert = pcsv.ConvertOptions(column_types=texts)
    return pcsv.read_csv(open_input(file), parse_options=parsing, convert_options=convert)


def _plain(column: pa.Field) -> pa.Field:
    """Return a column of texts of any form as one of large texts, which may be more than 2 GiB together."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    texts = pa.types.is_string(kind) or pa.types.is_string_view(kind)
    return column.with_type(pa.large_string() if texts else kind)


def _missing(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    """Say which labels are none."""
    if pa.types.is_nested(labels.type) or pa.types.is_binary(labels.type):
        return labels.is_null()
    return pc.is_in(labels.cast(pa.large_string()), pa.array(UNLABELLED, pa.large_string()))
