"""CREST in a loop of the user's own: the same bits as effray's run, resumed at any step, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, IterableDataset, default_collate

import reference
from raypkg import CrestLoader, Run, Split, build_model, fit
from raypkg.core.errors import UserError
from raypkg.coresets.record import Recorder
from raypkg.engine.worker import Worker
from raypkg.methods.crest.hook import Crest
from raypkg.methods.crest.quadratic import flat

N, SIZE, EPOCHS = 120, 8, 4
BUSY = {"exclude_every_steps": 7, "exclude_below": 0.4, "h": 3.0}  # exclusions, and intervals of several steps
CASES = {
    "published": {},
    "published, busy": BUSY,
    "each-step": {"preset": "each-step"},
    "each-step, busy": {"preset": "each-step", "exclude_every_steps": 7, "exclude_below": 0.4, "exclude_after": 1},
    # Chooses with the weights of an earlier moment. With one coreset, a run fits to the gradient of its next step.
    "three coresets": {"preset": "fast", "h": 3.0, "model_batches": 3},
    "released": {"preset": "released", **BUSY},
}
every_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def split():
    p = reference.problem(N, 3, 5, dtype=torch.float32)
    return Split.from_tensors(p.features, torch.arange(N) % 3)


def tensors():
    """Return all samples as effray's own models receive them, and their labels."""
    x, y = split().batch(torch.arange(N))
    return split().inputs(x), y


def network():
    return build_model("mlp", (5,), 3, seed=0)


def loader_of(model, dataset=None, **options):
    return CrestLoader(tensors() if dataset is None else dataset, model, SIZE, **{"epochs": EPOCHS} | options)


def start(**options):
    """Return the model, the optimiser and the loader of a bare loop."""
    model = network()
    return model, optimizer_of(model), loader_of(model, **options)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, fused=True)


def train(model, optimizer, loader, epochs=EPOCHS, stop=None):
    """Plain PyTorch; return the states of all three right after step ``stop``."""
    step = 0
    for _ in range(epochs):
        for x, y, w in loader:
            losses = F.cross_entropy(model(x), y, reduction="none")
            optimizer.zero_grad()
            (losses @ w * (1 / len(y))).backward()
            optimizer.step()
            step += 1
            if step == stop:
                return copy.deepcopy([part.state_dict() for part in (model, optimizer, loader)])


def values(model):
    return flat(model.parameters())


@every_case
def test_a_bare_loop_gives_the_weights_of_effrays_run_bit_for_bit(options):
    model, optimizer, loader = start(**options)
    train(model, optimizer, loader)
    data, indices = split(), torch.arange(N)
    hook = Crest(loader.options, indices, SIZE)
    training = {"epochs": EPOCHS, "batch_size": SIZE, "lr": 0.05, "precision": "float32", "schedule": "constant"}
    training |= {"nesterov": False, "weight_decay": 0.0}
    run = fit(Run.simple(network(), data, hooks=[Recorder(data.y), hook], augment=(), **training))
    assert values(model).equal(values(run.model))
    assert loader.report()["history"] == hook.algorithm.state.history
    spent = {bill.phase: {"forward": bill.forward, "backward": bill.backward} for bill in run.bills()}
    assert {part: cost for part, cost in loader.report()["cost"].items() if any(cost.values())} == {
        part: spent[part] for part in spent if part != "evaluate"
    }


@every_case
def test_stopped_in_the_middle_of_an_epoch_and_resumed_equals_never_stopped(options, tmp_path):
    straight, optimizer, whole = start(**options)
    train(straight, optimizer, whole)
    for step in (15, 44):  # 15: after the last batch of an epoch, before the loop has left it
        torch.save(train(*start(**options), stop=step), tmp_path / "states.pt")
        states = torch.load(tmp_path / "states.pt", weights_only=True)  # tensors and plain values
        resumed, optimizer, loader = parts = start(**options)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
        finished = (step - 1) // 15
        train(resumed, optimizer, loader, EPOCHS - finished)
        assert values(resumed).equal(values(straight))
        assert loader.report() == whole.report() and loader.report()["step"] == 15 * EPOCHS


def test_a_pass_is_an_epoch_or_all_steps_and_none_follows_the_last():
    model, optimizer, loader = start(epochs=None, steps=20)
    train(model, optimizer, loader, epochs=1)
    assert len(loader) == loader.report()["step"] == 20
    with pytest.raises(UserError, match="all 20 steps of this CrestLoader are done"):
        next(iter(loader))
    loader = loader_of(model, epochs=2)
    next(iter(loader))  # left by ``break``: the next pass is a whole one
    assert [len(list(loader)) for _ in range(2)] == [15, 14]


def test_two_passes_at_once_are_refused():
    loader = loader_of(network())
    with pytest.raises(UserError, match="another pass over this CrestLoader has begun"):
        list(zip(loader, loader, strict=True))


def test_the_report_says_pools_checks_and_their_cost():
    model, optimizer, loader = start(**BUSY)
    assert loader.report()["rho"] is None
    train(model, optimizer, loader)
    report = loader.report()
    rows, subset = report["history"], 4 * SIZE
    assert report["checks"] == len(rows) > report["expired"] > 1
    assert report["pools"] == rows[-1]["update"] + (rows[-1]["rho"] > 0.05) * (rows[-1]["step"] < 60)
    assert (report["rho"], report["interval"] >= 1, report["active"] < N) == (rows[-1]["rho"], True, True)
    chosen = {row["update"]: row["chosen"] for row in rows}
    assert report["cost"]["select"] == {"forward": sum(chosen.values()) * subset, "backward": 0}
    assert report["cost"]["check"] == {"forward": len(rows) * subset, "backward": 0}
    assert report["cost"]["model"] == {"forward": 2 * sum(chosen.values()) * SIZE} | {
        "backward": 2 * sum(chosen.values()) * SIZE
    }
    assert report["cost"]["train"] == {"forward": 60 * SIZE, "backward": 60 * SIZE}


