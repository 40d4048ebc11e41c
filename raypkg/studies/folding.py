"""Sweeps in lines of the list of runs: each takes the place of its trials."""

from collections.abc import Mapping, Sequence

from raypkg.core.errors import UserError
from raypkg.runs.activity import DONE, state_of, written
from raypkg.runs.listing import Listed, named
from raypkg.runs.storage import Storage

from .show import trials_left
from .standing import ranked
from .sweep_folder import FOLDER, RECORD, SweepFolder, is_sweep


def folded(root: str, lines: Sequence[Listed]) -> list[Listed]:
    """Return the lines of runs that are no trials, and a line for each sweep.

    Args:
        root: of all runs.
        lines: of all runs.
    """
    runs = {(line.experiment, line.name): line for line in lines}
    sweeps = Storage(root) / FOLDER
    folds = []
    for name in sweeps.list():
        if not is_sweep(sweeps / name):
            continue
        time = max(written(root, FOLDER, name).values(), default=0.0)
        try:
            sweep = SweepFolder(sweeps / name)
            places = [(sweep.experiment, sweep.run_name(number)) for number in range(len(sweep.trials))]
            trials = {place[1]: runs.pop(place) for place in places if place in runs}
            folds.append(_line(sweep, trials, time))
        except UserError:
            folds.append(Listed(FOLDER, name, f"bad {RECORD}", "–", "–", FOLDER, None, None, None, time))
    return [*runs.values(), *folds]


def _line(sweep: SweepFolder, trials: Mapping[str, Listed], time: float) -> Listed:
    """Return the line of a sweep: the accuracy of its best trial, and the cost of all that are done."""
    config = sweep.config
    done = [trial for trial in trials.values() if trial.state == DONE]
    best = _best(sweep)
    title = f"{sweep.name}: {len(done)} of {max(len(sweep.trials), sweep.order['samples'])} trials done"
    return Listed(
        sweep.experiment,
        f"{title}, best {best}" if best else title,
        state_of(sweep.storage) if trials_left(sweep) else DONE,
        named(config, "dataset"),
        named(config, "model"),
        f"{FOLDER} {sweep.experiment}",
        trials[best].accuracy if best in trials else None,
        sum(trial.backward or 0 for trial in done) if done else None,
        sum(trial.seconds or 0 for trial in done) if done else None,
        max([time, *(trial.time for trial in trials.values())]),
    )


def _best(sweep: SweepFolder) -> str:
    """Return the name of the best trial, as the sweep found when it last ended."""
    table = sweep.storage.read_table("results.parquet")
    rows = [] if table is None else table.to_pylist()
    done = [row for row in rows if row.get("state") == DONE]
    whole = [row for row in done if row.get(sweep.metric) is not None]
    best = next(iter(ranked(whole, sweep.metric, sweep.mode)), None)
    return str(best.get("run")) if best else ""
