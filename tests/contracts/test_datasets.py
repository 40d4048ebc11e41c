"""The contract of every registered data source, on small files where it needs any."""

import pickle
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import samples
import tiny_language
from raypkg.core.errors import UserError
from raypkg.data import load_data
from raypkg.data.kinds import IMAGES, ROWS, TEXTS
from raypkg.data.sources import dataset
from raypkg.data.sources.built_in import SHAPES
from raypkg.data.split import Split

LABELS = np.arange(12) % 3


def from_torchvision(name, folder, monkeypatch):
    channels = 3 if name.startswith("CIFAR") else 1

    def fetched(root, train, download):
        images = samples.pixels(len(LABELS), 6, 6, channels, seed=train)
        data = images if channels == 3 else torch.from_numpy(images[..., 0])  # as torchvision keeps them
        return SimpleNamespace(data=data, targets=LABELS.tolist(), classes=list(samples.CLASSES))

    monkeypatch.setattr(f"torchvision.datasets.{name}", fetched)
    return name.lower()


def from_parquet(folder, monkeypatch):
    images = [samples.encode(image) for image in samples.pixels(len(LABELS))]
    for split in ("train", "test"):
        samples.write_parquet(folder / f"{split}-0.parquet", images, LABELS)
    return f"parquet:{folder}"


def from_folder(folder, monkeypatch):
    for split in ("train", "val"):
        samples.write_folder(folder / split, samples.pixels(len(LABELS)), LABELS)
    return f"folder:{folder}"


def from_table(folder, monkeypatch):
    folder.mkdir()
    columns = {f"x{i}": np.random.default_rng(i).normal(size=len(LABELS)) for i in range(20)}
    rows = pa.table({**columns, "id": np.arange(len(LABELS)) * 7, "label": LABELS})
    for split in ("train", "test"):
        pq.write_table(rows.replace_schema_metadata({"effray": '{"id": "id"}'}), folder / f"{split}.parquet")
    return f"table:{folder}"


def from_libsvm(folder, monkeypatch):
    folder.mkdir()
    for split in ("train", "test"):
        rows = (" ".join([f"{y}", *(f"{c}:{i + 0.5}" for c in range(1, 10 + i % 3))]) for i, y in enumerate(LABELS))
        (folder / f"{split}.libsvm").write_text("\n".join(rows))
    return f"libsvm:{folder}"


