"""Samples that are read by blocks from where they lie: the same values, an order that needs few blocks, copies."""

import gc
import pickle
import shutil
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import fs

import samples
from contracts.test_datasets import PREPARE
from raypkg.core.address import opened
from raypkg.core.errors import UserError
from raypkg.core.settings import Dataset, Training
from raypkg.data import load_data
from raypkg.data.coreset import Coreset
from raypkg.data.opening import open_data
from raypkg.data.split import at_hand, shuffled_by_blocks
from raypkg.data.store import images, streamed
from raypkg.data.store.streamed import HeldBlocks, Stream
from raypkg.engine.batches import Batches
from raypkg.engine.run import Run
from raypkg.engine.worker import Worker
from raypkg.experiments.samples import Samples
from raypkg.models import build_model
from test_object_sources import WITH_FILES, same

N = 120


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 1000)


@pytest.fixture(params=["pixels", "encoded"])
def source(request, tmp_path, monkeypatch):
    """120 images in order of their classes."""
    if request.param == "encoded":
        monkeypatch.setattr(images, "DECODED_BYTES", 0)
    for split, seed in {"train": 0, "test": 1}.items():
        encoded = [samples.encode(image) for image in samples.pixels(N, seed=seed)]
        samples.write_parquet(tmp_path / "data" / f"{split}-0.parquet", encoded, np.arange(N) * 3 // N)
    return f"parquet:{tmp_path}/data"


@pytest.fixture
def stream(tmp_path):
    return Stream(str(tmp_path / "stores"), 4, tmp_path / "cache")


@pytest.fixture
def split(source, stream):
    """The training split, in a dozen blocks or more."""
    return load_data(source, cache=stream).train


@pytest.mark.parametrize("name", [*WITH_FILES, "mnist"])
def test_a_streamed_set_has_the_values_of_a_local_one(name, stream, tmp_path, monkeypatch):
    source = PREPARE[name](tmp_path / "data", monkeypatch)
    local = load_data(source, cache=tmp_path / "local")
    remote = load_data(source, cache=stream)
    same(local.train, remote.train)
    same(local.test, remote.test)
    assert not list(tmp_path.glob("cache/*.arrow"))


def test_a_bucket_holds_it_and_no_machine_does(source, bucket, tmp_path):
    address = bucket("stores")
    remote = load_data(source, cache=Stream(address, 4, tmp_path / "cache")).train
    same(load_data(source, cache=tmp_path / "local").train, remote)
    same(replace(remote, take=pickle.loads(pickle.dumps(remote.take))), remote)
    system, path = opened(address)
    entries = system.get_file_info(fs.FileSelector(path, recursive=True))
    names = [entry.base_name for entry in entries if entry.type == fs.FileType.File]
    assert sorted(name.rpartition(".")[2] for name in names) == ["blocks", "blocks", "index", "index"]
    assert not (tmp_path / "cache").exists()


def test_samples_larger_than_a_block_are_not_divided(source, stream, monkeypatch):
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 1)
    split = load_data(source, cache=stream).train
    assert split.blocks.of.tolist() == list(range(N))


@pytest.mark.parametrize("regime", [{"noise": 0.3}, {"imbalance": 0.2}, {"repeat": 3}])
def test_regimes(source, tmp_path, monkeypatch, regime):
    monkeypatch.setenv("EFFRAY_CACHE", str(tmp_path / "cache"))
    local = open_data(Dataset(name=source, **regime), seed=1).train
    remote = open_data(Dataset(name=source, streamed=str(tmp_path / "stores"), **regime), seed=1).train
    same(local, remote)
    assert len(remote.blocks.of) == len(local)
    some = torch.arange(0, len(local), 7)
    assert torch.equal(at_hand(remote, some).batch(some)[0], local.batch(some)[0])


# The order of training


def test_each_sample_once_an_epoch_in_even_batches():
    of = torch.arange(1000) // 37
    batches, again = (shuffled_by_blocks(of, 5, 64, seed=3, epoch=2) for _ in range(2))
    assert torch.cat(batches).sort().values.tolist() == list(range(1000))
    assert {len(batch) for batch in batches} == {62, 63}
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(torch.cat(batches), torch.cat(shuffled_by_blocks(of, 5, 64, seed=3, epoch=3)))


def test_a_batch_draws_from_the_blocks_of_the_window():
    window = 6
    of = torch.arange(40 * 50) // 50
    batches = shuffled_by_blocks(of, window, 20, seed=0, epoch=0)
    drawn_from = [of[batch].unique().tolist() for batch in batches]
    assert max(map(len, drawn_from)) <= window + 1  # one that leaves while another comes
    assert sum(map(len, drawn_from)) / len(drawn_from) > 0.8 * window
    for block in range(40):
        steps = torch.tensor([block in drawn for drawn in drawn_from]).nonzero()[:, 0]
        gaps = (steps.roll(-1) - steps).remainder(len(batches))  # the epoch's end is followed by its beginning
        assert len(batches) - int(gaps.max()) <= window * len(batches) / 40 + 1


def test_a_window_of_all_blocks_shuffles_everything():
    of = torch.arange(600) // 100
    order = torch.cat(shuffled_by_blocks(of, 99, 1, seed=0, epoch=0))
    places = order.argsort().view(6, 100).double().mean(1)  # of each block's samples
    assert (places - 299.5).abs().max() < 4 * 600 / 12**0.5 / 10  # four standard errors


