import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.data import Data
from raypkg.data.kinds import Moments
from raypkg.data.split import Split, hold_out, stratified_shards
from raypkg.data.store.arrow import Block, Header, write
from raypkg.data.store.cache import cached
from raypkg.engine.shards import Shard

IMAGES = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).view(2, 3, 2, 2)
ROWS = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
Y = torch.tensor([0, 1])


def test_images_and_rows_by_hand():
    split = Split.from_tensors(IMAGES, Y, classes=("a", "b", "c"), augment=["crop"])
    assert split.shape == (3, 2, 2) and split.num_classes == 3 and split.augment == ("crop",)
    assert split.batch([1])[0].equal(IMAGES[1:])
    assert split.mean == pytest.approx([7.5 / 255, 11.5 / 255, 15.5 / 255])  # (0+1+2+3+12+13+14+15) / 8 = 7.5
    split = Split.from_tensors(ROWS.double(), Y)
    assert split.mean == (2.0, 2.0) and split.std == (1.0, 1.0)  # a constant column counts as deviation 1
    assert split.batch([1])[0].equal(ROWS[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IMAGES.float(), Y), r"x is float32 \[2, 3, 2, 2\], needed is uint8 \[n, C, H, W\] or float \[n, D\]"),
        ((ROWS, Y.float()), r"y is float32 \[2\], needed are integers \[2\]"),
        ((ROWS, Y[:1]), r"y is int64 \[1\], needed"),
        ((ROWS[:0], Y[:0]), r"x is float32 \[0, 2\], needed .*, not empty"),
        ((torch.tensor([[0.0, 1], [torch.nan, 0]]), Y), "row 1 of x holds NaN or infinity"),
        ((ROWS.double() * 1e300, Y), "row 0 of x holds NaN or infinity, or a number beyond float32"),
        ((ROWS.numpy().astype(object), Y), r"x is object \[2, 2\], needed is uint8"),
        ((ROWS.numpy(), np.array([False, True])), r"y is bool \[2\], needed are integers"),
        ((ROWS, np.array([0, 2**64 - 1], np.uint64)), "labels run from 0 to 18446744073709551615 but none is 1"),
        ((ROWS, torch.tensor([0, 2])), "labels run from 0 to 2 but none is 1"),
        ((ROWS, torch.tensor([0, 2]), ("a", "b")), "sample 1 has label 2, allowed is 0 … 1"),
        ((ROWS, Y, ("a", "b", "a")), "two of the 3 classes are called 'a'"),
    ],
)
def test_refused_arrays(arguments, message):
    with pytest.raises(UserError, match=message):
        Split.from_tensors(*arguments)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("of_y", [np.uint8, np.int32, np.uint64, ">i8"])
@pytest.mark.parametrize("of_x", [np.float16, np.float64, ">f4", np.uint8])
def test_arrays_of_any_integers_and_floats_give_what_tensors_give(of_x, of_y):
    x = IMAGES if of_x is np.uint8 else ROWS
    expected = Split.from_tensors(x, Y)
    split = Split.from_tensors(read_only(x.numpy().astype(of_x)), read_only(Y.numpy().astype(of_y)))
    for a, b in zip(split.batch([1, 0]), expected.batch([1, 0]), strict=True):
        assert a.equal(b) and a.stride() == b.stride() and a.dtype == b.dtype
    for fact in ("shape", "mean", "std", "classes"):
        assert getattr(split, fact) == getattr(expected, fact)


@pytest.mark.parametrize("x", [ROWS.bfloat16(), ROWS.tolist()], ids=["bfloat16", "lists"])
def test_rows_that_numpy_does_not_have(x):
    assert Split.from_tensors(x, Y).batch([0, 1])[0].equal(ROWS)


def test_a_portable_shard_needs_no_file(tmp_path):
    x = torch.arange(12.0).view(6, 2)
    header = Header("rows", (2,), ("a", "b"))

    def build(path):
        write(path, header, [Block(x.numpy(), np.arange(6) % 2, sample=x.numpy())])

    split = cached(tmp_path / "rows.arrow", build).as_split()
    shard = Shard(Data(split, split), torch.tensor([4, 1]), torch.tensor([3]))
    sent = pickle.dumps(shard.portable())
    (tmp_path / "rows.arrow").unlink()
    arrived = pickle.loads(sent)
    for indices in (arrived.indices, arrived.valid, torch.tensor([3, 4, 1, 4])):
        assert torch.equal(arrived.data.train.batch(indices)[0], x[indices])
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickle.dumps(shard))


