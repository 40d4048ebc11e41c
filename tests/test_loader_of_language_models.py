"""CoresetLoader, and the adapters to trainers, with causal language models: a loss per token, a weight per sample."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset, TensorDataset

from raypkg import language
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.budgets import select
from raypkg.coresets.loader import CoresetLoader
from raypkg.coresets.record import Rows
from raypkg.models.language import LanguageModel, with_adapters
from test_integrations import EPOCHS, INFOBATCH, assert_equal_weights, lightning_fit, loop, trainer_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from raypkg.integrations.transformers import sample_losses  # noqa: E402

N, V, LENGTH = 48, 40, 9
RDS = {"rule": "rds_plus", "fraction": 0.5, "every_epochs": 1}  # 3 batches of 8 per epoch


class Instructions(Dataset):
    """Prompts of two tokens and longer answers; the two domains have tokens of their own. Padding follows."""

    def __init__(self, n=N, *, domain=None, equal=False, seed=0):
        rng = generator(seed, "instructions")
        self.domain = torch.arange(n) % 2 if domain is None else torch.full((n,), domain)
        self.ids = torch.randint(V // 2, (n, LENGTH), generator=rng) + V // 2 * self.domain[:, None]
        self.lengths = torch.full((n,), LENGTH) if equal else torch.randint(4, LENGTH + 1, (n,), generator=rng)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        there = torch.arange(LENGTH) < self.lengths[i]
        labels = self.ids[i].where(there & (torch.arange(LENGTH) >= 2), -100)
        return {"input_ids": self.ids[i], "attention_mask": there.long(), "labels": labels, "indices": i}


def llama(adapted=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
        initializer_range=0.3,  # so that samples differ
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    if adapted:
        pytest.importorskip("peft")
        model = with_adapters(model, 4, 8.0, 0.0, ("q_proj", "v_proj"))
    return model


def loader_of(model, samples=None, **options):
    given = {"rule": "random", "fraction": 0.5, "epochs": EPOCHS, **options}
    if given["rule"] == "rds_plus":
        given = {"target": Instructions(4, domain=1, seed=1), "rows": language.state_rows, **given}
    return CoresetLoader(DataLoader(samples or Instructions(), batch_size=8), model, **given)


def loss_by_hand(model, batch):
    """Mean of w_i times the mean cross-entropy of sample i's answer, one sample and no batch at a time."""
    losses = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        logits = model(input_ids=ids[None]).logits[0]
        places = [t for t in range(1, len(ids)) if labels[t] != -100]
        losses.append(torch.stack([F.cross_entropy(logits[t - 1], ids[t]) for t in places]).mean())
    return torch.stack(losses), (torch.stack(losses) * batch["weights"]).mean()


@pytest.mark.parametrize("kind", ["whole", "adapters", pytest.param("compiled", marks=pytest.mark.slow)])
def test_losses_of_samples_are_means_over_their_answers(kind):
    model = llama(adapted=kind == "adapters")
    batch = next(iter(loader_of(model)))
    batch["weights"] = torch.rand(8)
    expected, mean = loss_by_hand(model, batch)
    mean.backward()
    gradients = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    model.zero_grad()
    if kind == "compiled":
        model = torch.compile(model, backend="eager")
        model(input_ids=batch["input_ids"])  # later hooks are not called
    losses, outputs = sample_losses(model, batch)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    if kind != "compiled":
        assert outputs.logits.shape[:2] == (1, (batch["labels"] != -100).sum())
    (losses * batch["weights"]).mean().backward()
    for ours, theirs in zip((p.grad for p in model.parameters() if p.grad is not None), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("equal", [True, False])
def test_without_weights_and_with_answers_of_equal_lengths_the_loss_is_that_of_the_trainer(equal, tmp_path):
    samples = Instructions(equal=equal)
    trainer = trainer_of(llama(), tmp_path, samples=samples, coreset={"rule": "random", "fraction": 0.5})
    trainer.get_train_dataloader()
    plain = next(iter(DataLoader(samples, batch_size=8)))
    del plain["indices"]
    theirs = trainer.compute_loss(trainer.model, dict(plain))
    ours = trainer.compute_loss(trainer.model, {**plain, "weights": torch.ones(8)})
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6) == equal


