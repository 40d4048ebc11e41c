"""Selection in a loop of the user's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset, default_collate

import reference
from raypkg import CrestLoader
from raypkg.core.errors import UserError
from raypkg.core.seeds import derive
from raypkg.coresets.batches import Batches
from raypkg.coresets.budgets import class_budgets, select
from raypkg.coresets.loader import CoresetLoader
from raypkg.coresets.record import Record, margins_of
from raypkg.methods.crest.quadratic import flat

N = 120


def data():
    p = reference.problem(N, 3, 5, dtype=torch.float32)
    return TensorDataset(p.features, p.y)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def loader_of(model, rule, fraction, **options):
    return CoresetLoader(DataLoader(data(), batch_size=16), model, rule, fraction, **options)


def train(loader, model, epochs):
    """Plain PyTorch, with the lines that selection adds."""
    optimizer, seen = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(epochs):
        count = 0
        for x, y, w in loader:
            losses = F.cross_entropy(model(x), y, reduction="none")
            loader.record(losses)
            optimizer.zero_grad()
            (losses * w).mean().backward()
            optimizer.step()
            count += len(y)
        seen.append(count)
    return seen


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_ccs_selects_by_the_margins_of_the_losses_that_it_is_given():
    model = network()
    chosen = {"warm_epochs": 3, "epochs": 5}
    loader = loader_of(model, "ccs", 0.2, **chosen)
    total = torch.zeros(N)
    for _ in range(3):
        for x, y, _ in loader:
            losses = F.cross_entropy(model(x), y, reduction="none").detach()
            loader.record(losses)
            total[loader._latest] += margins_of(losses)
    _, y = data()[:]
    twin = select(Record(y, total, margins=total / 3), 24, "ccs", seed=derive(0, "selection", 3))
    again = loader_of(model, "ccs", 0.2, **chosen)
    again.load_state_dict(loader.state_dict())
    for each in (loader, again):
        next(iter(each))
        assert each.coreset.indices.equal(twin.indices.sort().values)


class ByKeywords(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return type("Output", (), {"logits": self.inner(x)})


class Backwards(Dataset):
    """Samples as mappings with their positions, which collation reverses."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        x, y = data()[i]
        return {"x": x, "label": y, "indices": i}


def reverse(rows):
    return default_collate(rows[::-1])


@pytest.mark.parametrize("balanced", [True, False])
def test_grand_by_full_gradients_keeps_the_largest_norms_of_its_twin(balanced):
    model = network()
    chosen = {"options": {"gradients": "full"}, "balanced": balanced, "epochs": 1}
    pairs = loader_of(model, "grand", 0.2, **chosen)
    mappings = DataLoader(Backwards(), batch_size=16, collate_fn=reverse)
    mappings = CoresetLoader(mappings, ByKeywords(model), "grand", 0.2, **chosen)
    x, y = data()[:]
    model.eval()
    losses = F.cross_entropy(model(x), y, reduction="none")
    norms = torch.stack([flat(torch.autograd.grad(loss, model.parameters(), retain_graph=True)) for loss in losses])
    norms, counts = norms.norm(dim=1), class_budgets(y.bincount(), 24)
    parts = [((y == label).nonzero()[:, 0], count) for label, count in enumerate(counts)]
    parts = parts if balanced else [(torch.arange(N), 24)]
    twin = torch.cat([members[norms[members].topk(count).indices] for members, count in parts]).sort().values
    for loader in (pairs, mappings):
        next(iter(loader))
        assert loader.coreset.indices.equal(twin)


def test_a_batch_carries_its_own_samples_and_weights():
    loader, everything = loader_of(network(), "gradmatch", 0.5, epochs=1), data()
    weight_of = {tuple(row.tolist()): weight for x, _, w in loader for row, weight in zip(x, w.tolist(), strict=True)}
    picked = loader.coreset
    assert len(loader) == 4 and len(weight_of) == 60
    for index, weight in zip(picked.indices.tolist(), picked.weights.tolist(), strict=True):
        assert weight_of[tuple(everything[index][0].tolist())] == weight


