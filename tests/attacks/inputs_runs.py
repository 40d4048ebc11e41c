"""Bad input in run folders: each file missing, empty, cut short, changed or another's; and requests to DeltaGrad."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attacks.cases import Cases, cases

JSONS = ("cut", "{}", "[1, 2]", "a folder")


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
        case "not UTF-8":
            file.write_bytes(b"\xff\xfe\x00")
        case "one bit flipped":
            file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        case "nested brackets":
            file.write_text("x = " + "[" * 5000)
        case "longer":
            file.write_bytes(content + b"\0")
        case "with a line twice":
            file.write_bytes(content * 2)
        case how if len(how) < 100 and (folder / "runs" / how).is_file():
            file.write_bytes((folder / "runs" / how).read_bytes())
        case _:
            file.write_text(how)


def each(file: str, damages: Iterable[str], says: str = "") -> dict[str, Any]:
    """Return the cases of a file that is damaged in some ways: what is said names it."""
    return {f"{file} {how}": ((file, how), says or Path(file).name) for how in damages}


SETTINGS = ("gone", "cut at a line", "not UTF-8", "nested brackets", "a folder")

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
LOST_OR_CHANGED = {name: case for name, case in RECORDED.items() if name.endswith((" gone", " one bit flipped"))}
DEEP = "[" * 50_000 + "]" * 50_000  # deeper than a stack


def sweep(trials: Any = ({"settings": {}},), **order: Any) -> str:
    """Return the record of a sweep."""
    whole = {"experiment": "crest", "metric": "accuracy", "mode": "max", "samples": 1, **order}
    return json.dumps({"order": whole, "trials": trials})


def manifest(**changes: Any) -> str:
    """Return a manifest."""
    whole = {"phases": [{"phase": "train", "backward": 1}], "samples": 1, "coreset": None, "seconds": 1, "elapsed": 1}
    return json.dumps({**whole, "full_training_backward": 1, **changes})


MANIFESTS = {
    '{"phases": 3}': "phases = 3: input should be a valid list",
    manifest(test_accuracy=1): "test_accuracy needs test_loss",
    manifest(test_accuracy=1, test_loss=1, full_training_backward=0): "full_training_backward > 0",
    manifest(findings=["x" * 1_000_000]): "findings.0 = … at most 10000 characters",
    manifest(test_accuracy=2.5, test_loss=1): "test_accuracy = 2.5: input should be less than or equal to 1",
    manifest(phases=[{"phase": "train", "backward": 10**400}]): "phases.0.backward",
    **{manifest(files={name: ""}): f"files.{name}" for name in ("../x", "..", "phases", "model.safetensors")},
    DEEP: "recursion limit exceeded",
}
SWEEP_FILES = {
    **each("tune/sweep/sweep.json", JSONS, "sweep"),
    **each("tune/sweep/sweep.json", ['{"order": 3, "trials": []}', "one bit flipped", DEEP], "sweep"),
    **each("tune/sweep/sweep.json", [sweep(metric="nope")], "unknown metric 'nope'"),
    **each("tune/sweep/sweep.json", [sweep([{"settings": {}, "ended": "gone"}])], "trials.0.ended = 'gone'"),
}
DAMAGED = {
    "train --resume stopped": {
        **each("train/stopped/config.toml", SETTINGS),
        **each("train/stopped/config.toml", ["seed = -1"], "seed"),
        **each("train/stopped/config.toml", ["lipt/l/config.toml"], "unknown setting"),
        **each("train/stopped/metrics.parquet", ["cut", "PAR1PAR1", "lipt/l/scores.parquet"]),
    },
    "lipt --resume halfway": {
        **each("lipt/halfway/phases/pretrain.json", JSONS),
        **each("lipt/halfway/phases/pretrain.json", ['{"costs": [], "elapsed": 1, "from": [1]}'], "from = [1]"),
        **each("lipt/halfway/pretrained.safetensors", ["gone", "one bit flipped", "train/t/model.safetensors"]),
        **each("lipt/halfway/coreset.parquet", ["cut", "select/sel/coreset.parquet"]),
        **each("lipt/halfway/scores.parquet", ["gone"]),
        **each("lipt/halfway/model.safetensors", ["longer"]),
    },
    "show t": {
        **each("train/t/summary.json", JSONS),
        **{text: (("train/t/summary.json", text), f"… is corrupt: … {says}") for text, says in MANIFESTS.items()},
        **each("train/t/metrics.parquet", ["cut", "lipt/l/coreset.parquet"]),
    },
    "report t": {
        **each(
            "train/t/environment.json", ["cut", "[]", '{"packages": 3}', '{"started": 3}', '{"processor": []}', DEEP]
        )
    },
    "show l --against sel": {
        **each("lipt/l/coreset.parquet", ["gone", "cut"]),
        **each("lipt/l/scores.parquet", ["lipt/l/coreset.parquet"]),
        **each("select/sel/summary.json", ["gone"], "sel is not finished"),
    },
    "export sp": {
        **each("sparse/sp/model.safetensors", ["gone", "one bit flipped", "a folder"]),
        **each("sparse/sp/config.toml", ["train/t/config.toml"], "sp/model.safetensors does not fit"),
        **each("sparse/sp/summary.json", ["gone"], "run 'sp' is not finished"),
    },
    "select --model-from t --rule grand": {
        **each("train/t/model.safetensors", ["gone", "one bit flipped", "lipt/l/model.safetensors"]),
        **each("train/t/model_record.parquet", ["cut", "lipt/l/coreset.parquet"]),
    },
    "tune crest --resume sweep": {
        **each("tune/sweep/sweep.json", ["gone"], "sweep"),
        **SWEEP_FILES,
        **each("tune/sweep/config.toml", ["lipt/l/config.toml"], "unknown setting"),
        **each("tune/sweep/space.py", ["gone", "text", "not UTF-8"]),
    },
    "show sweep": SWEEP_FILES,
    "deltagrad log dg": RECORDED,
    "deltagrad delete dg --ids 3 --period 1": LOST_OR_CHANGED,
}
DAMAGES = Cases()
for command, files in DAMAGED.items():
    DAMAGES += cases(command, command, files, make=damage)


def add(folder: Path, name: str) -> None:
    """Add a file of the user's to a run."""
    (folder / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "runs" / name).touch()


FOREIGN = ("plots/2024/a.png", "thesis.tex", "checkpoints/b")
KEPT = Cases()
for run in ("train/t", "train/stopped", "tune/sweep"):
    names = {f"{run}/{name}": f"it holds {name!r}, which no run or sweep does" for name in FOREIGN}
    KEPT += cases("a file of the user's", f"rm {run} --yes", names, make=add)

REQUESTS = cases(
    "requests to DeltaGrad",
    "{}",
    {
        "deltagrad delete dg --ids=9223372036854775807": "id 9223372036854775807 is unknown, allowed are 0 … 1436",
        "deltagrad delete dg --ids=nowhere.txt": "'nowhere.txt' (no such file)",
        "deltagrad add dg --data=nothing:here": "unknown dataset or module 'nothing:here'",
        "deltagrad delete table --where='label = 7'": "unknown class '7' … Allowed: 0, 1",
        "deltagrad delete table --where='label > 0'": "labels compare with = and != only",
        "deltagrad delete table --where='A > 3'": "unknown name in a condition 'A' … Allowed: a, b, label",
        "deltagrad stream dg nowhere": "the queue 'nowhere' cannot be read",
        "deltagrad delete t --ids 3": "run 't' has no recorded history",
        "deltagrad stream stopped queue": "run 'stopped' has no recorded history",
    },
)
