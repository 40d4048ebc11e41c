"""CoLM: gradients and choices against brute force, the memory of a step, the loop of one's own and the run."""

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reference
from gloo import on_workers
from raypkg import CrestLoader, Run, Split, build_model, fit
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.record import Recorder
from raypkg.engine.worker import Worker
from raypkg.methods.crest import colm
from raypkg.methods.crest.colm import LastValues, choose
from raypkg.methods.crest.hook import Crest
from raypkg.methods.crest.quadratic import MovingMoments, flat
from raypkg.methods.crest.settings import CrestOptions
from raypkg.models.language import ATTENTION, LanguageModel, with_adapters

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

N, SIZE, EPOCHS, VOCABULARY, LENGTH = 36, 6, 2, 50, 7
SHAPE = {"intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def network(rank=2, vocabulary=VOCABULARY, kind="llama", targets=ATTENTION, width=16):
    """Return a decoder of three layers; adapters are drawn, as B = 0 would hide gradients of A."""
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocabulary, hidden_size=width, **SHAPE, **SPECIAL)
    config.initializer_range = 0.2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        if rank:
            model = with_adapters(model, rank, 2.0 * rank, 0.0, targets)
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(weight, std=0.1)
    return LanguageModel(model)


def texts(n=N, vocabulary=VOCABULARY):
    """Return n samples of equal lengths, three tokens of them answered, and their sources."""
    x = torch.randint(3, vocabulary, (n, 2, LENGTH), generator=generator(0, "texts"))
    x[:, 1] = (torch.arange(LENGTH) >= LENGTH - 3).long()
    return x, torch.tensor([0, 0, 0, 1, 1, 2]).repeat(-(-n // 6))[:n]


def names_of(model, last):
    own = {id(weight): name for name, weight in model.network.named_parameters()}
    return [own[id(weight)] for weight in last.parameters]


def losses_of(model, x):
    return lambda: model(x).losses


@pytest.mark.parametrize(("kind", "rank"), [("llama", 0), ("llama", 2), ("qwen2", 2), ("phi", 2)])
def test_gradients_of_the_last_value_projection_equal_brute_force(kind, rank):
    model, (x, _) = network(rank, kind=kind, targets=("q_proj", "v_proj")).eval(), texts(5)
    last = LastValues(model)
    names, before = names_of(model, last), flat(model.parameters())
    assert all("layers.2.self_attn.v_proj" in name for name in names)
    losses, gradients = last.exact(losses_of(model, x))
    expected = reference.value_gradients(model, names, x)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert losses.equal(model(x).losses.detach())

    z = torch.randn(last.size, generator=generator(0, "z"))
    losses, slopes = last.slopes(losses_of(model, x), z)
    above, below = (reference.losses_beside(model, names, x, sign * 1e-3 * z) for sign in (1, -1))
    assert slopes[:, 0].equal((above - below) / 2e-3)
    torch.testing.assert_close(slopes[:, 0], expected @ z, rtol=0.1, atol=0.02 * float((expected @ z).abs().max()))
    assert flat(model.parameters()).equal(before) and torch.is_grad_enabled()
    assert not any("forward" in vars(module) for module in model.modules())


def test_bfloat16_spares_the_passes_of_the_last_layer():
    model, (x, _) = network().eval(), texts(8)
    last = LastValues(model)
    z = torch.randn(last.size, generator=generator(0, "z"))
    _, expected = last.slopes(losses_of(model, x), z)
    with torch.autocast("cpu", torch.bfloat16):
        _, slopes = last.slopes(losses_of(model, x), z)
        assert torch.is_autocast_enabled("cpu")
    assert 0 < float((slopes - expected).abs().max()) < 0.1 * float(expected.abs().max())
    narrow = LanguageModel(network().network.bfloat16())
    with pytest.raises(UserError, match=r"in bfloat16, .* rounding alone: give crest.gradient = exact"):
        next(iter(CrestLoader(texts(), narrow, SIZE, epochs=1, preset="colm")))


def test_an_error_in_a_pass_leaves_the_model_as_it_was():
    model, (x, _) = network().eval(), texts(5)
    before = flat(model.parameters())
    bad = x.clone()
    bad[:, 0, 0] = VOCABULARY
    last = LastValues(model)
    for compute in (last.exact, lambda losses: last.slopes(losses, torch.ones(last.size))):
        with pytest.raises(IndexError):
            compute(losses_of(model, bad))
    assert flat(model.parameters()).equal(before) and torch.is_grad_enabled()
    assert model(x).losses.requires_grad
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("rank_one", [True, False])
@pytest.mark.parametrize("size", [8, 11, 24])
def test_choices_equal_brute_force_over_several_steps(rank_one, size, monkeypatch):
    monkeypatch.setattr(colm, "KEPT", 5)
    monkeypatch.setattr(colm, "AT_ONCE", 60)  # a few rows at a time
    zero = torch.zeros(17, dtype=torch.float64)
    moments, first, second = MovingMoments(zero, zero), zero, zero
    for t in range(1, 5):
        rng = generator(0, "gradients", t)
        z = torch.randn(17, generator=rng, dtype=torch.float64) if rank_one else None
        factors = torch.randn(24, 1 if rank_one else 17, generator=rng, dtype=torch.float64)
        sources = torch.tensor([0] * 12 + [1] * 10 + [3] * 2)[torch.randperm(24, generator=rng)]
        gradients = factors * z if rank_one else factors
        picked, moments = choose(factors, z, sources, size, moments)
        if t > 1 or not rank_one:  # at first, rank-one features are ±1 and ties are many
            expected, mean = reference.colm(gradients, sources.tolist(), size, first, second, t, kept=5)
            assert picked.tolist() == expected
        else:
            mean = gradients[picked[sources[picked] != 3]].mean(dim=0)
        first, second = 0.9 * first + 0.1 * mean, 0.999 * second + 0.001 * mean**2
        torch.testing.assert_close(moments.first, first)
        torch.testing.assert_close(moments.second, second)
        assert len(picked.unique()) == size


class LiveBytes(TorchDispatchMode):
    """The peak of live bytes of tensors that are created inside the block."""

    def __init__(self, model):
        super().__init__()
        self.before = {weight.untyped_storage()._cdata for weight in model.parameters()}
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in self.before:
                storage = each.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: value for key, value in self.live.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.parametrize("gradient", ["estimate", "exact"])
def test_a_step_that_chooses_needs_the_memory_of_a_plain_step_on_as_many_samples(gradient):
    size, vocabulary = 32, 4000
    model = network(vocabulary=vocabulary)
    x, y = texts(4 * size, vocabulary)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])

    def step(batch):
        model(batch).losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(x[:size])  # the optimiser's state is there
    loader = CrestLoader((x, y), model, size, epochs=9, preset="colm", gradient=gradient)
    batches = iter(loader)
    step(next(batches)[0])
    with LiveBytes(model) as plain:
        step(x[:size])
    with LiveBytes(model) as chosen:
        step(next(batches)[0])
    assert plain.peak > size * 3 * vocabulary * 4  # the logits are in it
    assert chosen.peak <= 1.1 * plain.peak
    with LiveBytes(model) as all_of_them:  # so that a step on r would not pass
        step(x[: 2 * size])
    assert all_of_them.peak > 1.5 * plain.peak


