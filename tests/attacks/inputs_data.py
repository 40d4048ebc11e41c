"""Bad input in data: tables, sparse rows, parquet, folders of images, the options of sources, coreset files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import samples
from attacks.cases import cases

IMAGES = [samples.encode(image) for image in samples.pixels(6)]
LABELS = [0, 1, 2, 0, 1, 2]

PLACES = cases(
    "the place of data",
    "data {}",
    {
        "table": "needs one of train.parquet and train.csv",
        "table:queue": "'queue' is not a file with one of the endings",
        "libsvm:nowhere": "is not a file with one of the endings",
        "fashionmnist:/dev/null/x": "cannot fetch FashionMNIST into '/dev/null/x'",
    },
)

TABLE_OPTIONS = cases(
    "an option of a table",
    "data table:rows.csv --set {}",
    {
        "label=": "unknown label column of 'rows.csv' ''",
        "label=Label": "unknown label column of 'rows.csv' 'Label', did you mean 'label'",
        "test=0.999": "leaves no train samples of the 40",
    },
)

SIZES = cases(
    "the size of images",
    "data folder:images --set size={}",
    {
        "big": "folder option size = 'big'",
        "true": "folder option size = True",
        "99999999999999999999": "option size = '99999999999999999999' … less than or equal to 65536",
    },
)

SIZES_IN_PARQUET = cases(
    "the size of images in parquet",
    "data parquet:set --set size={}",
    {"-1": "parquet option size = -1", "100000": "size = 100000", "2147483648": "size = 2147483648"},
)

COLUMNS = cases(
    "the columns of sparse rows",
    "data libsvm:rows.libsvm --set columns={}",
    {
        "2000000000": "dense rows of 2,000,000,000 columns in 'rows.libsvm' … needed is",
        "2147483648": "dense rows of 2,147,483,648 columns in 'rows.libsvm' … needed is",
        "99999999999999999999": "option columns = '99999999999999999999' … less than or equal to 2147483648",
    },
)

CSV = cases(
    "a table in CSV",
    "data table:mine.csv",
    {
        "a missing value": ("a,label\n" + "1,0\n,1\n" * 3, "column 'a' … no value in line 3"),
        "NaN": ("a,label\n" + "1,0\nNaN,1\n" * 3, "column 'a' … NaN in line 3"),
        "beyond float32": ("a,label\n" + "1,0\n1e300,1\n" * 3, "column 'a' … 1e+300 in line 3, needed are … float32"),
        "large identifiers": ("a,label\n" + "16777217,0\n16777219,1\n" * 3, "column 'a' … float32 rounds"),
    },
    into="mine.csv",
)

LIBSVM = cases(
    "sparse rows",
    "data libsvm:mine.libsvm",
    {
        "falling columns": ("1 2:1 1:1\n", "line 1 … columns must begin at 1 and rise"),
        "a column of 2000000000": (
            "0 1:1\n1 2000000000:1\n" * 3,
            "rows of 2,000,000,000 columns in 'mine.libsvm' … needed is",
        ),
        "a column of 100000000": (
            "0 1:1\n1 100000000:1\n" * 3,
            "rows of 100,000,000 columns in 'mine.libsvm' … needed is",
        ),
    },
    into="mine.libsvm",
)

PACKED = cases(
    "packed sparse rows",
    "data libsvm:mine.bz2",
    {
        "no bz2": ("1 1:1\n", "mine.bz2 … cannot be read"),
        "nothing": ("", "mine.bz2"),
        "cut short": (b"BZh91AY&SY\x00\x01", "mine.bz2"),
    },
    into="mine.bz2",
)


def write_images(folder: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    table = pa.table(columns).replace_schema_metadata(metadata)
    (folder / "mine").mkdir()
    for split in ("train", "test"):
        pq.write_table(table, folder / "mine" / f"{split}.parquet")


def hub(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    return {"image": IMAGES, "label": LABELS}, {"huggingface": text}


def features(names: Any) -> str:
    return json.dumps({"info": {"features": {"label": {"names": names}}}})


PARQUET = cases(
    "images in parquet",
    "data parquet:mine",
    {
        "two image columns": (({"a": IMAGES, "b": IMAGES, "label": LABELS},), "several image columns among a, b"),
        "labels that are texts": (({"image": IMAGES, "label": list("abcabc")},), "label column 'label' … is string"),
        "labels that are floats": (({"image": IMAGES, "label": [0.0] * 6},), "label column 'label' … is double"),
        "labels that are lists": (({"image": IMAGES, "label": [[0]] * 6},), "label column 'label' … is list"),
    },
    make=lambda folder, content: write_images(folder, *content),
)


def damaged_parquet(folder: Path, content: bytes) -> None:
    for file in (folder / "set").iterdir():
        file.write_bytes(content)


PARQUET_FILES = cases(
    "parquet files",
    "data parquet:set",
    {
        "empty": (b"", "'set/train.parquet' cannot be read: Parquet"),
        "a few bytes": (b"PAR1", "'set/train.parquet' cannot be read: Parquet"),
        "text": (b"a,b\n1,2\n" * 100, "'set/train.parquet' cannot be read: Parquet"),
    },
    make=damaged_parquet,
)


def change_images(folder: Path, change: str) -> None:
    cats = folder / "images" / "train" / "cat"
    image = cats / "0.png"
    match change:
        case "dangling":
            (cats / "1.png").symlink_to("nowhere")
        case "loop":
            (cats / "1.png").symlink_to("1.png")
        case "empty":
            image.write_bytes(b"")
        case "cut":
            image.write_bytes(image.read_bytes()[:40])
        case "text":
            image.write_text("not an image")
        case "sizes":
            (cats / "1.png").write_bytes(samples.encode(samples.pixels(1, 8, 8)[0]))
        case "class":
            image.unlink()
        case "stranger":
            (cats.parents[1] / "test" / "owl").mkdir()
        case "bomb":
            head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\0\0\0"
            image.write_bytes(head + b"\0" * 40)


FOLDERS = cases(
    "folders of images",
    "data folder:images",
    {
        "an empty image": ("empty", "0.png does not decode"),
        "several sizes": ("sizes", "several sizes … --set dataset.options.size=224"),
        "a class of test alone": ("stranger", "class 'owl' … is not among the 2 classes of train"),
    },
    make=change_images,
)


def two_tables(folder: Path, contents: tuple[str, str]) -> None:
    (folder / "mine").mkdir()
    for split, text in zip(("train", "test"), contents, strict=True):
        (folder / "mine" / f"{split}.csv").write_text(text)


TWO_FILES = cases(
    "two tables",
    "data table:mine",
    {
        "other columns": (("a,label\n1,0\n", "b,label\n1,0\n"), "the columns of … test.csv' are not those of"),
        "another order of columns": (("a,b,label\n1,2,0\n", "b,a,label\n1,2,0\n"), "the columns of"),
        "a class that train lacks": (("a,label\n1,x\n", "a,label\n1,y\n"), "unknown class of the test rows 'y'"),
    },
    make=two_tables,
)


def write_coreset(folder: Path, columns: dict[str, Any]) -> None:
    pq.write_table(pa.table(columns), folder / "mine.parquet")


CORESETS = cases(
    "a coreset file",
    "train --model linear --train.epochs 1 --coreset mine.parquet",
    {
        "no weights": ({"index": [1]}, "needs columns index and weight, has index"),
        "no columns": ({}, "needs columns index and weight"),
        "indices that are texts": ({"index": ["1"], "weight": [1.0]}, "column index is string"),
        "indices that are dates": ({"index": pa.array([1], pa.date32()), "weight": [1.0]}, "column index is date32"),
    },
    make=write_coreset,
)

FOREIGN_CORESETS = cases(
    "a coreset file of others",
    "train --model linear --train.epochs 1 --coreset mine.parquet",
    {
        "empty": (b"", "mine.parquet"),
        "text": (b"index,weight\n1,1\n", "mine.parquet"),
        "only magic": (b"PAR1PAR1", "mine.parquet"),
    },
    into="mine.parquet",
)


def write_facts(folder: Path, facts: str) -> None:
    table = pa.table({"index": np.arange(9), "weight": np.ones(9)}).replace_schema_metadata({"effray": facts})
    pq.write_table(table, folder / "mine.parquet")


FACTS = cases(
    "the origin in a coreset file",
    "train --model linear --train.epochs 1 --coreset mine.parquet",
    {
        '{"samples": 9}': "was made for 9 samples, this data set has 1437",
        '{"dataset": "others"}': "was made for others, this data set is digits",
        '{"dataset": 3}': "was made for 3, this data set is digits",
    },
    make=write_facts,
)

SAMPLES_ALONE = cases(
    "dataset.only",
    "crest --model linear --dataset.only {}",
    {
        "few.parquet": "2 of the 20 samples in … few.parquet are held out here",
        "runs/lipt/l/scores.parquet": "needs columns index and weight",
        "runs/lipt/l": "runs/lipt/l",
    },
)
