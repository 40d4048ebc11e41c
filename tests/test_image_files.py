"""Images in parquet and in folders."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import samples
from raypkg.core.errors import UserError
from raypkg.data import load_data
from raypkg.data.store import images

PIXELS = samples.pixels(9)
IMAGES = [samples.encode(image) for image in PIXELS]
LABELS = np.arange(9) % 3
SORTED = np.array([0, 0, 1, 1, 2, 2])


@pytest.fixture
def load(tmp_path):
    return lambda **options: load_data(f"parquet:{tmp_path / 'set'}", options, cache=tmp_path / "cache")


def write(tmp_path, images=IMAGES, labels=LABELS, splits=("train", "test"), **layout):
    for split in splits:
        samples.write_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet", images, labels, **layout)


def everything(split):
    x, y = split.batch(range(len(split)))
    return x.permute(0, 2, 3, 1).numpy(), y.numpy()


@pytest.mark.parametrize(
    "layout", [{}, {"struct": False}, {"image": "picture"}, {"label": "fine_label"}, {"label": "species"}]
)
def test_images_labels_and_names_come_through_from_any_columns(tmp_path, load, layout):
    write(tmp_path, **layout)
    for split in load(**({"label": "species"} if layout.get("label") == "species" else {})):
        assert split.shape == (3, 6, 5) and split.classes == samples.CLASSES and split.augment == ("crop", "flip")
        np.testing.assert_array_equal(everything(split)[0], PIXELS)
        np.testing.assert_array_equal(everything(split)[1], LABELS)


def test_several_files_are_read_in_order_and_test_comes_before_valid(tmp_path, load):
    for part in range(3):
        some = slice(3 * part, 3 * part + 3)
        samples.write_parquet(tmp_path / "set" / f"train-{part}.parquet", IMAGES[some], LABELS[some])
    write(tmp_path, splits=["validation"])
    np.testing.assert_array_equal(everything(load().train)[0], PIXELS)
    write(tmp_path, IMAGES[:3], LABELS[:3], splits=["test"])
    assert len(load().test) == 3


def test_grey_images_have_one_channel_unless_some_have_colour(tmp_path, load):
    grey = [samples.encode(image) for image in samples.pixels(9, channels=1)]
    write(tmp_path, grey)
    assert load().train.shape == (1, 6, 5) and load().train.augment == ("crop",)
    write(tmp_path, grey[:-1] + IMAGES[-1:])
    assert load().train.shape == (3, 6, 5)
    write(tmp_path, grey, splits=["test"])
    assert load().test.shape == (3, 6, 5)  # train decides


def test_sizes(tmp_path, load):
    others = [samples.encode(image) for image in samples.pixels(9, 8, 8)]
    write(tmp_path, [*IMAGES[:8], others[0]])
    with pytest.raises(UserError, match=r"several sizes, such as 6×5 and 8×8: set option size, .*\(--set size=224 for"):
        load()
    assert load(size=4).train.batch([0, 8])[0].shape == (2, 3, 4, 4)
    write(tmp_path, splits=["train"])
    write(tmp_path, others, splits=["test"])
    with pytest.raises(UserError, match="test images are 8×8, train images 6×5: set option size"):
        load()


def test_a_set_too_large_to_decode_is_decoded_on_read(tmp_path, load, monkeypatch):
    write(tmp_path)
    decoded = load()
    monkeypatch.setattr(images, "DECODED_BYTES", 0)
    (tmp_path / "cache").rename(tmp_path / "before")
    encoded = load()
    assert next((tmp_path / "cache").glob("*.arrow")).read_bytes().count(b"PNG") == 9
    for a, b in zip(decoded, encoded, strict=True):
        x, y = b.batch([7, 2, 2])
        assert x.equal(a.batch([7, 2, 2])[0]) and y.tolist() == [1, 2, 2]
        assert b.mean == pytest.approx(a.mean) and b.std == pytest.approx(a.std)
        assert b.batch([])[0].shape == (0, 3, 6, 5)


def test_a_file_that_changed_is_read_again(tmp_path, load):
    write(tmp_path)
    load()
    write(tmp_path, IMAGES[::-1])
    np.testing.assert_array_equal(everything(load().train)[0], PIXELS[::-1])


def write_table(tmp_path, content):
    (tmp_path / "set").mkdir(exist_ok=True)
    for split in ("train", "test"):
        pq.write_table(content, tmp_path / "set" / f"{split}.parquet")


def write_with(tmp_path, metadata, labels=LABELS, kind=pa.int64()):  # noqa: B008
    """Write both splits with the hub's metadata as given, or with none."""
    noted = metadata and {"huggingface": metadata}
    write_table(tmp_path, pa.table({"image": IMAGES, "label": pa.array(labels, kind)}).replace_schema_metadata(noted))


