"""Functions of the user's in training: a loss, a metric, an augmentation; and training that stops early."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2

from gloo import on_workers
from raypkg.core.config import Named, load_settings
from raypkg.core.errors import UserError
from raypkg.data.augment import compose
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.loop import evaluate, fit
from raypkg.engine.run import Run
from raypkg.engine.worker import Worker
from raypkg.experiments import experiment, settings_of
from raypkg.experiments.trained import settings_of_trained
from raypkg.experiments.training import train_model
from raypkg.models import build_model
from raypkg.runs.folder import create
from test_kept_model import interrupted, kept, same
from test_kept_model import job_of as kept_job_of

HERE = "test_own_functions"
pytestmark = pytest.mark.usefixtures("blank_pictures")
shifted = v2.Compose([v2.RandomCrop(8, padding=2), v2.RandomHorizontalFlip(), v2.ColorJitter(brightness=0.5)])


def smooth(logits, y):
    return cross_entropy(logits, y, reduction="none", label_smoothing=0.1)


def mean(logits, y):
    return smooth(logits, y).mean()


def detached(logits, y):
    return smooth(logits, y).detach()


def count(logits, y):
    """Depends on the order and on the number of samples."""
    return (logits.argmax(1) == y).double() @ torch.arange(len(y)).double()


def nothing(logits, y):
    return None


def infinite(logits, y):
    return torch.tensor(torch.inf)


def as_float(image):
    return image.float()


job_of = partial(kept_job_of, base={"model": "linear", "train.epochs": 3})


def test_a_loss_is_trained_with_the_weights_of_a_coreset_and_the_cross_entropy_is_recorded():
    split = Split.from_tensors(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3)
    coreset = Coreset(torch.arange(15), torch.rand(15, generator=torch.Generator().manual_seed(1)))
    runs = []
    for given in ({"loss": smooth}, {"label_smoothing": 0.1}):
        model = build_model("linear", split.shape, 3, seed=0)
        run = Run.simple(model, split, coreset=coreset, epochs=2, batch_size=5, precision="float64", **given)
        runs.append(fit(run))
    one, other = runs
    assert same(one.model.state_dict(), other.model.state_dict())
    assert one.rows == other.rows


def test_a_metric_sees_all_samples_in_their_order():
    split = Split.from_tensors(torch.randn(300, 4, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 3)
    model = nn.Linear(4, 3)
    indices = torch.arange(299, -1, -1)
    x, y = split.batch(indices)
    with torch.no_grad():
        expected = count(model(split.inputs(x)), y).item()
    assert evaluate(model, split, indices, metric=count)["metric"] == expected > 0


@pytest.mark.slow
def test_two_workers_find_the_metric_and_the_images_of_one(tmp_path):
    own = {"train.metric": f"{HERE}:count", "dataset.augment": f"{HERE}:shifted"}
    one = train_model(Worker(), job_of(tmp_path / "one", **own))
    two, _ = on_workers(2, train_model, job_of(tmp_path / "two", **own))
    assert one["test_metric"] == two["test_metric"] > 0
    for name, weight in kept(tmp_path / "one").items():
        assert torch.allclose(weight, kept(tmp_path / "two")[name], rtol=0, atol=1e-12), name


def test_a_transform_of_torchvision_changes_an_image_by_its_number_alone():
    x = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = compose(["flip", f"{HERE}:shifted"])
    u = torch.rand(6, augment.draws, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    whole = augment(x, u)
    assert torch.equal(whole[4:], augment(x[4:], u[4:]))
    assert torch.equal(torch.get_rng_state(), state)
    assert len({image.numpy().tobytes() for image in augment(x[:1].expand(6, -1, -1, -1), u)}) == 6


def test_stopped_and_resumed_equals_never_stopped(tmp_path):
    best = {"train.keep": "best", "train.best_by": "metric", "train.metric": f"{HERE}:count"}
    few = {"dataset.imbalance": 0.02, "train.epochs": 2}
    settings = {"dataset.augment": f"{HERE}:shifted", "train.loss": f"{HERE}:smooth", **few, **best}

    rows = []
    straight = train_model(Worker(report=rows.append), job_of(tmp_path / "straight", **settings))
    interrupted(job_of(tmp_path / "stopped", **settings), 1)
    resumed = train_model(Worker(), job_of(tmp_path / "stopped", **settings))
    assert same(kept(tmp_path / "straight"), kept(tmp_path / "stopped"))
    for name in ("kept_epoch", "findings", "test_loss", "test_metric"):
        assert straight[name] == resumed[name], name
    figures = [row["metric"] for row in rows]
    assert straight["kept_epoch"] == 1 + figures.index(max(figures))
    assert f"held-out samples: metric {max(figures):.4g}" in straight["findings"][0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.loss": f"{HERE}:mean"}, r"train.loss must return a loss .* of 118 samples, not torch.float64 \[\]"),
        ({"train.loss": f"{HERE}:detached"}, r"not torch.float64 \[118\] without a gradient"),
        ({"train.loss": f"{HERE}:no"}, f"train.loss '{HERE}:no': module '{HERE}' has no 'no'"),
        ({"train.metric": f"{HERE}:nothing"}, "train.metric must return a finite number, not None"),
        ({"train.metric": f"{HERE}:infinite"}, r"train.metric must return a finite number, not tensor\(inf\)"),
        ({"dataset.augment": f"{HERE}:as_float"}, r"return torch.uint8 \[1, 8, 8\], not torch.float32 \[1, 8, 8\]"),
        ({"train.loss": f"{HERE}:smooth", "select.rule": "craig"}, "train.loss = .*: craig goes by the cross-entropy"),
        (
            {"train.loss": f"{HERE}:smooth", "hooks": [{"name": "agent"}]},
            "train.loss = .*: agent goes by the cross-entropy",
        ),
        ({"train.loss": f"{HERE}:smooth", "train.label_smoothing": 0.1}, "label_smoothing = 0.1 does nothing"),
        ({"train.patience": 3}, "train.patience = 3 does nothing without train.keep = best"),
        ({"train.best_by": "metric", "train.keep": "best"}, "train.best_by = metric: there is no train.metric"),
    ],
)
def test_one_line_says_what_is_wrong(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        train_model(Worker(), job_of(tmp_path, **settings))


@pytest.mark.parametrize("kind", ["crest", "sparse", "lipt", "deltagrad"])
def test_a_loss_is_refused_by_methods(kind):
    with pytest.raises(UserError, match=f"train.loss = {HERE}:smooth: .* goes by the cross-entropy"):
        load_settings(settings_of(experiment[kind]), {}, {"train.loss": f"{HERE}:smooth"})


def test_readers_of_gradients_refuse_a_run_with_another_loss(tmp_path):
    folder = create(str(tmp_path), "train", "one", job_of(tmp_path, **{"train.loss": f"{HERE}:smooth"}).experiment)
    folder.storage.write("model.safetensors", b"")
    costs = dict.fromkeys(["seconds", "elapsed", "full_training_backward"], 0)
    folder.finish({"phases": [], "samples": 1, "coreset": None, **costs})
    with pytest.raises(
        UserError, match=rf"run one has train\.loss = {HERE}:smooth, an audit goes by the cross-entropy"
    ):
        settings_of_trained(folder, "an audit")


def test_crest_refuses_an_augmentation_that_draws(tmp_path):
    job = replace(job_of(tmp_path, **{"dataset.augment": f"{HERE}:shifted"}), hooks=(Named(name="crest"),))
    with pytest.raises(UserError, match=f"dataset.augment = {HERE}:shifted: CREST augments by operations of effray"):
        train_model(Worker(), job)
