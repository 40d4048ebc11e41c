import pytest
import torch

import reference
from raypkg.core.seeds import generator
from raypkg.coresets.solvers import (
    AT_ONCE,
    BatchAtoms,
    Cholesky,
    MeanAtoms,
    batch_means,
    draw_in_proportion,
    largest,
    largest_bounded,
    matching_pursuit,
    spanned_pursuit,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "test"), dtype=torch.float64)


class Dense:
    """Materialised atoms [n, p] and a target [p]; S is a list."""

    def __init__(self, atoms, target):
        self.atoms, self.target, self.chosen = atoms, target, []

    def __len__(self):
        return len(self.atoms)

    def correlation(self, weights):
        return self.atoms @ (self.target - weights @ self.atoms[self.chosen])

    def append(self, j):
        self.chosen.append(j)
        return self.atoms[self.chosen] @ self.atoms[j], self.atoms[j] @ self.target

    def keep(self, places):
        self.chosen = [self.chosen[place] for place in places]


def pursue(atoms, target, k, *, lam=0.0, eps=1e-10):
    dense = Dense(atoms, target)
    picked, weights = matching_pursuit(dense, target @ target, k, lam=lam, eps=eps)
    assert dense.chosen == picked.tolist()
    return picked, weights


@pytest.mark.parametrize("k", [1, 7, 40, 200])
@pytest.mark.parametrize("seed", range(4))
def test_the_largest_by_bounds_are_the_largest(seed, k):
    values = random(200, seed=seed).round(decimals=1)  # many are equal
    bounds = values + random(200, seed=seed + 100).abs()
    asked = []
    best, found = largest_bounded(bounds, lambda some: asked.append(len(some)) or values[some], k, at_most=200)
    assert best.equal(largest(values, k)) and found.equal(values[best])
    assert sum(asked) <= max(k, (bounds >= found[-1]).sum()) + max(k, AT_ONCE)
    assert largest_bounded(bounds, lambda some: values[some], k, at_most=sum(asked)) is not None
    assert largest_bounded(bounds, lambda some: values[some], k, at_most=sum(asked) - 1) is None


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_a_draw_in_proportion_has_its_probabilities(k):
    scores, draws = torch.tensor([8.0, 1.0, 0.0, 2.0, 1.0, 4.0, 0.5]), 3000
    times = torch.zeros(7, dtype=torch.float64)
    probabilities = torch.zeros(7, dtype=torch.float64)
    for seed in range(draws):
        chosen, probability = draw_in_proportion(scores, k, generator(0, "draw", seed))
        assert chosen.unique().numel() == k
        times[chosen] += 1
        probabilities[chosen] = probability
    assert float(probabilities.sum()) == pytest.approx(k)
    assert ((times / draws - probabilities).abs() < 5 * (0.25 / draws) ** 0.5).all()
    below = (probabilities < 1) & (scores > 0)
    rates = probabilities[below] / scores[below]
    assert not len(rates) or rates.max() == pytest.approx(rates.min())  # in proportion where none is certain


def test_a_draw_takes_all_scores_above_zero_before_any_other():
    chosen, probability = draw_in_proportion(torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0]), 3, generator(0))
    assert {1, 3} < set(chosen.tolist())
    assert sorted(probability.tolist()) == pytest.approx([1 / 3, 1, 1])


def test_cholesky_grows_and_shrinks_to_the_factor_of_what_is_left(monkeypatch):
    monkeypatch.setattr("raypkg.coresets.solvers.GROWTH", 4)
    a = random(9, 9)
    matrix, kept = a @ a.T + torch.eye(9), []
    factor = Cholesky(like=matrix)
    for move in [0, 1, 2, 3, 4, 5, "-2", 6, "-0", 2, "-5", 7, 8]:
        if isinstance(move, str):
            kept.pop(position := int(move[1:]))
            factor.remove(position)
        else:
            assert factor.append(matrix[move, kept], matrix[move, move])
            kept.append(move)
        block = matrix[kept][:, kept]
        torch.testing.assert_close(factor.lower, torch.linalg.cholesky(block))
    right = random(len(kept), seed=1)
    torch.testing.assert_close(factor.solve(right), torch.linalg.solve(block, right))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_pursuit_equals_least_squares_anew_at_each_step(seed, lam):
    atoms = random(40, 12, seed=seed) + 0.3
    target = atoms.mean(dim=0)
    for k in (1, 5, 10):
        picked, weights = pursue(atoms, target, k, lam=lam)
        slow = reference.matching_pursuit(atoms, target, k, lam)
        assert dict(zip(picked.tolist(), weights.tolist(), strict=True)) == pytest.approx(slow)


