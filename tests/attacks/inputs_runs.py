"""Bad input in run folders: each file missing, empty, cut short, changed or another's; and requests to DeltaGrad."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from attacks.cases import cases

JSONS = ("cut", "{}", "[1, 2]", "a folder")
CONTENTS = {
    "empty": b"",
    "text": b"something else\n",
    "not UTF-8": b"\xff\xfe\x00",
    "zero bytes": b"\0" * 100,
    "only magic": b"PAR1PAR1",
    "nested brackets": b"x = " + b"[" * 5000,
}


def damage(folder: Path, damaged: tuple[str, str]) -> None:
    """Damage a file: the name of how, or the name of the file that takes its place, or its new content."""
    name, how = damaged
    file = folder / "runs" / name
    content = file.read_bytes() if file.is_file() else b""
    middle = len(content) // 2
    match how:
        case "gone":
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        case "a folder":
            file.unlink()
            file.mkdir()
        case "cut":
            file.write_bytes(content[:middle])
        case "cut at a line":
            file.write_bytes(content[: content.index(b"\n[")])
        case "one bit flipped":
            file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        case "longer":
            file.write_bytes(content + b"\0")
        case "without its first line":
            file.write_bytes(content.partition(b"\n")[2])
        case "with a line twice":
            file.write_bytes(content * 2)
        case how if (folder / "runs" / how).is_file():
            file.write_bytes((folder / "runs" / how).read_bytes())
        case _:
            file.write_bytes(CONTENTS.get(how, how.encode()))


def each(file: str, damages: Iterable[str], says: str = "") -> dict[str, Any]:
    """Return the cases of a file that is damaged in some ways: what is said names it."""
    return {f"{file} {how}": ((file, how), says or Path(file).name) for how in damages}


SETTINGS = ("gone", "cut at a line", "not UTF-8", "nested brackets", "a folder")

RESUMED = cases(
    "resuming a stopped run",
    "train --resume stopped",
    {
        **each("train/stopped/config.toml", SETTINGS),
        **each("train/stopped/config.toml", ["seed = -1"], "seed"),
        **each("train/stopped/config.toml", ["lipt/l/config.toml"], "unknown setting"),
        **each("train/stopped/metrics.parquet", ["cut", "only magic", "lipt/l/scores.parquet"]),
    },
    make=damage,
)

FINISHED_PHASES = cases(
    "resuming a run between phases",
    "lipt --resume halfway",
    {
        **each("lipt/halfway/phases/pretrain.json", JSONS),
        **each("lipt/halfway/pretrained.safetensors", ["gone", "one bit flipped", "train/t/model.safetensors"]),
        **each("lipt/halfway/coreset.parquet", ["cut", "select/sel/coreset.parquet"]),
        **each("lipt/halfway/scores.parquet", ["gone"]),
        **each("lipt/halfway/model.safetensors", ["longer"]),
    },
    make=damage,
)

SHOWN = cases(
    "showing a run",
    "show t",
    {
        **each("train/t/summary.json", JSONS),
        **each("train/t/metrics.parquet", ["cut", "lipt/l/coreset.parquet"]),
    },
    make=damage,
)


COMPARED = cases(
    "comparing runs",
    "show l --against sel",
    {
        **each("lipt/l/coreset.parquet", ["gone", "cut"]),
        **each("lipt/l/scores.parquet", ["lipt/l/coreset.parquet"]),
        **each("select/sel/summary.json", ["gone"], "sel is not finished"),
    },
    make=damage,
)

EXPORTED = cases(
    "exporting a run",
    "export sp",
    {
        **each("sparse/sp/model.safetensors", ["gone", "one bit flipped", "a folder"]),
        **each("sparse/sp/config.toml", ["train/t/config.toml"], "sp/model.safetensors does not fit"),
        **each("sparse/sp/summary.json", ["gone"], "run 'sp' is not finished"),
    },
    make=damage,
)

NOT_EXPORTED = cases(
    "exporting",
    "export {}",
    {
        "nope": "unknown run in runs 'nope'",
        "sel": "select trains no model",
        "stopped": "run 'stopped' is not finished",
    },
)

SELECTING = cases(
    "selecting with a run",
    "select --model-from t --rule grand",
    {
        **each("train/t/model.safetensors", ["gone", "one bit flipped", "lipt/l/model.safetensors"]),
        **each("train/t/model_record.parquet", ["cut", "lipt/l/coreset.parquet"]),
    },
    make=damage,
)

RECORDED = {
    **each("deltagrad/dg/log.jsonl", ["gone"], "dg"),
    **each("deltagrad/dg/log.jsonl", ["cut", "one bit flipped", "with a line twice"]),
    **each("deltagrad/dg/rows.parquet", ["gone", "lipt/l/coreset.parquet"]),
    **each("deltagrad/dg/model.safetensors", ["one bit flipped"]),
    **each("deltagrad/dg/config.toml", ["seed = 3"]),
    **each("deltagrad/dg/config.toml", ["train/t/config.toml"], "DeltaGrad is derived for SGD without momentum"),
    **each("deltagrad/dg/versions/00000/history.arrow", ["one bit flipped", "longer"], "history"),
    **each("deltagrad/dg/versions/00000/history.digests", ["gone"], "history"),
    **each("deltagrad/dg/versions", ["gone"], "history"),
}
LOGS = cases("the log of a run", "deltagrad log dg", RECORDED, make=damage)
LOST_OR_CHANGED = {name: case for name, case in RECORDED.items() if name.endswith((" gone", " one bit flipped"))}
DELETIONS = cases("deleting from a run", "deltagrad delete dg --ids 3 --period 1", LOST_OR_CHANGED, make=damage)

IDS = cases(
    "ids",
    "deltagrad delete dg --ids={}",
    {
        "9223372036854775807": "id 9223372036854775807 is unknown, allowed are 0 … 1436",
        "1437": "id 1437 is unknown, allowed are 0 … 1436",
        "3,3": "id 3 is given 2 times",
        "nowhere.txt": "'nowhere.txt' (no such file)",
        "set/train.parquet": "unknown id column of 'set/train.parquet'",
    },
)

ID_FILES = cases(
    "a file of ids",
    "deltagrad delete dg --ids mine.txt",
    {
        "": "mine.txt",
        "\n\n": "holds no ids",
        "3\n3\n": "id 3 is given 2 times",
    },
    into="mine.txt",
)


def write_ids(folder: Path, values: Any) -> None:
    pq.write_table(pa.table({"id": values}), folder / "mine.parquet")


ID_TABLES = cases(
    "a table of ids",
    "deltagrad delete dg --ids mine.parquet",
    {
        "nulls": ([3, None], "None is no id"),
        "booleans": ([True], "True is no id"),
        "a million of one": (pa.array([3] * 1_000_000), "id 3 is given 1000000 times"),
    },
    make=write_ids,
)

RESTORED = cases(
    "ids to put back",
    "deltagrad add dg --ids={}",
    {"3": "id 3 is in use already", "99999": "id 99999 is unknown", "3,3": "id 3 is given 2 times"},
)

CONDITIONS = cases(
    "a condition",
    "deltagrad delete table --where={}",
    {
        "label": "condition 'label' is not of the form",
        "label = 7": "unknown class '7' … Allowed: 0, 1",
        "label > 0": "labels compare with = and != only",
        "A > 3": "unknown name in a condition 'A' … Allowed: a, b, label",
        "a > 3; drop table": "a > '3; drop table': this is no number",
    },
)

ADDED = cases(
    "new samples",
    "deltagrad add dg --data={}",
    {
        "digts": "unknown dataset 'digts', did you mean 'digits'",
        ":": "unknown dataset or module ':'",
        "nothing:here": "unknown dataset or module 'nothing:here'",
    },
)

QUEUES = cases(
    "a queue",
    "deltagrad stream dg mine.jsonl",
    {
        '{"id": "a"}': "line 1 … must be an object with one of delete",
        '{"delete": [3], "id": ""}': "line 1 … the id must be a text … not ''",
        '{"delete": [9999], "id": "a"}': "request 'a': delete: id 9999 is unknown",
        '{"delete": [3, 3], "id": "a"}': "request 'a': delete: id 3 is given 2 times",
        '{"restore": [3], "id": "a"}': "request 'a': restore: id 3 is in use already",
    },
    into="mine.jsonl",
)

QUEUE_FILES = cases(
    "the queue",
    "deltagrad stream dg {}",
    {
        "nowhere": "the queue 'nowhere' cannot be read",
        "runs": "the queue 'runs'",
        "": "the queue",
    },
)

UNRECORDED = cases(
    "a run without history",
    "{}",
    {
        "deltagrad delete t --ids 3": "run 't' has no recorded history",
        "deltagrad verify sel": "run 'sel' has no recorded history",
        "deltagrad stream stopped queue": "run 'stopped' has no recorded history",
    },
)

SWEEP_FILES = {
    **each("tune/sweep/sweep.json", JSONS, "sweep"),
    **each("tune/sweep/sweep.json", ['{"order": 3, "trials": []}'], "sweep"),
}
RESUMED_SWEEPS = cases(
    "resuming a sweep",
    "tune crest --resume sweep",
    {
        **each("tune/sweep/sweep.json", ["gone"], "sweep"),
        **SWEEP_FILES,
        **each("tune/sweep/config.toml", ["lipt/l/config.toml"], "unknown setting"),
        **each("tune/sweep/space.py", ["gone", "text"]),
    },
    make=damage,
)
SHOWN_SWEEPS = cases("showing a sweep", "show sweep", SWEEP_FILES, make=damage)