def features(label):
    return json.dumps({"info": {"features": {"label": label}}})


def naming(names):
    return {"metadata": features({"names": names})}


def holding(**columns):
    return {"content": pa.table({name: pa.array(*column) for name, column in columns.items()})}


def write_other_columns(tmp_path):
    write(tmp_path)
    samples.write_parquet(tmp_path / "set" / "train-1.parquet", IMAGES, LABELS, label="labels")


def write_other_names(tmp_path):
    write(tmp_path, splits=["train"])
    write(tmp_path, splits=["test"], classes=samples.CLASSES[::-1])


TWICE = pa.Table.from_arrays([pa.array([b"a"]), pa.array([0]), pa.array([0])], ["image", "label", "label"])
BEYOND_INT64 = {"labels": [2**64 - 1] * len(LABELS), "kind": pa.uint64()}
NO_LIST = r"the schema metadata 'huggingface' of .*train\.parquet': "


@pytest.mark.parametrize(
    ("put", "options", "message"),
    [
        (write, {"labels": [*LABELS[:8], 3]}, r"row 8 of .*train-.*parquet' has label 3, allowed is 0 … 2"),
        (write, {"labels": [*LABELS[:4], None, *LABELS[5:]]}, "row 4 of .* has no label"),
        (write, {"labels": LABELS + 1, "classes": None}, "labels of .* are 1 … 3"),
        (write, {"labels": LABELS * 2, "classes": None}, r"labels of .* are 0 … 4 with gaps"),
        (write, {"images": [*IMAGES[:5], IMAGES[5][:-30], *IMAGES[6:]]}, "row 5 of .* does not decode"),
        (write, {"images": [*IMAGES[:5], None, *IMAGES[6:]]}, "row 5 of .* has no image"),
        (write, {"splits": ["train"]}, r"no test split: no file named test\* or valid\*, found train-00000"),
        (write, {"label": "species"}, r"unknown label column of .* 'label'.*Allowed: image, species"),
        (write_table, holding(text=(["a"],), label=([0],)), "no image column .*bytes. among text, label"),
        (write_table, holding(image=([b"a"],), label=([None], pa.int64())), "row 0 of .* has no label"),
        (write_table, holding(image=([b"a"],), label=([{"a": 1}],)), "'label' of .* is struct<.*>, needed are int"),
        (write_table, holding(image=([{"bytes": {"bytes": b"a"}}],), label=([0],)), "no image column"),
        (write_table, {"content": TWICE}, "train.parquet' has two columns 'label' among image, label, label"),
        (write_other_columns, {}, r"the columns of .* differ from those of"),
        (write_other_names, {}, r"class names of .*test-.* are owl, dog, cat, not cat, dog, owl"),
        (write_with, naming([1, 2, 3]), NO_LIST + "names.0 = 1: input should be a valid string"),
        (write_with, naming(["cat", "dog"]), "row 2 of .*train.parquet' has label 2, allowed is 0 … 1"),
        (write_with, naming(["cat", "dog", "cat"]), NO_LIST + "names = .*: has two classes 'cat'"),
        (write_with, {"metadata": None, **BEYOND_INT64}, r"labels? .*18446744073709551615"),
        (write_with, naming(samples.CLASSES) | BEYOND_INT64, r"labels? .*18446744073709551615"),
    ],
)
def test_refused_files(tmp_path, load, put, options, message):
    put(tmp_path, **options)
    with pytest.raises(UserError, match=message):
        load()


WITHOUT_NAMES = ["{}", '{"info": {"features": {}}}', features({"names": None}), features({})]
WITHOUT_METADATA = [(None, pa.uint8()), (None, pa.int16()), (None, pa.uint64())]


