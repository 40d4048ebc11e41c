"""What settings name: entries of registries, which must exist, and paths, which other processes must find as well."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from raypkg.core.address import is_uri
from raypkg.core.config import Named
from raypkg.core.errors import UserError
from raypkg.core.imports import heavy_imports
from raypkg.core.registry import Lookup
from raypkg.core.settings import Experiment, Model, RunSettings, Select, Target, Train
from raypkg.coresets.rules import coreset
from raypkg.data.sources import dataset
from raypkg.engine import hook
from raypkg.models import model, tokenizer_of

R = TypeVar("R", bound=RunSettings)
N = TypeVar("N", bound=Named)
TOKENIZER = "tokenizer"  # the option of a source of texts


def with_absolute_paths(settings: R) -> R:
    """Make the paths among the names absolute: workers and repeated runs are in other folders.

    They are those in ``parquet:PATH`` and ``transformers:./FOLDER``, of a tokenizer, ``dataset.only``,
    ``dataset.streamed`` and of first weights. URIs stay as they are, and so do names on the hub and of runs: of those
    only what is here is a path.
    """
    chosen = _absolute_data_set(settings.dataset)
    for name in ("only", "streamed"):
        path = getattr(chosen, name)
        if path is not None and not is_uri(path):
            chosen = chosen.model_copy(update={name: _absolute(path)})
    parts: dict[str, Any] = {"dataset": chosen}
    if named := _model_of(settings):
        family, colon, variant = named.name.partition(":")
        name = f"{family}{colon}{_absolute_folder(variant)}"
        parts["model"] = named.model_copy(update={"name": name})
    train = getattr(settings, "train", None)
    if isinstance(train, Train) and train.from_ is not None and _has_weights(Path(train.from_)):
        parts["train"] = train.model_copy(update={"from_": _absolute(train.from_)})
    return _with_target(settings.model_copy(update=parts), _absolute_data_set)


def _absolute_data_set(chosen: N) -> N:
    changes: dict[str, Any] = {}
    source, _, path = chosen.name.partition(":")
    if path and source in dataset and not is_uri(path):
        changes["name"] = f"{source}:{_absolute(path)}"
    if isinstance(own := chosen.options.get(TOKENIZER), str):
        changes["options"] = {**chosen.options, TOKENIZER: _absolute_folder(own)}
    return chosen.model_copy(update=changes)


def _with_target(settings: R, change: Callable[[Target], Target]) -> R:
    """Return the settings with a change to what the run's selection is for, if that is set."""
    select = _selection_of(settings)
    if select is None or select.target is None:
        return settings
    changes = {"target": change(select.target)}
    if isinstance(settings, Select):
        return settings.model_copy(update=changes)
    return settings.model_copy(update={"select": select.model_copy(update=changes)})


def _has_weights(path: Path) -> bool:
    """Say whether a path is a file or a finished run's folder; otherwise it may be the name of a run."""
    return path.is_file() or (path / "summary.json").is_file()


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
    """Have texts cut into the tokens of the model that is given them, where checked settings name no tokenizer.

    Those of a selection's target are cut as those to select from.
    """
    settings = _with_own_tokenizer(settings)
    own = settings.dataset.options.get(TOKENIZER)

    def cut_alike(target: Target) -> Target:
        if own is None or not target.is_data_set or TOKENIZER in target.options:
            return target
        if TOKENIZER not in dataset[target.name].schema.model_fields:
            return target
        return target.model_copy(update={"options": {**target.options, TOKENIZER: own}})

    return _with_target(settings, cut_alike)


def _with_own_tokenizer(settings: R) -> R:
    chosen = settings.dataset
    named = _model_of(settings)
    if named is None or TOKENIZER in chosen.options:
        return settings
    own = tokenizer_of(named.name)
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
    select = _selection_of(settings)
    if select is not None:
        lookups.append(Lookup(coreset, select.method, select.options))
        if select.target is not None and select.target.is_data_set:
            lookups.append(Lookup(dataset, select.target.name, select.target.options))
    return lookups + settings.lookups()


def _model_of(settings: RunSettings) -> Model | None:
    """Return the model that the settings choose by its name: of those that train, and of `effray embed`."""
    chosen = getattr(settings, "model", None)
    return chosen if isinstance(chosen, Model) and chosen.name else None


def _selection_of(settings: RunSettings) -> Select | None:
    """Return the settings of the run's selection, if it has any."""
    select = settings if isinstance(settings, Select) else getattr(settings, "select", None)
    return select if isinstance(select, Select) else None


def _check_hooks(settings: Experiment) -> None:
    for named in settings.hooks:
        needs = hook[named.name].needs
        if needs:
            raise UserError(f"hook {named.name!r} needs {needs[0]!r}, which nobody gives: it takes keywords only")


def _check_augmentations(settings: RunSettings) -> None:
    from raypkg.data.augment import compose

    compose(settings.dataset.augment or ())
