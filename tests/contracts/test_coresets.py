"""What every coreset method keeps, over the whole registry."""

import inspect

import pytest
import torch

import reference
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.methods.coresets import coreset
from raypkg.methods.gradients import HeadView
from raypkg.methods.selection import select, select_class

N = 60


@pytest.fixture(params=coreset.entries)
def entry(request):
    return coreset[request.param]


@pytest.fixture
def view():
    return reference.problem(N, dtype=torch.float32).view


@pytest.fixture
def valid():
    return reference.problem(25, dtype=torch.float32).view


def pick(entry, view, budget, *, seed=0, valid=None):
    return select_class(view, budget, entry, seed=seed, label=0, options={}, valid=valid)


@pytest.mark.parametrize("budget", [1, 2, 17, N - 1, N])
@pytest.mark.parametrize("balanced", [True, False])
def test_picks_fill_the_budget_exactly(entry, view, valid, budget, balanced):
    picked = select(view, budget, entry.name, seed=0, valid=valid, balanced=balanced)
    assert picked.indices.unique().numel() == budget
    assert 0 <= picked.indices.min() and picked.indices.max() < N
    assert picked.weights.isfinite().all() and (picked.weights >= 0).all() and picked.weights.max() > 0


def test_whole_budget_returns_everything(entry, view):
    assert pick(entry, view, N).indices.sort().values.equal(torch.arange(N))


@pytest.mark.parametrize("budget", [0, N + 1])
def test_budget_out_of_range(entry, view, budget):
    with pytest.raises(UserError, match=f"budget {budget}: must be from 1 to the number of samples, {N}"):
        pick(entry, view, budget)
    with pytest.raises(UserError, match=f"budget {budget}"):
        select(view, budget, entry.name, seed=0)


def test_same_seed_same_result(entry, view, valid):
    first, second = (pick(entry, view, 17, seed=3, valid=valid) for _ in range(2))
    assert first.indices.equal(second.indices) and first.weights.equal(second.weights)


def test_global_generator_is_untouched(entry, view, valid):
    before = torch.random.get_rng_state()
    pick(entry, view, 17, valid=valid)
    assert torch.random.get_rng_state().equal(before)


def test_inputs_are_untouched(entry, view, valid):
    parts = [part for v in (view, valid) for part in (v.logits, v.features, v.y)]
    before = [part.clone() for part in parts]
    pick(entry, view, 17, valid=valid)
    assert all(part.equal(old) for part, old in zip(parts, before, strict=True))


def test_precision_does_not_change_the_picks(entry, view, valid):
    single, double = pick(entry, view, 17, valid=valid), pick(entry, view.double(), 17, valid=valid.double())
    assert single.indices.equal(double.indices)
    torch.testing.assert_close(single.weights, double.weights)


def test_order_of_the_data_does_not_matter(entry, view, valid):
    if draws(entry):
        pytest.skip("draws by position")
    order = torch.randperm(N, generator=generator(0, "order"))
    straight, shuffled = pick(entry, view, 17, valid=valid), pick(entry, view[order], 17, valid=valid).at(order)
    torch.testing.assert_close(dense(shuffled), dense(straight))


def test_a_method_without_rng_ignores_the_seed(entry, view):
    same = pick(entry, view, 17, seed=0).indices.equal(pick(entry, view, 17, seed=1).indices)
    assert same != draws(entry)


@pytest.mark.parametrize("budget", [1, 5, 12])
def test_identical_samples_are_picked_all_the_same(entry, budget):
    view = HeadView(torch.zeros(12, 3), torch.ones(12, 2), torch.zeros(12, dtype=torch.int64))
    assert len(pick(entry, view, budget)) == budget


@pytest.mark.parametrize("budget", [1, 5, 12])
def test_gradients_of_zero_give_an_unweighted_coreset(entry, budget):
    logits = torch.tensor([200.0, -200.0]).repeat(12, 1)  # p = (1, 0) exactly
    view = HeadView(logits, torch.ones(12, 2), torch.zeros(12, dtype=torch.int64))
    assert pick(entry, view, budget).weights.equal(torch.ones(budget))


def test_a_method_names_itself(entry):
    assert entry.help.endswith(".")


def draws(entry):
    return "rng" in inspect.signature(entry.function).parameters


def dense(picked):
    """Weight of each sample, −1 where it is not picked."""
    return torch.full((N,), -1.0).index_put((picked.indices,), picked.weights)
