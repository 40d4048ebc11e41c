"""CCS, D2 pruning and Gm matching, which cover what there is, and the margins that a training records for the first."""

import math

import pytest
import torch
from torch.nn import functional as F

import reference
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import Training
from raypkg.coresets.budgets import select
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.record import Record, Recorder, margins_of
from raypkg.coresets.rules import coreset
from raypkg.coresets.rules.matching import geometric_median
from raypkg.data import load_data
from raypkg.data.split import Split
from raypkg.engine.hooks import Hook
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.models import build_model


def with_margins(*margins):
    margins = torch.tensor(margins)
    y = torch.zeros(len(margins), dtype=torch.int64)
    return Record(y, torch.zeros(len(margins)), margins=margins)


def with_features(features, errors=None):
    """A view of these features, and of two classes whose errors ‖p − e_y‖ are √2 times the given ones."""
    wrong = torch.full((len(features),), 0.5) if errors is None else torch.tensor(errors)
    logits = torch.stack([(1 - wrong).log(), wrong.log()], dim=1)
    return HeadView(logits.double(), torch.tensor(features, dtype=torch.float64), torch.zeros(len(features)).long())


# Margins


def test_a_margin_is_the_label_s_logit_above_all_others_together():
    view = reference.problem(50).view
    own = view.logits.gather(1, view.y[:, None])[:, 0]
    others = view.logits.scatter(1, view.y[:, None], -torch.inf).logsumexp(dim=1)
    margins = margins_of(F.cross_entropy(view.logits, view.y, reduction="none"))
    torch.testing.assert_close(margins, (own - others).float())


@pytest.mark.parametrize("loss, margin", [(0.0, 15.94), (1e-9, 15.94), (100.0, -100.0), (math.log(2), 0.0)])
def test_margins_of_extreme_losses_are_finite(loss, margin):
    assert margins_of(torch.tensor([loss])).item() == pytest.approx(margin, abs=0.01)


class Margins(Hook):
    """Spells out the margin of each sample's step by another forward pass before the step."""

    def __init__(self, n):
        self.exact = torch.zeros(n)
        self.to_largest = torch.zeros(n)

    def on_gradients(self, run):
        with torch.no_grad():
            logits = run.model(run.batch.x).float()
        own = logits.gather(1, run.batch.y[:, None])[:, 0]
        others = logits.scatter(1, run.batch.y[:, None], -torch.inf)
        self.exact[run.batch.indices] += own - others.logsumexp(dim=1)
        self.to_largest[run.batch.indices] += own - others.amax(dim=1)


@pytest.fixture(scope="module")
def trained():
    """An MLP that learned the digits for four epochs, with a recorder and with what it should have recorded."""
    split = load_data("digits").train
    recorder, twin = Recorder(split.y), Margins(len(split))
    model = build_model("mlp", split.shape, split.num_classes, seed=0)
    training = Training(epochs=4, precision="float32")
    fit(Run.simple(model, split, training, hooks=[recorder, twin], augment=()))
    return recorder, twin


def test_the_area_under_the_margin_is_recorded_while_training(trained):
    recorder, twin = trained
    torch.testing.assert_close(recorder.record.margins, twin.exact / 4, rtol=0, atol=0.05)


def test_the_recorded_margins_order_the_samples_as_those_to_the_largest_other_logit_do(trained):
    recorder, twin = trained
    ranks = [margins.argsort().argsort().double() for margins in (recorder.record.margins, twin.to_largest)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.99


def test_what_was_recorded_survives_a_checkpoint(trained):
    recorder, _ = trained
    again = Recorder(recorder.y)
    again.load_state_dict(recorder.state_dict())
    assert again.record.margins.equal(recorder.record.margins)


# CCS


def test_ccs_leaves_out_the_hardest_and_draws_as_many_from_each_stratum():
    margins = [-9.0, -8.0, *[0.0] * 3, *[1.0] * 5, *[9.9] * 10]  # strata of [0, 9.9] in thirds: 8, 0 and 10
    options = {"beta": 0.1, "strata": 3}
    picked = coreset["ccs"](with_margins(*margins), 8, rng=generator(0), options=options).indices
    assert not {0, 1} & set(picked.tolist())
    assert int((picked < 10).sum()) == int((picked >= 10).sum()) == 4


def test_ccs_takes_all_of_a_rare_stratum():
    margins = [0.0, 0.1, *[5.0] * 30, *[10.0] * 30]
    options = {"beta": 0.0, "strata": 4}
    picked = coreset["ccs"](with_margins(*margins), 12, rng=generator(0), options=options).indices
    assert {0, 1} < set(picked.tolist())
    assert int((picked >= 32).sum()) == 5


def test_ccs_drops_no_more_than_the_budget_allows():
    record = with_margins(*torch.arange(10.0).tolist())
    picked = coreset["ccs"](record, 8, rng=generator(0), options={"beta": 0.9}).indices
    assert sorted(picked.tolist()) == [2, 3, 4, 5, 6, 7, 8, 9]


def test_ccs_draws_evenly_among_equal_margins():
    times = torch.zeros(12)
    for seed in range(600):
        times[coreset["ccs"](with_margins(*[1.0] * 12), 3, rng=generator(0, seed)).indices] += 1
    assert ((times / 600 - 0.25).abs() < 5 * (0.25 * 0.75 / 600) ** 0.5).all()


def test_ccs_leaves_out_most_wrong_labels(trained):
    """Of digits with 30 % wrong labels, far fewer are drawn than there are."""
    split = load_data("digits").train
    rng = generator(0, "wrong")
    wrong = torch.rand(len(split), generator=rng) < 0.3
    shift = torch.randint(1, 10, (len(split),), generator=rng)
    x, y = split.batch(torch.arange(len(split)))
    noisy = Split.from_tensors(x.float().flatten(1), (y + shift * wrong) % 10)
    recorder = Recorder(noisy.y)
    model = build_model("mlp", noisy.shape, 10, seed=0)
    fit(Run.simple(model, noisy, Training(epochs=4, precision="float32"), hooks=[recorder], augment=()))
    picked = select(recorder.record, 200, "ccs", seed=0, options={"beta": 0.4}).indices
    assert wrong[picked].float().mean() < 0.1


def test_ccs_takes_the_margins_of_a_view_where_there_is_no_record():
    view = reference.problem(60).view
    losses = F.cross_entropy(view.logits, view.y, reduction="none")
    record = Record(view.y, losses.float(), margins=margins_of(losses))
    of_view, of_record = (select(samples, 12, "ccs", seed=0).indices for samples in (view, record))
    assert of_view.equal(of_record)


@pytest.mark.parametrize("record", [Record.empty(torch.zeros(4).long()), with_margins(*[torch.inf] * 4)])
def test_ccs_needs_margins(record):
    with pytest.raises(UserError, match="ccs needs the margins that a training recorded of these samples"):
        coreset["ccs"](record, 2, rng=generator(0))


def test_a_sample_that_was_not_trained_on_counts_as_easy():
    record = with_margins(-1.0, torch.inf, 2.0, 2.0)
    picked = coreset["ccs"](record, 3, rng=generator(0), options={"beta": 0.25}).indices
    assert sorted(picked.tolist()) == [1, 2, 3]


# D2 pruning


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"relative": False, "forward": 0.3}, {"neighbours": 3, "reverse": 0.2}])
def test_d2_equals_its_slow_twin(seed, options):
    view = reference.problem(40, seed=seed).view
    given = {"neighbours": 10, "forward": 1.0, "reverse": 1.0, "relative": True} | options
    assert coreset["d2"](view, 15, options=options).indices.tolist() == reference.message_passing(view, 15, **given)


