"""The end of a run: its figures as a manifest, its plots as pictures."""

from pathlib import Path
from typing import Any

import torch

from raypkg.core.settings import RunSettings
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.runs import plots
from raypkg.runs.folder import RunFolder
from raypkg.runs.plots import save_plot

from .coreset_files import FILE, SCORES, load_coreset, read_coreset
from .samples import Samples

PHASES = ("pretrain", "select", "train")
SHOWN = 16  # images in each of the two galleries


def finish(folder: RunFolder, experiment: RunSettings, found: Samples, *, epochs: int = 0) -> dict[str, Any]:
    """Draw the plots, write the manifest, drop what only an unfinished run needs; return the manifest.

    Args:
        folder: of the run, all its phases done and its last coreset saved.
        experiment: the run's data set and seed.
        found: the samples it could choose from.
        epochs: of the main training; 0 where there was none.
    """
    coreset = load_coreset(f"{folder.storage.root}/{FILE}", found.data.train, found.valid, experiment.dataset.name)
    records = {name: record for name in PHASES if (record := folder.phase(name))}
    costs = [{**cost, "phase": _row(name, cost)} for name, record in records.items() for cost in record["costs"]]
    summary = {
        **{name: value for name, value in records.get("train", {}).items() if name not in ("costs", "elapsed")},
        "samples": len(found.kept),
        "coreset": len(coreset),
        "phases": costs,
        "seconds": sum(cost["seconds"] for cost in costs),
        "elapsed": sum(record["elapsed"] for record in records.values()),
        "full_training_backward": epochs * len(found.kept),
        **{f"pretrain_{name}": value for name, value in records.get("pretrain", {}).items() if name != "costs"},
    }
    folder.flush()
    draw_plots(folder, found, coreset, costs)
    folder.finish(summary)
    for leftover in ("checkpoints", "ray"):
        folder.storage.delete_folder(leftover)
    return summary


def draw_plots(folder: RunFolder, found: Samples, coreset: Coreset, costs: list[dict[str, Any]]) -> None:
    """Draw every plot of the run into its folder."""
    split = found.data.train
    counts, total = (torch.bincount(split.y[i], minlength=split.num_classes) for i in (coreset.indices, found.kept))
    if folder.rows:
        save_plot(folder.storage, "curves", lambda path: plots.curves(folder.rows, path))
    save_plot(folder.storage, "costs", lambda path: plots.costs(costs, path))
    save_plot(
        folder.storage,
        "composition",
        lambda path: plots.composition(counts.tolist(), total.tolist(), split.classes, path),
    )
    table, everyone = read_coreset(f"{folder.storage.root}/{FILE}"), folder.storage.read_table(SCORES)
    if everyone is None or "score" not in table.column_names:
        return
    save_plot(
        folder.storage,
        "scores",
        lambda path: plots.scores(everyone["score"].to_numpy(), table["score"].to_numpy(), path),
    )
    if len(split.shape) == 3:
        order = torch.tensor(table["score"].to_numpy()).argsort()
        rows = [table.take(part.numpy()) for part in (order[:SHOWN], order[-SHOWN:].flip(0))]
        save_plot(folder.storage, "images", lambda path: _draw_images(split, rows, path))


def _draw_images(split: Split, rows: list[Any], path: Path) -> None:
    easiest, hardest = (split.batch(row["index"].to_numpy())[0].permute(0, 2, 3, 1).numpy() for row in rows)
    easy, hard = ([(sample["class"], sample["score"]) for sample in row.to_pylist()] for row in rows)
    plots.images(easiest, hardest, easy, hard, path)


def _row(phase: str, cost: dict[str, Any]) -> str:
    return phase if cost["phase"] == phase else f"{phase}: {cost['phase']}"
