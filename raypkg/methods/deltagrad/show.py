"""DeltaGrad's verdict and log as tables on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table


def verdict(found: Any) -> Table:
    """Return how near a model is to the retrained one, as a table."""
    table = Table(title="against training again", title_justify="left", box=SIMPLE, show_header=False, show_edge=False)
    for name, value in (
        (
            "distance of the weights",
            f"{found.distance:.3e} (of norm {found.norm:.4g}: {found.distance / found.norm:.1e})",
        ),
        ("test samples predicted differently", f"{found.disagreement:.2%}"),
        ("test accuracy", f"{found.accuracy:.2%}, retrained {found.retrained_accuracy:.2%}"),
        ("cost of retraining", f"{found.samples:,} gradients, {found.seconds:.2f} s"),
    ):
        table.add_row(name, value)
    return table


def ledger(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Return the log of a run as a table."""
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    for name in ("", "when", "what", "requests", "samples", "exact", "seconds", "model"):
        table.add_column(name, overflow="fold")
    for entry in entries:
        done = [f"{entry[what]:,} {what}" for what in ("deleted", "restored", "new") if entry.get(what)]
        table.add_row(
            str(entry["number"]),
            entry["time"][:16].replace("T", " "),
            ", ".join(done) or "trained",
            _few([asked["id"] or "–" for asked in entry.get("requests", ())]),
            f"{entry['samples']:,}",
            f"{entry['exact']}/{entry['steps']}" if "exact" in entry else "",
            f"{entry['seconds']:.2f}" if "seconds" in entry else "",
            entry["model"][:10],
        )
    return table


def _few(requests: Sequence[str]) -> str:
    return ", ".join(requests[:3]) + (f" and {len(requests) - 3} more" if len(requests) > 3 else "")
