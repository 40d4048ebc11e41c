"""Selecting for other samples than those selected from: held-out ones, or the few of another domain."""

import csv

import pytest
import torch

import reference
from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import Reselect, Select
from raypkg.coresets.budgets import select
from raypkg.coresets.gradients import HeadView, head_view
from raypkg.coresets.record import Record
from raypkg.coresets.rules import coreset
from raypkg.coresets.sharded import LiveModel, check_schedule, select_coreset, target_of
from raypkg.data import Data, load_data
from raypkg.data.split import Split
from raypkg.engine.batches import plain_batches
from raypkg.engine.shards import WorkerShards, class_shards
from raypkg.models import build_model

WITH_TARGET = ("craig", "glister", "gradmatch", "gradmatchpb")
C, D, N = 3, 6, 240
EACH = N // 2  # samples of each domain
NONE = torch.empty(0, dtype=torch.int64)


def rows(domain, count, seed=0):
    """Rows of a domain: its classes differ in three columns of its own, the other domain's are near 0."""
    rng = generator(seed, "domain", domain)
    y = torch.arange(count) % C
    x = 0.05 * torch.randn(count, D, generator=rng)
    own = slice(0, C) if domain == "photos" else slice(C, D)
    x[:, own] += torch.eye(C)[y] + 0.3 * torch.randn(count, C, generator=rng)
    return x, y


def mixture():
    parts = [rows("photos", EACH), rows("sketches", EACH)]
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Split.from_tensors(x, y, classes=["cat", "dog", "ship"])


def write_table(folder, domain="sketches", count=12, names=("cat", "dog", "ship"), columns=D):
    """Write a few rows as PATH/train.csv and PATH/test.csv; return the data set's name."""
    x, y = rows(domain, count, seed=1)
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*(f"x{i}" for i in range(columns)), "label"])
            for row, label in zip(x.tolist(), y.tolist(), strict=True):
                if label < len(names):
                    writer.writerow([*row[:columns], names[label]])
    return f"table:{folder}"


@pytest.fixture
def few(tmp_path):
    return write_table(tmp_path / "few")


def model():
    return build_model("mlp", (D,), C, seed=0)


def small_batches(name):
    return {"batch_size": 2} if name == "gradmatchpb" else {}


def picked(name, target, *, balanced=True, holders=1, valid=NONE, options=None):
    split = mixture()
    kept = torch.arange(N)[~torch.isin(torch.arange(N), valid)]
    chosen = {"rule": name, "balanced": balanced, "target": target, "options": options or {}}
    settings = Select(fraction=0.2, weighted=True, **chosen)
    shards = WorkerShards(class_shards(Data(split, split), split.y, kept, valid, holders))
    scorer = LiveModel(model(), "float32")
    return select_coreset(shards, [scorer], settings, Record.empty(split.y), kept, seed=0)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("name", WITH_TARGET)
def test_the_domain_of_the_target_is_what_is_picked(name, balanced, few):
    chosen = picked(name, few, balanced=balanced, options=small_batches(name)).coreset.indices
    of_target = (chosen >= EACH).float().mean()
    drawn = picked("random", None, balanced=balanced).coreset.indices
    of_random = (drawn >= EACH).float().mean()
    # half of gradmatchpb's random pairs are mixed
    assert of_target > (0.7 if name == "gradmatchpb" else 0.9)
    assert 0.3 < of_random < 0.7


@pytest.mark.parametrize("name", WITH_TARGET)
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("target", ["valid", "few"])
def test_holders_of_some_classes_pick_as_one_holder_of_all(name, balanced, target, few):
    target = few if target == "few" else target
    valid = torch.arange(0, N, 5)
    alone, shared = (picked(name, target, balanced=balanced, holders=n, valid=valid) for n in (1, 3))
    assert alone.coreset.indices.equal(shared.coreset.indices)
    torch.testing.assert_close(alone.coreset.weights, shared.coreset.weights, rtol=1e-4, atol=1e-5)
    assert alone.cost.forward == shared.cost.forward == len(alone.indices) + (12 if target == few else len(valid))


@pytest.mark.parametrize("name", [name for name in WITH_TARGET if coreset[name].by_class])
def test_each_class_is_selected_for_the_targets_samples_of_that_class(name, few):
    split = mixture()
    like = target_of(Select(rule=name, target=few)).split_like(split)
    chosen = picked(name, few).coreset
    for label in range(C):
        views = []
        for data in (split, like):
            members = (data.y == label).nonzero()[:, 0]
            views.append(head_view(model(), plain_batches(data, members, torch.device("cpu"))))
        view, target = views
        members = (split.y == label).nonzero()[:, 0]
        share = int((split.y[chosen.indices] == label).sum())
        rng = generator(0, "select", label)
        given = {"target": target, "valid": target, "memory": 0, "rng": rng}
        expected = coreset[name](view, share, **given).at(members)
        of_class = split.y[chosen.indices] == label
        assert chosen.indices[of_class].equal(expected.indices.sort().values)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("memory", [0, 40 * 25 * 8, 2**30])
def test_craig_for_a_target_equals_its_slow_twin(seed, memory):
    train, target = reference.problem(40, seed=seed), reference.problem(25, seed=seed)
    gradients, aims = (reference.per_sample_gradients(p).flatten(1) for p in (train, target))
    distances = torch.stack([(aims - row).norm(dim=1) for row in gradients])  # [n, m]
    chosen = coreset["craig"](train.view, 8, rng=generator(0), memory=memory, target=target.view)
    medoids = reference.greedy_medoids(distances, 8)
    assert chosen.indices.tolist() == medoids
    expected = [count * 8 / 25 for count in reference.clusters(distances, medoids)]
    assert chosen.weights.tolist() == pytest.approx(expected)


