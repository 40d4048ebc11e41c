"""Data sources behind a URI: files of an object store are read like those of a folder."""

import http.client
import http.server
import os
import shutil
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs

import samples
from contracts.test_datasets import PREPARE
from raypkg.core.address import opened
from raypkg.core.errors import UserError
from raypkg.core.settings import Dataset, RunSettings
from raypkg.data import load_data
from raypkg.data.files import files_below, place_of
from raypkg.data.store.cache import cached
from raypkg.experiments.samples import open_samples

WITH_FILES = ("table", "libsvm", "text", "parquet", "folder")


def upload(folder, uri):
    """Copy a folder into the bucket."""
    system, path = opened(uri)
    fs.copy_files(str(folder), path, destination_filesystem=system)


def same(a, b):
    everything = torch.arange(len(a))
    assert (a.classes, a.shape, a.mean, a.std, a.columns) == (b.classes, b.shape, b.mean, b.std, b.columns)
    for ours, theirs in zip(a.batch(everything), b.batch(everything), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("source", WITH_FILES)
def test_a_source_in_a_bucket_is_the_local_one(source, bucket, tmp_path, monkeypatch):
    folder = tmp_path / "local"
    name = PREPARE[source](folder, monkeypatch)
    local = load_data(name, cache=tmp_path / "cache")
    upload(folder, bucket("data"))
    remote = load_data(f"{source}:{bucket('data')}", cache=tmp_path / "cache")
    same(local.train, remote.train)
    same(local.test, remote.test)


def test_a_single_file_in_a_bucket_or_by_its_file_uri(bucket, tmp_path):
    folder = tmp_path / "local"
    folder.mkdir()
    table = pa.table({"x": torch.randn(20).numpy(), "label": [0, 1] * 10})
    pq.write_table(table, folder / "rows.parquet")
    upload(folder, bucket("data"))
    local = load_data(f"table:{folder}/rows.parquet", cache=tmp_path / "cache")
    for uri in (bucket("data/rows.parquet"), f"file://{folder}/rows.parquet"):
        remote = load_data(f"table:{uri}", cache=tmp_path / "cache")
        same(local.train, remote.train)
        same(local.test, remote.test)


def test_an_object_that_changed_is_imported_again(bucket, tmp_path, monkeypatch):
    folder = tmp_path / "local"
    PREPARE["parquet"](folder, monkeypatch)
    upload(folder, bucket("data"))
    name = f"parquet:{bucket('data')}"
    before = load_data(name, cache=tmp_path / "cache").train
    images = [samples.encode(image) for image in samples.pixels(6)]
    samples.write_parquet(folder / "train-0.parquet", images, [0, 1, 2, 0, 1, 2])
    upload(folder, bucket("data"))
    assert (len(before), len(load_data(name, cache=tmp_path / "cache").train)) == (12, 6)


@pytest.mark.parametrize("source", WITH_FILES)
def test_a_missing_source_or_bucket_is_one_line(source, bucket, tmp_path):
    for place in (bucket("nothing/here"), bucket("nothing/here").replace("//bucket", "//nobodys")):
        with pytest.raises(
            UserError, match=r"nothing/here.* (does not exist|cannot be listed: .*NO_SUCH_BUCKET)"
        ) as told:
            load_data(f"{source}:{place}", cache=tmp_path)
        assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


class Between(http.server.BaseHTTPRequestHandler):
    """Forwards requests to the store and counts bytes; may deny all, or fail the first request for each object."""

    def do_GET(self):
        server = self.server
        if server.denying or (server.failing and self.path not in server.seen):
            server.seen.add(self.path)
            self.send_response(403 if server.denying else 503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        store = http.client.HTTPConnection("127.0.0.1", server.store)
        store.request(self.command, self.path, headers=dict(self.headers))
        answer = store.getresponse()
        body = answer.read()
        server.bytes += len(body)
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("server", "date", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        store.close()

    do_HEAD = do_GET

    def log_message(self, *words):
        pass


@pytest.fixture
def between(port):
    """A server between the client and the store."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Between)
    server.store, server.bytes, server.seen = port, 0, set()
    server.failing = server.denying = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def through(server, uri, port):
    return uri.replace(f":{port}", f":{server.server_port}")


@pytest.mark.slow
def test_a_request_that_fails_is_repeated(between, port, bucket, tmp_path, monkeypatch):
    name = PREPARE["folder"](tmp_path / "local", monkeypatch)
    upload(tmp_path / "local", bucket("data"))
    between.failing = True
    remote = load_data(f"folder:{through(between, bucket('data'), port)}", cache=tmp_path / "cache")
    assert len(between.seen) >= 24  # every image
    same(load_data(name, cache=tmp_path / "cache").train, remote.train)


def test_only_what_is_needed_is_fetched(between, port, bucket, tmp_path):
    folder = tmp_path / "local"
    folder.mkdir()
    images = [samples.encode(image) for image in samples.pixels(60)]
    ballast = pa.array([np.random.default_rng(i).bytes(100_000) for i in range(60)], pa.binary())
    for split in ("train", "test"):
        table = pa.table({"image": images, "label": [0, 1, 2] * 20, "ballast": ballast})
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=20)
    upload(folder, bucket("data"))
    load_data(f"parquet:{through(between, bucket('data'), port)}", cache=tmp_path / "cache")
    stored = sum(file.stat().st_size for file in folder.iterdir())
    assert between.bytes < stored / 10


def test_a_denied_bucket_is_refused_without_its_key(between, port, bucket, tmp_path):
    between.denying = True
    refusing = through(between, bucket("data"), port)
    for uri in (refusing, refusing.replace("//bucket", "//KEY:SECRET@bucket")):
        with pytest.raises(UserError, match=r"cannot be listed.*ACCESS_DENIED") as told:
            load_data(f"parquet:{uri}", cache=tmp_path)
        assert "SECRET" not in str(told.value)


@pytest.mark.parametrize("where", ["bucket", "folder"])
def test_a_file_that_changes_while_it_is_imported(where, bucket, tmp_path, monkeypatch):
    folder = tmp_path / "local"
    PREPARE["parquet"](folder, monkeypatch)
    upload(folder, bucket("data"))
    place = place_of(bucket("data") if where == "bucket" else str(folder))

    def build(path):
        changed = folder / "train-0.parquet"
        samples.write_parquet(changed, [samples.encode(image) for image in samples.pixels(6)], [0, 1, 2, 0, 1, 2])
        upload(folder, bucket("data"))
        path.write_bytes(b"what was there before, and what came after")

    store = tmp_path / "cache" / "set-train.arrow"
    with pytest.raises(UserError, match=r"-0\.parquet.* changed while it was imported"):
        cached(store, build, files_below(place, [".parquet"]))
    assert not store.exists()


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    name = PREPARE["folder"](tmp_path / "local", monkeypatch)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match=r"has 0\.0 GB of room, this data set takes .* name a folder on a larger disk"):
        load_data(name, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.arrow"))


def test_a_killed_import_starts_again(tmp_path, monkeypatch):
    name = PREPARE["parquet"](tmp_path / "local", monkeypatch)
    whole = load_data(name, cache=tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    for store in (tmp_path / "whole").glob("*.arrow"):
        half = store.read_bytes()[: store.stat().st_size // 2]
        (tmp_path / "killed" / store.name).with_suffix(".tmp").write_bytes(half)
    again = load_data(name, cache=tmp_path / "killed")
    same(whole.train, again.train)
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_a_copy_elsewhere_by_another_clock_is_the_same_data(tmp_path, monkeypatch):
    name = PREPARE["parquet"](tmp_path / "here", monkeypatch)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for file in (tmp_path / "there").iterdir():
        os.utime(file, (0, 0))
    names = (name, f"parquet:{tmp_path}/there")
    assert len({open_samples(RunSettings(dataset={"name": e})).digest(Dataset(name=e)) for e in names}) == 1
