"""Bad input in data: tables, sparse rows, parquet, folders of images, the options of sources, coreset files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import samples
from attacks.cases import cases

IMAGES = [samples.encode(image) for image in samples.pixels(6)]
LABELS = [0, 1, 2, 0, 1, 2]
WIDE, TIFF = (samples.encode(np.full((6, 5, 1), 70_000, kind), "TIFF") for kind in (np.int32, np.float32))
BOMB = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\x7f\xff\xff\xff" * 2 + b"\x08\x02" + b"\0" * 43
LARGE = samples.encode(np.zeros((10_000, 10_000, 1), np.uint8))  # more than Pillow decodes without a warning

SOURCES = cases(
    "sources of data",
    "data {}",
    {
        "mnist:s3://bucket/mnist": "MNIST is read from a local folder, not from 's3://bucket/mnist'",
        "table": "needs one of train.parquet and train.csv",
        "table:nope.csv": "'nope.csv' does not exist",
        "fashionmnist:/dev/null/x": "cannot fetch FashionMNIST into '/dev/null/x'",
    },
)

MEMORY = cases(
    "the limit of memory",
    "data table:rows.csv",
    dict.fromkeys(("4 GiB", "nan"), "EFFRAY_MEMORY = … must be a number above 0"),
    variable="EFFRAY_MEMORY",
)

NUMBERS = cases(
    "numbers that float64 rounds",
    "data table:mine.csv",
    {
        "labels of more than 64 bits": (f"a,label\n1,{2**63}\n2,{2**63 + 1}\n", f"'label' … holds {2**63 + 1}, which"),
        "features of more than 64 bits": (f"a,label\n{2**63 + 1},0\n1,1\n", f"'a' … holds {2**63 + 1}, which"),
        "among fractions": (f"a,label\n1,0.5\n2,-{2**53 + 1}\n", f"'label' … holds -{2**53 + 1}, which"),
    },
    into="mine.csv",
)

SPARSE = cases(
    "sparse rows",
    "data libsvm:mine.svm",
    {
        f"{2**53 + 1} 1:1\n{2**53} 1:2\n": f"line 1 … '{2**53 + 1}', needed is a number, the label, up to 9,007,",
        "1e300 1:1\n": "needed is a number, the label, up to",
    },
    into="mine.svm",
)


def write_mnist(folder: Path, contents: tuple[bytes, bytes]) -> None:
    raw = folder / "mine/MNIST/raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        for name, content in zip(("images-idx3", "labels-idx1"), contents, strict=True):
            (raw / f"{split}-{name}-ubyte").write_bytes(content)


def idx(*sizes: int, values: bytes) -> bytes:
    return bytes([0, 0, 8, len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes) + values


MNIST_IMAGES = idx(4, 28, 28, values=bytes(4 * 28 * 28))
MNIST = cases(
    "files of MNIST",
    "data mnist:mine",
    {
        "no images": ((b"", b""), "cannot fetch MNIST into 'mine' ("),
        "fewer labels": ((MNIST_IMAGES, idx(3, values=bytes(3))), "4 images and 3 labels up to 0"),
        "a label beyond the classes": ((MNIST_IMAGES, idx(4, values=b"\0\1\2\xff")), "4 images and 4 labels up to 255"),
    },
    make=write_mnist,
)

TEXTS = cases(
    "texts",
    "data text:mine.jsonl",
    {
        "a text that is not UTF-8": (b'{"text": "a\xff", "label": 0}\n', "mine.jsonl' cannot be read: … Invalid UTF8"),
        "a label that is not UTF-8": (b'{"text": "a", "label": "\xff"}\n', "mine.jsonl' cannot be read: … Invalid"),
        "values nested deeper than a stack": (
            '{"text": "[[", "label": 0, "z": ' + '{"a":' * 20_000 + "1" + "}" * 20_001 + "\n",
            "mine.jsonl' has values nested more than 32 deep",
        ),
        "no text besides the label": (b'{"label": "a"}\n', "none of the usual columns of texts among label"),
    },
    into="mine.jsonl",
)

OPTIONS = cases(
    "options of sources",
    "{}",
    {
        "data table:rows.csv --set label=Label": "unknown label column of 'rows.csv' 'Label', did you mean 'label'",
        "data text:rows.csv --set label=a": "none of the usual columns of texts",
        "data table:rows.csv --set test=0.999": "leaves no train samples of the 40",
        "data folder:images --set size=big": "folder option size = 'big'",
        "data folder:images --set size=99999999999999999999": "option size = … less than or equal to 65536",
        "data parquet:set --set size=100000": "size = 100000",
        "data libsvm:rows.libsvm --set columns=2000000000": "dense rows of 2,000,000,000 columns … needed is",
    },
)

CUT = {"cut short": (b"BZh91AY&SY\x00\x01", "mine.bz2")}
PACKED = cases("packed sparse rows", "data libsvm:mine.bz2", CUT, into="mine.bz2")


def write_images(folder: Path, columns: dict[str, Any]) -> None:
    (folder / "mine").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table(columns), folder / "mine" / f"{split}.parquet")


PARQUET = cases(
    "images in parquet",
    "data parquet:mine",
    {
        "two image columns": ({"a": IMAGES, "b": IMAGES, "label": LABELS}, "several image columns among a, b"),
        "labels that are texts": ({"image": IMAGES, "label": list("abcabc")}, "label column 'label' … is string"),
        "labels that are floats": ({"image": IMAGES, "label": [0.0] * 6}, "label column 'label' … is double"),
    },
    make=write_images,
)


def overwrite_parquet(folder: Path, content: bytes) -> None:
    for file in (folder / "set").iterdir():
        file.write_bytes(content)


PARQUET_FILES = cases(
    "parquet files",
    "data parquet:set",
    {
        "empty": (b"", "'set/train.parquet' cannot be read: Parquet"),
        "text": (b"a,b\n1,2\n" * 100, "'set/train.parquet' cannot be read: Parquet"),
    },
    make=overwrite_parquet,
)


def write_image(folder: Path, image: tuple[str, bytes]) -> None:
    name, content = image
    file = folder / "images/train/cat" / name
    file.write_bytes(content) if content or name == "0.png" else file.symlink_to("nowhere")


FOLDERS = cases(
    "folders of images",
    "data folder:images",
    {
        "an empty image": (("0.png", b""), "0.png does not decode"),
        "a large image": (("0.png", LARGE), "0.png is too large to decode … 100000000 pixels … EFFRAY_MEMORY raises"),
        "a format that runs a program": (("0.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "0.png does"),
        "pixels of 32 bits": (("0.png", WIDE), "0.png does not decode … its pixels are not of 8 or 16 bits"),
        "a class that leads nowhere": (("../owl", b""), "images/train/owl' is no folder: a link that leads nowhere"),
        "a bomb": (("0.png", BOMB), "0.png"),
    },
    make=write_image,
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


def write_facts(folder: Path, facts: str) -> None:
    table = pa.table({"index": np.arange(9), "weight": np.ones(9)}).replace_schema_metadata({"effray": facts})
    pq.write_table(table, folder / "mine.parquet")


FACTS = cases(
    "the origin in a coreset file",
    "train --model linear --train.epochs 1 --coreset mine.parquet",
    {
        '{"samples": 9}': "was made for 9 samples, this data set has 1437",
        '{"samples": "many"}': "mine.parquet is damaged: samples = 'many': input should be a valid integer",
        "[]": "the metadata of … mine.parquet is damaged: input should be an object",
    },
    make=write_facts,
)
