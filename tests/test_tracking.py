"""Trackers other than W&B: what they hold after a run, and how they refuse."""

import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event

from raypkg.cli import main
from raypkg.core.errors import UserError
from raypkg.experiments.train import TrainSettings
from raypkg.runs.folder import RunFolder
from raypkg.runs.storage import Storage
from raypkg.runs.tracking import TRACKERS, package

RUN = ["train", "--model", "linear", "--train.epochs", "2", "--train.evaluate_every_epochs", "1", "--name", "one"]


def trained(monkeypatch, folder, *options):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        main([*RUN, "--cluster.workers", "0", *options])
    assert not ended.value.code
    return RunFolder(Storage("runs/train/one"))


def events(path):
    """Yield the events of a file: each has its length, a checksum, its bytes and another checksum."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack_from("<Q", content)
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_tensorboard_has_the_rows_by_epoch_and_the_summary(monkeypatch, tmp_path, capsys, blank_pictures):
    run = trained(monkeypatch, tmp_path, "--track", "tensorboard")
    (file,) = tmp_path.glob("runs/train/one/tensorboard/events.*")
    values = [(value.tag, event.step, value) for event in events(file) for value in event.summary.value]
    scalars = {(tag, step): value.simple_value for tag, step, value in values}
    for row in run.rows:
        assert scalars["train/valid_loss", row["epoch"]] == pytest.approx(row["valid_loss"])
    assert scalars["summary/test_accuracy", 0] == pytest.approx(run.summary["test_accuracy"])
    assert values[0][0].startswith("config") and "epochs = 2" in str(values[0][2].tensor)
    assert f"TensorBoard: tensorboard --logdir {tmp_path}/runs/train/one/tensorboard" in capsys.readouterr().out


def test_mlflow_has_the_settings_the_rows_and_the_summary(monkeypatch, tmp_path, capsys, blank_pictures):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = trained(monkeypatch, tmp_path, "--track", "mlflow", "--track.project", "mine")
    client = mlflow.MlflowClient()
    (kept,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (kept.info.run_name, kept.info.status, kept.data.tags["group"]) == ("one", "FINISHED", "train")
    assert (kept.data.params["model.name"], kept.data.params["train.epochs"]) == ("linear", "2")
    losses = [(each.step, each.value) for each in client.get_metric_history(kept.info.run_id, "train/loss")]
    assert losses == [(row["epoch"], row["loss"]) for row in run.rows]
    assert kept.data.metrics["summary/test_accuracy"] == run.summary["test_accuracy"]
    assert f"MLflow: mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db" in capsys.readouterr().out
    assert sorted(path.name for path in Path().iterdir()) == ["mlflow.db", "runs"]


def test_what_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(
        UserError, match=r"track.name = mlflow needs the package 'mlflow': pip install 'effray\[mlflow\]'"
    ):
        package("mlflow")


def test_event_files_are_local():
    folder = SimpleNamespace(storage=SimpleNamespace(local=None, root="s3://bucket/runs/train/one"))
    with pytest.raises(UserError, match=r"track.name = tensorboard: s3://.* is remote, event files are local"):
        TRACKERS["tensorboard"](TrainSettings(), folder, "train")
