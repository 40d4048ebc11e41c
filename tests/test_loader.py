"""Selection in a loop of the user's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import reference
from raypkg.core.errors import UserError
from raypkg.core.seeds import derive
from raypkg.engine.loader import CoresetLoader
from raypkg.methods.gradients import head_view
from raypkg.methods.selection import select
from raypkg.models.classifier import Tapped, as_classifier

N = 120


def data():
    p = reference.problem(N, 3, 5, dtype=torch.float32)
    return TensorDataset(p.features, p.y)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


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


def test_each_selection_is_by_the_model_of_that_epoch():
    model = network()
    loader = CoresetLoader(DataLoader(data(), batch_size=16), model, "gradmatch", 0.2, every=2)
    for epoch in range(4):
        if epoch % 2 == 0:
            view = head_view(Tapped(model), [data()[:]])
            twin = select(view, 24, "gradmatch", seed=derive(0, "selection", epoch + 1))
        train(loader, model, 1)
        assert loader.coreset.indices.equal(twin.indices)
        torch.testing.assert_close(loader.coreset.weights, twin.weights, rtol=1e-3, atol=1e-3)


def test_a_batch_carries_its_own_samples_and_weights():
    model, everything = network(), data()
    loader = CoresetLoader(DataLoader(everything, batch_size=16), model, "gradmatch", 0.5)
    found = {tuple(row.tolist()): weight for x, _, w in loader for row, weight in zip(x, w.tolist(), strict=True)}
    picked = loader.coreset
    assert len(loader) == 4 and len(found) == 60
    for index, weight in zip(picked.indices.tolist(), picked.weights.tolist(), strict=True):
        assert found[tuple(everything[index][0].tolist())] == weight


def test_warm_epochs_and_random_online():
    model = network()
    loader = CoresetLoader(DataLoader(data(), batch_size=16), model, "random", 0.1, every=1, warm=1)
    assert train(loader, model, 1) == [N]
    picks = []
    for _ in range(3):
        assert train(loader, model, 1) == [12]
        picks.append(loader.coreset.indices.tolist())
    assert picks[0] != picks[1] != picks[2]


def test_infobatch_prunes_by_the_losses_that_it_is_given():
    model = network()
    loader = CoresetLoader(DataLoader(data(), batch_size=16), model, "infobatch", 1.0, every=1, epochs=8)
    seen = train(loader, model, 8)
    assert seen[0] == N and all(n < N for n in seen[1:7]) and seen[7] == N


def test_the_model_is_left_as_it_is():
    model = network().train()
    before, hooks = weights(model), [len(m._forward_pre_hooks) for m in model.modules()]
    CoresetLoader(DataLoader(data(), batch_size=16), model, "grand", 0.2).__iter__().__next__()
    assert weights(model).equal(before) and all(m.training for m in model.modules())
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_stopped_and_resumed_equals_never_stopped():
    def start():
        model = network()
        loader = CoresetLoader(DataLoader(data(), batch_size=16), model, "infobatch", 1.0, every=1, epochs=9)
        return loader, model

    straight, model = start()
    train(straight, model, 5)
    stopped, halfway = start()
    train(stopped, halfway, 2)
    resumed, again = start()
    again.load_state_dict(halfway.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    train(resumed, again, 3)
    assert weights(again).equal(weights(model))


def test_scored_samples_may_be_others():
    model, everything = network(), data()
    broken = TensorDataset(torch.full((N, 5), torch.nan), everything.tensors[1])
    with pytest.raises(UserError, match="NaN or infinite"):
        next(iter(CoresetLoader(DataLoader(broken, batch_size=16), model, "grand", 0.2)))
    next(iter(CoresetLoader(DataLoader(broken, batch_size=16), model, "grand", 0.2, scored=everything)))


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


def test_what_cannot_work_is_refused():
    model, loader = network(), DataLoader(data(), batch_size=16)
    with pytest.raises(UserError, match="fraction 2: must be above 0"):
        CoresetLoader(loader, model, "grand", 2)
    with pytest.raises(UserError, match="did you mean 'grand'"):
        CoresetLoader(loader, model, "grant", 0.1)
    with pytest.raises(UserError, match="infobatch acts on the progress of the training: give epochs="):
        CoresetLoader(loader, model, "infobatch", 1.0, every=1)
    with pytest.raises(UserError, match="batch_size over a data set that has a length"):
        CoresetLoader(DataLoader(Endless(), batch_size=4), model)
    with pytest.raises(UserError, match=r"has no nn\.Linear"):
        CoresetLoader(loader, nn.Flatten())
    with pytest.raises(UserError, match=r"Sequential must end in its last nn\.Linear"):
        next(iter(CoresetLoader(loader, nn.Sequential(nn.Linear(5, 3), nn.ReLU()), "grand", 0.1)))


def test_tapped_sees_what_the_split_model_sees():
    model, (x, _) = network().eval(), data()[:]
    tapped = Tapped(model).features(x)
    assert tapped.equal(as_classifier(model).features(x))
