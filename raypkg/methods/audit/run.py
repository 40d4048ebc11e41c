"""An audit: the model of a finished run, the scores of its training samples, and the worst of them as they look."""

from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raypkg.cluster.actors import hold
from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.settings import Dataset, RunSettings
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.sharded import SentModel
from raypkg.data import Data
from raypkg.data.kinds import IMAGES, TEXTS
from raypkg.data.split import Split
from raypkg.data.tokenizer import tokenizer_at
from raypkg.engine.shards import Shard, class_shards
from raypkg.engine.worker import Cost
from raypkg.experiments.coreset_files import area_under_curve
from raypkg.experiments.resolve import stored_settings
from raypkg.experiments.samples import Samples, new_model, open_samples
from raypkg.experiments.trained import settings_of_trained
from raypkg.methods.deltagrad.run import open_recorded
from raypkg.models.classifier import classifier
from raypkg.runs import plots
from raypkg.runs.catalog import locate
from raypkg.runs.checkpoints import load_tensors
from raypkg.runs.folder import CONFIG, LOG, MODEL, RunFolder
from raypkg.runs.plots import BLUE, VERMILLION, count_axis, cut, page, save_plot
from raypkg.runs.storage import Storage

from .experiment import TABLE, AuditSettings
from .influence import HeadHessian, influence, self_influence

COLUMNS = {"self": "self_influence", "influence": "influence", "loss": "loss"}  # that a score of --by has
PICTURES = 24  # in the gallery
LONGEST = 100  # characters of a text on the page


class Audited(NamedTuple):
    """A run to audit: its model and the samples that it is trained on now."""

    name: str
    digest: str  # of the file of its model, which every deletion changes
    samples: Samples  # train_indices are those in use
    scorer: SentModel
    decay: float  # λ of the Hessian
    is_linear: bool  # the head is the whole model


def open_audited(settings: AuditSettings, samples: Samples, folder: RunFolder) -> Audited:
    """Open the run to audit; refuse one without a usable model, held-out samples or weight decay, or of other data."""
    run = locate(folder.storage.parent.parent.root, settings.model_from, having=MODEL)
    stored = settings_of_trained(run, "an audit")
    ours, theirs = (dict(each.dataset) | {"seed of the run": each.seed} for each in (settings, stored))
    for name, value in theirs.items():
        if ours[name] != value and name != "digest":
            raise UserError(f"run {run.name} has {name} {value}, here it is {ours[name]}: an audit takes the run's")
    if run.storage.read(LOG):
        with open_recorded(run) as recorded:  # checks its rows: deleted ones may have been blanked since
            data = Data(recorded.split, recorded.samples.data.test)
            samples = Samples(data, recorded.active.nonzero()[:, 0], recorded.samples.held_out)
    elif stored.dataset.digest not in (None, samples.digest(stored.dataset)):
        raise UserError(f"run {run.name} trained on other samples of {stored.dataset.name}: its files changed")
    if settings.on == "valid" and not len(samples.held_out):
        raise UserError(
            f"run {run.name} holds out no samples (dataset.validation = 0): train it with some, or give --on test"
        )
    decay = settings.damping or run.config.get("train", {}).get("weight_decay")
    if not decay:
        raise UserError(
            f"run {run.name} has no weight decay, so the Hessian may be singular: give --damping, such as 1e-3"
        )
    model = classifier(new_model(stored, samples.data), "effray audit")
    is_linear = isinstance(model.features, nn.Flatten | nn.Identity)
    weights = load_tensors(run.storage, MODEL)
    scorer = SentModel.of(stored.model, samples.data.train, weights, "float32")
    return Audited(run.name, run.storage.digest(MODEL) or "", samples, scorer, decay, is_linear)


def views_of(shard: Shard, scorer: SentModel) -> tuple[Tensor, HeadView, list[HeadView], Cost]:
    """Return the positions of a shard's samples, their view, that of its held-out samples if any, and the cost."""
    with Cost("audit") as cost:
        model = scorer.on(shard)
        view = model.view(shard, shard.indices)
        held_out = [model.view(shard, shard.valid)] if len(shard.valid) else []
        cost.forward += len(shard.indices) + len(shard.valid)
    return shard.indices, view, held_out, cost


