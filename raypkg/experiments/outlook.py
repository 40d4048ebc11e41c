"""What a run is going to do, phase by phase, as its settings alone tell: before it begins, or after it was stopped.

An experiment that does more than one training says so in its room: ``@outlook(name)`` on ``stages(settings)`` in
``experiment.py``. Nothing here imports torch before a size is asked for.
"""

from collections.abc import Callable
from functools import partial

from raypkg.core.registry import Registry
from raypkg.core.settings import Experiment, RunSettings, Select
from raypkg.runs.report import Stage

CORESET = "coreset.parquet"
EMBEDDED = ("train.parquet", "test.parquet")
outlook = Registry("outlook", "raypkg.methods.*.experiment", "raypkg.methods.*.show")


def stages_of(experiment: str, settings: RunSettings) -> list[Stage]:
    """Return what the phases of a run are to do, in their order.

    Args:
        experiment: its name.
        settings: of the run.
    """
    if experiment in outlook:
        return outlook[experiment](settings)
    if isinstance(settings, Experiment):
        return [main_stage(settings)]
    return [selection_stage()]


@outlook("embed")
def embedding_stages(settings: RunSettings) -> list[Stage]:
    """Return the one phase of an embedding, whose rows of metrics are parts: how many is up to the data."""
    return [Stage("embed", files=EMBEDDED)]


def selection_stage() -> Stage:
    """Return a selection by a model that is trained already."""
    return Stage("select", files=(CORESET,))


def main_stage(settings: Experiment, share: float | None = None) -> Stage:
    """Return the main training: on a coreset where settings give or select one, otherwise on all samples.

    Args:
        settings: of the run.
        share: of the samples in use, where it is not that of ``select``.
    """
    select = getattr(settings, "select", None)
    given = getattr(settings, "coreset", None)
    size: Callable[[int], int] = int
    selects = select is not None or given is not None or share is not None
    if given is not None and not getattr(select, "every_epochs", 0):
        size = partial(_size_given, given)
    elif share is not None:
        size = partial(_size_selected, share)
    elif isinstance(select, Select):
        size = partial(_size_selected, select.fraction)
    return Stage(
        "train",
        settings.epochs,
        batch_size=settings.train.batch_size,  # type: ignore[attr-defined]  # declared where the experiment is
        size=size,
        whole=min(settings.epochs, getattr(select, "warm_epochs", 0)),
        files=("model.safetensors", "model_record.parquet", *[CORESET] * selects),
    )


def in_whole_batches(stage: Stage) -> Stage:
    """Return a training whose batches are chosen one by one, each as large as a batch can be."""
    batch = stage.batch_size
    return stage._replace(size=lambda n: -(-n // batch) * batch)


def _size_selected(share: float, n: int) -> int:
    from raypkg.coresets.budgets import budget_of

    return budget_of(share, n)


def _size_given(path: str, n: int) -> int:
    from .coreset_files import read_coreset

    return len(read_coreset(path))
