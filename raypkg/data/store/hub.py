"""The layout in which data sets are published on the hub: names of files, and class names in a schema's metadata."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from raypkg.core.errors import UserError
from raypkg.data.files import Place, files_below
from raypkg.data.split import repeated

LABELS = ("label", "fine_label", "labels", "coarse_label")
PREFIXES = {"train": ("train",), "test": ("test", "valid")}  # `valid` stands in where there is no `test`


class Feature(BaseModel):
    """What the hub's metadata says of a column; names are given for one of labels."""

    names: list[str] | None = None


class Info(BaseModel):
    """The part of the hub's metadata that describes the columns."""

    features: dict[str, Any] = {}


class HubMetadata(BaseModel):
    """The JSON under the key ``huggingface`` of a schema's metadata, as far as it is used."""

    info: Info = Info()


def split_files(root: Place, split: str, kind: str, suffixes: Sequence[str]) -> list[Place]:
    """List the files of a split, known by the prefix of their name.

    Args:
        root: their folder, with all below it, or one file.
        split: "train" or "test".
        kind: of files, for errors.
        suffixes: of their names.

    Raises:
        UserError: there are none.
    """
    if not root.exists():
        raise UserError(f"{kind} path {str(root)!r} does not exist")
    files = [root] if root.is_file() else [path for path in files_below(root) if path.suffix in suffixes]
    for prefix in PREFIXES[split]:
        named = [file for file in files if file.name.startswith(prefix)]
        if named:
            return named
    names = sorted({file.name for file in files})
    some = ", ".join(names[:3]) or f"no {kind} file"
    raise UserError(f"{str(root)!r} has no {split} split: no file named {'* or '.join(PREFIXES[split])}*, found {some}")


def class_names(schema: pa.Schema, label: str, file: Place) -> tuple[str, ...]:
    """Return what the hub's metadata, if there is any, calls the values of the label column."""
    metadata = schema.metadata or {}
    where = f"the schema metadata 'huggingface' of {str(file)!r}"
    try:
        hub = HubMetadata.model_validate_json(metadata.get(b"huggingface", b"{}"))
        feature = Feature.model_validate(hub.info.features.get(label, {}))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        raise UserError(f"{where} does not list the classes of {label!r}: {path} {first['msg']}") from None
    names = feature.names or []
    if (twice := repeated(names)) is not None:
        raise UserError(f"{where} has two classes {twice!r} of {label!r}")
    return tuple(names)
