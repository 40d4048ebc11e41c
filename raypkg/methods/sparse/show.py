"""What an export saves, as a table on the terminal."""

from typing import Any

from rich.box import SIMPLE
from rich.table import Table


def savings(found: Any) -> Table:
    """Return what a model takes without the weights that do not exist, as a table."""
    table = Table("", "dense", "csr", "", box=SIMPLE, show_edge=False, pad_edge=False)
    table.add_row("weights", f"{found.weights:,}", f"{found.active:,}", f"{found.active / found.weights:.2%}")
    table.add_row("bytes", f"{found.dense_bytes:,}", f"{found.bytes:,}", f"{found.bytes / found.dense_bytes:.2f} ×")
    table.add_row(
        f"ms for {found.batch} samples, one thread",
        f"{1e3 * found.dense_seconds:.3f}",
        f"{1e3 * found.seconds:.3f}",
        f"{found.seconds / found.dense_seconds:.2f} ×",
    )
    table.add_row("largest difference of logits", "", f"{found.difference:.1e}", "")
    return table
