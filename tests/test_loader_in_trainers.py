"""CoresetLoader within the trainers of others, against the plain weighted loop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.loader import CoresetLoader

N, LENGTH, C, RATE, EPOCHS = 48, 5, 3, 0.05, 3


class Sentences(Dataset):
    """Tokens of which the first tells the label, in the form of Hugging Face's data sets."""

    def __init__(self, n=N, name="labels"):
        rng = generator(0, "sentences")
        self.name = name
        self.y = torch.arange(n) % C
        self.ids = torch.randint(3, 10, (n, LENGTH), generator=rng)
        self.ids[:, 0] = self.y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(LENGTH).long(), self.name: self.y[i]}


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=10,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=C,
        initializer_range=0.5,  # so that samples differ
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def coresets_of(model, samples, **options):
    given = {"rule": "craig", "fraction": 0.5, "epochs": EPOCHS, "every_epochs": 1, **options}
    return CoresetLoader(DataLoader(samples, batch_size=8), model, **given)


def plain_loop(model, loader, *, accumulate):
    """Train by hand; return the weights that were seen."""
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    seen = []
    model.train()
    for _ in range(EPOCHS):
        for step, batch in enumerate(loader, 1):
            weights, labels, indices = (batch.pop(name) for name in ("weights", "labels", "indices"))
            losses = F.cross_entropy(model(**batch).logits, labels, reduction="none")
            loader.record(losses, indices)
            seen.append(weights)
            ((losses * weights).mean() / accumulate).backward()
            if step % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return torch.cat(seen)


def in_hugging_face(model, loader, folder, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class CoresetTrainer(transformers.Trainer):
        loss_is_scaled_for_ga = False

        def get_train_dataloader(self):
            return loader

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            weights, labels, indices = (inputs.pop(name) for name in ("weights", "labels", "indices"))
            losses = F.cross_entropy(model(**inputs).logits, labels, reduction="none")
            loader.record(losses, indices)
            return (losses * weights).mean()

    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return CoresetTrainer(model, arguments).train()


def assert_equal_weights(first, second):
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_trainer_of_hugging_face_trains_as_the_plain_weighted_loop(accumulate, tmp_path):
    model = bert()
    by_hand = copy.deepcopy(model)
    loader = coresets_of(model, Sentences())
    result = in_hugging_face(model, loader, tmp_path, gradient_accumulation_steps=accumulate)
    twin = coresets_of(by_hand, Sentences())
    weights = plain_loop(by_hand, twin, accumulate=accumulate)
    assert weights.std() > 0.1
    assert_equal_weights(model, by_hand)
    assert loader.coreset.indices.equal(twin.coreset.indices)
    torch.testing.assert_close(loader.losses, twin.losses, rtol=1e-4, atol=1e-5)  # fetched ahead, and yet their own
    assert result.global_step == EPOCHS * N // 2 // 8 // accumulate


def rows():
    rng = generator(0, "rows")
    return TensorDataset(torch.randn(N, 6, generator=rng), torch.arange(N) % C)


@pytest.mark.parametrize("name", ["labels", "label"])
def test_a_mapping_is_yielded_with_its_weights_and_positions(name):
    samples = Sentences(name=name)
    loader = coresets_of(bert(), samples)
    picked = {}
    for batch in loader:
        assert set(batch) == {"input_ids", "attention_mask", "labels", "weights", "indices"}
        assert batch["input_ids"].equal(samples.ids[batch["indices"]])
        picked |= dict(zip(batch["indices"].tolist(), batch["weights"].tolist(), strict=True))
    chosen = loader.coreset
    assert picked == dict(zip(chosen.indices.tolist(), chosen.weights.tolist(), strict=True))


def test_a_mapping_needs_labels():
    with pytest.raises(UserError, match="has input_ids, attention_mask, y: it needs 'labels'"):
        next(iter(coresets_of(bert(), Sentences(name="y"))))


def test_an_epoch_is_as_long_as_its_length_says():
    loader = coresets_of(nn.Linear(6, C), rows(), warm_epochs=1, every_epochs=0)
    assert [(len(loader), len(list(loader))) for _ in range(EPOCHS)] == [(6, 6), (3, 3), (3, 3)]


def test_losses_may_be_recorded_for_a_batch_that_was_fetched_earlier():
    loader = coresets_of(bert(), Sentences())
    first, second, *_ = iter(loader)
    for batch, loss in ((second, 2.0), (first, 1.0)):
        loader.record(torch.full((8,), loss), batch["indices"])
    assert (loader.losses[first["indices"]] == 1).all() and (loader.losses[second["indices"]] == 2).all()
    with pytest.raises(UserError, match=r"losses \[3\] of a batch of 8"):
        loader.record(torch.zeros(3), first["indices"])


def test_a_loader_selects_for_a_target():
    torch.manual_seed(0)
    model, everything = nn.Linear(6, C), rows()
    few = TensorDataset(everything.tensors[0][:9] * 3, everything.tensors[1][:9])
    plain, aimed = (coresets_of(model, everything, target=target) for target in (None, few))
    next(iter(plain)), next(iter(aimed))
    assert not plain.coreset.weights.equal(aimed.coreset.weights)
    with pytest.raises(UserError, match="grand selects for no target: target would do nothing"):
        coresets_of(model, everything, rule="grand", target=few)
    with pytest.raises(UserError, match="the target has no samples"):
        coresets_of(model, everything, target=TensorDataset(few.tensors[0][:0], few.tensors[1][:0]))


def test_a_data_set_of_hugging_face_is_taken_and_given():
    datasets = pytest.importorskip("datasets")
    sentences = Sentences()
    table = datasets.Dataset.from_dict({"input_ids": sentences.ids.tolist(), "labels": sentences.y.tolist()})
    loader = coresets_of(bert(), table.with_format("torch"))
    for batch in loader:
        assert batch["input_ids"].equal(sentences.ids[batch["indices"]])
    kept = table.select(loader.coreset.indices)
    assert kept["labels"][:] == sentences.y[loader.coreset.indices].tolist() and len(kept) == N // 2