def split():
    x, y = texts()
    return Split(
        take=lambda rows: x[rows].numpy(), y=y, classes=("a", "b", "c"), shape=(LENGTH, VOCABULARY), mean=(), std=()
    )


def start(**options):
    model = network()
    optimizer = torch.optim.AdamW(list(model.parameters()), 0.01, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    return model, optimizer, CrestLoader(texts(), model, SIZE, **{"epochs": EPOCHS, "preset": "colm"} | options)


def train(model, optimizer, loader, epochs=EPOCHS, stop=None):
    step = 0
    for _ in range(epochs):
        for x, _, w in loader:
            assert len(w) == SIZE and w.eq(1).all()
            optimizer.zero_grad()
            (model(x).losses @ w * (1 / len(w))).backward()
            optimizer.step()
            step += 1
            if step == stop:
                return copy.deepcopy([part.state_dict() for part in (model, optimizer, loader)])


def trained(model):
    return flat(weight for weight in model.parameters() if weight.requires_grad)


def run(gradient, worker=None, epochs=EPOCHS):
    """Return effray's own run, on all workers."""
    data = split()
    options = CrestOptions(choose="colm", gradient=gradient, tau=0.0, subset="2m", exclude_below=0.0)
    hook = Crest(options, torch.arange(N), SIZE)
    training = {"epochs": epochs, "batch_size": SIZE, "lr": 0.01, "precision": "float32", "schedule": "constant"}
    training |= {"optimizer": "adamw", "momentum": 0.9, "nesterov": False, "weight_decay": 0.0}
    return Run.simple(network(), data, hooks=[Recorder(data.y), hook], augment=(), worker=worker, **training)


@pytest.mark.parametrize("gradient", ["estimate", "exact"])
def test_a_bare_loop_gives_the_weights_of_effrays_run_bit_for_bit(gradient):
    model, optimizer, loader = start(gradient=gradient)
    train(model, optimizer, loader)
    whole = fit(run(gradient))
    assert trained(model).equal(trained(whole.model))
    bills = {bill.phase: bill.forward for bill in whole.bills()}
    steps = EPOCHS * N // SIZE
    assert loader.report()["cost"]["select"]["forward"] == bills["select"] == steps * 2 * SIZE
    (picked,) = whole.hooks[1].picked
    assert picked.shape == (2, steps * SIZE)
    results = whole.hooks[1].results(whole)
    assert results.tables["steps"]["steps"].to_numpy().sum() == steps * SIZE


def choices_by(worker):
    return fit(run("estimate", worker, epochs=1)).hooks[1].picked[0]


def test_choices_do_not_depend_on_the_number_of_workers():
    alone, *others = choices_by(Worker()), *on_workers(2, choices_by)
    assert all(picked.equal(alone) for picked in others)


@pytest.mark.parametrize("gradient", ["estimate", "exact"])
def test_stopped_in_the_middle_of_an_epoch_and_resumed_equals_never_stopped(gradient, tmp_path):
    straight, optimizer, whole = start(gradient=gradient)
    train(straight, optimizer, whole)
    torch.save(train(*start(gradient=gradient), stop=4), tmp_path / "state.pt")
    resumed, optimizer, loader = parts = start(gradient=gradient)
    for part, state in zip(parts, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(resumed, optimizer, loader)
    assert trained(resumed).equal(trained(straight))
    assert str(loader.state_dict()) == str(whole.state_dict())


@pytest.mark.parametrize("gradient", ["estimate", "exact"])
def test_mappings_for_a_model_of_transformers_choose_the_same(gradient):
    (x, _), ours = texts(), network()
    mappings = [{"input_ids": tokens, "labels": tokens.where(segments == 1, -100)} for tokens, segments in x]
    one = {"epochs": 1, "preset": "colm", "gradient": gradient}
    pairs = CrestLoader((x, torch.zeros(N).long()), ours, SIZE, **one)
    theirs = CrestLoader(mappings, ours.network, SIZE, **one)
    for (tokens, *_), batch in zip(pairs, theirs, strict=True):
        assert batch["input_ids"].equal(tokens[:, 0]) and batch["weights"].eq(1).all()
    with pytest.raises(UserError, match="needs mappings with input_ids and labels for a model of transformers"):
        next(iter(CrestLoader(texts(), ours.network, SIZE, **one)))


class NoValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.v_proj = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (network, {"preset": "each-step"}, "CREST chooses by the logits of a classifier: .* preset colm"),
        (lambda: network().network, {"preset": "each-step"}, "for a language model give preset colm"),
        (lambda: build_model("mlp", (5,), 3, seed=0), {}, "CoLM chooses for language models, .* not for a Classifier"),
        (lambda: network(targets=("q_proj",)), {}, "trains no layer called v_proj"),
        (network, {"tau": 0.1}, "choose = colm: tau = 0.1 must be 0"),
        (network, {"preset": "each-step", "gradient": "exact"}, "choose = logits: gradient = exact would do nothing"),
    ],
)
def test_what_is_refused(model, options, message):
    with pytest.raises(UserError, match=message):
        next(iter(CrestLoader(texts(), model(), SIZE, **{"epochs": 1, "preset": "colm"} | options)))
    with pytest.raises(UserError, match="v_proj is in no list of layers"):
        LastValues(NoValues())