def test_weights_that_would_turn_negative_are_dropped():
    """The sum of the axes attracts first; both axes together then push its weight to −0.45 and take its place."""
    atoms = torch.tensor([[1.0, 1.0, 0.5], [1.0, 0.0, -0.1], [0.0, 1.0, -0.1]], dtype=torch.float64)
    target = torch.tensor([1.0, 1.0, -0.3], dtype=torch.float64)
    first, _ = pursue(atoms, target, 1)
    picked, weights = pursue(atoms, target, 3)
    assert first.tolist() == [0]
    assert sorted(picked.tolist()) == [1, 2]
    torch.testing.assert_close(weights, torch.full((2,), 1.03 / 1.02, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(6))
def test_unlimited_pursuit_is_non_negative_least_squares(seed):
    atoms, target = random(8, 5, seed=seed), random(5, seed=seed + 100)
    picked, weights = pursue(atoms, target, 8, lam=0.1, eps=1e-14)
    dense = torch.zeros(8, dtype=torch.float64).index_put((picked,), weights)
    torch.testing.assert_close(dense, reference.nonnegative_ridge(atoms, target, 0.1))


def test_pursuit_of_special_atoms():
    atoms = random(10, 6)
    picked, weights = pursue(atoms, 2 * atoms[4], 5)
    assert picked.tolist() == [4]
    assert weights.tolist() == pytest.approx([2.0])
    atoms = random(10, 4).abs()
    assert len(pursue(atoms, -atoms[0], 5)[0]) == 0
    assert len(pursue(atoms, torch.zeros(4, dtype=torch.float64), 5)[0]) == 0
    atoms = random(1, 4).expand(6, 4)
    assert pursue(atoms, 2 * atoms[0], 6)[0].tolist() == [0]
    assert len(pursue(atoms, 2 * atoms[0], 6, lam=0.5)[0]) == 6


def test_an_atom_in_the_span_of_the_chosen_ones_is_passed_over():
    class Rounded(Dense):
        """Rounding makes the copy of the first atom look best."""

        def correlation(self, weights):
            return super().correlation(weights) + torch.tensor([1.0, 0.9, 0.0], dtype=torch.float64)

    atoms = torch.eye(3, dtype=torch.float64)[[0, 0, 1]]
    dense, target = Rounded(atoms, atoms[0] + 0.5 * atoms[2]), atoms.new_tensor([1.0, 0.5, 0.0])
    picked, weights = matching_pursuit(dense, target @ target, 3, lam=0.0, eps=1e-10)
    assert picked.tolist() == dense.chosen == [0, 2]
    assert weights.tolist() == pytest.approx([1.0, 0.5])


def test_mean_gradients_that_are_spelt_out_are_pursued_like_batches(monkeypatch):
    view = reference.problem(90, dtype=torch.float64).view
    order = torch.randperm(90, generator=generator(0))
    batch = torch.empty_like(order)
    batch[order] = torch.arange(90) // 4  # the last one has 2 samples
    target = view.mean()
    monkeypatch.setattr("raypkg.coresets.solvers.BLOCK", 10)
    found = []
    for atoms in (BatchAtoms(view, batch, target, 60), MeanAtoms(batch_means(view, order, 4), target)):
        chosen, weights = matching_pursuit(atoms, atoms.energy, 12, lam=0.01, eps=1e-10)
        found.append((atoms.ranked(chosen).tolist(), weights))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("seed", range(3))
def test_more_samples_than_numbers_are_pursued_like_few(seed):
    problem = reference.problem(160, 3, 4, seed=seed)
    view, gradients = problem.view, reference.per_sample_gradients(problem).flatten(1)  # [160, 15], of rank 10
    target = view.mean()
    lam = 0.1 * float(target.square().sum())

    def error(chosen, weights):
        return (weights @ gradients[chosen] - target.flatten()).square().sum() + lam * weights @ weights

    atoms = BatchAtoms(view, torch.arange(160), target, 60)
    one = matching_pursuit(atoms, atoms.energy, 60, lam=lam, eps=1e-10)
    same = spanned_pursuit(view, target, 60, lam=lam, eps=1e-10, together=1)
    assert same[0].tolist() == one[0].tolist() and len(one[0]) == 60
    torch.testing.assert_close(same[1], one[1])

    chosen, weights = spanned_pursuit(view, target, 60, lam=lam, eps=1e-10, together=16)
    torch.testing.assert_close(weights, reference.ridge(gradients[chosen], target.flatten(), lam))
    assert error(chosen, weights) < 1.05 * error(*one)
