"""DeltaGrad's verdict and log as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Table

if TYPE_CHECKING:
    from .ledger import Entry
    from .verify import Verdict

COLUMNS = ("", "when", "what", "requests", "samples", "exact", "seconds", "model")
SHOWN = 3  # requests of an entry


def verdict_table(verdict: Verdict) -> Table:
    """Return how near a model is to the retrained one, as a table."""
    table = Table(title="against training again", title_justify="left", box=SIMPLE, show_header=False, show_edge=False)
    relative = verdict.distance / verdict.norm
    distance = f"{verdict.distance:.3e} (of norm {verdict.norm:.4g}: {relative:.1e})"
    accuracy = f"{verdict.accuracy:.2%}, retrained {verdict.retrained_accuracy:.2%}"
    cost = f"{verdict.samples:,} gradients, {verdict.seconds:.2f} s"
    table.add_row("distance of the weights", distance)
    table.add_row("test samples predicted differently", f"{verdict.disagreement:.2%}")
    table.add_row("test accuracy", accuracy)
    table.add_row("cost of retraining", cost)
    return table


def log_table(entries: Sequence[Entry]) -> Table:
    """Return the log of a run as a table."""
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, overflow="fold")
    for entry in entries:
        is_replay = "exact" in entry
        table.add_row(
            str(entry["number"]),
            entry["time"][:16].replace("T", " "),
            _what(entry),
            _requests(entry),
            f"{entry['samples']:,}",
            f"{entry['exact']}/{entry['steps']}" if is_replay else "",
            f"{entry['seconds']:.2f}" if is_replay else "",
            entry["model"][:10],
        )
    return table


def _what(entry: Entry) -> str:
    counts = []
    for kind in ("deleted", "restored", "new"):
        if count := entry.get(kind):
            counts.append(f"{count:,} {kind}")
    return ", ".join(counts) or "trained"


def _requests(entry: Entry) -> str:
    """Name the first few requests of an entry; those of the command line have no id."""
    names = [request["id"] or "–" for request in entry.get("requests", ())]
    shown = ", ".join(names[:SHOWN])
    further = len(names) - SHOWN
    return f"{shown} and {further} more" if further > 0 else shown
