"""Trackers other than W&B: what they hold after a run, and how they refuse."""

import struct
import sys
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event

from raypkg.core.errors import UserError
from raypkg.experiments.train import TrainSettings
from raypkg.runs.folder import RunFolder
from raypkg.runs.storage import Storage
from raypkg.runs.tracking import TRACKERS


def events(path):
    """Yield the events of a file: each has its length, a checksum, its bytes and another checksum."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack_from("<Q", content)
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_tensorboard_has_the_rows_by_epoch_and_the_summary(effray, tmp_path):
    out = effray("train --name one --model linear --train.epochs 2 --train.evaluate_every_epochs 1 --track tensorboard")
    run = RunFolder(Storage("runs/train/one"))
    (file,) = tmp_path.glob("runs/train/one/tensorboard/events.*")
    values = [(value.tag, event.step, value) for event in events(file) for value in event.summary.value]
    scalars = {(tag, step): value.simple_value for tag, step, value in values}
    for row in run.rows:
        assert scalars["train/valid_loss", row["epoch"]] == pytest.approx(row["valid_loss"])
    assert scalars["summary/test_accuracy", 0] == pytest.approx(run.summary["test_accuracy"])
    assert values[0][0].startswith("config") and "epochs = 2" in str(values[0][2].tensor)
    assert f"TensorBoard: tensorboard --logdir {tmp_path}/runs/train/one/tensorboard" in out


def test_what_is_not_installed_is_refused(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    line = refusal("train --track tensorboard")
    assert "tensorboard needs the package 'tensorboardX': pip install 'effray[tensorboard]'" in line


def test_event_files_are_local():
    folder = SimpleNamespace(storage=SimpleNamespace(local=None, root="s3://bucket/runs/train/one"))
    with pytest.raises(UserError, match=r"track.name = tensorboard: s3://.* is remote, event files are local"):
        TRACKERS["tensorboard"](TrainSettings(), folder, "train")
