"""The contract of every pre-training, sparsity and merge of LiPT, user code included."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rich.console import Console
from torch import nn

from raypkg.cluster.workers import Workers
from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.experiments.samples import augmentations, new_model, open_samples
from raypkg.experiments.training import load_record
from raypkg.methods.lipt import merge, pretraining
from raypkg.methods.lipt.merges import Member
from raypkg.methods.lipt.pretrain import MERGED_FILE, redrawn
from raypkg.methods.lipt.settings import RESULT, LiptSettings
from raypkg.methods.sparse import initial as sparsity
from raypkg.methods.sparse.masks import random_masks, shapes_of
from raypkg.runs.checkpoints import load_tensors, save_tensors
from raypkg.runs.folder import RunFolder, create
from raypkg.runs.report import Report

MODELS = 3


def own_pretraining(settings, report, *, samples):
    """A user's own: any weights will do, as long as they are in the run folder."""
    model = new_model(settings, samples.data)
    save_tensors(report.folder.storage, RESULT, {name: w + 1 for name, w in model.state_dict().items()})


def own_sparsity(model, density):
    return {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes_of(model).items()}


def own_merge(initial, members, *, gather):
    """The last model, pruned weights and all."""
    return gather(members)[-1].parameters


def not_one_parameter(initial, members):
    return {}


def own(function):
    return f"{__name__}:{function.__name__}"


def lipt_settings(**pretrain):
    short = {"models": MODELS, "epochs": 1, "joint_epochs": 0, "evaluate_every_epochs": 1, "precision": "float32"}
    chosen = {"model": "mlp", "cluster.workers": 0, **{f"pretrain.{name}": value for name, value in short.items()}}
    return load_settings(LiptSettings, overrides=chosen | {f"pretrain.{name}": v for name, v in pretrain.items()})


def carry_out(root, **pretrain):
    """Pre-train in a new run folder, and return it."""
    settings = lipt_settings(**pretrain)
    folder = create(str(root), "lipt", None, settings)
    repeat(folder, settings)
    return folder


def repeat(folder, settings):
    samples = open_samples(settings)
    settings.check(len(samples.train_indices), samples.data)
    with Report(folder, None, Console(quiet=True)) as report, Workers(settings.cluster, report, "") as workers:
        pretraining[settings.pretrain.method](settings, report, samples=samples, workers=workers)


def weights(folder):
    return load_tensors(folder.storage, RESULT)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module", params=[*pretraining.entries, own(own_pretraining)])
def method(request):
    return request.param


@pytest.fixture(scope="module")
def pretrained(method, tmp_path_factory):
    return carry_out(tmp_path_factory.mktemp("runs"), method=method)


def form(state):
    return {name: (w.shape, w.dtype) for name, w in state.items()}


def test_a_pretraining_leaves_weights_and_a_record_of_all_samples(pretrained):
    samples = open_samples(lipt_settings())
    state = weights(pretrained)
    assert form(state) == form(new_model(lipt_settings(), samples.data).state_dict())
    assert all(w.isfinite().all() for w in state.values())
    y = samples.data.train.y
    assert len(load_record(pretrained.storage, RESULT, y)) == len(y)


def test_a_pretraining_is_a_function_of_the_seed_and_not_repeated_when_finished(method, pretrained, tmp_path):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    folder = carry_out(tmp_path, method=method)
    assert same(weights(folder), weights(pretrained))
    assert torch.equal(torch.get_rng_state(), before)
    if method in pretraining.entries:
        assert folder.phase("pretrain")["costs"]
        written = (folder.storage.local / RESULT).stat().st_mtime_ns
        repeat(RunFolder(folder.storage), lipt_settings(method=method))
        assert (folder.storage.local / RESULT).stat().st_mtime_ns == written


def initial_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3))


@pytest.fixture(params=[*sparsity.entries, own(own_sparsity)])
def rule(request):
    return sparsity[request.param]


def test_a_sparsity_gives_each_layer_a_count_and_no_positions(rule):
    batch = torch.randn(16, 6), torch.arange(16) % 3
    chosen = rule(initial_model(), 0.4, batch=batch, rng=generator(0, "densities"))
    first, again, other = (redrawn(chosen, generator(seed, "mask")) for seed in (0, 0, 1))
    assert same(first, again)
    for name, mask in chosen.items():
        assert first[name].sum() == other[name].sum() == mask.sum()
        assert mask.all() or not torch.equal(first[name], other[name])


