"""Experiments: one function with its settings per command, here or in a method's room. No torch at import."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from raypkg.core.errors import UserError, user_code
from raypkg.core.registry import Entry, Registry, heavy_imports

if TYPE_CHECKING:  # pydantic and pyarrow, which `--help` does not need
    from rich.console import Console

    from raypkg.core.settings import Experiment, RunSettings
    from raypkg.experiments.phases import Donors
    from raypkg.experiments.samples import Samples
    from raypkg.runs.folder import RunFolder

GIVEN = ("samples", "report", "workers")
experiment = Registry("experiment", "raypkg.experiments", "raypkg.methods.*.experiment", given=GIVEN)
# write(run, place) → Markdown on the use of the files
export_format = Registry(
    "export format", "raypkg.experiments.export", "raypkg.methods.*.export", decorator="export_format"
)
R = TypeVar("R", bound="RunSettings")


def settings_of(entry: Entry) -> type[RunSettings]:
    """Return the settings class of an experiment: the type of its function's ``settings``."""
    return typing.get_type_hints(entry.function)["settings"]


def training_settings_of(entry: Entry) -> type[Experiment]:
    """Return the settings class of an experiment, which must train."""
    from raypkg.core.settings import Experiment

    schema = settings_of(entry)
    if not issubclass(schema, Experiment):
        raise UserError(f"{entry.name} trains no model")
    return schema


def open_run(settings: R) -> tuple[R, Samples]:
    """Open a run's samples; return them with the settings to store: pinned by a digest, adapted to their number."""
    with heavy_imports():  # imports only: the garbage collector is off in this block
        from raypkg.data import opening  # noqa: F401
    from raypkg.core.config import changed
    from raypkg.core.presets import FORMER
    from raypkg.core.settings import Experiment
    from raypkg.experiments.samples import open_samples

    samples = open_samples(settings)
    dataset = settings.dataset
    values: dict[str, Any] = {}
    if dataset.digest is None:
        values["dataset.digest"] = samples.digest(dataset)
    if dataset.is_drawn and dataset.seed is None:
        values["dataset.seed"] = settings.seed
    if isinstance(settings, Experiment) and getattr(settings, "preset", FORMER) != FORMER:
        notes = list(settings.adapted)
        for name, (value, replaced) in settings.adaptations(len(samples.train_indices)).items():
            values[name] = value
            notes.append(f"{name} = {value} instead of {replaced}")
        values["adapted"] = notes
    return changed(settings, values), samples


def carry_out(
    entry: Entry,
    settings: RunSettings,
    samples: Samples,
    folder: RunFolder,
    console: Console,
    *,
    group: str = "",
    listen: Callable[[Mapping[str, Any]], None] | None = None,
    donors: Donors | None = None,
) -> str:
    """Run an experiment in its folder, or resume it there; return the closing line of its tracker.

    ``group`` is the run's group in the tracker, by default the experiment's name. ``listen`` receives every row of
    metrics, and may end the run by ``SystemExit``. ``donors`` returns finished runs whose phases may be taken over.
    """
    with heavy_imports():
        from raypkg.cluster.workers import Workers
        from raypkg.experiments.samples import SAMPLES
        from raypkg.experiments.trained import keep_first_weights
        from raypkg.runs.report import Report

    warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray")
    keep_first_weights(settings, samples, folder)
    if donors:
        from raypkg.experiments.phases import stages_of, take_over

        take_over(folder, stages_of(entry.name, settings), donors)
    following = None
    if settings.track.name:
        from raypkg.runs.tracking import TRACKERS

        following = TRACKERS[settings.track.name](settings, folder, group or entry.name)
    ray_files = (folder.storage / "ray").uri
    with (
        Report(folder, following, console, listen) as report,
        Workers(settings.cluster, report, ray_files, local={SAMPLES: samples}) as workers,
        user_code(),
    ):
        entry(settings, samples=samples, report=report, workers=workers)
    return following.finish(folder.summary or {}) if following else ""