def audit(settings: AuditSettings, audited: Audited, storage: Storage) -> dict[str, Any]:
    """Score the training samples, store them worst first, draw the plots, and return the phase's record."""
    data, indices, valid = audited.samples
    split, test = data
    if settings.on == "test":
        valid = valid[:0]
    with hold(lambda count: class_shards(data, split.y, indices, valid, count), settings.cluster) as shards:
        parts = shards.map(views_of, audited.scorer)
    positions, views, of_shards, costs = map(list, zip(*parts, strict=True))
    held_out_views = [*chain.from_iterable(of_shards)]
    if settings.on == "test":
        everyone = torch.arange(len(test))
        _, of_test, _, cost = views_of(Shard(Data(test, test), everyone, everyone[:0]), audited.scorer)
        held_out_views.append(of_test)
        costs.append(cost)
    cost = Cost.joined("audit", costs)
    with cost:
        found = torch.cat(positions)
        order = found.argsort()  # the same for any number of shards
        found = found[order]
        view, held_out = HeadView.concat(views)[order].double(), HeadView.concat(held_out_views).double()
        hessian = HeadHessian(view, audited.decay)
        scores = {"influence": influence(view, held_out, hessian)}
        if settings.by == "self":
            scores["self_influence"] = self_influence(view, hessian)
        scores["loss"] = cross_entropy(view.logits, view.y, reduction="none")
    column = COLUMNS[settings.by]
    by = scores[column]
    worst = by.argsort(descending=True, stable=True)

    # The table, worst first.
    ids = (found if split.ids is None else split.ids[found])[worst]
    names = np.array(split.classes, object)
    table = {"rank": np.arange(1, len(worst) + 1), "class": names[split.y[found[worst]].numpy()], "id": ids.numpy()}
    table |= {name: values[worst].numpy() for name, values in {"index": found, **scores}.items()}
    wrong = None
    if split.truth is not None and len(split.truth) == len(split):  # otherwise samples were added
        wrong = (split.y != split.truth)[found].numpy()
        table["true_class"] = names[split.truth[found[worst]].numpy()]
    storage.write_table(TABLE, pa.table(table))

    loss = cross_entropy(held_out.logits, held_out.y).item()
    accuracy = (held_out.logits.argmax(1) == held_out.y).double().mean().item()
    listed = worst[: settings.listed]
    predicted = -scores["influence"][listed].sum().item() / (len(found) - len(listed))
    word, kind = column.replace("_", "-"), "held-out" if settings.on == "valid" else "test"
    first = f"the worst of {len(found):,} training samples by {word} is id {ids[0]} ({table['class'][0]})"
    change = f"the {kind} loss is predicted to change by {predicted:+.4f}"
    findings = [
        f"{first}; without the {settings.listed:,} worst, {change}",
        f"run {audited.name}: {kind} loss {loss:.4f}, accuracy {accuracy:.2%}, {len(held_out):,} samples",
    ]
    figures: dict[str, Any] = {"held_out_loss": loss, "held_out_accuracy": accuracy}
    if wrong is not None and 0 < wrong.sum() < len(wrong):
        areas = {name: area_under_curve(score.numpy(), wrong) for name, score in scores.items()}
        figures |= {f"auc_{name}": area for name, area in areas.items()}
        by_score = ", ".join(f"{name.replace('_', '-')} {area:.3f}" for name, area in areas.items())
        among = wrong[worst[: wrong.sum()].numpy()].mean()
        findings.append(f"{wrong.sum():,} wrong labels are known, {among:.1%} of as many worst; AUC: {by_score}")
    if not audited.is_linear:
        findings.append("by the last layer's gradients only: the layers below it count as fixed")
    if settings.on == "test":
        findings.append("the test set was looked at: do not choose by it and then report its accuracy")
    save_plot(storage, "harm", partial(harm, by.numpy(), wrong, word))
    shown = _shown(found[listed], table, split, settings, storage)
    facts = {"audited": audited.name, "audited_model": audited.digest, "on": settings.on, "by": settings.by}
    return {**figures, **facts, "tables": [shown], "costs": [cost.record()], "main": True, "findings": findings}


