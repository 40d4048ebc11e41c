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
        "": "unknown dataset ''",
        ":": "unknown dataset or module ':'",
        ":x": "unknown dataset or module ':x'",
        "digits:x": "takes no path",
        "table": "needs one of train.parquet and train.csv",
        "table:nowhere": "table 'nowhere' is not a file",
        "table:queue": "'queue' is not a file with one of the endings",
        "table:images": "needs one of train.parquet",
        "table:/dev/null": "not a file",
        "table:\x00": "table",
        "table:" + "x" * 300: "table",
        "libsvm:nowhere": "is not a file with one of the endings",
        "libsvm:rows.csv": "is not a file with one of the endings",
        "libsvm:images": "needs one of train.libsvm",
        "parquet:nowhere": "parquet path 'nowhere' does not exist",
        "parquet:rows.csv": "has no train split",
        "parquet:images": "has no train split … no parquet file",
        "parquet:set/train.parquet": "has no test split",
        "folder:nowhere": "has no train split",
        "folder:rows.csv": "has no train split",
        "folder:set": "has no train split",
        "folder:images/train": "has no train split",
        "cifar10:rows.csv": "cannot fetch CIFAR10 into 'rows.csv'",
        "cifar10:/proc/x": "cannot fetch CIFAR10 into '/proc/x'",
        "mnist:/dev/null": "cannot fetch MNIST into '/dev/null'",
        "fashionmnist:/dev/null/x": "cannot fetch FashionMNIST into '/dev/null/x'",
    },
)

TABLE_OPTIONS = cases(
    "an option of a table",
    "data table:rows.csv --set {}",
    {
        "label=": "unknown label column of 'rows.csv' ''",
        "label=Label": "unknown label column of 'rows.csv' 'Label', did you mean 'label'",
        "label=3": "table option label = 3",
        "label=[1]": "table option label",
        "label": "is not of the form KEY=VALUE",
        "=": "is not of the form KEY=VALUE",
        "test=1": "table option test = 1",
        "test=-1": "table option test = -1",
        "test=nan": "table option test = nan … finite",
        "test=0.999": "leaves no train samples of the 40",
        "test=0": "leaves no test samples of the 40",
        "split=test": "unknown table option 'split'",
        "cache=x": "unknown table option 'cache'",
        "label.x=3": "unknown table option 'label.x'",
    },
)

SIZES = cases(
    "the size of images",
    "data folder:images --set size={}",
    {
        "-1": "folder option size = -1",
        "1.5": "folder option size = 1.5",
        "big": "folder option size = 'big'",
        "true": "folder option size = True",
        "100000": "size = 100000",
        "1000000000": "size = 1000000000",
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
        "0": "libsvm option columns = 0",
        "2": "option columns = 2, but 'rows.libsvm' has column 3",
        "x": "libsvm option columns = 'x'",
        "2000000000": "dense rows of 2,000,000,000 columns in 'rows.libsvm' … needed is",
        "2147483648": "dense rows of 2,147,483,648 columns in 'rows.libsvm' … needed is",
        "99999999999999999999": "option columns = '99999999999999999999' … less than or equal to 2147483648",
    },
)

CSV = cases(
    "a table in CSV",
    "data table:mine.csv",
    {
        "nothing": ("", "mine.csv"),
        "a newline": ("\n", "mine.csv"),
        "only a head": ("a,label\n", "has 0 rows"),
        "one row": ("a,label\n1,0\n", "leaves no"),
        "no label": ("a,b\n1,2\n3,4\n", "unknown label column"),
        "only labels": ("label\n0\n1\n0\n", "3 rows and 0 columns"),
        "a row too short": ("a,b,label\n1,2,0\n1,0\n", "cannot be read"),
        "a row too long": ("a,label\n1,0\n1,2,0\n", "cannot be read"),
        "two columns of one name": ("a,a,label\n" + "1,2,0\n3,4,1\n" * 5, "'a'"),
        "two labels": ("a,label,label\n" + "1,0,0\n2,1,1\n" * 5, "'label'"),
        "a column without a name": ("a,,label\n" + "1,x,0\n" * 6, "column ''"),
        "a text among numbers": ("a,label\n1,0\nx,1\n" * 3, "column 'a' … is string"),
        "a missing value": ("a,label\n" + "1,0\n,1\n" * 3, "column 'a' … no value in line 3"),
        "a missing label": ("a,label\n" + "1,0\n2,\n" * 3, "column 'label' … no value"),
        "NaN": ("a,label\n" + "1,0\nNaN,1\n" * 3, "column 'a' … NaN in line 3"),
        "infinity": ("a,label\n" + "1,0\ninf,1\n" * 3, "column 'a' … inf in line 3"),
        "beyond float32": ("a,label\n" + "1,0\n1e300,1\n" * 3, "column 'a' … 1e+300 in line 3, needed are … float32"),
        "dates": ("a,label\n" + "2020-01-01,0\n2020-01-02,1\n" * 3, "column 'a' … is date32"),
        "booleans": ("a,label\n" + "true,0\nfalse,1\n" * 3, "column 'a' … is bool"),
        "large identifiers": ("a,label\n" + "16777217,0\n16777219,1\n" * 3, "column 'a' … float32 rounds"),
        "an open quote": ('a,label\n"1,0\n2,1\n', "mine.csv"),
        "semicolons": ("a;label\n1;0\n2;1\n", "unknown label column"),
        "UTF-16": ("a,label\n1,0\n".encode("utf-16"), "mine.csv"),
        "no text": (b"\xff\xfe\x00\x01" * 50, "mine.csv"),
        "zero bytes": (b"\0" * 500, "mine.csv"),
        "HTML": ("<html><body>404</body></html>\n", "mine.csv"),
    },
    into="mine.csv",
)

