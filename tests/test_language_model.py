"""Language models: the losses of transformers itself, adapters, training, resuming, workers, and wrong input."""

import math
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from gloo import on_workers
from ray_runs import effray, same_weights
from ray_runs import run as ray_run
from raypkg import load_model
from raypkg.core.errors import UserError
from raypkg.core.settings import Model
from raypkg.data import load_data
from raypkg.data.coreset import Coreset
from raypkg.data.kinds import TEXTS
from raypkg.engine.loop import evaluate, fit
from raypkg.engine.run import Run
from raypkg.engine.worker import Cost, Worker
from raypkg.experiments.embedding import named_backbone
from raypkg.methods.sparse.hook import first_batch
from raypkg.methods.sparse.masks import prunable
from raypkg.models import build_model
from raypkg.models.operations import checkpoint_blocks
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage
from tiny_language import instructions, tiny_language

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
LENGTH, VOCABULARY = 64, 317
LORA = {"rank": 4, "dropout": 0.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    tiny_language(folder / "model")
    instructions(folder, 30)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def build(place, seed=0, model="model", **options):
    return build_model(f"transformers-lm:{place / model}", (LENGTH, VOCABULARY), 1, seed=seed, options=options)


def data_of(place):
    options = {"tokenizer": str(place / "model"), "length": LENGTH}
    return load_data(f"instructions:{place / 'instructions.jsonl'}", options, cache=place / "cache")


def plain_losses(network, x):
    """Return each sample's loss as transformers itself computes it from labels that are −100 outside the answer."""
    losses = []
    for tokens, segments in x:
        ids = tokens[tokens >= 0][None]
        labels = torch.where(segments[tokens >= 0] == 1, ids[0], -100)[None]
        losses.append(network(input_ids=ids, labels=labels).loss)
    return torch.stack(losses)


@pytest.mark.parametrize("tied", [True, False])
def test_losses_and_gradients_are_those_of_transformers(place, tied, tmp_path):
    tiny_language(tmp_path / "model", tied=tied)
    model = build(tmp_path).eval()
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    x, _ = data_of(place).train.batch(range(6))
    out = model(x)
    expected = plain_losses(network, x)
    torch.testing.assert_close(out.losses, expected, rtol=1e-5, atol=1e-5)
    assert out.tokens.tolist() == (x[:, 1] == 1).sum(1).tolist()
    out.losses.sum().backward()
    expected.sum().backward()
    for name, weight in network.named_parameters():
        found = model.get_parameter(f"network.{name}").grad
        torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_sample_is_right_if_its_first_answered_token_is_the_most_probable(place):
    model = build(place).eval()
    x, _ = data_of(place).train.batch(range(24))
    first = (x[:, 1] == 1).int().argmax(1)
    asked = [row[None, :end] for row, end in zip(x[:, 0], first, strict=True)]
    logits = torch.stack([model.network(input_ids=prompt).logits[0, -1] for prompt in asked])
    likeliest = logits.argmax(1)
    x[::2, 0].scatter_(1, first[::2, None], likeliest[::2, None])
    right = model(x).right
    assert right.equal(likeliest == x[:, 0].gather(1, first[:, None])[:, 0]) and right[::2].all() and not right.all()


@torch.no_grad()
def test_a_padded_batch_is_each_sample_alone_in_losses_and_states(place, monkeypatch):
    model = build(place, **LORA).eval()
    x = TEXTS.example(6, (LENGTH, VOCABULARY))
    whole, (states, there) = model(x), model.hidden(x)
    monkeypatch.setattr("raypkg.models.language.LOGITS_AT_ONCE", 3 * VOCABULARY)
    for i in range(6):
        alone = x[i : i + 1, :, : int((x[i, 0] >= 0).sum())]
        torch.testing.assert_close(model(alone).losses, whole.losses[i : i + 1], rtol=1e-5, atol=1e-5)
        h, mask = model.hidden(alone)
        assert mask.all() and there[i].sum() == mask.sum()
        torch.testing.assert_close(states[i][there[i]], h[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_sample_without_an_answer_has_no_loss(place):
    x = TEXTS.example(2, (LENGTH, VOCABULARY))
    x[:, 1].clamp_max_(0)
    out = build(place)(x)
    assert out.losses.tolist() == [0, 0] and not out.right.any() and not out.tokens.any()


def test_adapters_begin_as_nothing_and_leave_the_base_as_it_is(place):
    data, model, plain = data_of(place), build(place, **LORA), build(place)
    x, _ = data.train.batch(range(4))
    assert torch.equal(model.eval()(x).losses, plain.eval()(x).losses)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == set(model.state_dict()) - {"base"} and all("lora_" in name for name in trained)
    assert len(trained) == 2 * 4 * 2  # A and B of four matrices in two layers
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    run = fit(Run.simple(model, data.train, epochs=1, batch_size=6, lr=0.1))
    changed = {name for name, weight in run.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == trained


def test_adapters_are_drawn_by_the_seed_and_scaled_by_alpha(place):
    first, again, other = (build(place, seed=seed, **LORA).state_dict() for seed in (0, 0, 1))
    drawn = [name for name in first if "lora_A" in name]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    for options, scale in (({}, 2.0), ({"alpha": 4.0}, 1.0)):
        model = build(place, **LORA, targets=["v_proj"], **options)
        adapted = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
        assert len(adapted) == 2 and all(layer.scaling["default"] == scale for layer in adapted)


def test_the_state_has_tied_weights_once_and_takes_no_others(place):
    model = build(place)
    state = model.state_dict()
    assert len(state) == len(list(model.parameters())) and not any("lm_head" in name for name in state)
    other = build(place, **LORA)
    with pytest.raises(RuntimeError, match="missing are"):
        other.load_state_dict(state)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    model.load_state_dict(state | {name: value + 1 for name, value in state.items()})
    assert all(value.abs().sum() > 0 for value in model.state_dict().values())
    head, embedding = model.network.lm_head.weight, model.network.model.embed_tokens.weight
    assert head is embedding


def test_adapters_are_refused_on_another_base(place, tmp_path):
    tiny_language(tmp_path / "model", seed=1)
    state = build(place, **LORA).double().state_dict()
    build(place, **LORA).load_state_dict(state)
    other = build(tmp_path, **LORA)
    with pytest.raises(UserError, match="the adapters were trained on a base with other weights than those of this"):
        other.load_state_dict(state)
    del state["base"]  # as older states
    other.load_state_dict(state)


def test_a_base_in_bfloat16_stays_so_and_its_adapters_do_not(place):
    model = build(place, **LORA, base="bfloat16")
    run = Run.simple(model, data_of(place).train, epochs=1, batch_size=6, lr=0.1, precision="float32")
    kinds = {weight.requires_grad: weight.dtype for weight in fit(run).model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    x, _ = run.split.batch(range(4))
    torch.testing.assert_close(
        build(place, base="bfloat16", **LORA)(x).losses, build(place)(x).losses, rtol=2e-2, atol=0
    )


def test_checkpointing_gives_the_same_gradients(place):
    x, _ = data_of(place).train.batch(range(4))
    gradients = []
    for checkpointing in (False, True):
        model = build(place, rank=4, dropout=0.2)
        if checkpointing:
            checkpoint_blocks(model)
        torch.manual_seed(1)
        model(x).losses.sum().backward()
        gradients.append([weight.grad for weight in model.parameters() if weight.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
    assert layers


def training(place, **options):
    given = {"epochs": 4, "batch_size": 6, "optimizer": "adamw", "lr": 0.01, **options}
    return Run.simple(build(place, rank=4, dropout=0.1), data_of(place).train, **given)


def test_stopped_and_resumed_equals_never_stopped(place, tmp_path):
    places = StoredCheckpoints(Storage(str(tmp_path)))
    straight = fit(training(place))
    first = training(place)
    first.last = 2
    fit(first, checkpoints=places)
    resumed = fit(training(place), checkpoints=places)
    state = resumed.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in straight.model.state_dict().items())
    assert straight.rows[-1]["loss"] == resumed.rows[-1]["loss"] < straight.rows[0]["loss"]
    adapters = sum(value.nbytes for value in state.values())
    assert max(file.stat().st_size for file in tmp_path.iterdir()) < 3 * adapters + 40_000  # no base in it


def test_parts_of_a_batch_add_up_to_the_whole(place):
    whole, parts = (
        fit(Run.simple(build(place, **LORA), data_of(place).train, epochs=1, lr=0.1, precision="float64", **size))
        for size in ({"batch_size": 12}, {"batch_size": 12, "micro_batch": 5})
    )
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=0, atol=1e-12)


def test_the_objective_weighs_the_mean_loss_of_each_sample(place):
    split = data_of(place).train
    chosen = Coreset(torch.arange(6), torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 1.5]))
    model = build(place, **LORA)
    x, _ = split.batch(chosen.indices)
    expected = (model(x).losses.detach().double() * chosen.weights).mean()
    run = fit(Run.simple(model, split, coreset=chosen, epochs=1, batch_size=6, lr=1e-6))
    assert run.rows[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_evaluation_gives_loss_perplexity_and_first_answers(place):
    model, split = build(place).eval(), data_of(place).test
    x, _ = split.batch(range(len(split)))
    with torch.no_grad():
        out = model(x)
    found = evaluate(model, split, precision="float32")
    assert found["loss"] == pytest.approx(float(out.losses.double().mean()), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["accuracy"] == float(out.right.double().mean())


def trained_on(worker, place):
    run = Run.simple(
        build(place, **LORA), data_of(place).train, worker=worker, epochs=2, batch_size=6, lr=0.1, precision="float64"
    )
    return [value.numpy() for value in fit(run).model.state_dict().values()], run.cost.sent


@pytest.mark.slow
def test_two_workers_train_as_one_and_exchange_the_adapters_alone(place):
    alone, _ = trained_on(Worker(), place)
    for weights, sent in on_workers(2, trained_on, place):
        for a, b in zip(alone, weights, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
        assert sent < 8 * 2 * sum(weight.nbytes for weight in weights) + 10_000


SMALL = (
    "train --dataset instructions:{0}/instructions.jsonl --set dataset.options.length=64 --model"
    " transformers-lm:{0}/model --set model.options.rank=4 --train.optimizer adamw --train.lr 0.01"
    " --train.batch_size 6 --train.epochs 2 --train.evaluate_every_epochs 1"
)


def small_run(place, root, name, *options):
    return ray_run(root, "train", name, *SMALL.format(place).split()[1:], *options)


def test_a_run_from_the_command_line_and_its_model(place, tmp_path, capsys, blank_pictures):
    finished = small_run(place, tmp_path, "one", "--cluster.workers", "0", "--train.keep", "best")
    said = capsys.readouterr().out
    assert "test perplexity" in said and "first answered token right" in said
    rows = pq.read_table(finished / "metrics.parquet").to_pylist()
    assert rows[-1]["perplexity"] == pytest.approx(math.exp(rows[-1]["valid_loss"]))
    assert "tokenizer" in (finished / "config.toml").read_text()
    stored = load_file(finished / "model.safetensors")
    assert (finished / "model.safetensors").stat().st_size < sum(v.nbytes for v in stored.values()) + 4_000
    model = load_model(finished)
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[name])
    asked = data_of(place).test.batch([0])[0][0, 0][None]
    assert model.network.generate(input_ids=asked.clamp_min(0), max_new_tokens=2).shape[1] > asked.shape[1]
    again = small_run(place, tmp_path, "two", "--cluster.workers", "0", "--train.from", "one", "--train.lr", "1e-9")
    same_weights(finished, again, tolerance=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--dataset.noise 0.1", "dataset.noise = 0.1: a language model has no logits and labels"),
        ("--train.label_smoothing 0.1", "train.label_smoothing = 0.1: a language model has no logits and labels"),
        ("--select.rule gradmatch --select.fraction 0.5", "select.rule = gradmatch needs a classifier"),
    ],
)
def test_a_training_that_a_language_model_cannot_have(place, tmp_path, capsys, options, said):
    words = SMALL.format(place).split()
    effray(words[0], "--root", tmp_path, *words[1:], "--cluster.workers", "0", *options.split(), code=2)
    assert said in capsys.readouterr().err


def test_texts_without_an_answer_and_frozen_backbones(place, tmp_path, capsys):
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(f"cat {i},{i % 2}\n" for i in range(20)))
    model = f"transformers-lm:{place / 'model'}"
    chosen = ["--dataset", f"text:{tmp_path / 'texts.csv'}", "--model", model, "--cluster.workers", 0]
    effray("train", "--root", tmp_path, *chosen, code=2)
    assert "has texts without an answer, the only part that carries loss" in capsys.readouterr().err
    with pytest.raises(UserError, match="a frozen backbone needs a classifier"):
        named_backbone(Model(name=model), data_of(place), "float32", seed=0)


def test_masks_by_gradients_and_adapters_under_masks(place):
    model, split = build(place, **LORA), data_of(place).train
    with pytest.raises(UserError, match=r"first masks by snip need a classifier: .* give one of dense, erk, uniform"):
        first_batch("snip", model, split, torch.arange(4), Cost("masks"))
    assert {name.partition(".lora_")[2][0] for name in prunable(model)} == {"A", "B"}  # and nothing frozen


def test_a_folder_is_read_without_a_network(place, tmp_path, monkeypatch):
    calls = []

    def refuse(socket, address):
        calls.append(address)
        raise OSError("no network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    options = {"tokenizer": str(place / "model"), "length": LENGTH}
    train = load_data(f"instructions:{place / 'instructions.jsonl'}", options, cache=tmp_path).train
    fit(Run.simple(build(place, **LORA), train, epochs=1))
    assert not calls


def with_nan(folder):
    tensors = load_file(folder / "model.safetensors")
    broken = {name: value * math.nan for name, value in tensors.items()}
    save_file(broken, folder / "model.safetensors", {"format": "pt"})


def not_causal(folder):
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertLMHeadModel(config).save_pretrained(folder)


def capped(folder):
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, intermediate_size=16, final_logit_softcapping=0.01,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(folder)


RANKED = {"rank": 2}
FITTING = (LENGTH, VOCABULARY)


@pytest.mark.parametrize(
    ("damage", "options", "shape", "match"),
    [
        (with_nan, {}, FITTING, "maps tokens to NaN or infinity"),
        (not_causal, {}, FITTING, "is no causal language model: its states depend on later tokens"),
        (capped, {}, FITTING, "its logits are not linear in its last states, as with soft capping"),
        (
            None,
            {"targets": ["q_prj"], **RANKED},
            FITTING,
            "unknown target of LoRA 'q_prj', did you mean 'q_proj'.*down",
        ),
        (None, {"alpha": 1.0}, FITTING, "alpha would do nothing without adapters: give rank"),
        (None, {"base": "bfloat16"}, FITTING, "base would do nothing without adapters"),
        (None, {}, (LENGTH, 400), "knows 317 tokens, the data set's tokenizer has 400: give --set .*tokenizer="),
        (None, {}, (200, VOCABULARY), "takes 128 tokens at most, a text of the data set has up to 200"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_errors_are_one_line(place, tmp_path, damage, options, shape, match):
    shutil.copytree(place / "model", tmp_path / "model")
    if damage:
        damage(tmp_path / "model")
    with pytest.raises(UserError, match=match) as error:
        build_model(f"transformers-lm:{tmp_path / 'model'}", shape, 1, seed=0, options=options)
    assert "\n" not in str(error.value)
