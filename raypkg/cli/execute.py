"""Running an experiment: settings → run folder → phases → results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raypkg.core.config import load_stored
from raypkg.core.errors import Interruption, UserError
from raypkg.core.registry import Entry
from raypkg.core.settings import APART, Experiment, RunSettings
from raypkg.experiments import carry_out, open_run
from raypkg.experiments.embed import EmbedSettings
from raypkg.experiments.resolve import resolve, stored_settings
from raypkg.experiments.samples import Samples
from raypkg.runs.catalog import find
from raypkg.runs.folder import RunFolder, check_new, create, discard
from raypkg.runs.show import show_run, terminal

from .unfinished import resume_command


def execute(
    entry: Entry, schema: type[RunSettings], config: Path | None, values: Mapping[str, Any], name: str | None, root: str
) -> None:
    """Run an experiment in a new run folder; a mistake found before any result leaves no folder behind.

    Raises:
        UserError: bad settings, or what the experiment raises.
    """
    settings = resolve(schema, config, values)
    check_new(root, entry.name, name, settings)
    settings, samples = open_run(settings)
    folder = create(root, entry.name, name, settings)
    with folder.storage.locked(f"run {folder.name!r}"):  # nobody else's work is discarded
        try:
            _run(entry, settings, samples, folder, root)
        except BaseException:
            if not folder.started:
                discard(folder.storage)
            raise


def resume_run(
    entry: Entry, schema: type[RunSettings], name: str, values: Mapping[str, Any], root: str, refused: Mapping[str, Any]
) -> None:
    """Resume a stopped run; a finished one is only shown.

    Raises:
        UserError: no such run, or settings that would change its result.
    """
    changed = [option for option, value in refused.items() if value is not None]
    changed += [setting for setting in values if setting.partition(".")[0] not in APART]
    if changed:
        raise UserError(f"--resume {name} keeps the settings: {changed[0]} cannot change, only cluster.* and track.*")
    folder = find(root, entry.name, name)
    settings = load_stored(schema, stored_settings(folder), values)
    if folder.summary:
        folder.check_all()
        show_run(folder, terminal())
        return
    with folder.storage.locked(f"run {name!r}"):
        latest = RunFolder(folder.storage)  # as whoever had the lock left it
        settings, samples = open_run(settings)
        _run(entry, settings, samples, latest, root)


def subject(settings: RunSettings) -> str:
    """Return what a run is about: the model that it trains or takes features of, or the rule that selects."""
    if isinstance(settings, EmbedSettings):
        return settings.model.name or f"the model of {settings.model_from}"
    return settings.model.name if isinstance(settings, Experiment) else getattr(settings, "rule", "")


def _run(entry: Entry, settings: RunSettings, samples: Samples, folder: RunFolder, root: str) -> None:
    console = terminal()
    console.print(f"{entry.name} {folder.name}: {subject(settings)} on {settings.dataset.name}")
    try:
        line = carry_out(entry, settings, samples, folder, console)
    except (KeyboardInterrupt, SystemExit):
        raise Interruption(f"interrupted{_hint(folder, root)}") from None
    except Interruption as error:
        raise type(error)(f"{error}{_hint(folder, root)}") from error
    show_run(folder, console)
    if line:
        console.print(line, soft_wrap=True)


def _hint(folder: RunFolder, root: str) -> str:
    """Return how to resume a run that has any result yet."""
    if not folder.started:
        return ""
    return f"; resume with: {resume_command(folder, root)}"