@pytest.mark.parametrize("at_once", [1, 30, 1 << 20])
def test_statistics_of_pixels_are_rounded_once(monkeypatch, at_once):
    monkeypatch.setattr(Moments, "pixels_at_once", at_once)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)  # [n, H, W, C]
    pixels[..., 2] = 77
    moments = Moments()
    for block in np.split(pixels, [2, 3]):
        moments.update(block)
    flat = [[Fraction(int(value), 255) for value in pixels[..., c].flat] for c in range(3)]
    mean = [sum(values) / len(values) for values in flat]
    variance = [sum((x - m) ** 2 for x in values) / len(values) for values, m in zip(flat, mean, strict=True)]
    np.testing.assert_allclose(moments.mean, [float(each) for each in mean], rtol=4e-16)
    np.testing.assert_allclose(moments.std[:2], [float(each) ** 0.5 for each in variance[:2]], rtol=4e-16)
    assert moments.mean[2] == 77 / 255 and moments.std[2] == 1  # a constant channel, whatever its value


# Parts with the same mix of classes

COUNTS = torch.tensor([50, 30, 15, 5])
MIXED = torch.arange(4).repeat_interleave(COUNTS)[torch.randperm(100, generator=generator(0, "labels"))]


def rng(seed=0):
    return generator(seed, "partition")


@pytest.mark.parametrize(("fraction", "held"), [(0.2, [10, 6, 3, 1]), (0.5, [25, 15, 8, 2]), (0, [0, 0, 0, 0])])
def test_held_out_by_hand(fraction, held):
    kept, valid = hold_out(MIXED, fraction, rng())
    assert torch.bincount(MIXED[valid], minlength=4).tolist() == held
    assert torch.cat([kept, valid]).sort().values.equal(torch.arange(100))
    assert kept.equal(kept.sort().values) and valid.equal(valid.sort().values)


def test_hold_out_follows_from_the_generator_and_leaves_every_class_a_sample():
    kept, _ = hold_out(torch.tensor([0, 0, 0, 1]), 0.9, rng())
    assert torch.tensor([0, 0, 0, 1])[kept].tolist() == [0, 1]
    first, again, other = (hold_out(MIXED, 0.2, rng(seed))[1] for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)


def test_shards_are_disjoint_exact_and_within_one_of_proportional():
    hand = [(MIXED, shards, size) for shards, size in ((1, 100), (5, 20), (3, 33), (2, 17), (4, 25))]
    for seed in range(50):
        draw = rng(seed)
        classes, n, shards = (int(torch.randint(*b, (1,), generator=draw)) for b in ((2, 12), (200, 400), (1, 6)))
        size = int(torch.randint(n // shards // 2, n // shards + 1, (1,), generator=draw))
        hand.append((torch.randint(classes, (n,), generator=draw), shards, size))
    for y, shards, size in hand:
        parts = stratified_shards(y, shards, size, rng())
        assert [len(part) for part in parts] == [size] * shards
        assert torch.cat(parts).unique().numel() == shards * size
        for part in parts:
            assert part.equal(part.sort().values)
            share = torch.bincount(y) * size / len(y)
            assert (torch.bincount(y[part], minlength=len(share)) - share).abs().max() < 1


def test_shards_of_some_of_the_samples():
    some = (torch.arange(100) % 2 == 0).nonzero()[:, 0]
    parts = stratified_shards(MIXED, 2, 20, rng(), indices=some)
    assert torch.isin(torch.cat(parts), some).all()


@pytest.mark.parametrize(
    ("shards", "size", "message"),
    [
        (3, 34, "3 disjoint shards of 34 samples each cannot be had from 100 samples"),
        (3, 0, "3 disjoint shards of 0 samples"),
        (10, 10, r"a shard of 10 samples holds none of class 3 \(5 samples\): use fewer or larger shards"),
    ],
)
def test_refused_shards(shards, size, message):
    with pytest.raises(UserError, match=message):
        stratified_shards(MIXED, shards, size, rng())
