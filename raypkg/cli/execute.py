"""Running, resuming and showing experiments: settings → run folder → phases → results."""

from collections.abc import Mapping
from typing import Any

from click import Group, get_current_context

from raypkg.core.config import load_stored
from raypkg.core.errors import Interruption, UserError, shown
from raypkg.core.presets import departures
from raypkg.core.registry import Entry
from raypkg.core.settings import APART, RunSettings
from raypkg.experiments import carry_out, experiment, open_run, settings_of
from raypkg.experiments.phases import stages_of, with_workers
from raypkg.experiments.resolve import resolve, stored_settings
from raypkg.experiments.samples import Samples
from raypkg.runs.folder import RunFolder, check_new, create, discard
from raypkg.runs.report import Stage
from raypkg.runs.show import show_run, show_unfinished, terminal


def execute(entry: Entry, base: Mapping[str, Any], values: Mapping[str, Any], name: str | None, root: str) -> None:
    """Run an experiment in a new run folder; a mistake found before any result leaves no folder behind."""
    settings = resolve(settings_of(entry), base, values)
    check_new(root, entry.name, name, settings)
    settings, samples = open_run(settings)
    settings, note = with_workers(settings, samples, stages_of(entry.name, settings))
    folder = create(root, entry.name, name, settings)
    with folder.storage.locked(f"run {folder.name!r}"):  # only this process may discard it
        try:
            _run(entry, settings, samples, folder, root, note)
        except BaseException:
            if not folder.started:
                discard(folder.storage)
            raise


def resume_run(entry: Entry, name: str, values: Mapping[str, Any], root: str, refused: Mapping[str, Any]) -> None:
    """Resume an interrupted run, or show a finished one; refuse settings that would change the result."""
    from raypkg.runs.catalog import find

    changed = [option for option, value in refused.items() if value is not None]
    changed += [setting for setting in values if setting.partition(".")[0] not in APART]
    if changed:
        raise UserError(f"--resume {name} keeps the settings: {changed[0]} cannot change, only cluster.* and track.*")
    folder = find(root, entry.name, name)
    settings = load_stored(settings_of(entry), stored_settings(folder), values)
    if folder.summary:
        folder.check_all()
        show_run(folder, terminal())
        return
    with folder.storage.locked(f"run {name!r}"):
        latest = RunFolder(folder.storage)  # another process may have held the lock until now
        settings, samples = open_run(settings)
        _run(entry, settings, samples, latest, root)


def _run(entry: Entry, settings: RunSettings, samples: Samples, folder: RunFolder, root: str, note: str = "") -> None:
    console = terminal()
    model = getattr(settings, "model", None)
    subject = model.name if model else getattr(settings, "rule", "")
    subject = subject or f"the model of {getattr(settings, 'model_from', '')}"
    preset = getattr(settings, "preset", None) or ""
    try:
        console.print(
            f"{entry.name} {folder.name}: {subject} on {settings.dataset.name}{preset and f', preset {preset}'}"
        )
        if note:
            console.print(note, soft_wrap=True)
        changed = ", ".join(f"{name} = {shown(value)}" for name, value in departures(settings).items())
        for what, text in (("changed", changed), ("adapted", "; ".join(getattr(settings, "adapted", ())))):
            if text:
                console.print(f"{what}: {text}", soft_wrap=True)
        line = carry_out(entry, settings, samples, folder, console)
    except (KeyboardInterrupt, SystemExit, Interruption) as error:
        kind, reason = (type(error), str(error)) if isinstance(error, Interruption) else (Interruption, "interrupted")
        hint = f"; resume with: {resume_command(folder, root)}" if folder.started else ""
        raise kind(f"{reason}{hint}") from error
    show_run(folder, console)
    if line:
        console.print(line, soft_wrap=True)


def resume_command(folder: RunFolder, root: str) -> str:
    """Return the command that resumes a run, or its study if it is a trial."""
    from raypkg.runs.catalog import resuming
    from raypkg.studies.study import study_around

    storage = folder.storage
    if study := study_around(storage):
        return resuming(study.command, study.storage, root)
    name = storage.parent.name
    context = get_current_context().find_root()
    group = context.command
    command = group.get_command(context, name) if isinstance(group, Group) else None
    train = " train" if isinstance(command, Group) else ""  # the experiment is the first command of a group
    return resuming(f"effray {name}{train}", storage, root)


def show_how_far(folder: RunFolder, root: str) -> None:
    """Print the progress of an unfinished run's phases, whether a process is working on it, and how to resume it.

    The code that its settings name is not imported.
    """
    from raypkg.runs.catalog import state_of
    from raypkg.studies.study import study_around

    stages: list[Stage] = []
    storage = folder.storage
    name = storage.parent.name
    try:
        values = folder.config
        if name not in experiment:
            raise UserError(f"there is no experiment {name!r}, whose run it would be by the folder that it is in")
        stages = stages_of(name, load_stored(settings_of(experiment[name]), values))
        if study := study_around(storage):
            storage = study.storage  # the process that runs the study holds its lock
        resume = resume_command(folder, root)
    except UserError as error:
        resume = f"nothing: {error}"
    show_unfinished(folder, stages, state_of(storage), resume, terminal())