def test_a_worker_reads_few_blocks_and_holds_its_share_of_the_window(split):
    of = torch.arange(64 * 100) // 100
    read = [set() for _ in range(4)]
    for batch in shuffled_by_blocks(of, 32, 128, seed=0, epoch=0):
        for rank, part in enumerate(batch.tensor_split(4)):
            read[rank] |= set(of[part].tolist())
    assert sum(map(len, read)) < 2.5 * 64  # 4 * 64 without the order within the batch
    held = []
    blocks = replace(split.blocks, of=torch.arange(1000), window=64, hold=held.append)
    for world in (1, 4):
        blocks.hold_for(torch.arange(1000), batch_size=10, ahead=9, world=world)
    assert held == [64 + 90 + 16, 16 + 90 + 16]


def test_batches_do_not_depend_on_the_number_of_workers(split):
    def epoch(worker):
        batches = Batches(split, Coreset.uniform(torch.arange(N)), 20, seed=0, augment=["flip"], worker=worker)
        return list(batches.epoch(1))

    alone = epoch(Worker())
    shared = [epoch(Worker(rank=rank, world=3)) for rank in range(3)]
    for whole, *slices in zip(alone, *shared, strict=True):
        assert torch.equal(whole.x, torch.cat([part.x for part in slices]))
        assert torch.equal(whole.indices, torch.cat([part.indices for part in slices]))
    assert torch.cat([batch.indices for batch in alone]).sort().values.tolist() == list(range(N))


# Copies


def test_copies_are_the_same_and_leave_no_file(source, split, stream, tmp_path, monkeypatch):
    """Their file never has a name, so the disk space is freed however the process ends."""
    write = streamed.write_batches

    def looked_at(*arguments):
        assert not list(stream.cache.iterdir())
        write(*arguments)

    monkeypatch.setattr(streamed, "write_batches", looked_at)
    local = load_data(source, cache=tmp_path / "local").train
    some = torch.tensor([7, 3, 99, 50])
    here = at_hand(split, some)
    assert here.blocks is None and len(here) == N
    assert torch.equal(here.batch(some)[0], local.batch(some)[0])
    assert not list(stream.cache.iterdir())
    with pytest.raises(IndexError, match="not on this machine"):
        here.batch([4])
    assert at_hand(local, some) is local


def test_a_disk_too_small_for_a_copy(split, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 999, 1))
    with pytest.raises(UserError, match=r"has 0.0 GB of room, a copy of 2 samples takes .* EFFRAY_CACHE"):
        at_hand(split, torch.tensor([1, 2]))


def test_a_window_beyond_the_memory_is_refused(split, monkeypatch):
    monkeypatch.setattr("raypkg.core.memory.machine_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"dataset.window = 4, \d+ blocks at once: needed is .* lower it"):
        Batches(split, Coreset.uniform(torch.arange(N)), 20, seed=0, augment=[], worker=Worker())


def test_held_blocks_are_freed_with_their_split(source, stream):
    split = load_data(source, cache=stream).train
    split.batch([1])
    store = split.take.args[0] if isinstance(split.take, partial) else split.take.__self__
    held = weakref.ref(store._blocks)
    del store
    gc.disable()  # blocks are large: they are not to wait for it
    try:
        del split
        assert held() is None
    finally:
        gc.enable()


def test_few_blocks_are_read_for_few_samples(split):
    looked_at = split.spread(16, blocks=4)
    assert len(looked_at) == 16 and len(split.blocks.of[looked_at].unique()) <= 4
    # A worker may have no model of LiPT to train.
    nothing = torch.arange(0)
    assert len(at_hand(split, nothing).batch(nothing)[1]) == 0


def test_the_digest_does_not_depend_on_where_samples_lie(source, stream, tmp_path):
    everything = torch.arange(N)

    def digest(cache):
        return Samples(load_data(source, cache=cache), everything, everything[:0]).digest(Dataset())

    assert digest(tmp_path / "local") == digest(stream)


# Errors


def test_a_hook_cannot_choose_samples_that_were_not_copied(split):
    given = Coreset.uniform(torch.arange(10))
    model = build_model("linear", split.shape, 3, seed=0)
    run = Run.simple(model, at_hand(split, given.indices), Training(batch_size=5), coreset=given)
    assert next(run.batches().batches).total == 5
    run.coreset = Coreset.uniform(torch.arange(5, 15))
    with pytest.raises(UserError, match="samples outside the given coreset"):
        run.batches()


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_damaged_block_is_refused(split, tmp_path, place):
    """Only the digest detects a flipped bit among pixels; among offsets Arrow would read anywhere in memory."""
    for file in (tmp_path / "stores").glob("*/*.blocks"):
        content = bytearray(file.read_bytes())
        content[round(place * (len(content) - 1))] ^= 1
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"block \d+ of .* is damaged: delete that folder, and it is built again"):
        split.batch(torch.arange(N))


def test_a_failed_block_is_requested_again():
    answers = iter([UserError("busy"), pa.record_batch({"x": [1]})])

    def load(number):
        answer = next(answers)
        if isinstance(answer, UserError):
            raise answer
        return answer

    held = HeldBlocks(load, most=2)
    with pytest.raises(UserError, match="busy"):
        held([3])
    assert held([3])[0].num_rows == 1
