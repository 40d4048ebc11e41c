"""The end of a run: its figures as a manifest, its plots as pictures."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raypkg.core.settings import RunSettings
from raypkg.data.coreset import Coreset
from raypkg.data.kinds import IMAGES
from raypkg.data.opening import wrong_share
from raypkg.data.split import Split
from raypkg.runs import plots
from raypkg.runs.plots import save_plot
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .coreset_files import FILE, SCORES, load_coreset, read_coreset
from .samples import Samples

LEFT_OUT = {
    "costs",
    "elapsed",
    "files",
    "findings",
    "from",
    "main",
    "number",
}  # of a phase's record
Records = Mapping[str, Mapping[str, Any]]  # what each phase left
SHOWN = 16  # images in each of the two galleries


def finish(report: Report, settings: RunSettings, samples: Samples, *, epochs: int = 0) -> dict[str, Any]:
    """Draw the plots, write the manifest, drop what only an unfinished run needs; return the manifest.

    Args:
        report: of the run, with the records of all its phases.
        settings: the run's data set and seed.
        samples: those it could choose from.
        epochs: of the main training; 0 where there was none.
    """
    folder = report.folder
    records = report.records
    coreset = _coreset_of(folder.storage, settings, samples)
    costs = _costs(records)
    wrong = _wrong_labels(samples, coreset)
    taken = {phase: record["from"] for phase, record in records.items() if "from" in record}
    summary = {
        **_figures(records),
        **wrong,
        **({"taken_over": taken} if taken else {}),
        "samples": len(samples.train_indices),
        "coreset": None if coreset is None else len(coreset),
        "phases": costs,
        "seconds": sum(cost["seconds"] for cost in costs),
        "elapsed": sum(record["elapsed"] for record in records.values()),
        "full_training_backward": epochs * len(samples.train_indices),
        "findings": [
            *(line for record in records.values() for line in record.get("findings", ())),
            *_told_wrong(wrong),
            *_told_taken(taken),
        ],
    }
    folder.flush()
    draw_plots(folder.storage, folder.rows, costs)
    if coreset is not None:
        draw_coreset(folder.storage, samples, coreset)
    folder.finish(summary)
    return summary


def draw_plots(storage: Storage, rows: Sequence[dict[str, Any]], costs: Sequence[dict[str, Any]]) -> None:
    """Draw what every run has: its learning curves and its costs."""
    if rows:
        save_plot(storage, "curves", lambda path: plots.curves(rows, path))
    save_plot(storage, "costs", lambda path: plots.costs(costs, path))


def draw_coreset(storage: Storage, samples: Samples, coreset: Coreset) -> None:
    """Draw a coreset's classes and, where there are scores, which were picked, with the extreme images."""
    split = samples.data.train
    picked = torch.bincount(split.y[coreset.indices], minlength=split.num_classes).tolist()
    total = torch.bincount(split.y[samples.train_indices], minlength=split.num_classes).tolist()
    save_plot(storage, "composition", lambda path: plots.composition(picked, total, split.classes, path))
    table = read_coreset(f"{storage.root}/{FILE}")
    everyone = storage.read_table(SCORES)
    if everyone is None or "score" not in table.column_names:
        return
    all_scores = everyone["score"].to_numpy()
    scores = table["score"].to_numpy()
    save_plot(storage, "scores", lambda path: plots.scores(all_scores, scores, path))
    if split.kind is IMAGES:
        order = torch.tensor(scores).argsort()
        easiest = table.take(order[:SHOWN].numpy())
        hardest = table.take(order[-SHOWN:].flip(0).numpy())
        save_plot(storage, "images", lambda path: _draw_images(split, easiest, hardest, path))


def _draw_images(split: Split, easiest: pa.Table, hardest: pa.Table, path: Path) -> None:
    plots.images(_pixels(split, easiest), _pixels(split, hardest), _labels(easiest), _labels(hardest), path)


def _pixels(split: Split, rows: pa.Table) -> np.ndarray:
    x, _ = split.batch(rows["index"].to_numpy())
    return x.permute(0, 2, 3, 1).numpy()  # [m, H, W, C]


def _labels(rows: pa.Table) -> list[tuple[str, float]]:
    return [(sample["class"], sample["score"]) for sample in rows.to_pylist()]


def _coreset_of(storage: Storage, settings: RunSettings, samples: Samples) -> Coreset | None:
    """Return the run's coreset, or None where it trained on all samples."""
    if FILE not in storage.list():
        return None
    return load_coreset(f"{storage.root}/{FILE}", samples.data.train, samples.held_out, settings.dataset.name)


def _wrong_labels(samples: Samples, coreset: Coreset | None) -> dict[str, float]:
    """Return which share of the training samples, and of the coreset, has a wrong label, where that is known."""
    split = samples.data.train
    shares = {"wrong_labels": wrong_share(split, samples.train_indices)}
    if coreset is not None:
        shares["coreset_wrong_labels"] = wrong_share(split, coreset.indices)
    return {name: share for name, share in shares.items() if share is not None}


def _told_wrong(shares: Mapping[str, float]) -> Iterator[str]:
    """Yield how many wrong labels a selection picked, beside how many there are."""
    if "coreset_wrong_labels" in shares:
        yield (
            f"wrong labels: {shares['coreset_wrong_labels']:.1%} of the coreset,"
            f" {shares['wrong_labels']:.1%} of all samples"
        )


def _told_taken(taken: Mapping[str, str]) -> Iterator[str]:
    """Yield which phases were taken over from another run."""
    for run in dict.fromkeys(taken.values()):
        phases = " and ".join(phase for phase, donor in taken.items() if donor == run)
        yield f"{phases}: taken over from {run}, whose samples and seconds are counted here too"


def _costs(records: Records) -> list[dict[str, Any]]:
    """Return the bills of all phases in their order; a part of a phase is named after both."""
    costs = []
    for phase, record in records.items():
        for cost in record["costs"]:
            part = cost["phase"]
            name = phase if part == phase else f"{phase}: {part}"
            costs.append({**cost, "phase": name})
    return costs


def _figures(records: Records) -> dict[str, Any]:
    """Return what the phases found: the main one's figures by their names, others' with the phase before them."""
    figures: dict[str, Any] = {}
    for phase, record in records.items():
        prefix = "" if record.get("main") else f"{phase}_"
        for name in record.keys() - LEFT_OUT:
            figures[f"{prefix}{name}"] = record[name]
    return dict(sorted(figures.items()))
