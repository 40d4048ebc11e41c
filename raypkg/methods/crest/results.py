"""What CREST leaves of a finished training: tables, pictures, findings, and the samples that were trained on."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
from torch import Tensor

from raypkg.coresets.recorder import Recorder
from raypkg.data.coreset import Coreset
from raypkg.engine.run import Results, Run, Selected

from . import plots
from .settings import CrestOptions
from .state import CrestState
from .variance import warning_of


def results_of(state: CrestState, options: CrestOptions, indices: Tensor, run: Run) -> Results:
    """Return the checks, choices and looks, their pictures, and the samples that were trained on as a coreset.

    Args:
        state: at the end of training.
        options: of CREST.
        indices: the training samples, int64 [n].
        run: the training.
    """
    (picked,) = [rows.numpy() for rows in state.picked]  # [2, ·], joined at the end of the last epoch
    steps = state.counts[indices].numpy()
    recorder = next(hook for hook in run.hooks if isinstance(hook, Recorder))
    forgotten = recorder.record.forgotten
    assert forgotten is not None  # a recorder counts it
    difficulty = plots.difficulty_of_picks(picked, forgotten.numpy())
    each_step = options.tau == 0
    found = f"CREST chose {state.updates} pools of mini-batch coresets: see plots/regions.png"
    if each_step:
        found = f"CREST chose a mini-batch coreset for each of {state.updates} steps: see plots/minibatches.png"
    tables = {
        "crest": pa.Table.from_pylist(state.history),
        "minibatches": pa.table({"update": picked[0], "index": picked[1]}),
        "steps": pa.table({"index": indices.numpy(), "steps": steps}),
    }
    pictures: dict[str, Callable[[Path], None]] = {
        "minibatches": partial(plots.minibatches, difficulty, steps),
    }
    if each_step and state.history:  # none in fewer than T2 steps
        pictures["choices"] = partial(plots.choices, state.history)
    elif not each_step:
        pictures["regions"] = partial(plots.regions, state.history, options.tau)
    if state.looks:
        tables["looks"] = pa.Table.from_pylist(state.looks)
    return Results(
        facts={"pools": state.updates},
        findings=[found, *state.said, *warning_of(run.model)],
        tables=tables,
        plots=pictures,
        selected=_selected(state, options, indices),
    )


def _selected(state: CrestState, options: CrestOptions, indices: Tensor) -> Selected:
    """Return the samples that were trained on, weighted by how often."""
    used = state.counts.nonzero()[:, 0]
    times = state.counts[used]
    coreset = Coreset(used, times / times.float().mean())
    origin = {"method": "crest", **options.model_dump()}
    return Selected(coreset, origin, indices)