def test_rows_of_tensors_are_gathered_as_they_would_be_collated():
    samples = TensorDataset(torch.randn(9, 3, 4, 4).to(memory_format=torch.channels_last), torch.arange(9))
    gathered = Batches(samples, default_collate, 0)[[7, 0, 7]]
    collated = default_collate([samples[i] for i in (7, 0, 7)])
    assert type(gathered) is type(collated)
    for ours, theirs in zip(gathered, collated, strict=True):
        assert ours.equal(theirs) and ours.stride() == theirs.stride()


def test_the_model_is_left_as_it_is():
    model = network().train()
    before, hooks = weights(model), [len(m._forward_pre_hooks) for m in model.modules()]
    next(iter(loader_of(model, "grand", 0.2, epochs=1)))
    assert weights(model).equal(before) and all(m.training for m in model.modules())
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


def crest_state():
    return CrestLoader(data().tensors, network(), 16, epochs=1).state_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: None, "this is no state of a CoresetLoader: it has no 'indices'"),
        (crest_state, "this is no state of a CoresetLoader"),
        (lambda: loader_of(network(), "grand", 0.5, epochs=1, seed=1).state_dict(), "seed = 1, this one has 0"),
        (
            lambda: CoresetLoader(loaded(Table([0, 1] * 60)), network(), "grand", 0.5, epochs=1).state_dict(),
            r"labels = \[0, 1, .*, this one has \[0, 1, 2",
        ),
    ],
)
def test_a_state_of_something_else_is_refused(state, message):
    with pytest.raises(UserError, match=message):
        loader_of(network(), "grand", 0.5, epochs=1).load_state_dict(state())


def test_scored_samples_may_be_others():
    model, everything = network(), data()
    broken = TensorDataset(torch.full((N, 5), torch.nan), everything.tensors[1])
    with pytest.raises(UserError, match="NaN or infinite"):
        next(iter(CoresetLoader(loaded(broken), model, "grand", 0.2, epochs=1)))
    next(iter(CoresetLoader(loaded(broken), model, "grand", 0.2, epochs=1, scored=everything)))


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


class Table(Dataset):
    """One row for each label, whatever the label is."""

    def __init__(self, labels, row=None):
        self.labels, self.row = labels, torch.zeros(5) if row is None else row

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.row, self.labels[i]


def loaded(data, **options):
    return DataLoader(data, batch_size=16, **options)


@pytest.mark.parametrize(
    ("loader", "rule", "fraction", "options", "message"),
    [
        (loaded(data()), "grand", 0.1, {"warm_epochs": 9}, "^warm_epochs = 9 of 9 epochs: nothing would be"),
        (loaded(data()), "infobatch", 0.1, {}, "it needs fraction = 1 and every_epochs = 1, not 0.1 and 0"),
        (loaded(data()), "grand", 0.1, {"epochs": 2.5}, r"epochs = 2.5: must be an integer, 1 or more"),
        (loaded(Table([])), "grand", 0.1, {}, "the data set has no samples"),
        (loaded(data()), "craig", 0.1, {"target": Table([])}, "the target has no samples"),
        (loaded(data()), "grand", 0.1, {"target": data()}, "grand selects for no target: target would do nothing"),
        (loaded(data(), drop_last=True), "grand", 0.1, {}, "drop_last=True: it must give every sample once"),
        (loaded(Endless()), "grand", 0.1, {}, "_InfiniteConstantSampler"),
        (loaded(data(), sampler=RandomSampler(data(), replacement=True)), "grand", 0.1, {}, "every sample once"),
        (data(), "grand", 0.1, {}, "takes a DataLoader with a batch_size, not TensorDataset"),
    ],
)
def test_what_cannot_work_is_refused(loader, rule, fraction, options, message):
    with pytest.raises(UserError, match=message):
        CoresetLoader(loader, network(), rule, fraction, **{"epochs": 9} | options)