def test_lipt_trains_with_each_sparsity(rule, tmp_path):
    name = rule.name if rule.name in sparsity.entries else own(own_sparsity)
    folder = carry_out(tmp_path, sparsity=name, merge="mean", density=0.2)
    merged = weights(folder)["features.1.weight"]
    dense = rule.name not in ("erk", "grasp", "snip", "uniform")
    assert (merged == 0).any() != dense  # a weight that no model has stays 0 in the plain mean


@pytest.fixture(params=[*merge.entries, own(own_merge)])
def merging(request):
    return merge[request.param]


def trained_members():
    """Initial weights, and models that moved from them, each by its own masks."""
    model = initial_model()
    initial = {name: w.detach() for name, w in model.named_parameters()}
    members = []
    for number in range(5):
        rng = generator(number, "members")
        masks = random_masks(shapes_of(model), dict.fromkeys(shapes_of(model), 0.5), rng)
        moved = {name: w + torch.randn(w.shape, generator=rng) for name, w in initial.items()}
        members.append(Member({name: w * masks.get(name, 1) for name, w in moved.items()}, masks))
    return initial, members


def test_a_merge_returns_the_models_parameters_and_changes_none(merging):
    initial, members = trained_members()
    merged = merging(initial, members, total=torch.clone, gather=list)
    untouched, again = trained_members()
    assert form(merged) == form(initial) and same(initial, untouched)
    assert all(same(one.parameters, copy.parameters) for one, copy in zip(members, again, strict=True))
    dense = Member(members[0].parameters, {})  # of equal models it returns the model
    assert same(merging(initial, [dense] * 3, total=torch.clone, gather=list), dense.parameters)


def test_a_merge_on_three_workers_is_that_on_one(merging):
    initial, members = trained_members()
    expected = dict(merging(initial, members, total=torch.clone, gather=list))
    values, barrier = [None] * 3, threading.Barrier(3, timeout=60)

    def exchange(rank, value):
        values[rank] = value
        barrier.wait()
        everyone = list(values)
        barrier.wait()
        return everyone

    def work(rank):
        def gather(models):
            everyone = exchange(rank, models)
            return [everyone[number % 3][number // 3] for number in range(len(members))]

        return dict(merging(initial, members[rank::3], total=lambda sums: sum(exchange(rank, sums)), gather=gather))

    with ThreadPoolExecutor(3) as pool:
        for merged in pool.map(work, range(3)):
            torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*merge.entries, own(own_merge)])
def test_lipt_merges_by_each(name, tmp_path):
    record = carry_out(tmp_path, merge=name).phase("pretrain")
    assert record["models"] == MODELS and record["merges"] == 1
    assert all(cost["sent"] == 0 for cost in record["costs"])  # there is but one worker


def test_joint_epochs_train_the_merged_model_on_all_samples_stopped_or_not(tmp_path):
    """A slow twin: plain training from what was merged."""
    folder = carry_out(tmp_path, joint_epochs=2)
    settings = load_settings(LiptSettings, folder.config)
    samples = open_samples(settings)
    model = new_model(settings, samples.data)
    model.load_state_dict(load_tensors(folder.storage, MERGED_FILE))
    joint = settings.pretrain.model_copy(update={"epochs": 2, "batch_size": MODELS * settings.pretrain.batch_size})
    augment = augmentations(settings.dataset, samples.data)
    twin = Run.simple(model, samples.data.train, joint, coreset=samples.everyone, augment=augment)
    expected = fit(twin).model.state_dict()
    assert same(expected, weights(folder))
    assert folder.phase("joint")["costs"][0]["backward"] == 2 * len(samples.train_indices)
    folder.storage.delete("phases/joint.json")
    folder.storage.delete_folder("checkpoints/joint")
    repeat(RunFolder(folder.storage), settings)
    assert same(expected, weights(folder))


def test_joint_epochs_continue_the_record_of_the_models(tmp_path):
    """Of the samples that the models forgot, each is forgotten at least as often afterwards."""
    shard_alone = {"epochs": 4, "lr": 0.5, "batch_size": 16}
    y = open_samples(lipt_settings()).data.train.y
    before = load_record(carry_out(tmp_path / "merged", **shard_alone).storage, RESULT, y)
    after = load_record(carry_out(tmp_path / "joint", joint_epochs=1, **shard_alone).storage, RESULT, y)
    known = before.forgotten.isfinite()
    assert (before.forgotten[known] > 0).any()
    assert (after.forgotten[known] >= before.forgotten[known]).all()
    assert not torch.equal(after.losses, before.losses)


def test_a_merge_that_does_not_fit_the_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="not_one_parameter' returned other parameters or shapes than"):
        carry_out(tmp_path, merge=own(not_one_parameter))
