"""Texts, or pairs of them, with labels: parquet, CSV, TSV or JSON lines, tokenised once on their way into the store."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from raypkg.core.errors import UserError
from raypkg.data.files import Place, place_of
from raypkg.data.kinds import PADDING
from raypkg.data.split import Split
from raypkg.data.store.cache import Cache, Target, cached, fingerprint, store_path, write_store
from raypkg.data.store.hub import PREFIXES, split_files
from raypkg.data.store.rows import split_rows
from raypkg.data.store.stored import Block, Header, Stored
from raypkg.data.store.texts import BLOCK, SUFFIXES, TextTable
from raypkg.data.tokenizer import STORED, encode, files_of, padded, tokenizer_at, trained

from . import dataset

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

    The tokenizer is that of a model of Hugging Face, by name or folder, which `transformers:NAME` brings with it;
    without one, byte pairs are learned from the train texts. Needs `pip install 'effray[text]'`.

    Args:
        root: PATH; of a single file, the share ``test`` is the test split, drawn by its length alone.
        split: "train" or "test".
        cache: folder of the memory-mapped stores.
        tokenizer: name on the hub, or folder; left out = trained on the texts.
        vocabulary: the most tokens of a tokenizer that is trained.
        length: the most tokens of a text or pair; longer ones are cut, which is said.
        columns: one or two columns of texts; left out = premise and hypothesis, text, sentence and their like.
        label: column of labels, numbers or texts; left out = label and its like.
        test: share of a single file.
        unlabelled: leave out rows without a label (none, "", "-" or -1) instead of refusing them.

    Raises:
        UserError: missing, unreadable or wrong files, columns or labels; empty texts; a tokenizer that cannot be read.
    """
    place = place_of(root)
    files = _files(place)
    own = files_of(tokenizer)
    options = {
        "tokenizer": tokenizer,
        "vocabulary": 0 if tokenizer else vocabulary,
        "length": length,
        "columns": columns,
        "label": label,
        "test": test,
        "unlabelled": unlabelled,
    }
    read = [*files["train"], *files["test"], *own]
    key = fingerprint(read, **options)
    target = store_path(cache, place.resolve().stem, key, split)

    def build(unfinished: Target) -> None:
        tables = {name: TextTable(files[name], columns, label, unlabelled) for name in PREFIXES}
        train = tables["train"]
        table = tables[split]
        train_rows = _rows(files, "train", train, test)
        rows = _rows(files, split, table, test)
        table.check_like(train)
        tokens = tokenizer_at(tokenizer) if tokenizer else trained(train.everything(train_rows), vocabulary)
        header = Header("encoded", (length, tokens.get_vocab_size()), train.classes)
        cut = 0

        def blocks() -> Iterator[Block]:
            nonlocal cut
            for chunk in np.split(rows, range(BLOCK, len(rows), BLOCK)):
                encoded, longer = encode(tokens, table.texts(chunk), length)
                cut += longer
                unused = np.zeros((1, 1))  # in place of a sample for the statistics
                yield Block([each.tobytes() for each in encoded], table.y(chunk, train), unused)

        write_store(unfinished, header, blocks())
        if cut:
            log.warning(
                "%s: %d of %d %s texts are cut at %d tokens (option length)", root, cut, len(rows), split, length
            )

    store = cached(target, build, read)
    texts = store.as_split(_Tokens)
    return replace(texts, mean=(), std=())


def _files(root: Place) -> dict[str, list[Place]]:
    """Return the files of each split; a single file is that of both."""
    if root.is_file():
        if root.suffix not in SUFFIXES:
            raise UserError(f"text file {str(root)!r} does not end in one of {', '.join(SUFFIXES)}")
        return {split: [root] for split in PREFIXES}
    return {split: split_files(root, split, "text", SUFFIXES) for split in PREFIXES}


def _rows(files: dict[str, list[Place]], split: str, table: TextTable, test: float) -> np.ndarray:
    if not len(table):
        raise UserError(f"{str(table.files[0])!r} holds no samples")
    first = {name: each[0] for name, each in files.items()}
    return split_rows(first, split, len(table), test)


@dataclass(frozen=True)
class _Tokens:
    """Gathers texts as int64 [b, 2, l], padded to the longest of them."""

    store: Stored

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        tokens = [np.frombuffer(row, STORED).reshape(-1, 2) for row in self.store.encoded(indices)]
        return padded(tokens, PADDING)
