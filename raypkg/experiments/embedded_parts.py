"""The files of features: parts of bounded size, whole or not there, and the tables that they are joined to."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.data.sources.table import FEATURES, LABEL, features_schema
from raypkg.data.split import Split
from raypkg.engine.costs import Cost
from raypkg.runs.storage import Storage

PARTS = "parts"  # folder of those that are not joined yet
FACTS = b"part"  # key of what a part's metadata say of its making
FORM: dict[str, Any] = {"compression": "none", "use_dictionary": [LABEL], "write_page_checksum": True}


class Part(NamedTuple):
    """Consecutive samples of a split, whose rows are computed and written together.

    Attributes:
        file: its name.
        split: train or test.
        draw: number of the augmentation's draw.
        start: of its positions.
        stop: of its positions.
    """

    file: str
    split: str
    draw: int
    start: int
    stop: int

    @property
    def positions(self) -> Tensor:
        """Of its samples, int64 [m]."""
        return torch.arange(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start


def parts_of(split: str, n: int, draws: int, size: int) -> list[Part]:
    """Cut the rows of a split's n samples, draw by draw, into parts of a size.

    >>> [(part.file, part.draw, part.start, part.stop) for part in parts_of("test", 5, 1, 3)]
    [('test-00000.parquet', 0, 0, 3), ('test-00001.parquet', 0, 3, 5)]
    """
    places = [(draw, start) for draw in range(draws) for start in range(0, n, size)]
    return [
        Part(f"{split}-{number:05d}.parquet", split, draw, start, min(start + size, n))
        for number, (draw, start) in enumerate(places)
    ]


class Made(NamedTuple):
    """How a part was made.

    Attributes:
        digest: of the backbone.
        world: how many holders were at work.
        cost: of this part.
    """

    digest: str
    world: int
    cost: Cost


def write_part(storage: Storage, part: Part, features: Tensor, split: Split, made: Made) -> None:
    """Write a part: id, label and features of each sample.

    Args:
        storage: the run folder.
        part: which samples.
        features: theirs, float32 [m, D].
        split: that they are in.
        made: how.
    """
    positions = part.positions
    ids = positions if split.ids is None else split.ids[positions]
    classes = np.array(split.classes, object)
    labels = classes[split.y[positions].numpy()]
    schema = features_schema(features.shape[1], split.classes)
    numbers = pa.array(features.numpy().reshape(-1))
    vectors = pa.FixedSizeListArray.from_arrays(numbers, type=schema.field(FEATURES).type)
    table = pa.table([ids.numpy(), labels, vectors], schema=schema)
    facts = json.dumps([made.digest, made.world, made.cost.record()])
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({FACTS: facts}), sink, **FORM)
    storage.write(f"{PARTS}/{part.file}", sink.getvalue().to_pybytes())


def read_part(storage: Storage, part: Part) -> tuple[pa.Table, Made] | None:
    """Return a part and how it was made, or None where it is missing or damaged."""
    content = storage.read(f"{PARTS}/{part.file}")
    if content is None:
        return None
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        table = file.read(use_threads=False)  # none of Arrow's own: they may outlive the interpreter
        digest, world, cost = json.loads(table.schema.metadata[FACTS])
        return table, Made(digest, world, Cost(**cost))
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError):
        return None


def is_there(storage: Storage, part: Part, digest: str) -> bool:
    """Say whether a part is there, undamaged and made by the backbone of a digest."""
    found = read_part(storage, part)
    return found is not None and found[1].digest == digest and len(found[0]) == len(part)


def join_parts(storage: Storage, parts: Iterable[Part], name: str, width: int, classes: Sequence[str]) -> list[Made]:
    """Join the parts of a split to one table, one part in memory at a time; return how they were made.

    Args:
        storage: the run folder.
        parts: in the order of their rows.
        name: of the table's file.
        width: of the features.
        classes: names of all classes.

    Raises:
        UserError: a part was damaged meanwhile, or the disk is full.
    """
    made = []
    schema = features_schema(width, classes)
    with storage.new_file(name) as sink, pq.ParquetWriter(sink, schema, **FORM) as writer:
        for part in parts:
            found = read_part(storage, part)
            if found is None:
                raise UserError(f"{storage.root}/{PARTS}/{part.file} is damaged: --resume computes it again")
            writer.write_table(found[0])
            made.append(found[1])
    return made
