"""Experiments, one file each: settings and the story of the run; what all of them need is here. No torch at import."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raypkg.core.registry import Entry, Registry
from raypkg.core.settings import Experiment, Select

if TYPE_CHECKING:  # they import pyarrow, which `--help` need not wait for
    from rich.console import Console

    from raypkg.runs.folder import RunFolder

experiment = Registry("experiment", "raypkg.experiments", "raypkg.methods.*.experiment", given=("report",))


def settings_of(entry: Entry) -> type[Experiment]:
    """Return the settings class of an experiment: the type of its function's ``settings``."""
    return typing.get_type_hints(entry.function)["settings"]


def with_absolute_path(settings: Any) -> Any:
    """Make the paths in ``parquet:PATH`` and ``dataset.only`` absolute: workers and repeated runs are in other folders.

    URIs stay as they are.
    """
    from raypkg.data.sources import dataset

    changes, data = {}, settings.dataset
    source, _, path = data.name.partition(":")
    if path and source in dataset.entries:
        changes["name"] = f"{source}:{Path(path).expanduser().absolute()}"
    if data.only is not None and "://" not in data.only:
        changes["only"] = str(Path(data.only).expanduser().absolute())
    return settings.model_copy(update={"dataset": data.model_copy(update=changes)}) if changes else settings


def check_names(settings: Any) -> None:
    """Refuse unknown data sets, models, methods and augmentations, and wrong options, before anything is made."""
    from raypkg.coresets.rules import coreset
    from raypkg.data.augment import compose
    from raypkg.data.sources import dataset
    from raypkg.models import model

    dataset[settings.dataset.name].options(settings.dataset.options)
    compose(settings.dataset.augment or ())
    if isinstance(settings, Experiment):
        model[settings.model.name].options(settings.model.options)
    select = settings if isinstance(settings, Select) else getattr(settings, "select", None)
    if isinstance(select, Select):
        coreset[select.method].options(select.options)


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
    from raypkg.runs.report import Report
    from raypkg.runs.tracking import Listened, tracker

    warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray")
    following = tracker(settings, folder, group or entry.name)
    if listen:
        following = Listened(following, listen)
    with Report(folder, following, console) as report:
        entry(settings, report=report)
    return following.finish(folder.summary or {})