def recording(loader):
    """Return the loss of a weighted coreset in a loop that records the losses of samples."""

    def loss(model, batch):
        losses, _ = sample_losses(model, batch)
        loader.record(losses, batch["indices"])
        return (losses * batch["weights"]).mean()

    return loss


def chosen(rule):
    if rule == "infobatch":
        return INFOBATCH
    return {**RDS, "target": Instructions(4, domain=1, seed=1), "rows": language.state_rows}


@pytest.mark.parametrize(("rule", "accumulate"), [("rds_plus", 1), ("rds_plus", 3), ("infobatch", 1)])
def test_the_trainer_trains_as_the_plain_loop(rule, accumulate, tmp_path):
    model = llama()
    by_hand = copy.deepcopy(model)
    options = {"gradient_accumulation_steps": accumulate}
    trainer = trainer_of(model, tmp_path, options, samples=Instructions(), coreset=chosen(rule))
    trainer.train()
    twin = loader_of(by_hand, **chosen(rule))
    loop(by_hand, twin, recording(twin), accumulate=accumulate)
    assert_equal_weights(model, by_hand)
    assert trainer.loader.coreset.indices.equal(twin.coreset.indices)
    torch.testing.assert_close(trainer.loader.losses, twin.losses)
    assert twin.losses.isfinite().sum() >= N // 2


@pytest.mark.filterwarnings("ignore")  # Lightning advises more workers, and GPUs
def test_lightning_trains_as_the_plain_loop(tmp_path):
    model, by_hand = llama().train(), llama()
    loader, twin = (loader_of(each, **RDS) for each in (model, by_hand))
    lightning_fit(model, loader, tmp_path, loss=recording(loader))
    loop(by_hand, twin, recording(twin))
    assert_equal_weights(model, by_hand)


# Selection


def rows_by_hand(model, samples):
    """Position-weighted means of the last hidden states, one sample and no padding at a time."""
    rows = []
    for sample, length in zip(samples, samples.lengths, strict=True):
        h = model.model(input_ids=sample["input_ids"][None, :length]).last_hidden_state[0].double()
        places = torch.arange(1, length + 1).double()
        rows.append(normalize((places @ h / places.sum())[None]))
    return Rows(torch.cat(rows).float())


