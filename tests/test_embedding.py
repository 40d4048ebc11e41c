"""`effray embed`: features are those of the model, rows are the samples, and a run that died ends as if it had not."""

import resource
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from forked import effray, kill_at
from raypkg.core.seeds import generator
from raypkg.data import load_data
from raypkg.data.augment import compose
from raypkg.data.sources.built_in import digits as load_digits
from raypkg.data.split import hold_out
from raypkg.experiments import embedding
from raypkg.experiments.trained import load_model
from raypkg.models import build_model
from raypkg.runs.storage import Storage
from run_files import check_whole, files

PLAIN = "--precision float32 --cluster.workers 0 --rows-per-part 200"
EMBED = f"embed --name one --model resnet8 {PLAIN}"
BROKEN = 1003


class Broken(nn.Module):
    """Has no feature of a black image."""

    def forward(self, x):
        rows = x.flatten(1)
        return rows / (rows != rows.min(1, keepdim=True).values).any(1, keepdim=True)


def broken(shape, num_classes):
    return nn.Sequential(Broken(), nn.Linear(64, num_classes))


def with_a_black_digit(root: str, *, split: str):
    honest = load_digits(root, split=split)

    def take(indices):
        x = honest.take(indices)
        x[indices == BROKEN] = 0
        return x

    return replace(honest, take=take)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, blank_pictures):
    """Return the run folder of an embedding of the digits by a model as it is built."""
    folder = tmp_path_factory.mktemp("embedded") / "work"
    folder.mkdir()
    ended = effray(EMBED, folder)
    assert ended.code == 0, ended
    return folder / "runs/embed/one"


