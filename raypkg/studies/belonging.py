"""Which sweep a run belongs to, and what is deleted with either."""

import re
from collections.abc import Sequence

from raypkg.core.errors import UserError
from raypkg.runs.storage import Storage

from .sweep_folder import FOLDER, SweepFolder, is_sweep

TRIAL = re.compile(r"(.+)-(\d{3,})")  # the name of a trial: its sweep's, and a number


def sweep_around(run: Storage) -> SweepFolder | None:
    """Return the sweep of which a run is a trial, if it is one.

    Raises:
        UserError: there is a sweep of the name, whose record is damaged.
    """
    match = TRIAL.fullmatch(run.name)
    if match is None:
        return None
    experiment = run.parent
    storage = experiment.parent / FOLDER / match[1]
    if not is_sweep(storage):
        return None
    sweep = SweepFolder(storage)
    is_its_own = sweep.experiment == experiment.name and int(match[2]) < len(sweep.trials)
    return sweep if is_its_own else None


def with_sweeps(chosen: Sequence[Storage], trials: bool) -> tuple[list[Storage], list[Storage]]:
    """Return the folders to delete, and those that nobody may be working on meanwhile, each once.

    Args:
        chosen: runs and sweeps.
        trials: whether the trials of sweeps may be deleted, and are with their sweeps.

    Raises:
        UserError: a trial is chosen, and trials may not be deleted.
    """
    folders: list[Storage] = []
    sweeps: list[Storage] = []
    for storage in chosen:
        folders.append(storage)
        if is_sweep(storage):
            folders += _trials_of(storage) if trials else []
        elif sweep := sweep_around(storage):
            if not trials:
                raise UserError(
                    f"{storage.name} is a trial of sweep {sweep.name!r}, which would run it again: --trials deletes it"
                    f" all the same, and `effray rm {sweep.name} --trials` the whole sweep"
                )
            sweeps.append(sweep.storage)
    return _once(folders), _once([*folders, *sweeps])


def _trials_of(storage: Storage) -> list[Storage]:
    """Return the folders of a sweep's trials; none where its record, which tells of them, is damaged."""
    try:
        sweep = SweepFolder(storage)
    except UserError:
        return []
    runs = storage.parent.parent / sweep.experiment
    there = set(runs.list())
    names = [sweep.run_name(number) for number in range(len(sweep.trials))]
    return [runs / name for name in names if name in there]


def _once(folders: Sequence[Storage]) -> list[Storage]:
    """Return folders without repetitions, in their order."""
    return list({storage.root: storage for storage in folders}.values())