def test_medoids_that_no_sample_of_the_target_is_nearest_to_weigh_nothing():
    train, target = reference.problem(60).view, reference.problem(5).view
    chosen = coreset["craig"](train, 20, rng=generator(0), memory=0, target=target)
    assert 1 <= chosen.weights.count_nonzero() <= 5 and float(chosen.weights.sum()) == pytest.approx(20)


def test_glister_looks_at_held_out_samples_unless_it_is_told_to_look_elsewhere(few):
    valid = torch.arange(0, N, 5)
    by_default, held_out, itself, other = (
        picked("glister", target, valid=valid).coreset.indices.tolist() for target in (None, "valid", "train", few)
    )
    assert by_default == held_out
    assert len({tuple(indices) for indices in (held_out, itself, other)}) == 3


@pytest.mark.parametrize("name", ["craig", "gradmatch", "gradmatchpb"])
def test_the_training_samples_are_the_target_by_default(name):
    valid = torch.arange(0, N, 5)
    by_default, itself, held_out = (picked(name, target, valid=valid) for target in (None, "train", "valid"))
    assert by_default.coreset.indices.equal(itself.coreset.indices)
    assert by_default.coreset.weights.equal(itself.coreset.weights)
    assert by_default.cost.forward == len(by_default.indices) < held_out.cost.forward
    assert not by_default.coreset.weights.equal(held_out.coreset.weights)


def test_a_data_set_is_read_with_its_options_and_normalised_like_the_training_samples(tmp_path):
    write_table(tmp_path / "few")
    single = tmp_path / "few" / "train.csv"
    single.write_text(single.read_text().replace("label", "kind"))
    chosen = load_settings(
        Select, None, {"target.name": f"table:{single}", "target.options.label": "kind", "target.options.test": 0.5}
    )
    target, split = target_of(chosen), mixture()
    like = target.split_like(split)
    assert (len(like), like.mean, like.std) == (6, split.mean, split.std)


def test_classes_are_matched_by_their_names(tmp_path):
    split = mixture()
    name = write_table(tmp_path / "named", names=("ship", "cat"))  # sorted as cat, ship: numbers 0 and 1
    like = target_of(Select(target=name)).split_like(split)
    assert like.classes == split.classes and like.y.tolist() == [2, 0] * 4
    assert len(picked("gradmatch", name, balanced=False).coreset) == N // 5
    with pytest.raises(UserError, match=r"has no sample of class 'dog': add some, or give select\.balanced = false"):
        picked("gradmatch", name)


def test_samples_of_another_kind_are_no_target(tmp_path):
    unknown = write_table(tmp_path / "unknown", names=("cat", "eel"))
    with pytest.raises(UserError, match=r"unknown class of select\.target = .* 'eel'"):
        picked("craig", unknown)
    narrow = write_table(tmp_path / "narrow", columns=4)
    with pytest.raises(UserError, match=r": samples of shape \(4,\), those of training have \(6,\)"):
        picked("craig", narrow)
    with pytest.raises(UserError, match="no samples are held out"):
        picked("gradmatch", "valid", balanced=False)
    view = reference.problem(10).view
    with pytest.raises(UserError, match="the target has no samples"):
        select(view, 2, "craig", seed=0, target=view[:0], balanced=False)


def test_texts_of_a_target_are_cut_into_the_tokens_of_those_of_training(tmp_path):
    pytest.importorskip("tokenizers")
    names = []
    for folder, words in (("all", "red green blue"), ("few", "red violet")):
        (tmp_path / folder).mkdir()
        lines = [f"{word} {i},{'yes' if i % 2 else 'no'}" for i in range(20) for word in words.split()]
        for split in ("train", "test"):
            (tmp_path / folder / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
        names.append(f"text:{tmp_path / folder}")
    split = load_data(names[0]).train
    with pytest.raises(UserError, match="its texts must be cut as those of training are: give option tokenizer"):
        target_of(Select(target=names[1])).check(split)


@pytest.mark.parametrize("name", [name for name in coreset.names if not coreset[name].has_target])
def test_a_target_that_would_do_nothing_is_refused(name):
    fraction = 1.0 if coreset[name].sizes_itself else 0.5
    settings = Reselect(rule=name, fraction=fraction, every_epochs=1, target="valid")
    with pytest.raises(UserError, match=f"{name} selects for no target: select.target = valid would do nothing; craig"):
        check_schedule(settings, 4)
    check_schedule(settings.model_copy(update={"target": None}), 4)
    settings = Reselect(rule="craig", target={"name": "valid", "options": {"label": "kind"}})
    with pytest.raises(UserError, match=r"select\.target = valid takes no options: label would do nothing"):
        check_schedule(settings, 4)


def aimed(view: HeadView, budget: int, *, target: HeadView | None = None):
    """A user's rule that picks those most like the target."""
    return coreset["gradmatch"](view, budget, target=target)


def test_a_rule_of_the_users_own_declares_a_target_by_its_keyword(few):
    name = f"{__name__}:aimed"
    check_schedule(Reselect(rule=name, target=few), 4)
    assert picked(name, few).coreset.indices.equal(picked("gradmatch", few).coreset.indices)
