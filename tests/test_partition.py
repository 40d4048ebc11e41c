import pytest
import torch

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.data.split import hold_out, stratified_shards

COUNTS = torch.tensor([50, 30, 15, 5])
Y = torch.arange(4).repeat_interleave(COUNTS)[torch.randperm(100, generator=generator(0, "labels"))]


def rng(seed=0):
    return generator(seed, "partition")


@pytest.mark.parametrize(("fraction", "held"), [(0.2, [10, 6, 3, 1]), (0.5, [25, 15, 8, 2]), (0, [0, 0, 0, 0])])
def test_held_out_by_hand(fraction, held):
    kept, valid = hold_out(Y, fraction, rng())
    assert torch.bincount(Y[valid], minlength=4).tolist() == held
    assert torch.cat([kept, valid]).sort().values.equal(torch.arange(100))
    assert kept.equal(kept.sort().values) and valid.equal(valid.sort().values)


def test_hold_out_follows_from_the_generator_and_leaves_every_class_a_sample():
    kept, _ = hold_out(torch.tensor([0, 0, 0, 1]), 0.9, rng())
    assert torch.tensor([0, 0, 0, 1])[kept].tolist() == [0, 1]
    first, again, other = (hold_out(Y, 0.2, rng(seed))[1] for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)


def test_shards_are_disjoint_exact_and_within_one_of_proportional():
    hand = [(Y, shards, size) for shards, size in ((1, 100), (5, 20), (3, 33), (2, 17), (4, 25))]
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
    parts = stratified_shards(Y, 2, 20, rng(), indices=some)
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
        stratified_shards(Y, shards, size, rng())
