"""What a sparse run is going to do, and what an export saves, as a table on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Table

from raypkg.experiments.outlook import in_whole_batches, main_stage, outlook
from raypkg.runs.stages import Stage

from .settings import SparseSettings

if TYPE_CHECKING:
    from .export import Exported


@outlook("sparse")
def sparse_stages(settings: SparseSettings) -> list[Stage]:
    """Return the extended training, on mini-batch coresets where CREST chooses the batches."""
    stage = main_stage(settings)
    return [in_whole_batches(stage) if settings.crest else stage]


def savings(exported: Exported) -> Table:
    """Return what a model takes without the weights that do not exist, as a table."""
    density = exported.active / exported.weights
    size = exported.bytes / exported.dense_bytes
    time = exported.seconds / exported.dense_seconds
    table = Table("", "dense", "csr", "", box=SIMPLE, show_edge=False, pad_edge=False)
    table.add_row("weights", f"{exported.weights:,}", f"{exported.active:,}", f"{density:.2%}")
    table.add_row("bytes", f"{exported.dense_bytes:,}", f"{exported.bytes:,}", f"{size:.2f} ×")
    table.add_row(
        f"ms for {exported.batch} samples, one thread",
        f"{1e3 * exported.dense_seconds:.3f}",
        f"{1e3 * exported.seconds:.3f}",
        f"{time:.2f} ×",
    )
    table.add_row("largest difference of logits", "", f"{exported.difference:.1e}", "")
    return table
