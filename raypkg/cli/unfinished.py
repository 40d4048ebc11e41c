"""A run that is not done: how far it is, whether anybody is working on it, and the command that resumes it."""

from click import Group, get_current_context

from raypkg.core.config import load_stored
from raypkg.core.errors import UserError
from raypkg.experiments import experiment, settings_of
from raypkg.experiments.phases import stages_of
from raypkg.runs.catalog import resuming, state_of
from raypkg.runs.folder import RunFolder
from raypkg.runs.report import Stage
from raypkg.runs.show import show_unfinished, terminal
from raypkg.studies.study import study_around


def show_how_far(folder: RunFolder, root: str) -> None:
    """Print how far each phase of a run is, whether it is going, and how to resume it.

    Args:
        folder: of the run.
        root: of all runs, as the user gave it.
    """
    stages: list[Stage] = []
    storage = folder.storage
    try:
        stages = _stages(folder)
        if sweep := study_around(storage):
            storage = sweep.storage  # whoever runs the sweep holds its lock
        resume = resume_command(folder, root)
    except UserError as error:
        resume = f"nothing: {error}"
    show_unfinished(folder, stages, state_of(storage), resume, terminal())


def resume_command(folder: RunFolder, root: str) -> str:
    """Return the command that resumes a run, or the sweep of which it is a trial.

    Args:
        folder: of the run.
        root: of all runs, as the user gave it.

    Raises:
        UserError: there is a sweep that it may be of, whose record is damaged.
    """
    storage = folder.storage
    if sweep := study_around(storage):
        return resuming(sweep.command, sweep.storage, root)
    return resuming(_command(storage.parent.name), storage, root)


def _command(name: str) -> str:
    """Return the command of an experiment, which may be the first of a group."""
    context = get_current_context().find_root()
    group = context.command
    command = group.get_command(context, name) if isinstance(group, Group) else None
    return f"effray {name} train" if isinstance(command, Group) else f"effray {name}"


def _stages(folder: RunFolder) -> list[Stage]:
    """Return what the phases of a run are to do, without importing the code that its settings name.

    Raises:
        UserError: the settings are lost or damaged, or the folder is among those of no experiment.
    """
    name = folder.storage.parent.name
    values = folder.config
    if name not in experiment:
        raise UserError(f"there is no experiment {name!r}, whose run it would be by the folder that it is in")
    settings = load_stored(settings_of(experiment[name]), values)
    return stages_of(name, settings)