def _shown(
    positions: Tensor, table: dict[str, Any], split: Split, settings: AuditSettings, storage: Storage
) -> dict[str, Any]:
    """Return the table of the worst samples for people, with their texts; draw those that are images."""
    headings = [name for name in table if name not in ("index", "rank")]
    columns = [
        [f"{value:.4g}" if isinstance(value, float) else str(value) for value in table[name][: len(positions)]]
        for name in headings
    ]
    note = ""
    try:
        source, rows, dataset = originals(split, positions, settings.dataset)
        if source.kind is TEXTS:
            from tokenizers import Tokenizer

            name = dataset.options.get("tokenizer", "")
            tokenizer = tokenizer_at(name) if name else Tokenizer.from_str(source.tokenizer)
            texts = [tokenizer.decode(tokens[tokens >= 0].tolist()) for tokens in source.batch(rows)[0][:, 0]]
            headings.insert(0, "text")  # the first column is the only one that is flush left
            columns.insert(0, [cut(text, LONGEST) for text in texts])
        elif source.kind is IMAGES:
            x, _ = source.batch(rows[:PICTURES])
            labels = [*zip(table["class"].tolist(), table[COLUMNS[settings.by]].tolist(), strict=True)][: len(x)]
            images = x.permute(0, 2, 3, 1).numpy()  # [m, H, W, C]
            save_plot(storage, "worst", partial(plots.gallery, [(f"The {len(labels)} worst", images, labels)]))
    except UserError as error:
        note = f"without texts and pictures: {error}"
    headings = [name.replace("_", " ") for name in headings]
    rows_of_text = [list(row) for row in zip(*columns, strict=True)]
    return {"title": f"The {len(positions):,} worst", "headings": headings, "rows": rows_of_text, "note": note}


def originals(split: Split, positions: Tensor, dataset: Dataset) -> tuple[Split, Tensor, Dataset]:
    """Return the samples behind some rows: for those of `effray embed` the texts or images that it embedded."""
    kind, _, path = dataset.name.partition(":")
    if kind != "table" or split.ids is None or CONFIG not in Storage(path).list():
        return split, positions, dataset
    values = stored_settings(RunFolder(Storage(path)))
    embedded = load_settings(RunSettings, {name: values[name] for name in ("dataset", "seed")})
    source = open_samples(embedded).data.train
    rows = split.ids[positions]
    if source.ids is not None:
        rows = torch.stack([(source.ids == id).nonzero()[0, 0] for id in rows])
    return originals(source, rows, embedded.dataset)


def harm(scores: np.ndarray, wrong: np.ndarray | None, name: str, path: str | Path) -> None:
    """Draw the histogram of all scores [n] and, if they are known, that of the wrong labels, bool [n], within it."""
    edges = np.histogram_bin_edges(scores, min(60, 1 + len(scores) // 4)).tolist()
    title = f"The highest of {len(scores):,} scores is {scores.max():.3g}, the median {np.median(scores):.3g}"
    with page(path) as figure:
        axes = figure.subplots()
        axes.hist(scores, edges, color=BLUE, alpha=0.5, label=f"all {len(scores):,} samples")
        if wrong is not None:
            axes.hist(scores[wrong], edges, color=VERMILLION, label=f"the {wrong.sum():,} with wrong labels")
            worst = np.argsort(-scores, kind="stable")[: wrong.sum()]
            title = f"{wrong[worst].mean():.0%} of the {wrong.sum():,} highest scores have wrong labels"
        axes.set_title(title)
        axes.set(xlabel=name, ylabel="samples", yscale="log")
        count_axis(axes.yaxis)
        axes.legend(loc="upper right")