class Rows(Dataset):
    """Samples in the form of Hugging Face's data sets, of a length that may change."""

    def __init__(self, *left_out):
        self.x, self.y = tensors()
        self.left_out = left_out
        self.length = N

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        row = {"values": self.x[index], "labels": self.y[index]}
        return {name: value for name, value in row.items() if name not in self.left_out}


class ByKeywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, values):
        return type("Output", (), {"logits": self.inner(values)})


def of_hugging_face():
    datasets = pytest.importorskip("datasets")
    x, y = tensors()
    return datasets.Dataset.from_dict({"values": x.tolist(), "labels": y.tolist()}).with_format("torch")


@pytest.mark.parametrize("preset", ["published", "each-step"])
@pytest.mark.parametrize("rows", [Rows, of_hugging_face])
def test_samples_may_be_mappings_as_those_of_hugging_face(preset, rows):
    pairs = list(loader_of(network(), preset=preset, epochs=1))
    mappings = list(loader_of(ByKeywords(), rows(), preset=preset, epochs=1))
    for (x, y, w), batch in zip(pairs, mappings, strict=True):
        assert batch["values"].equal(x) and batch["labels"].equal(y) and batch["weights"].equal(w)
        assert tensors()[0][batch["indices"]].equal(x)


def test_samples_may_be_arrays():
    x, y = tensors()
    same = zip(loader_of(network()), loader_of(network(), (x.numpy(), y.numpy())), strict=True)
    assert all(each.equal(other) for batch, of_arrays in same for each, other in zip(batch, of_arrays, strict=True))


def test_the_model_the_random_numbers_and_the_users_data_set_are_left_as_they_are():
    model, before = network().train(), values(network())
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    next(iter(loader_of(model)))
    assert torch.rand(3).equal(expected)
    assert values(model).equal(before) and all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_error_leaves_the_training_as_it_was_so_that_it_continues():
    straight, optimizer, whole = start()
    train(straight, optimizer, whole)
    model = network()
    optimizer = optimizer_of(model)

    class Pairs(Rows):
        def __getitem__(self, index):
            return self.x[index], self.y[index]

    samples = Pairs()
    loader = loader_of(model, samples)
    train(model, optimizer, loader, epochs=1)
    before, state = values(model), str(loader.state_dict())
    samples.length = N - 1
    with pytest.raises(UserError, match="the data set has 119 samples, CrestLoader was made for 120"):
        next(iter(loader))
    assert values(model).equal(before) and all(module.training for module in model.modules())
    assert str(loader.state_dict()).replace("'end': 30", "'end': None") == state
    samples.length = N
    train(model, optimizer, loader, epochs=EPOCHS - 1)
    assert values(model).equal(values(straight))


class Numbered(Rows):
    def __getitem__(self, index):
        return super().__getitem__(index) | {"indices": index}


def reverse(rows):
    return default_collate(rows[::-1])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 121}, "^batch_size = 121: there are only 120 samples to choose from"),
        ({"batch_size": None}, "batch_size = None: must be an integer, 1 or more"),
        ({"epochs": None}, "give either epochs or steps"),
        ({"preset": "publish"}, r"unknown preset 'publish'.*published"),
        ({"tua": 0.1}, "unknown setting 'tua', did you mean 'tau'"),
        ({"alpha": 0.1}, "alpha is now called exclude_below"),
        ({"tau": 0.0, "h": 2.0}, r"^tau = 0, .*: h = 2\.0 would do nothing"),
        ({"subset": 0.01}, "^subset = 0.01 of 120 samples is 1, fewer than the 8 of batch_size"),
        ({"dataset": Stream()}, "a data set with a length that gives samples by index, not a Stream"),
        ({"dataset": (torch.ones(3, 5), torch.ones(2))}, r"tensors \(x, y\) of equal lengths, not \[3, 2\]"),
        ({"dataset": Numbered(), "model": ByKeywords(), "collate_fn": reverse}, "must keep it"),
        ({"dataset": Rows("labels")}, "a batch of the data set has values: it needs 'labels' as well"),
        (
            {"dataset": [{"values": [0.0] * 5, "labels": 0}] * 9, "model": ByKeywords()},
            r"'values' of a batch is no tensor",
        ),
        ({"model": nn.Linear(5, 2)}, "label out of range"),
    ],
)
def test_what_is_refused(given, message):
    known = {"dataset": tensors(), "model": network(), "batch_size": SIZE, "epochs": EPOCHS}
    with pytest.raises(UserError, match=message):
        next(iter(CrestLoader(**known | given)))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr("raypkg.methods.crest.loader.ranks_here", lambda: Worker(1, 2))
    with pytest.raises(UserError, match="CrestLoader is for one process, not 2"):
        loader_of(network())


def relabelled():
    x, y = tensors()
    return x, (y + 1) % 3


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (dict, "this is no state of a CrestLoader: it has no 'settings'"),
        (lambda: loader_of(network(), seed=1).state_dict(), "of a CrestLoader with seed = 1, this one has 0"),
        (lambda: loader_of(network(), preset="each-step").state_dict(), r"with tau = 0\.0, this one has 0\.05"),
        (lambda: loader_of(network(), relabelled()).state_dict(), r"with labels = \[1, 1, .*, this one has \[0, 0"),
    ],
)
def test_a_checkpoint_of_another_loader_is_refused(state, message):
    loader = loader_of(network())
    before = str(loader.state_dict())
    with pytest.raises(UserError, match=message):
        loader.load_state_dict(state())
    assert str(loader.state_dict()) == before
