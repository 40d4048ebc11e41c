"""The folder of a user who has worked for a while: a run of every experiment, a sweep, and data of every kind."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import samples
from forked import effray
from raypkg.methods.crest.settings import CrestSettings
from raypkg.studies.study import Order, Trial, create_study

QUICK = "--train.epochs 1 --cluster.workers 0"
RUNS = (
    f"train --name t --model linear {QUICK}",
    f"lipt --name l --model linear --pretrain.models 2 --pretrain.epochs 1 {QUICK}",
    f"sparse --name sp --model mlp --density 0.2 {QUICK}",
    f"deltagrad train --name dg {QUICK}",
    f"deltagrad train --name table --dataset table:rows.csv {QUICK}",
    "crest --name cr --model linear --train.epochs 4 --budget 0.5 --cluster.workers 0",
    "select --name sel --model-from t --fraction 0.2 --cluster.workers 0",
)
SPACE = """
from ray import tune
METRIC, MODE = "accuracy", "max"
def space():
    return {"crest.b": tune.choice([1, 2])}
"""


def make_world(folder: Path) -> Path:
    """Make the runs, by the commands that make them, and the data; return the folder."""
    _make_data(folder)
    for command in RUNS:
        ended = effray(command, folder)
        assert (ended.code, ended.err) == (0, ""), ended
    for plots in folder.glob("runs/*/*/plots"):
        shutil.rmtree(plots)
    # One run was stopped in its first epoch, and one between its last phase and its end.
    runs = folder / "runs"
    shutil.copytree(runs / "train/t", runs / "train/stopped")
    shutil.copytree(runs / "lipt/l", runs / "lipt/halfway")
    shutil.rmtree(runs / "train/stopped/phases")
    for name in ("train/stopped/summary.json", "train/stopped/model.safetensors", "lipt/halfway/summary.json"):
        (runs / name).unlink()
    order = Order(experiment="crest", metric="accuracy", mode="max", samples=1, search="random", varied=["crest.b"])
    create_study(str(runs), "sweep", order, CrestSettings(), SPACE, [Trial(settings={"crest.b": 1})])
    return folder


def _make_data(folder: Path) -> None:
    images = [samples.encode(image) for image in samples.pixels(9)]
    for split in ("train", "test"):
        samples.write_parquet(folder / "set" / f"{split}.parquet", images, np.arange(9) % 3)
        for name in ("cat", "dog"):
            (folder / "images" / split / name).mkdir(parents=True)
            (folder / "images" / split / name / "0.png").write_bytes(images[0])
    rows = [f"{i % 7},{i * 0.5},{i % 2}\n" for i in range(40)]
    (folder / "rows.csv").write_text("a,b,label\n" + "".join(rows))
    (folder / "rows.libsvm").write_text("".join(f"{i % 2} 1:{i} 3:0.5\n" for i in range(40)))
    (folder / "loop").symlink_to("loop")
    (folder / "queue").write_text('{"delete": [3], "id": "a"}\n')
    few = pa.table({"index": np.arange(20) * 2, "weight": np.ones(20, np.float32)})
    pq.write_table(few, folder / "few.parquet")
