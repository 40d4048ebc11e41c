"""Parameters shared among workers (FSDP2): the result of DDP, and checkpoints for either strategy."""

import pytest
import torch
from torch import nn

from gloo import on_workers
from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.data import load_data
from raypkg.data.split import Split
from raypkg.engine.loop import evaluate, fit
from raypkg.engine.run import Hook, Run
from raypkg.engine.worker import Worker, whole
from raypkg.experiments import experiment, settings_of
from raypkg.models import build_model
from raypkg.models.classifier import Classifier
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage
from tiny_language import instructions, tiny_language

PLAIN = "a model of two layers"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("language")
    tiny_language(folder / "model")
    instructions(folder, 30)
    return folder


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.narrow(torch.relu(self.wide(self.norm(x))))


def run_of(worker, place, options, **settings):
    if place == PLAIN:
        x = torch.randn(23, 5, generator=torch.Generator().manual_seed(0))
        split = Split.from_tensors(x, torch.arange(23) % 3)
        torch.manual_seed(0)
        model = Classifier(nn.Sequential(nn.Linear(5, 8), Layer(), Layer()), nn.Linear(8, 3))
    else:
        tokens = {"tokenizer": str(place / "model"), "length": 64}
        split = load_data(f"instructions:{place}/instructions.jsonl", options=tokens).train
        model = build_model(f"transformers-lm:{place}/model", split.shape, split.num_classes, seed=0, options=options)
    common = {"epochs": 2, "batch_size": 7, "clip": 0.5, "precision": "float32", "lr": 0.01}
    return Run.simple(model, split, worker=worker, **common | settings)


def trained(worker, place, folder, options, settings):
    """Return the weights, last row and evaluations by each strategy, and where a second one resumed from the first."""
    found = {}
    for strategies in ("ddp", "fsdp", "fsdp-fsdp", "fsdp-ddp", "ddp-fsdp"):
        places = StoredCheckpoints(Storage(f"{folder}/{strategies}"))
        first, _, second = strategies.partition("-")
        for strategy, last in [(first, 1), (second, 2)] if second else [(first, 2)]:
            run = run_of(worker, place, options, **settings)
            run.sharded, run.last = strategy == "fsdp", last
            fit(run, checkpoints=places)
        weights = {name: value.numpy() for name, value in whole(run.model.state_dict()).items()}
        row = {name: value for name, value in run.rows[-1].items() if isinstance(value, float)}
        # With 129 samples and 128 the workers have different numbers of batches.
        measured = [evaluate(run.model, run.split, torch.arange(n) % 20, worker) for n in (1, 19, 257)]
        found[strategies] = weights, row, measured, sum(bill.sent for bill in run.bills())
    return found


def check(place, folder, options, settings):
    first, second = on_workers(2, trained, place, str(folder), options, settings)
    ours, row, measured, sent = first["ddp"]
    for results in (first, second):
        straight, resumed = results["fsdp"][0], results["fsdp-fsdp"][0]
        assert all((value == resumed[name]).all() for name, value in straight.items())
        for strategies, (weights, theirs, figures, bytes_sent) in results.items():
            assert weights.keys() == ours.keys()
            for name, value in weights.items():
                assert abs(value - ours[name]).max() < 1e-6, (strategies, name)
            assert theirs == pytest.approx(row, abs=1e-5)
            for figure, other in zip(figures, measured, strict=True):
                assert figure == pytest.approx(other, abs=1e-5)
            assert (bytes_sent > sent) == ("fsdp" in strategies)


SETTINGS = [{"optimizer": "sgd"}, {"optimizer": "adamw", "decay": "matrices", "checkpointing": True}]


@pytest.mark.parametrize("settings", [pytest.param(SETTINGS[0], marks=pytest.mark.slow), SETTINGS[1]])
def test_it_trains_what_ddp_trains_and_resumes_under_either(tmp_path, settings):
    check(PLAIN, tmp_path, {}, settings)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"rank": 4, "dropout": 0.1}, {}])
def test_a_language_model_is_trained_as_by_ddp(place, tmp_path, options):
    check(place, tmp_path, options, SETTINGS[1])


def test_hooks_that_need_the_parameters_and_parameters_of_two_types_are_refused():
    run = run_of(Worker(), PLAIN, {}, optimizer="sgd")
    run.sharded, run.hooks = True, [Hook()]
    with pytest.raises(UserError, match=r"cluster.strategy = fsdp: hook Hook needs complete parameters"):
        fit(run)
    run.hooks = []
    run.model.head.bfloat16()
    with pytest.raises(UserError, match=r"fsdp needs parameters of one type, not torch.bfloat16 and torch.float32"):
        fit(run)


@pytest.mark.parametrize(
    ("kind", "settings", "problem"),
    [
        ("train", {"model": "resnet8"}, "is for models of transformers, not resnet8"),
        ("train", {"cluster.workers": 1}, "does nothing with cluster.workers = 1"),
        ("train", {"train.micro_batch": 2}, "does not go with train.micro_batch"),
        ("train", {"train.compile": True}, "does not go with train.compile"),
        ("train", {"train.average": 0.9}, "does not go with train.average"),
        ("crest", {}, "is for effray train and instruct"),
        ("select", {"model_from": "it"}, "is for effray train and instruct"),
    ],
)
def test_it_is_refused_where_it_would_do_nothing_or_hang(kind, settings, problem):
    model = {} if kind == "select" else {"model": "transformers-lm:it"}
    with pytest.raises(UserError, match=f"^cluster.strategy = fsdp {problem}$"):
        load_settings(settings_of(experiment[kind]), {}, {**model, "cluster.strategy": "fsdp", **settings})
