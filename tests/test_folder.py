"""Folders of images, a folder a class."""

import shutil

import numpy as np
import pytest

import samples
from raypkg.core.errors import UserError
from raypkg.data import load_data

PIXELS = samples.pixels(6)
LABELS = np.array([0, 0, 1, 1, 2, 2])


@pytest.fixture
def root(tmp_path):
    for split in ("train", "test"):
        samples.write_folder(tmp_path / "set" / split, PIXELS, LABELS)
    return tmp_path / "set"


@pytest.fixture
def load(tmp_path):
    return lambda **options: load_data(f"folder:{tmp_path / 'set'}", options, cache=tmp_path / "cache")


def test_images_labels_and_names_come_through(root, load):
    for split in load():
        x, y = split.batch(range(6))
        assert split.classes == samples.CLASSES and split.shape == (3, 6, 5)
        np.testing.assert_array_equal(x.permute(0, 2, 3, 1), PIXELS)
        np.testing.assert_array_equal(y, LABELS)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_names_of_the_test_folder_which_may_lack_classes(root, load, name):
    (root / "test").rename(root / name)
    (root / name / "owl").rename(root / "train" / "owl" / "more")
    assert len(load().test) == 4 and load().test.num_classes == 3


def test_without_a_test_folder_a_share_is_drawn_from_the_files(root, load, tmp_path):
    samples.write_folder(tmp_path / "more", samples.pixels(40), np.arange(40) % 2)
    for parent in (root, root / "train"):  # train/<class> alone, then <class> alone
        for path in root.iterdir():
            shutil.rmtree(path)
        shutil.copytree(tmp_path / "more", parent if parent == root else root / "train", dirs_exist_ok=True)
        data = load(test=0.25)
        assert (len(data.train), len(data.test)) == (30, 10) and data.train.num_classes == data.test.num_classes == 2
        pictures = {x.numpy().tobytes() for split in data for x in split.batch(range(len(split)))[0]}
        assert len(pictures) == 40  # disjoint, and all of them
    (root / "held out").mkdir()
    with pytest.raises(UserError, match="none of the folders test, val, valid, validation"):
        load()


def test_nested_folders_and_other_files(root, load):
    inner = root / "train" / "cat" / "images"
    inner.mkdir()
    (root / "train" / "cat" / "000.png").rename(inner / "000.PNG")
    (root / "train" / "cat" / "boxes.txt").write_text("0 0 1 1")
    (root / "train" / ".hidden").mkdir()
    assert len(load().train) == 6 and load().train.num_classes == 3


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
def test_refused_folders(root, load, change, message):
    change(root)
    with pytest.raises(UserError, match=message):
        load()
