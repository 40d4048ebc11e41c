"""Wrong labels, long tails and repeated samples: drawn by seed on any data set, with true labels kept apart."""

import pickle

import pytest
import torch

from raypkg.core.config import load_settings, parse_toml, to_toml
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import Dataset, RunSettings
from raypkg.data import load_data
from raypkg.data.coreset import Coreset
from raypkg.data.opening import long_tail, open_data, subset, with_wrong_labels, wrong_share
from raypkg.data.split import Split
from raypkg.engine.shards import Shard
from raypkg.experiments.coreset_files import save_coreset
from raypkg.experiments.samples import open_samples
from raypkg.runs.storage import Storage


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def split_of(y, classes=None):
    x = torch.arange(float(len(y)))[:, None]
    return Split.from_tensors(x, torch.tensor(y), classes)


def settings_of(run_seed=0, **dataset):
    return RunSettings(seed=run_seed, dataset=Dataset(**dataset))


def test_exactly_the_share_of_labels_is_wrong_and_each_is_of_another_class():
    split = split_of([0, 1, 2, 3] * 500)
    noisy = with_wrong_labels(split, 0.4, rng())
    wrong = noisy.y != split.y
    assert int(wrong.sum()) == 800 and torch.equal(noisy.truth, split.y)
    assert wrong_share(noisy, torch.arange(2000)) == pytest.approx(0.4)
    shifts = ((noisy.y - split.y) % 4)[wrong].bincount(minlength=4)  # uniform over the three other classes
    assert shifts[0] == 0 and shifts[1:].min() > 230
    with pytest.raises(UserError, match=r"dataset\.noise = 0\.5: the data set has one class"):
        with_wrong_labels(split_of([0, 0, 0]), 0.5, rng())


@pytest.mark.parametrize(
    ("counts", "share", "left"),
    [([1000] * 5, 0.01, [1000, 316, 100, 32, 10]), ([100, 3, 50], 0.001, [100, 3, 1])],
)
def test_class_sizes_fall_geometrically_and_no_class_is_lost(counts, share, left):
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    assert y[long_tail(y, share, rng())].bincount().tolist() == left


def test_repeated_samples_carry_the_ids_of_the_originals():
    train, plain = open_data(Dataset(repeat=3)).train, load_data("digits").train
    assert len(train) == 3 * len(plain) and train.ids.tolist()[:4] == [0, 0, 0, 1]
    assert all(map(torch.equal, train.batch([3, 4, 5]), plain.batch([1, 1, 1])))


def test_all_together_copies_share_a_label_the_tail_is_that_of_true_labels_and_the_test_split_is_unchanged():
    train, test = open_data(Dataset(noise=0.3, imbalance=0.1, repeat=2, seed=4))
    plain = load_data("digits")
    assert torch.equal(train.y[::2], train.y[1::2]) and torch.equal(train.truth, plain.train.y[train.ids])
    sizes = train.truth[::2].bincount()
    assert sizes[0] > 9 * sizes[9]
    assert wrong_share(train, torch.arange(len(train))) == pytest.approx(0.3, abs=0.01)
    assert all(map(torch.equal, test.batch(range(len(test))), plain.test.batch(range(len(test)))))
    assert test.truth is None and test.ids is None


def test_held_out_samples_are_as_noisy_and_copies_stay_together():
    samples = open_samples(settings_of(repeat=5))
    train = samples.data.train
    assert not set(train.ids[samples.train_indices].tolist()) & set(train.ids[samples.held_out].tolist())
    samples = open_samples(settings_of(noise=0.4, validation=0.5))
    assert wrong_share(samples.data.train, samples.held_out) == pytest.approx(0.4, abs=0.05)


def test_draws_follow_from_the_seed_of_the_run_or_their_own():
    before = torch.get_rng_state()
    first, again, other, own = (
        open_samples(settings_of(seed, noise=0.4, **own), verify=False)
        for seed, own in ((0, {}), (0, {}), (1, {}), (1, {"seed": 0}))
    )
    y = first.data.train.y
    assert torch.equal(y, again.data.train.y) and torch.equal(y, own.data.train.y)
    assert not torch.equal(y, other.data.train.y) and torch.equal(before, torch.get_rng_state())
    assert first.digest(Dataset()) != other.digest(Dataset())
    with pytest.raises(UserError, match="gives other samples than those the run began with"):
        open_samples(settings_of(1, noise=0.4, digest=first.digest(Dataset())))


def test_stored_settings_alone_give_the_same_labels():
    stored = Dataset(noise=0.4, imbalance=0.5, repeat=2, seed=7)
    samples = open_samples(RunSettings(seed=3, dataset=stored))
    shard = pickle.loads(pickle.dumps(Shard(stored, samples.train_indices, samples.held_out)))
    assert torch.equal(shard.data.train.y, samples.data.train.y)
    with pytest.raises(UserError, match="drawn by a seed: give"):
        Shard(Dataset(noise=0.4), samples.train_indices, samples.held_out).data.train  # noqa: B018


def test_settings_without_a_regime_are_stored_as_before_there_were_any():
    assert Dataset().model_dump(exclude_none=True) == {"name": "digits", "options": {}, "validation": 0.1}
    chosen = load_settings(RunSettings, {}, {"dataset.noise": 0.4, "dataset.imbalance": 0.5, "dataset.repeat": 5})
    assert load_settings(RunSettings, parse_toml(to_toml(chosen), "config.toml")) == chosen
    assert chosen.dataset.noise == 0.4


def test_a_subset_of_a_subset_keeps_truth_and_ids():
    noisy = with_wrong_labels(split_of([0, 1] * 10), 0.5, generator(0, "noise"))
    part = subset(subset(noisy, torch.tensor([5, 6, 7])), torch.tensor([2, 0]))
    assert part.ids.tolist() == [7, 5] and part.batch([0])[0].item() == 7.0
    assert part.truth.tolist() == noisy.truth[[7, 5]].tolist()


def test_a_coreset_narrows_a_data_set_and_its_held_out_samples_stay(tmp_path):
    whole = open_samples(RunSettings())
    picked = whole.train_indices[torch.tensor([9, 3, 50])]
    save_coreset(Storage(str(tmp_path)), Coreset.uniform(picked), whole, RunSettings(), {})
    narrowed = open_samples(settings_of(only=f"{tmp_path}/coreset.parquet"))
    assert narrowed.train_indices.tolist() == sorted(picked.tolist())
    assert torch.equal(narrowed.held_out, whole.held_out)
