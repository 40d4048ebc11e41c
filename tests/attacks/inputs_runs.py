"""Bad input in run folders: each file missing, empty, cut short, changed or another's; and requests to DeltaGrad."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from attacks.cases import cases

JSONS = ("empty", "cut", "text", "not UTF-8", "{}", "[1, 2]", "null", "3", "a folder")
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


SETTINGS = ("gone", "empty", "cut", "cut at a line", "text", "not UTF-8", "nested brackets", "a folder")
FEWER_SETTINGS = ("gone", "cut at a line", "a folder")  # where they are read by the same function

RESUMED = cases(
    "resuming a stopped run",
    "train --resume stopped",
    {
        **each("train/stopped/config.toml", SETTINGS),
        **each("train/stopped/config.toml", ["seed = -1", "seed = true"], "seed"),
        **each("train/stopped/config.toml", ["train = 3", "model = 3"], "= 3"),
        **each(
            "train/stopped/config.toml", ["sed = 1", "lipt/l/config.toml", "tune/sweep/config.toml"], "unknown setting"
        ),
        **each(
            "train/stopped/metrics.parquet", ["empty", "cut", "text", "only magic", "a folder", "lipt/l/scores.parquet"]
        ),
    },
    make=damage,
)

FINISHED_PHASES = cases(
    "resuming a run between phases",
    "lipt --resume halfway",
    {
        **each("lipt/halfway/phases/pretrain.json", JSONS),
        **each("lipt/halfway/phases/select.json", ["{}", "[1, 2]"]),
        **each("lipt/halfway/pretrained.safetensors", ["gone", "empty", "cut", "one bit flipped", "longer", "text"]),
        **each("lipt/halfway/pretrained.safetensors", ["train/t/model.safetensors"]),
        **each("lipt/halfway/coreset.parquet", ["gone", "empty", "cut", "one bit flipped", "text"]),
        **each("lipt/halfway/coreset.parquet", ["select/sel/coreset.parquet"]),
        **each("lipt/halfway/scores.parquet", ["gone", "cut", "text"]),
        **each("lipt/halfway/model.safetensors", ["gone", "empty", "cut", "one bit flipped", "text"]),
        **each("lipt/halfway/config.toml", FEWER_SETTINGS),
    },
    make=damage,
)

SHOWN = cases(
    "showing a run",
    "show t",
    {
        **each("train/t/summary.json", JSONS),
        **each("train/t/summary.json", ["lipt/l/environment.json"]),
        **each("train/t/metrics.parquet", ["empty", "cut", "text", "lipt/l/coreset.parquet"]),
    },
    make=damage,
)


COMPARED = cases(
    "comparing runs",
    "show l --against sel",
    {
        **each("lipt/l/coreset.parquet", ["gone", "empty", "cut", "text", "train/t/metrics.parquet"]),
        **each("lipt/l/scores.parquet", ["empty", "cut", "text", "train/t/metrics.parquet"]),
        **each("lipt/l/scores.parquet", ["lipt/l/coreset.parquet"]),
        **each("select/sel/summary.json", ["gone"], "sel is not finished"),
        **each("select/sel/summary.json", ["{}", "[1, 2]"]),
    },
    make=damage,
)

EXPORTED = cases(
    "exporting a run",
    "export sp",
    {
        **each(
            "sparse/sp/model.safetensors", ["gone", "empty", "cut", "one bit flipped", "longer", "text", "a folder"]
        ),
        **each("sparse/sp/model.safetensors", ["train/t/model.safetensors"]),
        **each("sparse/sp/config.toml", SETTINGS),
        **each("sparse/sp/config.toml", ["train/t/config.toml"], "sp/model.safetensors does not fit"),
        **each("sparse/sp/summary.json", ["gone"], "run 'sp' is not finished"),
        **each("sparse/sp/summary.json", JSONS),
    },
    make=damage,
)

NOT_EXPORTED = cases(
    "exporting",
    "export {}",
    {
        "nope": "unknown run in runs 'nope'",
        "t": "is dense",
        "dg": "is dense",
        "sel": "select trains no model",
        "stopped": "run 'stopped' is not finished",
        "sweep": "sweep",
        "": "unknown run",
        "runs/sparse": "unknown run",
    },
)

SELECTING = cases(
    "selecting with a run",
    "select --model-from t --rule grand",
    {
        **each(
            "train/t/model.safetensors", ["gone", "empty", "cut", "one bit flipped", "text", "lipt/l/model.safetensors"]
        ),
        **each("train/t/model_record.parquet", ["empty", "cut", "text"]),
        **each("train/t/model_record.parquet", ["lipt/l/coreset.parquet"]),
        **each("train/t/config.toml", FEWER_SETTINGS),
        **each("train/t/summary.json", ["{}", "[1, 2]", "cut"]),
    },
    make=damage,
)

RECORDED = {
    **each("deltagrad/dg/log.jsonl", ["gone", "empty"], "dg"),
    **each("deltagrad/dg/log.jsonl", ["cut", "one bit flipped", "text", "not UTF-8", "{}", "[1, 2]", "a folder"]),
    **each("deltagrad/dg/log.jsonl", ["with a line twice"]),
    **each("deltagrad/dg/rows.parquet", ["gone", "empty", "cut", "text"]),
    **each("deltagrad/dg/rows.parquet", ["lipt/l/coreset.parquet"]),
    **each("deltagrad/dg/model.safetensors", ["gone", "empty", "one bit flipped", "train/t/model.safetensors"]),
    **each("deltagrad/dg/config.toml", FEWER_SETTINGS),
    **each("deltagrad/dg/config.toml", ["seed = 3"]),
    **each("deltagrad/dg/config.toml", ["train/t/config.toml"], "DeltaGrad is derived for SGD without momentum"),
    **each(
        "deltagrad/dg/versions/00000/history.arrow", ["gone", "empty", "cut", "one bit flipped", "longer"], "history"
    ),
    **each("deltagrad/dg/versions/00000/history.digests", ["gone", "empty", "cut", "one bit flipped"], "history"),
    **each("deltagrad/dg/versions", ["gone"], "history"),
}
LOGS = cases("the log of a run", "deltagrad log dg", RECORDED, make=damage)
LOST_OR_CHANGED = {name: case for name, case in RECORDED.items() if name.endswith((" gone", " one bit flipped"))}
DELETIONS = cases("deleting from a run", "deltagrad delete dg --ids 3 --period 1", LOST_OR_CHANGED, make=damage)

IDS = cases(
    "ids",
    "deltagrad delete dg --ids={}",
    {
        "": "''",
        " ": "' '",
        "-1": "-1",
        "1.5": "1.5",
        "3,": "3,",
        ",3": ",3",
        "3,,4": "3,,4",
        "3, 4": "3, 4",
        "3-5": "3-5",
        "0x10": "0x10",
        "1e3": "1e3",
        "٣": "٣",
        "9223372036854775807": "id 9223372036854775807 is unknown, allowed are 0 … 1436",
        "9223372036854775808": "9223372036854775808",
        "1437": "id 1437 is unknown, allowed are 0 … 1436",
        "3,3": "id 3 is given 2 times",
        "nowhere.txt": "'nowhere.txt' (no such file)",
        ".": "'.'",
        "rows.csv": "rows.csv",
        "rows.parquet": "rows.parquet",
        "few.csv.parquet": "few.csv.parquet",
        "set/train.parquet": "unknown id column of 'set/train.parquet'",
        "runs": "runs",
        "\x7f": "ids",
        "9" * 5000: "ids",
    },
)

ID_FILES = cases(
    "a file of ids",
    "deltagrad delete dg --ids mine.txt",
    {
        "": "mine.txt",
        "\n\n": "holds no ids",
        "3\nx\n": "'x'",
        "3\n-4\n": "-4",
        "3\n1.5\n": "1.5",
        "3,4\n": "3,4",
        "id\n3\n": "'id'",
        "3\n3\n": "id 3 is given 2 times",
        "9" * 30: "mine.txt",
        "9" * 5000: "mine.txt",
        "1_000": "1_000",
        "٣": "٣",
        "no text": (b"\xff\xfe\x00", "mine.txt"),
    },
    into="mine.txt",
)


def write_ids(folder: Path, values: Any) -> None:
    pq.write_table(pa.table({"id": values}), folder / "mine.parquet")


ID_TABLES = cases(
    "a table of ids",
    "deltagrad delete dg --ids mine.parquet",
    {
        "none": (pa.array([], pa.int64()), "holds no ids"),
        "nulls": ([3, None], "None is no id"),
        "floats": ([3.0], "3.0 is no id"),
        "booleans": ([True], "True is no id"),
        "lists": ([[3]], "[3] is no id"),
        "texts": (["x"], "'x'"),
        "2⁶³": (pa.array([2**63], pa.uint64()), "mine.parquet"),
        "a million of one": (pa.array([3] * 1_000_000), "id 3 is given 1000000 times"),
    },
    make=write_ids,
)

RESTORED = cases(
    "ids to put back",
    "deltagrad add dg --ids={}",
    {"3": "id 3 is in use already", "99999": "id 99999 is unknown", "": "''", "3,3": "id 3 is given 2 times"},
)

CONDITIONS = cases(
    "a condition",
    "deltagrad delete table --where={}",
    {
        "": "condition ''",
        " ": "condition",
        "label": "condition 'label' is not of the form",
        "label =": "condition 'label ='",
        "= 1": "condition '= 1'",
        "label == 1": "unknown class '= 1'",
        "label = 7": "unknown class '7' … Allowed: 0, 1",
        "label > 0": "labels compare with = and != only",
        "label = '1'": "unknown class",
        "A > 3": "unknown name in a condition 'A' … Allowed: a, b, label",
        "a > x": "a > 'x': this is no number",
        "a > 3 and": "condition",
        "and a > 3": "condition",
        "a > 3 or b > 4": "condition",
        "a > 3 and c > 4": "unknown name in a condition 'c'",
        "a > 1e400": "1e400",
        "a > nan": "nan",
        "a < -inf": "inf",
        "a > 99": "no sample in use meets 'a > 99'",
        "a >= 0": "this would delete every sample",
        "label = 1": "would delete the whole class '1'",
        "a > 3; drop table": "a > '3; drop table': this is no number",
        "a > 3 " + "and a > 3 " * 5000 + "and": "condition",
        "((a > 3))": "unknown name in a condition",
        "a\x7f > 3": "unknown name in a condition",
    },
)

ADDED = cases(
    "new samples",
    "deltagrad add dg --data={}",
    {
        "": "unknown dataset ''",
        "digts": "unknown dataset 'digts', did you mean 'digits'",
        "table:rows.csv": "shape",
        "table:nowhere.csv": "nowhere.csv",
        "folder:images": "shape",
        "parquet:set": "shape",
        "libsvm:rows.libsvm": "rows.libsvm' has column 3",
        ":": "unknown dataset or module ':'",
        "nothing:here": "unknown dataset or module 'nothing:here'",
    },
)

QUEUES = cases(
    "a queue",
    "deltagrad stream dg mine.jsonl",
    {
        "[]": "line 1 … must be an object",
        "3": "line 1 … must be an object",
        "null": "line 1 … must be an object",
        "{": "line 1 … is not JSON",
        "{}": "line 1 … must be an object",
        "delete 3": "line 1 … is not JSON",
        '{"delete": [3]}': "line 1 … an id of its own",
        '{"id": "a"}': "line 1 … must be an object with one of delete",
        '{"delete": [3], "id": ""}': "line 1 … the id must be a text … not ''",
        '{"delete": [3], "id": null}': "line 1",
        '{"delete": [3], "id": true}': "line 1 … id",
        '{"delete": [3], "id": ["a"]}': "line 1 … id",
        '{"delete": [3], "id": {"a": 1}}': "line 1 … id",
        '{"remove": [3], "id": "a"}': "line 1",
        '{"delete": 3, "id": "a"}': "line 1 … takes a list of ids, not 3",
        '{"delete": [], "id": "a"}': "line 1 … takes a list of ids, not []",
        '{"delete": ["3"], "id": "a"}': "line 1 … takes a list of ids",
        '{"delete": [true], "id": "a"}': "line 1 … takes a list of ids",
        '{"delete": [1.0], "id": "a"}': "line 1 … takes a list of ids",
        '{"delete": [[3]], "id": "a"}': "line 1 … takes a list of ids",
        '{"delete": [NaN], "id": "a"}': "line 1",
        '{"delete": [9223372036854775808], "id": "a"}': "line 1 … takes a list of ids",
        '{"delete": [9999], "id": "a"}': "request 'a': delete: id 9999 is unknown",
        '{"delete": [3, 3], "id": "a"}': "request 'a': delete: id 3 is given 2 times",
        '{"restore": [3], "id": "a"}': "request 'a': restore: id 3 is in use already",
        '{"delete": [3], "delete": [4], "id": "a"}': "line 1 … a name occurs twice",
        '{"delete": [3], "restore": [4], "id": "a"}': "line 1",
        '{"delete_where": 3, "id": "a"}': "line 1 … takes a text, not 3",
        '{"delete_where": "x", "id": "a"}': "request 'a': condition 'x'",
        '{"add": ["digits"], "id": "a"}': "line 1 … takes a text",
        '{"add": "digts", "id": "a"}': "request 'a': unknown dataset 'digts'",
        '{"delete": [3], "id": "a"}\n{"delete": [4], "id": "a"}': "has the id 'a' 2 times",
        '{"delete": [3], "id": "a"}\n\n{"delete"': "line 3 … is not JSON",
        "nested brackets": ('{"delete": ' + "[" * 100_000, "line 1"),
        "a number of 5000 digits": ('{"delete": [' + "9" * 5000 + '], "id": "a"}', "line 1"),
        "no text": (b"\xff\xfe\x00", "mine.jsonl"),
        "zero bytes": (b"\0" * 50, "line 1"),
    },
    into="mine.jsonl",
)

QUEUE_FILES = cases(
    "the queue",
    "deltagrad stream dg {}",
    {"nowhere": "the queue 'nowhere' cannot be read", "runs": "the queue 'runs'", "": "the queue", ".": "the queue"},
)

UNRECORDED = cases(
    "a run without history",
    "{}",
    {
        "deltagrad delete t --ids 3": "run 't' has no recorded history",
        "deltagrad verify sel": "run 'sel' has no recorded history",
        "deltagrad log sweep": "sweep",
        "deltagrad log nope": "unknown run in runs 'nope'",
        "deltagrad log ''": "unknown run",
        "deltagrad stream stopped queue": "run 'stopped' has no recorded history",
        "deltagrad add l --data digits": "run 'l' has no recorded history",
        "deltagrad verify runs/deltagrad": "unknown run",
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
        **each("tune/sweep/config.toml", SETTINGS),
        **each("tune/sweep/config.toml", ["lipt/l/config.toml"], "unknown setting"),
        **each("tune/sweep/space.py", ["gone", "empty", "text", "not UTF-8", "a folder"]),
    },
    make=damage,
)
SHOWN_SWEEPS = cases("showing a sweep", "show sweep", SWEEP_FILES, make=damage)