@pytest.mark.parametrize(("metadata", "kind"), [*((each, pa.int64()) for each in WITHOUT_NAMES), *WITHOUT_METADATA])
def test_labels_of_any_integers_and_without_names(tmp_path, load, metadata, kind):
    write_with(tmp_path, metadata, kind=kind)
    train = load().train
    assert train.classes == ("0", "1", "2")
    np.testing.assert_array_equal(everything(train)[1], LABELS)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "shape", "classes", "sizes", "mean"),
    [
        ("cifar10", (3, 32, 32), 10, (50_000, 10_000), (0.4914, 0.4822, 0.4465)),
        ("mnist", (1, 28, 28), 10, (60_000, 10_000), (0.1307,)),
        ("tiny-imagenet", (3, 64, 64), 200, (10_000, 2_000), (0.48, 0.45, 0.40)),
    ],
)
def test_real_data(tmp_path, real_data, name, shape, classes, sizes, mean):
    train, test = load_data(f"parquet:{real_data / name}", cache=tmp_path)
    assert (train.shape, train.num_classes, (len(train), len(test))) == (shape, classes, sizes)
    assert train.mean == pytest.approx(mean, abs=5e-3)
    assert torch.bincount(test.y).min() > 0


# Folders, a folder a class


@pytest.fixture
def root(tmp_path):
    for split in ("train", "test"):
        samples.write_folder(tmp_path / "set" / split, PIXELS[:6], SORTED)
    return tmp_path / "set"


@pytest.fixture
def load_folder(tmp_path):
    return lambda **options: load_data(f"folder:{tmp_path / 'set'}", options, cache=tmp_path / "cache")


def test_images_labels_and_names_come_through_from_folders(root, load_folder):
    for split in load_folder():
        x, y = split.batch(range(6))
        assert split.classes == samples.CLASSES and split.shape == (3, 6, 5)
        np.testing.assert_array_equal(x.permute(0, 2, 3, 1), PIXELS[:6])
        np.testing.assert_array_equal(y, SORTED)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_names_of_the_test_folder_which_may_lack_classes(root, load_folder, name):
    (root / "test").rename(root / name)
    (root / name / "owl").rename(root / "train" / "owl" / "more")
    assert len(load_folder().test) == 4 and load_folder().test.num_classes == 3


def test_without_a_test_folder_a_share_is_drawn_from_the_files(root, load_folder, tmp_path):
    samples.write_folder(tmp_path / "more", samples.pixels(40), np.arange(40) % 2)
    for parent in (root, root / "train"):  # train/<class> alone, then <class> alone
        for path in root.iterdir():
            shutil.rmtree(path)
        shutil.copytree(tmp_path / "more", parent if parent == root else root / "train", dirs_exist_ok=True)
        data = load_folder(test=0.25)
        assert (len(data.train), len(data.test)) == (30, 10) and data.train.num_classes == data.test.num_classes == 2
        pictures = {x.numpy().tobytes() for split in data for x in split.batch(range(len(split)))[0]}
        assert len(pictures) == 40  # disjoint, and all of them
    (root / "held out").mkdir()
    with pytest.raises(UserError, match="none of the folders test, val, valid, validation"):
        load_folder()


def test_nested_folders_and_other_files(root, load_folder):
    inner = root / "train" / "cat" / "images"
    inner.mkdir()
    (root / "train" / "cat" / "000.png").rename(inner / "000.PNG")
    (root / "train" / "cat" / "boxes.txt").write_text("0 0 1 1")
    (root / "train" / ".hidden").mkdir()
    assert len(load_folder().train) == 6 and load_folder().train.num_classes == 3


def without_classes(root):
    (root / "train").rename(root / "all")
    (root / "train").mkdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "train").rename(root / "training"), "no train split: none of the folders train"),
        (lambda root: (root / "test").rename(root / "held out"), "none of the folders test, val, valid, validation"),
        (without_classes, "train' holds no class folders"),
        (lambda root: (root / "train" / "fox").mkdir(), r"train/fox' holds no images \(.bmp"),
        (lambda root: (root / "test/owl").rename(root / "test/fox"), "'fox' of .*test' is not among the 3 classes of"),
    ],
)
def test_refused_folders(root, load_folder, change, message):
    change(root)
    with pytest.raises(UserError, match=message):
        load_folder()