LIBSVM = cases(
    "sparse rows",
    "data libsvm:mine.libsvm",
    {
        "nothing": ("", "has no rows"),
        "only remarks": ("# a\n#b\n\n", "has no rows"),
        "a label that is a text": ("cat 1:1\n", "line 1 … begins with 'cat'"),
        "a label that is NaN": ("nan 1:1\n", "line 1 … begins with 'nan'"),
        "no label": ("1:1 2:2\n", "line 1 … begins with '1:1'"),
        "no value": ("1 1:\n", "line 1 … column:value"),
        "no column": ("1 :1\n", "line 1 … column:value"),
        "no colon": ("1 1\n", "line 1 … column:value"),
        "two colons": ("1 1:1:1\n", "line 1 … column:value"),
        "column 0": ("1 0:1\n", "line 1 … columns must begin at 1"),
        "a negative column": ("1 -1:1\n", "line 1"),
        "falling columns": ("1 2:1 1:1\n", "line 1 … columns must begin at 1 and rise"),
        "a column twice": ("1 2:1 2:1\n", "line 1 … rise"),
        "a column of 2000000000": (
            "0 1:1\n1 2000000000:1\n" * 3,
            "rows of 2,000,000,000 columns in 'mine.libsvm' … needed is",
        ),
        "a column of 100000000": (
            "0 1:1\n1 100000000:1\n" * 3,
            "rows of 100,000,000 columns in 'mine.libsvm' … needed is",
        ),
        "a column beyond 32 bits": ("0 1:1\n1 4294967297:1\n" * 3, "line 2"),
        "NaN": ("1 1:nan\n", "line 1 … NaN"),
        "infinity": ("1 1:1\n0 1:1e60\n", "line 2 … infinity"),
        "no column at all": ("1\n0\n" * 5, "mine.libsvm"),
        "UTF-16": ("1 1:1\n".encode("utf-16"), "mine.libsvm"),
        "no text": (b"\xff\xfe\x00" * 100, "mine.libsvm"),
        "zero bytes": (b"\0" * 100, "mine.libsvm"),
        "one row": ("1 1:1\n", "leaves no"),
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
        "no rows": (({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())},), "no images"),
        "no image column": (({"label": LABELS},), "no image column"),
        "two image columns": (({"a": IMAGES, "b": IMAGES, "label": LABELS},), "several image columns among a, b"),
        "images that are texts": (({"image": ["a"] * 6, "label": LABELS},), "no image column"),
        "images that are null": (({"image": [None, *IMAGES[1:]], "label": LABELS},), "row 0 … has no image"),
        "images that are empty": (({"image": [b"", *IMAGES[1:]], "label": LABELS},), "does not decode"),
        "images cut short": (({"image": [IMAGES[0][:40], *IMAGES[1:]], "label": LABELS},), "does not decode"),
        "no label column": (({"image": IMAGES},), "unknown label column"),
        "labels that are texts": (({"image": IMAGES, "label": list("abcabc")},), "label column 'label' … is string"),
        "labels that are floats": (({"image": IMAGES, "label": [0.0] * 6},), "label column 'label' … is double"),
        "labels that are lists": (({"image": IMAGES, "label": [[0]] * 6},), "label column 'label' … is list"),
        "labels that are booleans": (({"image": IMAGES, "label": [True, False] * 3},), "is bool"),
        "labels that are null": (({"image": IMAGES, "label": [None, *LABELS[1:]]},), "row 0 … has no label"),
        "labels with gaps": (({"image": IMAGES, "label": [0, 2, 0, 2, 0, 2]},), "with gaps"),
        "labels from 1": (({"image": IMAGES, "label": [1, 2, 3] * 2},), "with gaps or not from 0"),
        "negative labels": (({"image": IMAGES, "label": [-1, 0, 1] * 2},), "with gaps or not from 0"),
        "labels beyond int64": (({"image": IMAGES, "label": pa.array([2**63 + 1] * 6, pa.uint64())},), "label"),
        "metadata that is no JSON": (hub("{"), "huggingface"),
        "metadata that is no text": (hub("\udcff".encode(errors="surrogateescape")), "huggingface"),
        "metadata that is a list": (hub("[1]"), "huggingface"),
        "metadata that is a number": (hub("3"), "huggingface"),
        "metadata without features": (hub('{"info": []}'), "huggingface"),
        "features that are a list": (hub('{"info": {"features": [1]}}'), "huggingface"),
        "a feature that is a text": (hub('{"info": {"features": {"label": "x"}}}'), "huggingface"),
        "class names that are a number": (hub(features(3)), "huggingface"),
        "class names that are numbers": (hub(features([1, 2, 3])), "huggingface"),
        "fewer class names than classes": (hub(features(["cat"])), "has label 1"),
        "class names twice": (hub(features(["cat", "cat", "dog"])), "'cat'"),
        "nested brackets": (hub("[" * 100_000), "huggingface"),
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
        "only magic": (b"PAR1PAR1PAR1", "'set/train.parquet' cannot be read: Parquet"),
        "a lying length": (b"PAR1" + b"\xff" * 8 + b"PAR1", "'set/train.parquet' cannot be read: Parquet"),
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
        "a dangling link": ("dangling", "1.png"),
        "a link to itself": ("loop", "1.png"),
        "an empty image": ("empty", "0.png does not decode"),
        "an image cut short": ("cut", "0.png does not decode"),
        "a text": ("text", "0.png does not decode"),
        "several sizes": ("sizes", "several sizes … --set dataset.options.size=224"),
        "a class without images": ("class", "holds no images"),
        "a class of test alone": ("stranger", "class 'owl' … is not among the 2 classes of train"),
        "an image of 2³¹ pixels a side": ("bomb", "0.png"),
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
        "an empty test": (("a,label\n1,0\n", "a,label\n"), "has 0 rows"),
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
        "an index twice": ({"index": [1, 1], "weight": [1.0, 1.0]}, "coreset index 1"),
        "a negative index": ({"index": [-1, 2], "weight": [1.0, 1.0]}, "-1"),
        "an index too large": ({"index": [1437], "weight": [1.0]}, "has index 1437"),
        "an index of 2⁶³": ({"index": pa.array([2**63], pa.uint64()), "weight": [1.0]}, "9223372036854775808"),
        "an index of 2⁶⁴ − 1": ({"index": pa.array([2**64 - 1], pa.uint64()), "weight": [1.0]}, "18446744073709551615"),
        "indices that are texts": ({"index": ["1"], "weight": [1.0]}, "column index is string"),
        "indices that are lists": ({"index": [[1]], "weight": [1.0]}, "column index is list"),
        "indices that are booleans": ({"index": [True], "weight": [1.0]}, "column index is bool"),
        "indices that are dates": ({"index": pa.array([1], pa.date32()), "weight": [1.0]}, "column index is date32"),
        "weights that are 0": ({"index": [1, 2], "weight": [0.0, 0.0]}, "weight"),
        "weights that are NaN": ({"index": [1], "weight": [float("nan")]}, "coreset weight nan"),
        "weights that are infinite": ({"index": [1], "weight": [float("inf")]}, "coreset weight inf"),
        "weights beyond float32": ({"index": [1, 2], "weight": [1e300, 1.0]}, "weight"),
        "weights that are null": ({"index": [1, 2], "weight": [None, 1.0]}, "column weight"),
        "weights that are booleans": ({"index": [1], "weight": [True]}, "column weight is bool"),
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
        '{"samples": "x"}': "samples",
        '{"samples": null}': "samples",
        '{"dataset": "others"}': "was made for others, this data set is digits",
        '{"dataset": 3}': "was made for 3, this data set is digits",
        '{"dataset": ["digits"]}': "was made for",
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
        "queue": "queue",
        "/dev/null": "/dev/null",
    },
)