@torch.inference_mode()
def assert_features(found, model, pixels):
    x = load_data("digits").train.inputs(pixels)
    expected = model.eval().features(x.contiguous(memory_format=torch.channels_last)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def rows_of(file):
    table = pq.read_table(file)
    return table, np.stack(table["features"].to_numpy())


def test_features_are_those_of_the_model_for_every_sample_of_both_splits(embedded):
    data = load_data("digits")
    model = build_model("resnet8", data.train.shape, 10, seed=0)
    for split, name in zip(data, ("train", "test"), strict=True):
        table, features = rows_of(embedded / f"{name}.parquet")
        pixels, y = split.batch(torch.arange(len(split)))
        assert table["id"].to_pylist() == list(range(len(split)))
        assert table["label"].to_pylist() == [data.train.classes[label] for label in y]
        assert_features(features, model, pixels)
    (bill,) = files(embedded)["summary.json"]["phases"]
    assert bill["forward"] == 1437 + 360


def test_the_run_folder_is_a_data_set_of_rows_with_the_ids_classes_and_held_out_samples_of_the_data(embedded):
    rows = load_data(f"table:{embedded}")
    data = load_data("digits")
    _, features = rows_of(embedded / "train.parquet")
    x, y = rows.train.batch(torch.arange(len(rows.train)))
    assert x.numpy().tobytes() == features.tobytes()
    assert y.equal(data.train.y) and rows.train.classes == data.train.classes
    assert rows.train.ids.equal(torch.arange(len(data.train))) and rows.test.ids.equal(torch.arange(len(data.test)))
    of_rows, of_data = (hold_out(split.y, 0.1, generator(0, "hold out")) for split in (rows.train, data.train))
    assert of_rows[0].equal(of_data[0]) and of_rows[1].equal(of_data[1])


def test_the_features_of_a_trained_model_are_its_own(tmp_path):
    assert effray("train --name base --model resnet8 --train.epochs 1 --cluster.workers 0", tmp_path).code == 0
    assert effray(f"embed --name one --model-from base {PLAIN}", tmp_path).code == 0
    test = load_data("digits").test
    _, features = rows_of(tmp_path / "runs/embed/one/test.parquet")
    pixels, _ = test.batch(torch.arange(len(test)))
    assert_features(features, load_model(str(tmp_path / "runs/train/base")), pixels)


def test_each_draw_is_a_row_of_every_training_sample_augmented_anew_and_the_test_samples_have_one(tmp_path):
    assert effray(f"embed --name one --model resnet8 --draws 3 --seed 4 {PLAIN}", tmp_path).code == 0
    data = load_data("digits")
    n = len(data.train)
    table, features = rows_of(tmp_path / "runs/embed/one/train.parquet")
    test = pq.read_table(tmp_path / "runs/embed/one/test.parquet")
    assert table["id"].to_pylist() == list(range(n)) * 3
    assert len(test) == len(data.test)

    augment = compose(("crop",))
    model = build_model("resnet8", data.train.shape, 10, seed=4)
    pixels, _ = data.train.batch(torch.arange(n))
    for draw in range(3):
        uniforms = torch.rand(n, augment.draws, generator=generator(4, "embed", draw))
        assert_features(features[draw * n : (draw + 1) * n], model, augment(pixels, uniforms))


def killed_after(count):
    """Let the process be killed once it has written so many parts."""
    kill_at(embedding, "write_part", lambda calls: len(calls) > count)


RESUME = "embed --resume one --cluster.workers 0"


@pytest.mark.parametrize(
    ("owner", "name", "due"),
    [
        *((embedding, "write_part", lambda calls, count=count: len(calls) > count) for count in (0, 5, 8)),
        (embedding, "join_parts", lambda calls: calls[-1][2] == "test.parquet"),
        (Storage, "delete_folder", lambda calls: calls[-1][1] == embedding.PARTS),
    ],
)
def test_killed_at_any_moment_and_resumed_it_leaves_what_an_undisturbed_run_leaves(
    embedded, tmp_path, owner, name, due
):
    assert effray(EMBED, tmp_path, lambda: kill_at(owner, name, due)).code == -signal.SIGKILL
    assert effray(RESUME, tmp_path).code == 0
    check_whole(tmp_path / "runs")
    here, there = files(tmp_path / "runs/embed/one"), files(embedded)
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


def test_a_resumed_run_computes_the_parts_that_are_missing_damaged_or_edited_and_no_others(embedded, tmp_path):
    assert effray(EMBED, tmp_path, lambda: killed_after(6)).code == -signal.SIGKILL
    parts = tmp_path / "runs/embed/one/parts"
    assert len([*parts.iterdir()]) == 6
    content = bytearray((parts / "train-00001.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (parts / "train-00001.parquet").write_bytes(content)
    (parts / "train-00003.parquet").write_bytes(content[:100])
    edited = pq.read_table(parts / "train-00002.parquet")  # with its metadata
    ids = pa.array(edited["id"].to_numpy()[::-1])
    pq.write_table(edited.set_column(0, edited.schema.field("id"), ids), parts / "train-00002.parquet")
    written = {file.name: file.stat().st_mtime_ns for file in parts.iterdir()}
    kill = partial(kill_at, Storage, "delete_folder", lambda calls: calls[-1][1] == embedding.PARTS)
    assert effray(RESUME, tmp_path, kill).code == -signal.SIGKILL
    same = [file.name for file in parts.iterdir() if file.stat().st_mtime_ns == written.get(file.name)]
    assert sorted(same) == ["train-00000.parquet", "train-00004.parquet", "train-00005.parquet"]
    assert effray(RESUME, tmp_path).code == 0
    assert (tmp_path / "runs/embed/one/train.parquet").read_bytes() == (embedded / "train.parquet").read_bytes()


def with_files_of_at_most(size):
    """Let writing fail beyond so many bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [30_000, 150_000])  # fewer bytes than a part has, and than the joined parts
def test_a_disk_that_gets_full_is_a_line_and_the_run_goes_on_once_there_is_room(embedded, tmp_path, size):
    line = effray(EMBED, tmp_path, lambda: with_files_of_at_most(size)).line
    assert "cannot write" in line
    run = tmp_path / "runs/embed/one"
    if size > 100_000:
        check_whole(tmp_path / "runs")
        assert effray(RESUME, tmp_path).code == 0
        assert (run / "train.parquet").read_bytes() == (embedded / "train.parquet").read_bytes()
    else:
        assert not run.exists()


def test_a_folder_that_cannot_be_listed_for_a_while_does_not_end_the_run(embedded, tmp_path, monkeypatch):
    honest = Storage.list

    def throttled(storage, *folders):
        if folders == (embedding.PARTS,):
            (tmp_path / "refused").touch()
            raise OSError("slow down")
        return honest(storage, *folders)

    monkeypatch.setattr(Storage, "list", throttled)
    monkeypatch.setattr(embedding, "GLANCE", 0.01)
    assert effray(EMBED, tmp_path).code == 0
    assert (tmp_path / "refused").exists()
    assert files(tmp_path / "runs/embed/one") == files(embedded)


def test_a_feature_that_is_no_number_is_told_with_its_sample(tmp_path):
    own = f"--dataset {__name__}:with_a_black_digit --model {__name__}:broken"
    line = effray(f"embed --name one {own} {PLAIN}", tmp_path).line
    assert f"train sample {BROKEN}: its features hold NaN or infinity" in line


def test_a_table_may_hold_vectors_beside_numbers_in_one_file_of_both_splits(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 3))
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 3)
    table = pa.table({"v": column, "a": np.arange(50.0), "label": np.arange(50) % 2, "key": np.arange(50) * 10})
    pq.write_table(table, tmp_path / "mine.parquet", row_group_size=7)
    train, test = load_data(f"table:{tmp_path / 'mine.parquet'}", {"id": "key"})
    assert train.columns == ("a", "v[0]", "v[1]", "v[2]")
    for split in (train, test):
        x, _ = split.batch(torch.arange(len(split)))
        rows = split.ids.numpy() // 10
        np.testing.assert_array_equal(x[:, 0].numpy(), rows)
        np.testing.assert_array_equal(x[:, 1:].numpy(), vectors[rows].astype(np.float32))
