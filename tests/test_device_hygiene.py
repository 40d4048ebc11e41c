"""Models, batches, rules and whole trainings on a pretended GPU: results of the CPU, no mixed devices, few waits.

PyTorch's ``FakeTensorMode`` with ``device="cuda"`` has no values, which selection and hooks ask for, and takes a CPU
index; see tests/pretended.py for what is done instead.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import reference
import test_crest_loader
import test_loader
from pretended import DEVICE, There, pretended
from raypkg import CoresetLoader, CrestLoader, lipt
from raypkg.core.settings import Reselect, Training
from raypkg.coresets.budgets import select
from raypkg.coresets.record import Recorder
from raypkg.coresets.rules import coreset
from raypkg.coresets.sharded import Reselection
from raypkg.data import Data
from raypkg.data.augment import compose
from raypkg.data.coreset import Coreset
from raypkg.data.kinds import TEXTS
from raypkg.data.split import Split
from raypkg.engine.batches import training_batch
from raypkg.engine.loop import fit
from raypkg.engine.run import Hook, Run
from raypkg.engine.shards import Shard, WorkerShards
from raypkg.engine.worker import CPU, Worker
from raypkg.methods.agent.hook import Correction
from raypkg.methods.agent.settings import AgentOptions
from raypkg.methods.crest.hook import Crest
from raypkg.methods.crest.settings import CrestOptions
from raypkg.methods.language.api import Projection, less_rows, state_rows
from raypkg.models import build_model, model
from sparse_training import sparse as sparse_hooks

N, C = 48, 3
LIBRARIES = {"torchvision", "transformers", "transformers-lm"}
LARGE = ("alexnet", "resnet18", "resnet3", "resnet5", "vgg", "airbench", "wrn")
ALL_MODELS = [
    pytest.param(name, marks=[pytest.mark.slow] * name.startswith(LARGE))
    for name in sorted({*model.entries} - LIBRARIES)
]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def split(shape=(3, 8, 8)):
    y = torch.arange(N) % C
    return Split.from_tensors(
        torch.randint(0, 256, (N, *shape), generator=rng(), dtype=torch.uint8), y, augment=("flip",)
    )


def values(tensors):
    return [tensor.value if isinstance(tensor, There) else tensor for tensor in tensors]


def passes(name, device):
    """Return the logits of a model and all gradients of its loss."""
    shape = (12, 50) if name == "transformer" else (3, 16, 16)
    options = {"dropout": 0.0} if name == "transformer" else {}  # kernels draw in other orders
    network = build_model(name, shape, C, seed=0, options=options).to(device).to(memory_format=torch.channels_last)
    x = TEXTS.example(4, shape) if name == "transformer" else torch.randn(4, *shape, generator=rng())
    logits = network(x.to(device))
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 0], device=device)).backward()
    return values([logits.detach(), *(weight.grad for weight in network.parameters())])


@pytest.mark.parametrize("name", ALL_MODELS)
def test_models_pass_forward_and_backward(name):
    torch.manual_seed(0)
    expected = passes(name, CPU)
    torch.manual_seed(0)
    with pretended() as there:
        found = passes(name, DEVICE)
    torch.testing.assert_close(found, expected)
    assert not there.waits


def test_images_are_augmented_and_normalised_there():
    images, augment = split(), compose(["crop", "flip", "randaugment"])
    samples, draws = Coreset.uniform(torch.arange(N)), torch.rand(N, augment.draws, generator=rng())
    expected = training_batch(images, samples, augment, draws, Worker())
    with pretended() as there:
        found = training_batch(images, samples, augment, draws, Worker(device=DEVICE))
    assert found.x.value.equal(expected.x) and found.y.value.equal(expected.y)
    assert len(there.waits) <= 2  # for the parts of all 14 operations at once


CASES = [(name, {}) for name in coreset.names if coreset[name].sees == "gradients"]
CASES += [("craig", {"greedy": "stochastic"}), ("grand", {"pick": "drawn"}), ("ccs", {})]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("budget", [17, 41])
def test_rules_select_there(name, options, budget):
    view, valid = (reference.problem(n, dtype=torch.float32).view for n in (60, 25))
    how = {"seed": 0, "options": options, "target": valid, "balanced": False}
    expected = select(view, budget, name, **how)
    with pretended():
        found = select(view, budget, name, device=DEVICE, **how)
    assert found.indices.equal(expected.indices)
    torch.testing.assert_close(found.weights, expected.weights)


class Keep(Hook):
    """Keeps the weights of the last step."""

    def on_step(self, run):
        self.weights = [weight.detach() for weight in run.model.parameters()]


def reselection(device, samples, rule, **options):
    recorder, everyone = Recorder(samples.y), torch.arange(N)
    shard = Shard(Data(samples, samples), everyone, everyone[:0], device)
    settings = Reselect(rule=rule, fraction=0.5, warm_epochs=1, every_epochs=1, weighted=True, **options)
    return [recorder, Reselection(settings, WorkerShards([shard]), recorder, everyone)]


def sparse(device, samples, update_every_steps=2, **settings):
    return sparse_hooks(growth="gradient", update_every_steps=update_every_steps, **settings)


TRAININGS = {
    "plain": lambda device, samples: [],
    "recorded": lambda device, samples: [Recorder(samples.y)],
    "gradmatch": lambda device, samples: reselection(device, samples, "gradmatch"),
    "gradmatchpb": lambda device, samples: reselection(device, samples, "gradmatchpb"),
    "full gradients": lambda device, samples: reselection(device, samples, "grand", options={"gradients": "full"}),
    "sparse": sparse,
    "momentum": lambda device, samples: sparse(device, samples, redistribution="momentum", drop="set"),
    "agent": lambda device, samples: sparse(device, samples, correction=[Correction(AgentOptions(form="measured"))]),
    "crest": lambda device, samples: [Crest(CrestOptions(tau=0.05, h=2.0, subset=0.5), torch.arange(N), 16)],
}


def trained(device, hooks, epochs=3, size=16, **settings):
    samples, keep = split(), Keep()
    chosen = Training(epochs=epochs, batch_size=size, lr=0.05, precision="float64", **settings)
    network = build_model("mlp", samples.shape, C, seed=0)
    run = Run.simple(network, samples, chosen, worker=Worker(device=device), hooks=[*hooks(device, samples), keep])
    fit(run)
    return run.rows, values(keep.weights)


@pytest.mark.parametrize("hooks", TRAININGS.values(), ids=TRAININGS)
def test_trainings_are_those_of_the_cpu(hooks):
    rows, weights = trained(CPU, hooks)
    with pretended():
        theirs, found = trained(DEVICE, hooks)
    torch.testing.assert_close(found, weights)
    assert [row["loss"] for row in theirs] == pytest.approx([row["loss"] for row in rows])


@pytest.mark.parametrize("hooks", [TRAININGS["plain"], TRAININGS["recorded"], partial(sparse, update_every_steps=15)])
@pytest.mark.parametrize("settings", [{}, {"clip": 1.0, "optimizer": "adamw", "micro_batch": 5}])
def test_the_host_waits_once_an_epoch_not_at_each_step(hooks, settings):
    waits = []
    for size in (16, 8):
        with pretended() as there:
            trained(DEVICE, hooks, 1, size, **settings)
        waits.append(len(there.waits))
    assert waits[0] == waits[1]


def step(model, losses, w, optimizer):
    optimizer.zero_grad()
    ((losses * w.to(losses)).sum() / len(w)).backward()
    optimizer.step()


def weights_of(network):
    return values(weight.detach() for weight in network.parameters())


def by_coresets(device, rule):
    network = test_loader.network().double().to(device)
    x, y = test_loader.data().tensors
    batches = DataLoader(TensorDataset(x.double(), y), batch_size=16)
    loader = CoresetLoader(batches, network, rule, 0.5, epochs=2, every_epochs=1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(2):
        for x, y, w in loader:
            losses = F.cross_entropy(network(x.to(device)), y.to(device), reduction="none")
            loader.record(losses)
            step(network, losses, w, optimizer)
    return weights_of(network)


def by_crest(device, **options):
    network = test_crest_loader.network().to(device)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for x, y, w in test_crest_loader.loader_of(network, **options):
        step(network, F.cross_entropy(network(x.to(device)), y.to(device), reduction="none"), w, optimizer)
    return weights_of(network)


def by_colm(device, **options):
    test_colm = pytest.importorskip("test_colm")
    network = test_colm.network().to(device)
    optimizer = torch.optim.SGD([weight for weight in network.parameters() if weight.requires_grad], 0.05)
    for x, _, w in CrestLoader(test_colm.texts(12), network, test_colm.SIZE, epochs=1, preset="colm", **options):
        step(network, network(x.to(device)).losses, w, optimizer)
    return weights_of(network)


def by_lipt(device):
    options = {"models": 2, "epochs": 1, "batch_size": 16, "density": 0.5, "precision": "float64", "workers": 0}
    x, y = test_loader.data().tensors
    network = test_loader.network().double().to(device)
    return weights_of(lipt.pretrain(network, TensorDataset(x.double(), y), **options))


def language_rows(device):
    test_colm = pytest.importorskip("test_colm")
    network, x = test_colm.network().double().eval().to(device), test_colm.texts(6)[0].to(device)
    return values([state_rows(network, [x]), less_rows(network, [x], Projection(0, 8))])


LOOPS = {
    "gradmatch": partial(by_coresets, rule="gradmatch"),
    "craig": partial(by_coresets, rule="craig"),
    "crest": partial(by_crest, epochs=2, **test_crest_loader.BUSY),
    "colm": pytest.param(by_colm, marks=pytest.mark.slow),
    "colm, exact": partial(by_colm, gradient="exact"),
    "lipt": by_lipt,
    "rows of language models": language_rows,
}


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")  # which this device is not
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_loops_of_ones_own_are_those_of_the_cpu(loop):
    expected = loop(CPU)
    with pretended():
        found = loop(DEVICE)
    torch.testing.assert_close(found, expected)


# What is planted must be found


def test_a_weight_of_the_host_is_found():
    network = build_model("mlp", (3, 8, 8), C, seed=0)
    planted = copy.deepcopy(network)
    with pretended():
        network.to(DEVICE)(torch.randn(2, 3, 8, 8, device=DEVICE))
        planted.features.to(DEVICE)
        with pytest.raises(RuntimeError, match="a host tensor"):
            planted(torch.randn(2, 3, 8, 8, device=DEVICE))


def test_an_index_of_the_host_is_found():
    view = reference.problem(60).view
    with pretended():
        there = view.to(DEVICE)
        assert len(there[torch.arange(3, device=DEVICE)]) == 3
        with pytest.raises(RuntimeError, match=r"index.* a host tensor \[3\]"):
            there[torch.arange(3)]


def test_a_copy_to_the_host_within_a_step_is_found():
    class Reads(Hook):
        def on_step(self, run):
            run.seen.losses.cpu()

    class Mixes(Hook):
        def on_gradients(self, run):
            weight = next(run.model.parameters())
            weight.grad = None if weight.grad is None else weight.grad + weight.detach().cpu()

    with pretended() as there:
        trained(DEVICE, lambda device, samples: [Reads()], 1, 8)
        assert there.waits.count("aten._to_copy.default") > N // 8
        with pytest.raises(RuntimeError, match="a host tensor"):
            trained(DEVICE, lambda device, samples: [Mixes()], 1, 8)