def test_rds_plus_picks_by_the_last_states_of_the_model_of_that_epoch():
    model, samples, target = llama(), Instructions(), Instructions(4, domain=1, seed=1)
    model.model.embed_tokens.weight.data[V // 2 :] += 1.0
    loader = loader_of(model.train(), samples, **{**RDS, "fraction": 0.25})
    picks = []
    for _ in range(2):
        with torch.no_grad():
            pool, aim = rows_by_hand(model, samples), rows_by_hand(model, target)
        seen = torch.cat([batch["indices"] for batch in loader]).sort().values
        picked = select(pool, N // 4, "rds_plus", seed=0, target=aim).indices.sort().values
        assert seen.equal(picked)
        picks.append(picked)
        nn.init.normal_(model.model.embed_tokens.weight)
    assert model.training
    assert samples.domain[picks[0]].float().mean() > 0.9
    assert not picks[0].equal(picks[1])


def test_pairs_of_tokens_for_a_language_model_of_our_own_pick_the_same():
    def pairs(samples):
        there = torch.arange(LENGTH) < samples.lengths[:, None]
        segments = (torch.arange(LENGTH) >= 2).long().expand(len(samples), -1)
        return TensorDataset(torch.stack([samples.ids, segments], dim=1).where(there[:, None], -1), samples.domain)

    model, target = llama(), Instructions(4, domain=1, seed=1)
    ours, theirs = (
        loader_of(model, **RDS),
        loader_of(LanguageModel(model), pairs(Instructions()), **RDS | {"target": pairs(target)}),
    )
    x, y, w = next(iter(theirs))
    next(iter(ours))
    assert x.shape == (8, 2, LENGTH) and y.shape == w.shape == (8,)
    assert theirs.coreset.indices.equal(ours.coreset.indices)


def test_less_picks_by_gradients_of_the_adapters():
    model, samples = llama(adapted=True).eval(), Instructions()
    gradients = partial(language.less_rows, projection=language.Projection(0, 64))
    target = Instructions(4, domain=1, seed=1)
    loader = loader_of(model, samples, rule="less", fraction=0.25, rows=gradients, target=target)
    seen = torch.cat([batch["indices"] for batch in loader]).sort().values

    def by_hand(samples):
        return {name: x for name, x in next(iter(DataLoader(samples, N))).items() if name != "indices"}

    pool, aim = (Rows(gradients(model, [by_hand(each)])) for each in (samples, target))
    assert seen.equal(select(pool, N // 4, "less", seed=0, target=aim).indices.sort().values)


# Refusals


class Changed(Instructions):
    """Instructions with other labels at the fifth sample, or of another form."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        return {**sample, "labels": self.change(i, sample["labels"])}


@pytest.mark.parametrize(
    ("options", "samples", "message"),
    [
        (
            {"rule": "gradmatch", "warm_epochs": 1},
            None,
            r"gradmatch selects by a classifier's head, .* give random, infobatch, ccs or, with rows, less, rds_plus",
        ),
        ({**RDS, "rows": None}, None, r"give rows, .* such as raypkg.language.state_rows"),
        ({"rows": language.state_rows}, None, "random selects by no rows: rows would do nothing"),
        (
            {**RDS, "rows": lambda model, batches: torch.cat([batch["labels"] for batch in batches])},
            None,
            r"rows are torch.int64 \[48, 9\]: needed is float \[n, d\]",
        ),
        ({**RDS, "rows": lambda model, batches: "x"}, None, "rows returned str of 1 for 0 samples"),
        ({}, Changed(lambda i, y: y.where(torch.tensor(i != 5), -100)), "sample 5 has no answered token: its labels"),
        ({}, Changed(lambda i, y: y.clamp_min(-5)), "labels must be integers from 0 up, .* with -100 for no answer"),
        ({}, Changed(lambda i, y: y.float()), r"or of tokens \[\d+, 9\] .*; a batch has torch.float32 \[\d+, 9\]"),
        ({}, Changed(lambda i, y: y[1:]), r"or of tokens \[\d+, 9\] .*; a batch has torch.int64 \[\d+, 8\]"),
    ],
)
def test_what_cannot_work_is_one_line(options, samples, message):
    with pytest.raises(UserError, match=message) as refused:
        next(iter(loader_of(llama(), samples, **options)))
    assert "\n" not in str(refused.value)


def test_models_that_are_not_causal_are_refused():
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    batch = next(iter(loader_of(llama())))
    for model in (transformers.BertForMaskedLM(config), nn.Linear(1, 1)):
        with pytest.raises(UserError, match=f"causal language model of transformers, not {type(model).__name__}"):
            sample_losses(model, batch)


def test_the_trainer_trains_on_the_choices_of_colm(tmp_path):
    trainer = trainer_of(llama(), tmp_path, samples=Instructions(), crest={"preset": "colm"})
    trainer.train()
    assert trainer.loader.report()["pools"] == trainer.state.global_step == EPOCHS * N // 8


def test_a_checkpoint_of_other_answers_is_refused():
    state = loader_of(llama()).state_dict()
    with pytest.raises(UserError, match="the checkpoint is of a CoresetLoader with labels"):
        loader_of(llama(), Instructions(seed=3)).load_state_dict(state)