def test_d2_by_hand():
    """The middle of three neighbours hears of two hard ones; once it is taken, the lone sample is worth more."""
    view = with_features([[0.0], [0.5], [1.0], [50.0]], errors=[0.6, 0.5, 0.4, 0.3])
    options = {"neighbours": 2, "relative": False}
    assert coreset["d2"](view, 3, options=options).indices.tolist() == [1, 3, 0]
    assert coreset["d2"](view, 3, options={**options, "reverse": 1e9}).indices.tolist() == [1, 0, 2]
    assert coreset["d2"](view, 3, options={**options, "forward": 1e9}).indices.tolist() == [0, 3, 2]


def test_d2_does_not_depend_on_the_size_of_the_features_unless_it_is_told_to():
    p = reference.problem(40).view
    larger = HeadView(p.logits, 10 * p.features, p.y)
    assert coreset["d2"](p, 12).indices.equal(coreset["d2"](larger, 12).indices)
    published = [coreset["d2"](view, 12, options={"relative": False}).indices for view in (p, larger)]
    assert not published[0].equal(published[1])


def test_d2_of_a_single_sample():
    assert coreset["d2"](with_features([[1.0]]), 1).indices.tolist() == [0]


def test_d2_graph_does_not_depend_on_the_block(monkeypatch):
    view = reference.problem(50).view
    picked = coreset["d2"](view, 12).indices
    monkeypatch.setattr("raypkg.coresets.rules.coverage.BLOCK", 7)
    assert coreset["d2"](view, 12).indices.equal(picked)


# Gm matching


def test_the_geometric_median_by_hand():
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(corners, 100), torch.full((2,), 0.5, dtype=torch.float64))
    line = torch.tensor([[0.0], [1.0], [100.0]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(line, 500), line[1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_no_point_near_the_geometric_median_has_a_smaller_sum_of_distances(seed):
    points = torch.randn(40, 3, generator=generator(seed, "points"), dtype=torch.float64)
    median = geometric_median(points, 500)
    least = (points - median).norm(dim=1).sum()
    for nudge in 1e-3 * torch.randn(50, 3, generator=generator(seed, "nudge"), dtype=torch.float64):
        assert (points - median - nudge).norm(dim=1).sum() >= least - 1e-9


def test_gm_brings_the_mean_of_the_chosen_to_the_median():
    view = reference.problem(300).view
    features = F.normalize(view.features, dim=1)
    median = geometric_median(features, 100)
    picked = coreset["gm"](view, 30).indices
    random = torch.randperm(300, generator=generator(0))[:30]
    errors = [float((features[chosen].mean(dim=0) - median).norm()) for chosen in (picked, random)]
    assert errors[0] < 0.2 * errors[1]


def test_each_choice_of_gm_is_the_one_that_brings_the_mean_nearest_to_the_median():
    view = reference.problem(60).view
    features = F.normalize(view.features, dim=1)
    median = geometric_median(features, 100)
    chosen = []
    for _ in range(12):
        left = [i for i in range(60) if i not in chosen]
        chosen.append(min(left, key=lambda i: float((features[[*chosen, i]].mean(dim=0) - median).norm())))
    assert coreset["gm"](view, 12).indices.tolist() == chosen


def test_gm_is_not_led_astray_by_a_minority_far_away():
    near = torch.randn(60, 4, generator=generator(0, "near")) + torch.tensor([5.0, 0, 0, 0])
    far = torch.randn(25, 4, generator=generator(0, "far")) + torch.tensor([-40.0, 0, 0, 0])
    view = with_features(torch.cat([near, far]).tolist())
    picked = coreset["gm"](view, 20).indices
    assert int((picked >= 60).sum()) <= 2  # of 25, where a uniform draw has 6
