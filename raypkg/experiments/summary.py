"""The end of a run: its figures as a manifest, its plots as pictures."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raypkg.core.settings import RunSettings
from raypkg.data.coreset import Coreset
from raypkg.data.kinds import IMAGES
from raypkg.data.opening import wrong_share
from raypkg.runs import plots
from raypkg.runs.folder import CORESET, SCORES
from raypkg.runs.plots import save_plot
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .coreset_files import load_coreset, read_coreset
from .samples import Samples

LEFT_OUT = {"costs", "elapsed", "files", "findings", "from", "main", "number"}  # of a phase's record
SHOWN = 16  # images in each of the two galleries


def finish(report: Report, settings: RunSettings, samples: Samples, *, epochs: int = 0) -> None:
    """Draw the plots, write the manifest, and delete what only an unfinished run needs."""
    folder = report.folder
    records = report.records
    split = samples.data.train
    n = len(samples.train_indices)
    coreset = None
    if CORESET in folder.storage.list():
        coreset = load_coreset(f"{folder.storage.root}/{CORESET}", samples, settings.dataset)

    costs = []
    figures: dict[str, Any] = {}  # the main phase's by name, the others' prefixed by the phase
    for phase, record in records.items():
        prefix = "" if record.get("main") else f"{phase}_"
        figures |= {f"{prefix}{name}": record[name] for name in record.keys() - LEFT_OUT}
        for cost in record["costs"]:
            part = cost["phase"]
            costs.append({**cost, "phase": phase if part == phase else f"{phase}: {part}"})

    findings = [line for record in records.values() for line in record.get("findings", ())]
    wrong: dict[str, float | None] = {}
    if (share := wrong_share(split, samples.train_indices)) is not None:  # None = true labels are unknown
        wrong["wrong_labels"] = share
        if coreset is not None:
            wrong["coreset_wrong_labels"] = of_coreset = wrong_share(split, coreset.indices)
            findings.append(f"wrong labels: {of_coreset:.1%} of the coreset, {share:.1%} of all samples")
    taken = {phase: record["from"] for phase, record in records.items() if "from" in record}
    for run in dict.fromkeys(taken.values()):
        phases = " and ".join(phase for phase, donor in taken.items() if donor == run)
        findings.append(f"{phases}: taken over from {run}, whose samples and seconds are counted here too")

    summary = {
        **dict(sorted(figures.items())),
        **wrong,
        **({"taken_over": taken} if taken else {}),
        "samples": n,
        "coreset": None if coreset is None else len(coreset),
        "phases": costs,
        "seconds": sum(cost["seconds"] for cost in costs),
        "elapsed": sum(record["elapsed"] for record in records.values()),
        "full_training_backward": epochs * n,
        "findings": findings,
    }
    folder.flush()
    rows = folder.rows
    if any(plots.has_curve(rows, key) for key in ("loss", "accuracy", "perplexity")):
        save_plot(folder.storage, "curves", lambda path: plots.curves(rows, path))
    if coreset is not None:
        draw_coreset(folder.storage, samples, coreset)
    folder.finish(summary)


def draw_coreset(storage: Storage, samples: Samples, coreset: Coreset) -> None:
    """Draw a coreset's classes and, if its samples have scores, their distribution and the extreme images."""
    split = samples.data.train
    picked = torch.bincount(split.y[coreset.indices], minlength=split.num_classes).tolist()
    total = torch.bincount(split.y[samples.train_indices], minlength=split.num_classes).tolist()
    save_plot(storage, "composition", lambda path: plots.composition(picked, total, split.classes, path))
    table = read_coreset(f"{storage.root}/{CORESET}")
    everyone = storage.read_table(SCORES)
    if everyone is None or "score" not in table.column_names:
        return
    all_scores = everyone["score"].to_numpy()
    scores = table["score"].to_numpy()
    save_plot(storage, "scores", lambda path: plots.scores(all_scores, scores, path))
    if split.kind is not IMAGES:
        return

    def group(name: str, rows: pa.Table) -> tuple[str, np.ndarray, list[tuple[str, float]]]:
        x, _ = split.batch(rows["index"].to_numpy())
        labels = [(sample["class"], sample["score"]) for sample in rows.to_pylist()]
        return f"{name} {len(rows)} of the coreset", x.permute(0, 2, 3, 1).numpy(), labels  # [m, H, W, C]

    order = torch.tensor(scores).argsort()
    easiest = group("Easiest", table.take(order[:SHOWN].numpy()))
    hardest = group("Hardest", table.take(order[-SHOWN:].flip(0).numpy()))
    save_plot(storage, "images", lambda path: plots.gallery([easiest, hardest], path))
