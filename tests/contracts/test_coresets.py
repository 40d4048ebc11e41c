"""What every coreset rule keeps, over the whole registry."""

import dataclasses
import inspect

import pytest
import torch
import torch.nn.functional as F

import reference
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.budgets import select, select_class
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.record import Record, Rows, margins_of
from raypkg.coresets.rules import coreset

N = 60
ONLY_WITH = {
    "craig": {"greedy": "stochastic"},
    "grand": {"pick": "drawn"},
}  # options under which a rule draws that does not draw by default


@pytest.fixture(params=[name for name, entry in coreset.entries.items() if not entry.sizes_itself])
def entry(request):
    return coreset[request.param]


@pytest.fixture
def view(entry):
    return seen_by(entry, reference.problem(N, dtype=torch.float32).view)


def seen_by(entry, view):
    """The view itself, its features as rows, or what training would have recorded of its samples."""
    if entry.sees == "gradients" or entry.name == "random":
        return view
    if entry.sees == "rows":
        return Rows(view.features, view.y)
    losses = F.cross_entropy(view.logits, view.y, reduction="none")
    return Record(view.y, losses.float(), (3 * losses).floor().float(), margins_of(losses))


def in_double(samples):
    return samples.double() if isinstance(samples, HeadView) else samples


@pytest.fixture
def valid(entry):
    view = reference.problem(25, dtype=torch.float32).view
    return seen_by(entry, view) if entry.sees == "rows" else view


def pick(entry, view, budget, *, seed=0, target=None, options=None):
    return select_class(view, budget, entry, seed=seed, label=0, options=options or {}, target=target)


@pytest.mark.parametrize("budget", [1, 2, 17, N - 1, N])
@pytest.mark.parametrize("balanced", [True, False])
def test_picks_fill_the_budget_exactly(entry, view, valid, budget, balanced):
    picked = select(view, budget, entry.name, seed=0, target=valid, balanced=balanced)
    assert picked.indices.unique().numel() == budget
    assert 0 <= picked.indices.min() and picked.indices.max() < N
    assert picked.weights.isfinite().all() and (picked.weights >= 0).all() and picked.weights.max() > 0


@pytest.mark.parametrize("budget", [0, N + 1])
def test_budget_out_of_range(entry, view, budget):
    with pytest.raises(UserError, match=f"budget {budget}: must be from 1 to the number of samples, {N}"):
        select(view, budget, entry.name, seed=0)


def test_a_pick_follows_from_the_seed_and_touches_nothing_else(entry, view, valid):
    first, second = (pick(entry, view, 17, seed=3, target=valid) for _ in range(2))
    assert first.indices.equal(second.indices) and first.weights.equal(second.weights)
    before = torch.random.get_rng_state()
    pick(entry, view, 17, target=valid)
    assert torch.random.get_rng_state().equal(before)
    parts = [getattr(samples, field.name) for samples in (view, valid) for field in dataclasses.fields(samples)]
    before = [part.clone() for part in parts]
    pick(entry, view, 17, target=valid)
    assert all(part.equal(old) for part, old in zip(parts, before, strict=True))


def test_precision_does_not_change_the_picks(entry, view, valid):
    single, double = pick(entry, view, 17, target=valid), pick(entry, in_double(view), 17, target=in_double(valid))
    assert single.indices.equal(double.indices)
    torch.testing.assert_close(single.weights, double.weights)


def test_order_of_the_data_does_not_matter(entry, view, valid):
    if draws(entry):
        pytest.skip("draws by position")
    order = torch.randperm(N, generator=generator(0, "order"))
    straight, shuffled = pick(entry, view, 17, target=valid), pick(entry, view[order], 17, target=valid).at(order)
    torch.testing.assert_close(dense(shuffled), dense(straight))


def test_the_seed_matters_exactly_where_a_rule_draws(entry, view):
    first, second = (pick(entry, view, 17, seed=seed) for seed in (0, 1))
    assert first.indices.equal(second.indices) != draws(entry)
    assert draws(entry) or first.weights.equal(second.weights)


@pytest.mark.parametrize("name, options", ONLY_WITH.items())
def test_an_option_that_draws_takes_its_draws_from_the_seed(name, options):
    view = reference.problem(N, dtype=torch.float32).view
    first, again, other = (pick(coreset[name], view, 17, seed=seed, options=options).indices for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)


def test_memory_does_not_change_the_picks(entry, view, valid):
    least, most = (
        select_class(view, 17, entry, seed=0, label=0, options={}, target=valid, memory=memory) for memory in (0, 2**30)
    )
    assert least.indices.equal(most.indices) and least.weights.equal(most.weights)


@pytest.mark.parametrize("budget", [1, 5, 12])
def test_identical_samples_are_picked_all_the_same(entry, budget):
    view = HeadView(torch.zeros(12, 3), torch.ones(12, 2), torch.zeros(12, dtype=torch.int64))
    assert len(pick(entry, seen_by(entry, view), budget)) == budget


@pytest.mark.parametrize("budget", [1, 5, 12])
def test_gradients_of_zero_give_an_unweighted_coreset(entry, budget):
    logits = torch.tensor([200.0, -200.0]).repeat(12, 1)  # p = (1, 0) exactly
    view = HeadView(logits, torch.ones(12, 2), torch.zeros(12, dtype=torch.int64))
    assert pick(entry, seen_by(entry, view), budget).weights.equal(torch.ones(budget))


@pytest.mark.parametrize("entry", [entry for entry in coreset.entries.values() if entry.sizes_itself])
def test_a_rule_that_sizes_itself_takes_no_budget(entry):
    view = reference.problem(N).view
    samples = view if entry.sees == "gradients" else seen_by(entry, view)
    first, again, other = (select(samples, N, entry.name, seed=seed) for seed in (0, 0, 1))
    assert first.indices.equal(again.indices) and not first.indices.equal(other.indices)
    assert 1 <= len(first) <= N and first.indices.max() < N
    with pytest.raises(UserError, match="as many samples as it sees fit: a budget of 59 cannot be set"):
        select(samples, N - 1, entry.name, seed=0)


def draws(entry):
    return "rng" in inspect.signature(entry.function).parameters and entry.name not in ONLY_WITH


def dense(picked):
    """Weight of each sample, −1 where it is not picked."""
    return torch.full((N,), -1.0).index_put((picked.indices,), picked.weights)
