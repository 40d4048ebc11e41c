"""Experiments: settings and the story of a run, each a file here or in its method's room. No torch at import."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from raypkg.core.errors import UserError, ending_told
from raypkg.core.imports import heavy_imports
from raypkg.core.registry import Entry, Lookup, Registry
from raypkg.core.settings import Experiment, RunSettings, Select
from raypkg.coresets.rules import coreset
from raypkg.data.sources import dataset
from raypkg.engine import hook
from raypkg.models import model, tokenizer_of

if TYPE_CHECKING:  # they import pyarrow, which `--help` need not wait for
    from rich.console import Console

    from raypkg.runs.folder import RunFolder

experiment = Registry("experiment", "raypkg.experiments", "raypkg.methods.*.experiment", given=("report", "workers"))
R = TypeVar("R", bound=RunSettings)
TOKENIZER = "tokenizer"  # the option of a source of texts


def settings_of(entry: Entry) -> type[RunSettings]:
    """Return the settings class of an experiment: the type of its function's ``settings``."""
    return typing.get_type_hints(entry.function)["settings"]


def training_settings_of(entry: Entry) -> type[Experiment]:
    """Return the settings class of an experiment that trains.

    Raises:
        UserError: it does not.
    """
    schema = settings_of(entry)
    if not issubclass(schema, Experiment):
        raise UserError(f"{entry.name} trains no model")
    return schema


def with_absolute_paths(settings: R) -> R:
    """Make the paths among the names absolute: workers and repeated runs are in other folders.

    They are those in ``parquet:PATH`` and ``transformers:./FOLDER``, of a tokenizer, and ``dataset.only``. URIs stay as
    they are, and so do names on the hub: of those only what is a folder here is a path.
    """
    chosen = settings.dataset
    changes: dict[str, Any] = {}
    source, _, path = chosen.name.partition(":")
    if path and source in dataset:
        changes["name"] = f"{source}:{_absolute(path)}"
    if chosen.only is not None and "://" not in chosen.only:
        changes["only"] = _absolute(chosen.only)
    if isinstance(own := chosen.options.get(TOKENIZER), str):
        changes["options"] = {**chosen.options, TOKENIZER: _absolute_folder(own)}
    parts: dict[str, Any] = {"dataset": chosen.model_copy(update=changes)}
    if isinstance(settings, Experiment):
        family, colon, variant = settings.model.name.partition(":")
        name = f"{family}{colon}{_absolute_folder(variant)}"
        parts["model"] = settings.model.model_copy(update={"name": name})
    return settings.model_copy(update=parts)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _absolute_folder(name: str) -> str:
    """Return the path of a folder as an absolute one, and any other name as it is."""
    folder = "/" in name and Path(name).expanduser().is_dir()
    return _absolute(name) if folder else name


def check_names(settings: RunSettings) -> None:
    """Refuse unknown names of data sets, models, methods, hooks, rules, augmentations and projects, and wrong options.

    All names come before the first option, which imports what it belongs to, and PyTorch with it.
    """
    from raypkg.runs.tracking import check_tracker

    lookups = _lookups(settings)
    for each in lookups:
        each.registry.check(each.name)
    with heavy_imports():
        for each in lookups:
            each.registry[each.name].options(each.options)
    if isinstance(settings, Experiment):
        _check_hooks(settings)
    _check_augmentations(settings)
    check_tracker(settings)


def with_tokenizer(settings: R) -> R:
    """Have texts cut into the tokens of the model that is given them, where checked settings name no tokenizer."""
    chosen = settings.dataset
    if not isinstance(settings, Experiment) or TOKENIZER in chosen.options:
        return settings
    own = tokenizer_of(settings.model.name)
    if not own or TOKENIZER not in dataset[chosen.name].schema.model_fields:
        return settings
    options = {**chosen.options, TOKENIZER: own}
    return settings.model_copy(update={"dataset": chosen.model_copy(update={"options": options})})


def _lookups(settings: RunSettings) -> list[Lookup]:
    """Return all that the settings choose by its name."""
    lookups = [Lookup(dataset, settings.dataset.name, settings.dataset.options)]
    if isinstance(settings, Experiment):
        lookups.append(Lookup(model, settings.model.name, settings.model.options))
        lookups += [Lookup(hook, named.name, named.options) for named in settings.hooks]
    select = settings if isinstance(settings, Select) else getattr(settings, "select", None)
    if isinstance(select, Select):
        lookups.append(Lookup(coreset, select.method, select.options))
    return lookups + settings.lookups()


def _check_hooks(settings: Experiment) -> None:
    for named in settings.hooks:
        needs = hook[named.name].needs
        if needs:
            raise UserError(f"hook {named.name!r} needs {needs[0]!r}, which nobody gives: it takes keywords only")


def _check_augmentations(settings: RunSettings) -> None:
    from raypkg.data.augment import compose

    compose(settings.dataset.augment or ())


def _with_digest(settings: R, folder: RunFolder) -> R:
    """Open the data set; note in the stored settings which samples it gave, or refuse others than are noted there."""
    from raypkg.phases.samples import open_samples

    samples = open_samples(settings)
    if settings.dataset.digest is not None:
        return settings
    dataset = settings.dataset.model_copy(update={"digest": samples.digest(settings.dataset)})
    settings = settings.model_copy(update={"dataset": dataset})
    folder.keep_settings(settings)
    return settings


def carry_out(
    entry: Entry,
    settings: RunSettings,
    folder: RunFolder,
    console: Console,
    *,
    group: str = "",
    listen: Callable[[Mapping[str, Any]], None] | None = None,
) -> str:
    """Run an experiment in its folder, or resume it there; return what its tracker has to say at the end.

    Args:
        entry: the experiment.
        settings: of the run.
        folder: of the run.
        console: where progress is shown.
        group: of runs that the tracker keeps together; the experiment's name when left out.
        listen: hears every row of metrics as well, and may end the run there by ``SystemExit``.
    """
    with heavy_imports():
        from raypkg.cluster.workers import Workers
        from raypkg.phases.samples import forget_samples
        from raypkg.runs.report import Report
        from raypkg.runs.tracking import Listened, tracker

    warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray")
    forget_samples()
    settings = _with_digest(settings, folder)
    following = tracker(settings, folder, group or entry.name)
    if listen:
        following = Listened(following, listen)
    with (
        Report(folder, following, console) as report,
        Workers(settings.cluster, report, (folder.storage / "ray").uri) as workers,
        ending_told("the model, the data or a hook"),
    ):
        entry(settings, report=report, workers=workers)
    return following.finish(folder.summary or {})
