import pytest
import torch
from torch import nn

import reference
from raypkg.core.errors import UserError
from raypkg.coresets import gradients
from raypkg.coresets.gradients import HeadView, gradient_norms, head_view
from raypkg.models import build_model

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(params=TOLERANCE, ids=str)
def some(request):
    return reference.problem(20, dtype=request.param)


@pytest.fixture
def others(some):
    return reference.problem(7, dtype=some.features.dtype)


def close(fast, slow):
    torch.testing.assert_close(fast, slow, rtol=TOLERANCE[slow.dtype], atol=TOLERANCE[slow.dtype])


def pairwise(a, b):
    return (a[:, None] - b[None]).norm(dim=2)


def flat(problem):
    return reference.per_sample_gradients(problem).flatten(1)  # [n, C(D+1)]


def test_norms_inner_products_and_distances_are_those_of_autograd(some, others):
    close(some.view.norms(), flat(some).norm(dim=1))
    close(some.view.inner(), flat(some) @ flat(some).T)
    close(some.view.inner(others.view), flat(some) @ flat(others).T)
    close(some.view.project(others.head), flat(some) @ others.head.flatten())
    close(some.view.distances(), pairwise(flat(some), flat(some)))
    close(some.view.distances(others.view), pairwise(flat(some), flat(others)))


@pytest.mark.parametrize("num_classes, width", [(2, 1), (4, 6), (100, 1), (10, 512), (10, 2048)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equal_gradients_are_at_distance_zero(dtype, num_classes, width, scale):
    view = reference.problem(30, num_classes, width, dtype=dtype).view
    view = HeadView(view.logits, scale * view.features, view.y)
    other = view[torch.arange(30).repeat(5)]
    same = torch.arange(30)[:, None] == torch.arange(30).repeat(5)
    assert view.distances(other)[same].count_nonzero() == 0
    assert view[:1].distances(other)[0, ::30].count_nonzero() == 0


def test_sum_and_mean_are_those_of_autograd(some):
    gradients, weights = reference.per_sample_gradients(some), torch.linspace(0, 3, 20)
    weighted = gradients * weights[:, None, None].to(gradients)
    close(some.view.sum(), gradients.sum(dim=0))
    close(some.view.mean(), reference.gradient(some.head, some.features, some.y))
    close(some.view.sum(weights), weighted.sum(dim=0))
    close(some.view.mean(weights), weighted.mean(dim=0))


def test_moved_head_has_the_gradient_of_the_moved_head(some):
    step = 0.3 * reference.problem(1, seed=5, dtype=some.head.dtype).head
    close(
        some.view.shifted(some.view.through(step)).mean(), reference.gradient(some.head + step, some.features, some.y)
    )


@pytest.mark.parametrize("count", [0, 1, 20])  # one by inner products, twenty by the sum spelt out
def test_a_step_along_samples_moves_the_logits_by_their_summed_gradients(some, others, count):
    summed = reference.per_sample_gradients(others)[:count].sum(dim=0)
    close(some.view.along(others.view[:count]), reference.logits(summed, some.features))


@pytest.mark.parametrize("indices", [slice(3, 9), torch.tensor([4, 0, 4])], ids=["slice", "tensor"])
def test_a_part_of_a_view_has_what_was_computed_of_all_of_it(some, indices):
    used, fresh = some.view, some.view
    used.distances()
    assert used[indices].distances(used).equal(fresh[indices].distances(used))
    assert used[indices].residual.equal(fresh[indices].residual)


def test_residual_by_hand():
    view = HeadView(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0]]), torch.tensor([1]))
    assert view.residual.tolist() == [[0.5, -0.5]]
    assert view.sum().tolist() == [[1.5, 0.5], [-1.5, -0.5]]
    view = HeadView(torch.tensor([[0.0, 30.0]]), torch.ones(1, 1), torch.tensor([1]))
    assert view.residual[0].tolist() == pytest.approx([9.3576e-14, -9.3576e-14], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", torch.nan, r"sample 2: NaN or infinite logits \(3 of 5 samples\)"),
        ("features", -torch.inf, r"sample 2: NaN or infinite features \(3 of 5 samples\)"),
        ("y", -1, "sample 2: label out of range"),
        ("y", 3, "sample 2: label out of range"),
    ],
)
def test_the_first_sample_that_is_not_finite_or_has_no_class_is_named(name, value, message):
    parts = {"logits": torch.zeros(5, 3), "features": torch.zeros(5, 2), "y": torch.zeros(5, dtype=torch.int64)}
    parts[name][2:].fill_(value)
    with pytest.raises(UserError, match=message):
        HeadView(**parts)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
        self.head = nn.Linear(5, 4)

    def features(self, x):
        return self.body(x)


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model()


@pytest.fixture
def data():
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4


def test_head_view_evaluates_the_model_in_order(model, data):
    x, y = data
    view = head_view(model, [(x[:5], y[:5]), (x[5:], y[5:])])
    model.eval()
    torch.testing.assert_close(view.features, model.features(x).detach())
    torch.testing.assert_close(view.logits, model.head(model.features(x)).detach())
    assert view.y.equal(y)
    assert not view.logits.is_inference()  # usable in autograd


def test_head_view_is_float32_and_restores_every_mode_and_statistic(model, data):
    model.body[1].eval()
    before = model.body[1].running_mean.clone()
    head_view(model, [data])
    assert model.training and model.body[2].training and not model.body[1].training
    assert model.body[1].running_mean.equal(before)
    x, y = data
    view = head_view(model.bfloat16(), [(x.bfloat16(), y)])
    assert view.logits.dtype == view.features.dtype == torch.float32


def test_head_view_of_a_diverged_model_is_refused(model, data):
    nn.init.constant_(model.head.bias, torch.nan)
    with pytest.raises(UserError, match="sample 0: NaN or infinite logits"):
        head_view(model, [data])
    assert model.training


def samples_for(shape, n):
    if len(shape) == 2:  # texts: tokens and segments, padded by -1
        texts = torch.stack([torch.randint(1, shape[1], (n, shape[0])), torch.zeros(n, shape[0], dtype=torch.int64)], 1)
        texts[0, :, shape[0] // 2 :] = -1
        return texts
    return torch.randn(n, *shape)


@pytest.mark.parametrize(
    ("name", "shape"),
    {"mlp": (5,), "lenet5": (1, 28, 28), "resnet8": (3, 8, 8), "airbench": (3, 32, 32), "transformer": (6, 9)}.items(),
)
def test_norms_of_full_gradients_are_those_of_one_backward_pass_per_sample(name, shape, monkeypatch):
    torch.manual_seed(0)
    model = build_model(name, shape, 3, seed=0).train().to(memory_format=torch.channels_last)
    next(model.parameters()).requires_grad_(False)  # a frozen parameter has no part in it
    x, y = samples_for(shape, 7), torch.arange(7) % 3
    monkeypatch.setattr(gradients, "AT_ONCE", 2 * sum(p.numel() for p in model.parameters()))  # two samples at a time
    with torch.no_grad():  # as during training
        norms = gradient_norms(model, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert model.training
    torch.testing.assert_close(norms, reference.full_norms(model, x, y), rtol=1e-4, atol=1e-6)


def test_a_model_without_gradients_of_single_samples_is_refused():
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(UserError, match="Branching has no full gradients of single samples: "):
        gradient_norms(Branching(2, 3), [(torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))])
