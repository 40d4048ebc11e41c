"""The local store: round trips, statistics, damage, full disks and concurrent processes."""

import gc
import multiprocessing
import os
import resource
import time

import numpy as np
import pyarrow as pa
import pytest

from raypkg.core.errors import UserError
from raypkg.data.store import arrow
from raypkg.data.store.arrow import Block, Header, Store, write
from raypkg.data.store.cache import cache_folder, cached

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 4, 3, 2), dtype=np.uint8)  # [n, H, W, C]
ROWS = np.random.default_rng(1).normal(5, 2, (10, 3)).astype(np.float32)
ENCODED = [bytes([i]) * (i + 1) for i in range(10)]
Y = np.arange(10) % 2

HEADERS = {
    "pixels": Header("pixels", (2, 4, 3), ("a", "b"), ("crop",)),
    "rows": Header("rows", (3,), ("a", "b")),
    "encoded": Header("encoded", (2, 4, 3), ("a", "b")),
}


def blocks(x, sample=None):
    for start in range(0, 10, 3):
        part = x[start : start + 3]
        yield Block(part, Y[start : start + 3], part if sample is None else sample[start : start + 3])


def build(path, kind="pixels"):
    x = {"pixels": PIXELS, "rows": ROWS, "encoded": ENCODED}[kind]
    write(path, HEADERS[kind], blocks(x, PIXELS if kind == "encoded" else None))


@pytest.fixture(params=[1, 100, arrow.BATCH_BYTES], ids=["a batch a block", "some batches", "one batch"])
def batch_bytes(request, monkeypatch):
    monkeypatch.setattr(arrow, "BATCH_BYTES", request.param)


@pytest.mark.usefixtures("batch_bytes")
@pytest.mark.parametrize(("kind", "x"), [("pixels", PIXELS), ("rows", ROWS), ("encoded", ENCODED)])
def test_samples_come_back(tmp_path, kind, x):
    build(tmp_path / "store", kind)
    store = Store(tmp_path / "store")
    assert len(store) == 10 and store.header == HEADERS[kind]
    np.testing.assert_array_equal(store.y, Y)
    if kind == "encoded":
        assert [image.to_pybytes() for image in store.encoded(np.arange(10))] == ENCODED
        return
    indices = np.array([9, 0, 3, 3, 2, 8])
    np.testing.assert_array_equal(store.take(indices), x[indices])
    assert store.take(indices[:0]).shape == (0, *x.shape[1:])


def test_pixels_are_mapped_and_not_copied(tmp_path):
    megabyte = np.zeros((1000, 32, 32, 1), np.uint8)
    write(tmp_path / "store", Header("pixels", (1, 32, 32), ("a",)), [Block(megabyte, np.zeros(1000), megabyte)])
    gc.collect()
    before = pa.total_allocated_bytes()
    store = Store(tmp_path / "store")
    assert pa.total_allocated_bytes() - before < megabyte.nbytes / 10
    assert not store.view(store._columns[0]).flags.owndata


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-20], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 999, None]
)
def test_a_store_that_is_damaged_or_of_another_format_is_rebuilt_with_one_warning(
    tmp_path, caplog, monkeypatch, damage
):
    path = tmp_path / "a.arrow"
    with monkeypatch.context() as patch:
        if damage is None:
            patch.setattr(arrow, "FORMAT", 0)
        build(path)
    path.write_bytes(damage(path.read_bytes()) if damage else path.read_bytes())
    store = cached(path, build)
    np.testing.assert_array_equal(store.take(np.arange(10)), PIXELS)
    assert [record.message.split(" is damaged")[0] for record in caplog.records] == [f"the data cache {path}"]


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot build the data cache .*a\.arrow"):
            cached(tmp_path / "a.arrow", build)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["a.lock"]


def open_slowly(path):
    def slow_build(path):
        with (path.parent / "builders").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        build(path)

    assert len(cached(path, slow_build)) == 10


def test_one_of_several_processes_builds(tmp_path):
    fork = multiprocessing.get_context("fork").Process
    workers = [fork(target=open_slowly, args=(tmp_path / "a.arrow",)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len((tmp_path / "builders").read_text().split()) == 1


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    for name in ("EFFRAY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert str(cache_folder()) == "/home/ada/.cache/effray"
    for name, value, folder in (("XDG_CACHE_HOME", "/x", "/x/effray"), ("EFFRAY_CACHE", "/c", "/c")):
        monkeypatch.setenv(name, value)
        assert str(cache_folder()) == folder
    assert cache_folder(tmp_path) == tmp_path
