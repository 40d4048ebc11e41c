"""LiPT's merges against hand tables, its rounds against slow twins, and resuming at every checkpoint."""

from itertools import count

import pytest
import torch
from torch import nn

from gloo import on_workers
from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.seeds import derive, generator
from raypkg.data.coreset import Coreset
from raypkg.data.split import stratified_shards
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.engine.worker import Cost, Worker
from raypkg.experiments.samples import new_model, open_samples
from raypkg.experiments.training import load_record
from raypkg.methods.lipt.merges import Member, merge, reestimate
from raypkg.methods.lipt.pretrain import pretrain_models
from raypkg.methods.lipt.settings import RESULT, LiptSettings, Pretrain
from raypkg.runs.checkpoints import StoredCheckpoints, load_tensors
from raypkg.runs.storage import Storage

MODELS = 2
EPOCHS = 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("masked_mean", [2.0, 2.0, 9.0]),  # both, the first only, neither: the initial value
        ("mean", [2.0, 1.0, 0.0]),  # pruned weights count as they are
    ],
)
def test_means_by_hand(name, expected):
    pairs = (([1.0, 2.0, 0.0], [True, True, False]), ([3.0, 0.0, 0.0], [True, False, False]))
    members = [Member({"w": torch.tensor(w)}, {"w": torch.tensor(mask)}) for w, mask in pairs]
    merged = merge[name]({"w": torch.tensor([9.0] * 3)}, members, total=lambda sums: sums)
    assert merged["w"].tolist() == expected


def test_batch_norm_statistics_are_those_of_the_inputs():
    model = nn.Sequential(nn.BatchNorm1d(4))
    x = torch.randn(64, 4) * 3 + 2
    assert reestimate(model, x.split(16)) == 64
    assert torch.allclose(model[0].running_mean, x.mean(0), atol=1e-5)
    assert torch.allclose(model[0].running_var, torch.stack([p.var(0) for p in x.split(16)]).mean(0), atol=1e-5)
    assert model[0].momentum == 0.1
    assert reestimate(nn.Linear(4, 2), x.split(16)) == 0


def test_merges_are_spread_evenly_over_the_epochs():
    assert Pretrain(epochs=5, rounds=None).merge_epochs == [1, 2, 3, 4, 5]
    assert Pretrain(epochs=7, rounds=3).merge_epochs == [2, 4, 7]


# Rounds


def settings_of(**pretrain):
    short = {"models": MODELS, "epochs": EPOCHS, "sparsity": False, "precision": "float32", "lr": 0.05, **pretrain}
    chosen = {"model": "linear", "cluster.workers": 0}
    return load_settings(LiptSettings, overrides=chosen | {f"pretrain.{name}": value for name, value in short.items()})


def pretrained_on(worker, folder, settings):
    """Pre-train in a folder; return weights, record of samples and work."""
    storage = Storage(folder)
    record = pretrain_models(worker, settings, storage)
    if worker.rank:
        return None
    seen = load_record(storage, RESULT, open_samples(settings).data.train.y)
    return load_tensors(storage, RESULT), seen, [(cost["forward"], cost["backward"]) for cost in record["costs"]]


def pretrained(folder, settings):
    return pretrained_on(Worker(), str(folder), settings)


def same(a, b, tolerance=0.0):
    return all(torch.allclose(w, b[name], rtol=0, atol=tolerance) for name, w in a.items())


def test_each_round_starts_from_the_last_merge(tmp_path):
    """A slow twin: every epoch of every model is a training of its own, from the mean of all models before it."""
    settings = settings_of(rounds=EPOCHS, randaugment=False)
    data, indices, _ = open_samples(settings)
    rng = generator(settings.seed, "shards")
    shards = stratified_shards(data.train.y, MODELS, len(indices) // MODELS, rng, indices=indices)
    mean = new_model(settings, data)
    for epoch in range(EPOCHS):
        trained = []
        for number, shard in enumerate(shards):
            model = new_model(settings, data)
            model.load_state_dict(mean.state_dict())
            run = Run(
                model, data.train, Coreset.uniform(shard), settings.pretrain, derive(settings.seed, "lipt", number),
                "pretrain", Worker(), data.train.augment, Cost("pretrain"), epoch=epoch, last=epoch + 1,
            )  # fmt: skip
            trained.append(fit(run).model.state_dict())
        mean.load_state_dict({name: sum(state[name] for state in trained) / MODELS for name in trained[0]})
    weights, *_ = pretrained(tmp_path / "run", settings)
    assert same(weights, mean.state_dict(), tolerance=1e-6)
    once, *_ = pretrained(tmp_path / "once", settings_of(rounds=1, randaugment=False))
    assert not same(weights, once, tolerance=1e-3)


def killed_after(monkeypatch, last, folder, settings):
    """Pre-train until this checkpoint, the first of which is number 0, is written."""
    save = StoredCheckpoints.save
    numbers = count()

    def dying(self, epoch, state):
        save(self, epoch, state)
        if next(numbers) == last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoredCheckpoints, "save", dying)
        pretrained(folder, settings)


def test_killed_after_any_checkpoint_it_resumes_to_the_same_result(tmp_path, monkeypatch):
    settings = settings_of(rounds=2, sparsity="snip")
    expected = pretrained(tmp_path / "straight", settings)
    saves = MODELS * EPOCHS + 1  # one of the merge between the rounds
    for last in range(saves + 1):
        folder = tmp_path / f"killed {last}"
        if last < saves:
            killed_after(monkeypatch, last, folder, settings)
        else:
            pretrained(folder, settings)  # stopped after the last merge, before the phase has its record
        weights, seen, work = pretrained(folder, settings)
        assert same(weights, expected[0])
        assert torch.equal(seen.losses, expected[1].losses) and torch.equal(seen.forgotten, expected[1].forgotten)
        assert work == expected[2]


def test_two_workers_and_one_merge_to_the_same_weights(tmp_path):
    settings = settings_of(rounds=3, models=3)
    local, seen, work = pretrained(tmp_path / "one", settings)
    (together, seen_together, work_together), _ = on_workers(2, pretrained_on, str(tmp_path / "two"), settings)
    assert same(local, together, tolerance=1e-6) and work == work_together
    assert torch.allclose(seen.losses, seen_together.losses, rtol=0, atol=1e-4)


def test_a_damaged_checkpoint_between_rounds_is_refused(tmp_path, monkeypatch):
    settings = settings_of(rounds=3)
    killed_after(monkeypatch, 3, tmp_path, settings)  # both models and the merge, then the first model's next epoch
    (merged,) = (tmp_path / "checkpoints/pretrain/merged").iterdir()
    merged.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"pretrain is damaged: model_000 has done 2 epochs, the models were merged"):
        pretrained(tmp_path, settings)