def from_text(folder, monkeypatch):
    pytest.importorskip("tokenizers")
    folder.mkdir()
    texts = ["where is cat", "who ran on", "a dog sat"] * (len(LABELS) // 3)  # of one length
    for split in ("train", "test"):
        pq.write_table(pa.table({"text": texts, "label": LABELS}), folder / f"{split}-0.parquet")
    return f"text:{folder}"


def from_instructions(folder, monkeypatch):
    pytest.importorskip("transformers")
    folder.mkdir()
    row = '{"prompt": "Repeat %s", "completion": "%s", "source": "%s"}\n'
    rows = "".join(row % (digit, digit, "even" if digit % 2 else "odd") for digit in range(10))  # of one length
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(rows)
    return f"instructions:{folder}", {"tokenizer": str(tiny_language.tiny_language(folder.parent / "model"))}


AS_THEY_ARE = {"libsvm"}  # sources that are not standardised
PREPARE = {
    "table": from_table,
    "libsvm": from_libsvm,
    "text": from_text,
    "instructions": from_instructions,
    "synthetic": lambda folder, monkeypatch: monkeypatch.setitem(SHAPES, "covtype", (120, 5, 3)) or "synthetic",
    "digits": lambda folder, monkeypatch: "digits",
    "parquet": from_parquet,
    "folder": from_folder,
    **{
        name.lower(): lambda folder, monkeypatch, name=name: from_torchvision(name, folder, monkeypatch)
        for name in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST")
    },
}


@pytest.fixture(params=dataset.entries)
def data(request, tmp_path, monkeypatch):
    return loaded(request.param, tmp_path / "source", tmp_path / "cache", monkeypatch)


def loaded(kind, folder, cache, monkeypatch):
    prepared = PREPARE[kind](folder, monkeypatch)
    name, options = prepared if isinstance(prepared, tuple) else (prepared, {})
    return load_data(name, options, cache=cache)


def test_both_splits_have_one_shape_and_the_statistics_of_train(data, request):
    for what in ("shape", "classes", "num_classes", "mean", "std", "augment"):
        assert getattr(data.train, what) == getattr(data.test, what)
    x = data.train.batch(range(len(data.train)))[0].double()
    if request.node.callspec.params["data"] in AS_THEY_ARE:
        assert (set(data.train.mean), set(data.train.std)) == ({0.0}, {1.0})
        return
    if data.train.kind is TEXTS:
        assert data.train.mean == data.train.std == ()
        return
    values = x.permute(0, 2, 3, 1).flatten(0, 2) / 255 if x.ndim == 4 else x  # [m, channels or columns]
    assert data.train.mean == pytest.approx(values.mean(0).tolist())
    assert data.train.std == pytest.approx(values.std(0, correction=0).tolist())


def test_a_batch_gathers_the_requested_samples(data):
    for split in data:
        everything, labels = split.batch(torch.arange(len(split)))
        assert len(everything) == len(split) and split.kind.fits(everything, split.shape)
        assert split.kind is not ROWS or everything.dtype == torch.float32
        assert split.kind is not IMAGES or everything.is_contiguous(memory_format=torch.channels_last)
        assert labels.equal(split.y) and labels.dtype == torch.int64
        assert labels.unique().tolist() == list(range(split.num_classes))
        x, y = split.batch(torch.tensor([3, 0, 3]))
        assert x.equal(everything[[3, 0, 3]]) and y.equal(labels[[3, 0, 3]])


def test_a_batch_is_the_callers_own_and_may_be_empty(data):
    x, _ = data.train.batch([0])
    x += 1
    assert not data.train.batch([0])[0].equal(x)
    x, y = data.train.batch([])
    assert len(x) == 0 and data.train.kind.fits(x, data.train.shape) and y.shape == (0,)


@pytest.mark.parametrize(("like", "columns", "classes"), [("covtype", 54, 7), ("higgs", 28, 2), ("rcv1", 47_236, 2)])
def test_synthetic_rows_have_a_data_sets_shape_and_are_the_same_every_time(like, columns, classes):
    options = {"like": like, "rows": 30}
    one, again = (load_data("synthetic", options) for _ in range(2))
    assert (len(one.train), one.train.shape, one.train.num_classes) == (30, (columns,), classes)
    assert one.train.batch([3])[0].equal(again.train.batch([3])[0])
    assert not one.train.batch([0])[0].equal(one.test.batch([0])[0])


def test_invalid_indices(data):
    for indices in ([-1], [0, 10**6], [0.5], [True]):
        with pytest.raises(IndexError, match="indices"):
            data.train.batch(indices)


def test_a_split_travels_to_another_process(data):
    sent = pickle.loads(pickle.dumps(data.train))
    assert sent.batch([1, 2])[0].equal(data.train.batch([1, 2])[0])


def test_the_same_data_again_from_the_cache(data, request, tmp_path, monkeypatch):
    again = loaded(request.node.callspec.params["data"], tmp_path / "again", tmp_path / "cache", monkeypatch)
    assert again.train.batch(range(5))[0].equal(data.train.batch(range(5))[0])


def test_digits():
    train, test = load_data("digits")
    assert torch.bincount(train.y).tolist() == [142, 145, 142, 146, 145, 146, 145, 143, 139, 144]
    assert torch.bincount(test.y).tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    assert train.batch([0])[0].aminmax() == (0, 255)


@pytest.mark.parametrize("folder", [".", "mine", "mine/below"])
def test_a_failed_download_leaves_no_new_folder(tmp_path, monkeypatch, folder):
    def fetched(folder, **options):
        (folder / "MNIST" / "raw").mkdir(parents=True)
        raise RuntimeError("no network")

    (tmp_path / "mine").mkdir()
    monkeypatch.setattr("torchvision.datasets.MNIST", fetched)
    with pytest.raises(UserError, match=r"cannot fetch MNIST .*no network.*parquet:PATH or folder:PATH"):
        load_data(f"mnist:{tmp_path / folder}", cache=tmp_path / "cache")
    assert {path.name for path in tmp_path.rglob("*") if "cache" not in str(path.relative_to(tmp_path))} == {"mine"}


def rows(root, *, split, width: int = 2):
    """The user's own data set."""
    return Split.from_tensors(torch.ones(4, width) * torch.arange(4)[:, None], torch.tensor([0, 1, 0, 1]))


def without_split(root):
    return rows(root, split="train")


def with_two_roots(root, other, *, split):
    return rows(root, split=split)


def of_another_kind(root, *, split):
    return [split]


def with_a_missing_file(root, *, split):
    return open("/nowhere/rows.csv")


def test_the_users_own_function(monkeypatch):
    train, test = load_data(f"{__name__}:rows", {"width": 3})
    assert train.shape == (3,) and test.mean == (1.5, 1.5, 1.5) and train.augment == ()
    x, y = train.batch(torch.tensor([3, 1]))
    assert x.tolist() == [[3.0] * 3, [1.0] * 3] and x.dtype == torch.float32 and y.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{__name__}:without_split", r"must be callable as function\(root, \*, split\), not \(root\)"),
        (f"{__name__}:with_two_roots", "must be callable as function.*other, .*split"),
        (f"{__name__}:of_another_kind", "returned a list, not a"),
        (f"{__name__}:with_a_missing_file", r"test_datasets\.py, line \d+, in with_a_missing_file: FileNotFoundError"),
        ("digits:/data", "takes no path, got '/data'"),
        ("synthetic:mine", "takes no path"),
    ],
)
def test_invalid_names_and_functions(name, message):
    with pytest.raises(UserError, match=message):
        load_data(name)
