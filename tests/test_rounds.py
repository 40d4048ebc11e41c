"""LiPT's rounds: merged models start the next one, whatever stops them and whoever trains them; joint epochs follow."""

import pytest
import torch

from gloo import on_workers
from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.seeds import derive
from raypkg.data.coreset import Coreset
from raypkg.engine.costs import Cost
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.engine.worker import Worker
from raypkg.experiments.coreset_files import load_record
from raypkg.experiments.samples import new_model, open_samples
from raypkg.methods.lipt.outer import outer_step
from raypkg.methods.lipt.pretrain import RESULT
from raypkg.methods.lipt.pretrain.lipt import disjoint_shards, pretrain_models
from raypkg.methods.lipt.pretrain.member import Context
from raypkg.methods.lipt.settings import LiptSettings, Pretrain
from raypkg.runs.checkpoints import StoredCheckpoints, load_tensors
from raypkg.runs.storage import Storage

MODELS = 2
EPOCHS = 3


def settings_of(**pretrain):
    short = {"models": MODELS, "epochs": EPOCHS, "joint_epochs": 0, "precision": "float32", "lr": 0.05, **pretrain}
    chosen = {"model": "linear", "cluster.workers": 0}
    return load_settings(LiptSettings, overrides=chosen | {f"pretrain.{name}": value for name, value in short.items()})


def pretrained(folder, settings, worker=None):
    """Pre-train in a folder; return what is left there and the record, without times."""
    storage = Storage(str(folder))
    record = pretrain_models(worker or Worker(), settings, storage)
    samples = open_samples(settings)
    seen = load_record(storage, RESULT, samples.data.train.y)
    work = [(cost["forward"], cost["backward"]) for cost in record["costs"]]
    return load_tensors(storage, RESULT), seen, work


def same(a, b, tolerance=0.0):
    return all(torch.allclose(w, b[name], rtol=0, atol=tolerance) for name, w in a.items())


def test_the_models_are_merged_evenly_over_the_epochs():
    assert Pretrain(epochs=5).merge_epochs == [1, 2, 3, 4, 5]
    assert Pretrain(epochs=5, rounds=1).merge_epochs == [5]
    assert Pretrain(epochs=7, rounds=3).merge_epochs == [2, 4, 7]


def test_more_rounds_than_epochs_are_refused():
    with pytest.raises(UserError, match=r"pretrain.rounds = 6: models are merged after whole epochs, and there are 5"):
        Pretrain(epochs=5, rounds=6)


def test_each_round_starts_from_what_the_one_before_merged(tmp_path):
    """A slow twin: every epoch of every model is a training of its own, from the mean of all models before it."""
    settings = settings_of(rounds=EPOCHS, randaugment=False)
    context = Context(settings, Storage(str(tmp_path / "twin")), open_samples(settings), Worker())
    data = context.samples.data
    mean = new_model(settings, data)
    for epoch in range(EPOCHS):
        trained = []
        for number, shard in enumerate(disjoint_shards(context)):
            model = new_model(settings, data)
            model.load_state_dict(mean.state_dict())
            run = Run(
                model, data.train, Coreset.uniform(shard), settings.pretrain, derive(settings.seed, "lipt", number),
                "pretrain", Worker(), data.train.augment, Cost("pretrain"), epoch=epoch, last=epoch + 1,
            )  # fmt: skip
            trained.append(fit(run).model.state_dict())
        mean.load_state_dict({name: sum(state[name] for state in trained) / MODELS for name in trained[0]})
    weights, _, _ = pretrained(tmp_path / "run", settings)
    assert same(weights, mean.state_dict(), tolerance=1e-6)
    once, _, _ = pretrained(tmp_path / "once", settings_of(rounds=1, randaugment=False))
    assert not same(weights, once, tolerance=1e-3)


@pytest.mark.parametrize("kept", [True, False], ids=["after", "before"])
def test_killed_at_any_checkpoint_it_ends_as_if_it_had_not_been(kept, tmp_path, monkeypatch):
    settings = settings_of(rounds=2, outer_momentum=0.3, sparsity="snip")
    expected = pretrained(tmp_path / "straight", settings)
    save = StoredCheckpoints.save
    saves = MODELS * EPOCHS + 1  # one of what is merged between the rounds
    for fatal in range(saves + 1):
        count = 0

        def dying(self, epoch, state, fatal=fatal):
            nonlocal count
            count += 1
            if kept or count <= fatal:
                save(self, epoch, state)
            if count > fatal:
                raise KeyboardInterrupt

        folder = tmp_path / f"killed {fatal}"
        with monkeypatch.context() as patch:
            patch.setattr(StoredCheckpoints, "save", dying)
            if fatal < saves:
                with pytest.raises(KeyboardInterrupt):
                    pretrained(folder, settings)
            else:
                pretrained(folder, settings)  # stopped after the last merge, before the phase has its record
        weights, seen, work = pretrained(folder, settings)
        assert same(weights, expected[0])
        assert torch.equal(seen.losses, expected[1].losses) and torch.equal(seen.forgotten, expected[1].forgotten)
        assert work == expected[2]


def test_two_workers_and_one_merge_to_the_same_weights(tmp_path):
    settings = settings_of(rounds=3, models=3, outer_momentum=0.3)
    alone, seen, work = pretrained(tmp_path / "one", settings)
    results = on_workers(2, pretrained_there, str(tmp_path / "two"), settings)
    together = load_tensors(Storage(str(tmp_path / "two")), RESULT)
    assert same(alone, together, tolerance=1e-6)
    assert results == [work, None]
    assert same({"losses": seen.losses}, {"losses": load_there(tmp_path / "two", settings).losses}, tolerance=1e-4)


def pretrained_there(worker, folder, settings):
    record = pretrain_models(worker, settings, Storage(folder))
    return [(cost["forward"], cost["backward"]) for cost in record["costs"]] if worker.rank == 0 else None


def load_there(folder, settings):
    return load_record(Storage(str(folder)), RESULT, open_samples(settings).data.train.y)


def test_a_damaged_checkpoint_between_rounds_is_told(tmp_path, monkeypatch):
    settings = settings_of(rounds=3)
    count = 0
    save = StoredCheckpoints.save

    def dying(self, epoch, state):
        nonlocal count
        count += 1
        save(self, epoch, state)
        if count == 4:  # both models and the merge, then the first model's next epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoredCheckpoints, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            pretrained(tmp_path, settings)
    (merged,) = (tmp_path / "checkpoints/pretrain/merged").iterdir()
    merged.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"pretrain is damaged: model_000 has done 2 epochs, the models were merged"):
        pretrained(tmp_path, settings)


def test_no_momentum_goes_on_with_the_merged_weights():
    start, merged = {"w": torch.randn(5)}, {"w": torch.randn(5)}
    assert outer_step(start, merged, {}, 0.0) == (merged, {})


def test_outer_momentum_is_nesterovs():
    """As torch.optim.SGD with rate 1 on the gradient start − merged."""
    w = torch.nn.Parameter(torch.randn(5))
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=0.6, nesterov=True)
    ours, velocity = {"w": w.detach().clone()}, {}
    for _ in range(3):
        merged = {"w": ours["w"] + torch.randn(5)}
        w.grad = ours["w"] - merged["w"]
        optimizer.step()
        ours, velocity = outer_step(ours, merged, velocity, 0.6)
        torch.testing.assert_close(ours["w"], w.detach())