def test_no_pass_follows_the_last_epoch():
    loader = loader_of(network(), "random", 0.1, epochs=2)
    list(loader), list(loader)
    with pytest.raises(UserError, match="all 2 epochs of this CoresetLoader are done: give more epochs"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (Table([0.5] * 40), r"labels must be integers from 0 up, \[b\]; a batch has torch.float64 \[40\]"),
        (Table(["a"] * 40), "labels must be integers from 0 up, .*; a batch has (tuple|list)"),
        (Table([torch.zeros(3)] * 40), r"torch.float32 \[40, 3\]"),
        (TensorDataset(torch.zeros(40, 5)), r"must return pairs \(x, y\)"),
    ],
)
def test_batches_are_pairs_with_labels(samples, message):
    for rule in ("grand", "random"):
        with pytest.raises(UserError, match=message):
            next(iter(CoresetLoader(loaded(samples), network(), rule, 0.1, epochs=1)))


def test_labels_may_be_of_any_integer_type():
    for label in (1, torch.tensor(1, dtype=torch.int32)):
        for rule in ("grand", "random"):
            _, y, _ = next(iter(CoresetLoader(loaded(Table([label] * 40)), network(), rule, 0.1, epochs=1)))
            assert y.tolist() == [1] * 4


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(5, 3), nn.ReLU()), r"nn\.Linear"),
        (nn.Flatten(), r"nn\.Linear"),
        (nn.Linear(4, 3), "Linear cannot take the samples: mat1 and mat2 shapes"),
        (nn.Linear(5, 3).double(), "Linear cannot take the samples: .*dtype"),
    ],
)
def test_a_model_must_take_the_samples_and_end_in_its_head(module, message):
    with pytest.raises(UserError, match=message):
        next(iter(loader_of(module, "grand", 0.1, epochs=1)))


def test_records_must_fit():
    model = network()
    loader = loader_of(model, "infobatch", 1.0, every_epochs=1, epochs=4)
    x, y, _ = next(iter(loader))
    with pytest.raises(UserError, match=r"losses \[\] of a batch of 15: use reduction='none'"):
        loader.record(F.cross_entropy(model(x), y))
    with pytest.raises(UserError, match=r"infobatch needs the losses of each batch: call record\(losses\)"):
        next(iter(loader))
    with pytest.raises(UserError, match="forgetting needs the record"):
        next(iter(loader_of(model, "forgetting", 0.1, epochs=4)))
    short = TensorDataset(*(tensor[:9] for tensor in data().tensors))
    with pytest.raises(UserError, match="scored has 9 samples, the loader's data set 120"):
        next(iter(loader_of(model, "grand", 0.1, epochs=4, scored=short)))


def test_an_epoch_keeps_its_weights_when_another_begins():
    model = network()
    loader = loader_of(model, "gradmatch", 0.5, every_epochs=1, epochs=4)
    first = iter(loader)
    next(first)
    held, weights = loader.coreset, {}
    model[0].weight.data.normal_()
    next(iter(loader))
    assert not loader.coreset.weights.equal(held.weights)
    for x, _, w in first:
        weights |= {tuple(row.tolist()): value for row, value in zip(x, w.tolist(), strict=True)}
    for index, weight in zip(held.indices.tolist(), held.weights.tolist(), strict=True):
        row = tuple(data()[index][0].tolist())
        assert weights.get(row, weight) == weight


class Caching(nn.Module):
    """Makes a tensor in its first forward pass and keeps it."""

    def __init__(self):
        super().__init__()
        self.lazy, self.head, self.scale = nn.LazyLinear(8), nn.Linear(8, 3), None

    def forward(self, x):
        if self.scale is None:
            self.scale = torch.ones(8)
        return self.head(self.lazy(x).relu() * self.scale)


def test_what_a_model_makes_during_selection_still_trains():
    model = Caching()
    loader = loader_of(model, "el2n", 0.5, epochs=1)
    for x, y, _ in loader:
        F.cross_entropy(model(x), y).backward()
    assert model.lazy.weight.grad is not None
