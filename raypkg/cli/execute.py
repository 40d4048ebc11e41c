"""Running an experiment: settings → run folder → phases → what came of it."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from click import get_current_context
from rich.console import Console

from raypkg.core.config import Settings, load
from raypkg.core.errors import UserError
from raypkg.core.registry import Entry
from raypkg.core.settings import Experiment, Select
from raypkg.runs.folder import RunFolder, create, find
from raypkg.runs.report import Report
from raypkg.runs.show import show, terminal
from raypkg.runs.tracking import Listened, tracker

CHANGEABLE = ("cluster.", "track.")  # settings that do not alter the result


def execute(
    entry: Entry, schema: type[Settings], config: Path | None, values: Mapping[str, Any], name: str | None, root: str
) -> None:
    """Run an experiment in a new run folder; a mistake found before any result leaves no folder behind.

    Raises:
        UserError: bad settings, or what the experiment raises.
    """
    settings = with_absolute_path(load(schema, config, values))
    check_names(settings)
    folder = create(root, entry.name, name, settings)
    try:
        _run(entry, settings, folder)
    except BaseException:
        if not folder.started:
            folder.storage.delete_folder("")
        raise


def resume_run(
    entry: Entry, schema: type[Settings], name: str, values: Mapping[str, Any], root: str, refused: Mapping[str, Any]
) -> None:
    """Go on with a stopped run; a finished one is only shown.

    Raises:
        UserError: no such run, or settings that would change its result.
    """
    for setting in [*(option for option, value in refused.items() if value), *values]:
        if not setting.startswith(CHANGEABLE):
            raise UserError(f"--resume {name} keeps the settings: {setting} cannot change, only cluster.* and track.*")
    folder = find(root, entry.name, name)
    settings = load(schema, folder.config, values)
    if folder.summary:
        show(folder, terminal())
    else:
        _run(entry, settings, folder)


def with_absolute_path(settings: Any) -> Any:
    """Make the paths in ``parquet:PATH`` and ``dataset.only`` absolute: workers and repeated runs are in other folders.

    URIs stay as they are.
    """
    from raypkg.data import dataset

    changes, data = {}, settings.dataset
    source, _, path = data.name.partition(":")
    if path and source in dataset.entries:
        changes["name"] = f"{source}:{Path(path).expanduser().absolute()}"
    if data.only is not None and "://" not in data.only:
        changes["only"] = str(Path(data.only).expanduser().absolute())
    return settings.model_copy(update={"dataset": data.model_copy(update=changes)}) if changes else settings


def check_names(settings: Any) -> None:
    """Refuse unknown data sets, models, methods and augmentations, and wrong options, before anything is made."""
    from raypkg.data import dataset
    from raypkg.data.augment import compose
    from raypkg.methods.coresets import coreset
    from raypkg.models import model

    dataset[settings.dataset.name].options(settings.dataset.options)
    compose(settings.dataset.augment or ())
    if isinstance(settings, Experiment):
        model[settings.model.name].options(settings.model.options)
    select = settings if isinstance(settings, Select) else getattr(settings, "select", None)
    if isinstance(select, Select):
        coreset[select.method].options(select.options)


def subject(settings: Any) -> str:
    """Return what a run is about: the model that it trains, or the method that selects."""
    return settings.model.name if isinstance(settings, Experiment) else settings.method


def carry_out(
    entry: Entry,
    settings: Any,
    folder: RunFolder,
    console: Console,
    *,
    group: str = "",
    listen: Callable[[Mapping[str, Any]], None] | None = None,
) -> str:
    """Run an experiment in its folder, or go on with it there; return what its tracker has to say at the end.

    Args:
        entry: the experiment.
        settings: of the run.
        folder: of the run.
        console: where progress is shown.
        group: of runs that the tracker keeps together; the experiment's name when left out.
        listen: hears every row of metrics as well, and may end the run there by ``SystemExit``.
    """
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray")
    following = tracker(settings, folder, group or entry.name)
    if listen:
        following = Listened(following, listen)
    with Report(folder, following, console) as report:
        entry(settings, report=report)
    return following.finish(folder.summary or {})


def _run(entry: Entry, settings: Any, folder: RunFolder) -> None:
    console = terminal()
    console.print(f"{entry.name} {folder.name}: {subject(settings)} on {settings.dataset.name}")
    try:
        line = carry_out(entry, settings, folder, console)
    except (KeyboardInterrupt, SystemExit):
        hint = f"; go on with: {get_current_context().command_path} --resume {folder.name}" if folder.started else ""
        raise UserError(f"interrupted{hint}") from None
    show(folder, console)
    if line:
        console.print(line, soft_wrap=True)
