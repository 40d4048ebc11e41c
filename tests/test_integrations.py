"""The adapters to Hugging Face's Trainer, Lightning and Accelerate, against plain loops with the same objects."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.loader import CoresetLoader
from raypkg.methods.agent.correction import GradientCorrection
from raypkg.methods.crest.loader import CrestLoader
from raypkg.methods.sparse.training import SparseTraining

N, LENGTH, C, RATE, EPOCHS = 48, 5, 3, 0.05, 3
CORESET = {"rule": "craig", "fraction": 0.5, "every_epochs": 1}  # 3 batches of 8 per epoch
SPARSE = {"density": 0.3, "update_every": 2}
AGENT = {"form": "measured"}
CLIP = 0.5


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
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, num_labels=C, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.5,  # so that samples differ
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def coresets_of(model, samples, **options):
    given = {"rule": "craig", "fraction": 0.5, "epochs": EPOCHS, "every_epochs": 1, **options}
    return CoresetLoader(DataLoader(samples, batch_size=8), model, **given)


def rows():
    rng = generator(0, "rows")
    return TensorDataset(torch.randn(N, 6, generator=rng), torch.arange(N) % C)


def assert_equal_weights(first, second):
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def of_hugging_face():
    datasets, sentences = pytest.importorskip("datasets"), Sentences()
    table = datasets.Dataset.from_dict({"input_ids": sentences.ids.tolist(), "labels": sentences.y.tolist()})
    return table.with_format("torch")


@pytest.mark.parametrize("samples", [Sentences, partial(Sentences, name="label"), of_hugging_face])
def test_a_mapping_is_yielded_with_its_weights_and_positions(samples):
    samples, picked = samples(), {}
    loader = coresets_of(bert(), samples)
    for batch in loader:
        assert set(batch) - {"attention_mask"} == {"input_ids", "labels", "weights", "indices"}
        assert batch["input_ids"].equal(Sentences().ids[batch["indices"]])
        picked |= dict(zip(batch["indices"].tolist(), batch["weights"].tolist(), strict=True))
    chosen = loader.coreset
    assert picked == dict(zip(chosen.indices.tolist(), chosen.weights.tolist(), strict=True))
    if not isinstance(samples, Sentences):
        assert samples.select(chosen.indices)["labels"][:].equal(Sentences().y[chosen.indices])


def test_an_epoch_is_as_long_as_its_length_says():
    loader = coresets_of(nn.Linear(6, C), rows(), warm_epochs=1, every_epochs=0)
    assert [(len(loader), len(list(loader))) for _ in range(EPOCHS)] == [(6, 6), (3, 3), (3, 3)]


def test_a_loader_selects_for_a_target():
    torch.manual_seed(0)
    model, everything = nn.Linear(6, C), rows()
    few = TensorDataset(everything.tensors[0][:9] * 3, everything.tensors[1][:9])
    plain, aimed = (coresets_of(model, everything, target=target) for target in (None, few))
    next(iter(plain)), next(iter(aimed))
    assert not plain.coreset.weights.equal(aimed.coreset.weights)


def loop(model, loader, loss, *, sparse=None, agent=None, steps=9, accumulate=1):
    """Plain PyTorch, with the lines of each method."""
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    masks = SparseTraining(model, optimizer, total_steps=steps, **sparse) if sparse else None
    correction = GradientCorrection(model, loss=loss, **AGENT) if agent else None
    model.train()
    for _ in range(EPOCHS):
        if correction:
            correction.snapshot(agent)
        seen = []
        for number, batch in enumerate(loader, 1):
            (loss(model, batch) / accumulate).backward()
            seen.append(batch)
            if number % accumulate == 0:
                if correction:
                    parts, seen = seen, []
                    correction.correct(lambda snapshot, parts=parts: [loss(snapshot, b) / accumulate for b in parts])
                if masks:
                    masks.mask_gradients()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
    return masks


def loss_of_mapping(model, batch):
    given = {name: value for name, value in batch.items() if name not in ("labels", "weights", "indices")}
    losses = F.cross_entropy(model(**given).logits, batch["labels"], reduction="none")
    return (losses * batch.get("weights", 1.0)).mean()


def snapshots():
    """All samples, in batches of mappings and of pairs."""
    return list(DataLoader(Sentences(), 16)), list(DataLoader(rows(), 16))


def trainer_of(model, folder, options=None, *, samples=None, sparse=None, agent=None, **chosen):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from raypkg.integrations.transformers import CoresetMixin, StepCallback

    class CoresetTrainer(CoresetMixin, transformers.Trainer):
        pass

    given = {"save_strategy": "no", **(options or {})}
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=EPOCHS, learning_rate=RATE, lr_scheduler_type="constant", optim="sgd",
        optim_args="momentum=0.9", max_grad_norm=CLIP, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        dataloader_pin_memory=False, **given,
    )  # fmt: skip
    trainer = CoresetTrainer(model, arguments, train_dataset=samples or Sentences(), **chosen)
    if sparse or agent:
        trainer.step = StepCallback(trainer, sparse=sparse, agent=agent, batches=snapshots()[0] if agent else None)
        trainer.add_callback(trainer.step)
    return trainer


@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("agent", [None, AGENT], ids=["plain", "agent"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_trainer_on_coresets_trains_as_the_plain_loop(sparse, agent, accumulate, tmp_path):
    model = bert()
    by_hand = copy.deepcopy(model)
    options = {"gradient_accumulation_steps": accumulate}
    trainer = trainer_of(model, tmp_path, options, sparse=sparse, agent=agent, coreset=CORESET)
    trainer.train()
    twin = coresets_of(by_hand, Sentences(), **CORESET)
    told = {"sparse": sparse, "agent": agent and snapshots()[0], "steps": 9 // accumulate, "accumulate": accumulate}
    masks = loop(by_hand, twin, loss_of_mapping, **told)
    assert_equal_weights(model, by_hand)
    assert trainer.loader.coreset.indices.equal(twin.coreset.indices)
    assert trainer.loader.losses.isfinite().sum() >= N // 2
    assert trainer.args.max_grad_norm == CLIP
    if masks:
        assert all(trainer.step.sparse.masks[name].equal(mask) for name, mask in masks.masks.items())
        assert masks.density == pytest.approx(SPARSE["density"], abs=0.01)


def test_the_trainer_on_crest_trains_as_the_plain_loop(tmp_path):
    model = bert()
    by_hand = copy.deepcopy(model)
    trainer = trainer_of(model, tmp_path, crest={"preset": "each-step"})
    trainer.train()
    loop(by_hand, CrestLoader(Sentences(), by_hand, 8, epochs=EPOCHS, preset="each-step"), loss_of_mapping)
    assert_equal_weights(model, by_hand)
    assert trainer.state.global_step == trainer.loader.report()["step"] == EPOCHS * N // 8


INFOBATCH = {"rule": "infobatch", "fraction": 1, "every_epochs": 1}


@pytest.mark.parametrize(
    "chosen", [{"coreset": CORESET}, {"coreset": INFOBATCH}, {"crest": {}}, {"coreset": CORESET, "agent": AGENT}]
)
@pytest.mark.parametrize("after", [2, 3, 4])  # steps; three are an epoch of coresets
def test_the_trainer_resumes_in_the_middle_of_an_epoch(chosen, after, tmp_path):
    def train(resume=None):
        options = {"save_strategy": "steps", "save_steps": after, "save_total_limit": None}
        trainer = trainer_of(bert(), tmp_path, options, sparse=SPARSE, **chosen)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = train()
    resumed = train(str(tmp_path / f"checkpoint-{after}"))
    assert resumed.state.global_step == straight.state.global_step
    assert all(map(torch.equal, straight.model.state_dict().values(), resumed.model.state_dict().values()))
    assert "crest" in chosen or resumed.loader.losses.equal(straight.loader.losses)
    masks = straight.step.sparse.masks
    assert all(resumed.step.sparse.masks[name].equal(mask) for name, mask in masks.items())


def test_the_trainer_needs_one_loader_and_whole_steps(tmp_path):
    with pytest.raises(UserError, match="either coreset or crest"):
        trainer_of(bert(), tmp_path)
    from raypkg.integrations.transformers import StepCallback

    for given, message in (
        ({}, "sparse, agent or both"),
        ({"agent": {}}, "agent and batches together"),
        (
            {"agent": {"gama": 1.0}, "batches": []},
            "unknown argument of GradientCorrection 'gama', did you mean 'gamma'",
        ),
        ({"sparse": {"densty": 0.1}}, "unknown argument of SparseTraining 'densty', did you mean 'density'"),
    ):
        with pytest.raises(UserError, match=message):
            StepCallback(None, **given)
    options = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}

    def refused(checkpoint, message):
        with pytest.raises(UserError, match=message):
            trainer_of(bert(), tmp_path, options=options, coreset=CORESET).train(str(checkpoint))

    trainer_of(bert(), tmp_path, options=options, coreset=CORESET).train()
    refused(tmp_path / "checkpoint-1", "the last 1 batches of an epoch are no 2")
    last = tmp_path / "checkpoint-2"
    (last / "effray-sparse-0.pt").touch()
    refused(last, r"effray-sparse-0\.pt would not be restored: resume with the StepCallback")
    (last / "effray-sparse-0.pt").unlink()
    (last / "effray-loader-0.pt").unlink()
    refused(last, r"effray-loader-0.pt: resume from a checkpoint of output_dir")


def test_the_trainer_masks_after_unscaling_and_before_clipping():
    pytest.importorskip("transformers")
    from raypkg.integrations.transformers import StepCallback

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    wrapped = SimpleNamespace(optimizer=optimizer, scaler=scaler, state_dict=optimizer.state_dict)
    arguments = SimpleNamespace(max_grad_norm=CLIP, num_train_epochs=EPOCHS)
    callback = StepCallback(SimpleNamespace(compute_loss=None), sparse=SPARSE)
    state = SimpleNamespace(max_steps=9, global_step=0)
    callback.on_train_begin(arguments, state, None, model=model, optimizer=wrapped)
    x, y = rows().tensors
    scaler.scale(100 * F.cross_entropy(model(x), y)).backward()
    callback.on_pre_optimizer_step(arguments, state, None, model=model, optimizer=wrapped)
    assert all((model.get_parameter(name).grad[~mask] == 0).all() for name, mask in callback.sparse.masks.items())
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert float(norm) == pytest.approx(CLIP, rel=1e-4)


def lightning_fit(model, loader, folder, *, loss=None, sparse=None, agent=False, every=None, resume=None):
    lightning = pytest.importorskip("lightning")
    from raypkg.integrations.lightning import AgentCallback, CoresetCallback, SparseCallback

    class Classification(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            return (loss or loss_of_rows)(self.model, batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), RATE, momentum=0.9)

    callbacks = [CoresetCallback()]
    if agent:
        callbacks.append(AgentCallback(GradientCorrection(model, loss=loss_of_rows, **AGENT), snapshots()[1]))
    if sparse:
        callbacks.append(SparseCallback(**sparse))
    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, "{step}", every_n_train_steps=every, save_top_k=-1, auto_insert_metric_name=False
    )
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=bool(every), enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, gradient_clip_val=CLIP,
        callbacks=[*callbacks, *([saving] if every else [])],
    )  # fmt: skip
    trainer.fit(Classification(), loader, ckpt_path=resume)
    return trainer, callbacks[-1]


def loss_of_rows(model, batch):
    x, y, *w = batch
    return (F.cross_entropy(model(x), y, reduction="none") * (w[0] if w else 1.0)).mean()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, C))


LOADERS = {
    "coreset": lambda model: coresets_of(model, rows(), **CORESET),
    "crest": lambda model: CrestLoader(rows(), model, 8, epochs=EPOCHS, preset="each-step"),
}


@pytest.mark.filterwarnings("ignore")  # Lightning advises more workers, and GPUs
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("agent", [False, True], ids=["plain", "agent"])
def test_lightning_trains_as_the_plain_loop(kind, sparse, agent, tmp_path):
    model, by_hand = network(), network()
    trainer, callback = lightning_fit(model, LOADERS[kind](model), tmp_path, sparse=sparse, agent=agent)
    told = {"sparse": sparse, "agent": agent and snapshots()[1], "steps": trainer.global_step}
    masks = loop(by_hand, LOADERS[kind](by_hand), loss_of_rows, **told)
    assert_equal_weights(model, by_hand)
    if masks:
        assert all(callback.sparse.masks[f"model.{name}"].equal(mask) for name, mask in masks.masks.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("after", [2, 3, 4, 6])  # steps; an epoch has three of coresets and six of CREST
def test_lightning_resumes_in_the_middle_of_an_epoch(kind, after, tmp_path):
    straight, resumed = network(), network()
    whole, masks = lightning_fit(straight, LOADERS[kind](straight), tmp_path, sparse=SPARSE, agent=True, every=after)
    resumed[0].weight.data += 1  # the checkpoint has everything
    second, again = lightning_fit(
        resumed, LOADERS[kind](resumed), tmp_path, sparse=SPARSE, agent=True, resume=tmp_path / f"{after}.ckpt"
    )
    assert second.global_step == whole.global_step
    assert_equal_weights(straight, resumed)
    assert all(again.sparse.masks[name].equal(mask) for name, mask in masks.sparse.masks.items())


@pytest.mark.filterwarnings("ignore")
def test_lightning_warns_where_a_callback_is_missing_and_refuses_unknown_arguments(tmp_path):
    model = network()
    lightning_fit(model, LOADERS["coreset"](model), tmp_path, sparse=SPARSE, every=3)
    with pytest.warns(UserWarning, match="add the following callbacks: .*SparseCallback"):
        lightning_fit(model, LOADERS["coreset"](model), tmp_path, resume=tmp_path / "3.ckpt")
    with pytest.raises(UserError, match="unknown argument of SparseTraining 'densty', did you mean 'density'"):
        lightning_fit(model, LOADERS["coreset"](model), tmp_path, sparse={"densty": 0.1})


@pytest.mark.parametrize("kind", LOADERS)
def test_accelerate_needs_no_adapter(kind):
    accelerate = pytest.importorskip("accelerate")
    model, by_hand = network(), network()
    loader = LOADERS[kind](model)
    steps = EPOCHS * len(loader)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=1)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    prepared, optimizer, batches = accelerator.prepare(model, optimizer, loader)
    assert batches is loader
    sparse = SparseTraining(prepared, optimizer, total_steps=steps, **SPARSE)
    agent = GradientCorrection(prepared, loss=loss_of_rows, **AGENT)
    for _ in range(EPOCHS):
        agent.snapshot(snapshots()[1])
        for batch in batches:
            accelerator.backward(loss_of_rows(prepared, batch))
            accelerator.unscale_gradients()
            agent.correct(lambda snapshot, batch=batch: loss_of_rows(snapshot, batch))
            sparse.mask_gradients()
            accelerator.clip_grad_norm_(prepared.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    masks = loop(by_hand, LOADERS[kind](by_hand), loss_of_rows, sparse=SPARSE, agent=snapshots()[1], steps=steps)
    assert_equal_weights(model, by_hand)
    assert all(sparse.masks[name].equal(mask) for name, mask in masks.masks.items())
