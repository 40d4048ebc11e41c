"""One preparation of settings for every run: paths made absolute, names checked, the model's tokenizer filled in.

Settings can name code (``my_code:net``), and a study's folder holds a file of it. So write access to a run folder
decides which code runs when it is resumed. Stored settings that name code are accepted if their file, the modules that
it imports from the working folder, and all folders on their paths are the user's own and writable by nobody else.
Otherwise, and in an object store, which has no owners, ``--trust`` or EFFRAY_TRUST=1 is needed. An unpacked archive
belongs to the user: read its ``config.toml`` first.
"""

import ast
import grp
import os
import pwd
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.machinery import all_suffixes
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any, TypeVar

from raypkg.core.address import is_uri
from raypkg.core.config import Named, changed, dotted, fields_of, load_settings
from raypkg.core.errors import UserError
from raypkg.core.presets import with_preset, without
from raypkg.core.registry import Lookup, extra, heavy_imports, imported
from raypkg.core.settings import Experiment, Model, RunSettings, Select
from raypkg.data.sources import dataset
from raypkg.engine import hook
from raypkg.models import model, tokenizer_of
from raypkg.runs.folder import CONFIG, MODEL, RunFolder
from raypkg.runs.storage import Storage

R = TypeVar("R", bound=RunSettings)
TOKENIZER = "tokenizer"  # options of a source of texts
LENGTH = "length"
TRUST = "EFFRAY_TRUST"


def resolve(schema: type[R], base: Mapping[str, Any] | None, values: Mapping[str, Any], *, shared: bool = False) -> R:
    """Return settings that are ready for a run: with their preset, absolute paths, checked names and a tokenizer.

    ``values``, by dotted names, win over the nested ones of ``base``. Settings ``shared`` by a study's trials get no
    tokenizer: each trial takes that of its own model.
    """
    base = dict(base or {})
    values = with_preset(schema, base, values)
    settings = load_settings(schema, base, values)
    select = selection_of(settings)
    if select and getattr(select, "preset", None):
        from raypkg.coresets.rules import coreset

        rule = coreset[select.rule]
        if not rule.published:
            others = ", ".join(name for name in coreset.names if coreset[name].published)
            raise UserError(f"preset = published: {select.rule} has no other form; these have: {others}")
        # Options have priority over the published form, and so has the base that names the preset: it may be stored.
        part = "" if select is settings else "select."
        given = values if f"{part}preset" in values else dotted(base) | values
        fields = fields_of(type(select))
        form = {f"{part}{name}": value for name, value in rule.published.items() if name.partition(".")[0] in fields}
        settings = load_settings(schema, base, without(form, given) | values)
    settings = with_absolute_paths(settings)
    check_names(settings)
    return settings if shared else _with_tokenizer(settings)


def with_run(
    schema: type[RunSettings], base: Mapping[str, Any], values: Mapping[str, Any], root: str
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return a file's settings and the options, by dotted names, with data set and seed of the run in ``model_from``.

    What file or options give has priority; from a run on another data set, they take its tokenizer and length alone. A
    training's file has settings that a command without training lacks: it gives data set, seed, cluster and tracking.
    """
    if "model_from" not in schema.model_fields:
        return base, dict(values)
    if "train" in base:
        base = {name: part for name, part in base.items() if name in RunSettings.model_fields}
        base, values = {}, without(dotted(dict(base)), (*schema.apart, *values)) | dict(values)
    given = dotted(dict(base)) | dict(values)
    if not given.get("model_from"):
        return base, dict(values)
    from raypkg.runs.catalog import locate

    run = locate(root, given["model_from"].partition(",")[0], having=MODEL)
    stored = {name: part for name, part in stored_settings(run).items() if name in ("dataset", "seed")}
    theirs = without(dotted(stored), schema.apart)
    if name := given.get("dataset.name") or given.get("dataset"):
        chosen = _absolute("dataset.name", name)
        dataset.check(chosen)
        if chosen != theirs.get("dataset.name"):
            texts = [f"dataset.options.{option}" for option in (TOKENIZER, LENGTH)]
            cut_alike = _takes_tokenizer(Named(name=chosen))
            theirs = {key: value for key, value in theirs.items() if key == "seed" or (cut_alike and key in texts)}
        given["dataset.name"] = given.pop("dataset", name)
    return base, without(theirs, given) | dict(values)


def with_absolute_paths(settings: R) -> R:
    """Make the paths in names, tokenizers and files absolute: workers and resumed runs have other working folders."""
    texts = _texts(settings.model_dump())
    return changed(settings, {place: path for place, text in texts if (path := _absolute(place, text)) != text})


def _absolute(place: str, text: str) -> str:
    """Return a setting's text, with an absolute path where the setting, a dotted name, has or ends with one."""
    head, colon, path = text.partition(":") if place.endswith(".name") else ("", "", text)
    here = Path(os.path.expanduser(path))
    match place.split("."):
        case ["dataset", "name"] | [*_, "target", "name"]:
            is_path = path != "" and head in dataset and not is_uri(path)
        case ["dataset", "only" | "streamed"]:
            is_path = not is_uri(path)
        case ["model", "name"] | [*_, "dataset" | "target", "options", "tokenizer"]:  # otherwise of the hub
            is_path = "/" in path and here.is_dir()
        case ["train", "from"]:  # otherwise it may be the name of a run
            is_path = here.is_file() or (here / "summary.json").is_file()
        case _:
            is_path = False
    return f"{head}{colon}{here.absolute()}" if is_path else text


def check_names(settings: RunSettings) -> None:
    """Refuse unknown names of data sets, models, methods, hooks, rules, augmentations and projects, and wrong options.

    All names are checked before the first option: options import what they belong to, and PyTorch with it.
    """
    lookups = [Lookup(dataset, settings.dataset.name, settings.dataset.options)]
    hooks = settings.hooks if isinstance(settings, Experiment) else ()
    if isinstance(settings, Experiment):
        lookups.append(Lookup(model, settings.model.name, settings.model.options))
        lookups += [Lookup(hook, named.name, named.options) for named in hooks]
    if select := selection_of(settings):
        from raypkg.coresets.rules import coreset

        lookups.append(Lookup(coreset, select.rule, select.options))
        if select.target is not None and select.target.is_data_set:
            lookups.append(Lookup(dataset, select.target.name, select.target.options))
    lookups += settings.lookups()
    for each in lookups:
        each.registry.check(each.name)
    with heavy_imports():
        for each in lookups:
            each.registry[each.name].options(each.options)
        from raypkg.data.augment import compose
    for named in hooks:
        if needs := hook[named.name].needs:
            raise UserError(f"hook {named.name!r} needs {needs[0]!r}, which nobody gives: it takes keywords only")
    compose(settings.dataset.augment or ())
    for kind in ("loss", "metric"):
        if name := getattr(getattr(settings, "train", None), kind, None):
            imported(f"train.{kind}", name)
    if name := settings.track.name:
        from raypkg.runs.tracking import TENSORBOARD, wandb_settings

        _ = wandb_settings(settings.track) if name == "wandb" else extra(*TENSORBOARD)  # which refuse what is wrong


def _with_tokenizer(settings: R) -> R:
    """Set the tokenizer of texts to the model's, and a selection's target's and its length to the data set's."""
    chosen = getattr(settings, "model", None)
    named = chosen.name if isinstance(chosen, Model) else ""
    options = dict(settings.dataset.options)
    own = tokenizer_of(named) if named and TOKENIZER not in options else None
    if own and _takes_tokenizer(settings.dataset):
        options[TOKENIZER] = own
    changes = {"dataset.options": options}
    select = selection_of(settings)
    if select and select.target and select.target.is_data_set and _takes_tokenizer(select.target):
        shared = {name: options[name] for name in (TOKENIZER, LENGTH) if name in options}
        part = "" if select is settings else "select."
        changes[f"{part}target.options"] = shared | select.target.options
    return changed(settings, changes)


def selection_of(settings: RunSettings) -> Select | None:
    """Return the settings of the run's selection, or None."""
    select = settings if isinstance(settings, Select) else getattr(settings, "select", None)
    return select if isinstance(select, Select) else None


def _takes_tokenizer(chosen: Named) -> bool:
    return TOKENIZER in dataset[chosen.name].schema.model_fields


# Trust in stored settings


def trust_all() -> None:
    """Let all stored runs that this process opens run the code that they name."""
    os.environ[TRUST] = "1"


def stored_settings(folder: RunFolder) -> dict[str, Any]:
    """Return the settings of a stored run, not yet validated; refuse damaged ones, and code that is not trusted."""
    values = folder.config
    check_code(folder.storage, values)
    return values


def check_code(storage: Storage, values: Any, file: str = CONFIG) -> None:
    """Refuse stored settings that name code, unless the user owns or trusts them and the code."""
    registries: dict[str, Any] = {"dataset": dataset, "model": model, "target": dataset}
    for place, text in _texts(values):
        # A text that imports a module, as no URI and no registry's own name, such as torchvision:resnet18, does.
        head, colon, rest = text.partition(":")
        registry = registries.get(place.removesuffix(".name").rpartition(".")[2], ())
        if not colon or rest.startswith("//") or head in registry:
            continue
        if all(part.isidentifier() for part in head.split(".")):
            _check_own(storage, file, f"names code, {text!r}")
            _check_modules([head])


def check_file_of_code(storage: Storage, file: str) -> None:
    """Refuse a file of code, unless the user owns or trusts it and the modules that it imports."""
    _check_own(storage, file, "would be run as code")
    _check_modules(_imports(Path(f"{storage.local}/{file}"), []))


def _check_own(storage: Storage, file: str, why: str) -> None:
    is_own = storage.local is not None and _is_own(storage.local / file)
    if not is_own and os.environ.get(TRUST) != "1":
        raise UserError(f"{storage.root}/{file} is not your own alone and {why}: --trust lets it run")


def _check_modules(names: Iterable[str]) -> None:
    """Refuse modules of others in the working folder, with what they import from there by a static look at them."""
    pending, seen = [*names], set()
    while pending:
        *around, name = pending.pop().split(".")
        pending += filter(None, [".".join(around)])
        stem = Path.cwd().joinpath(*around, name)
        for suffix in all_suffixes():
            for file, package in ((Path(f"{stem}{suffix}"), around), (stem / f"__init__{suffix}", [*around, name])):
                if file.is_file() and file not in seen:
                    seen.add(file)
                    for path in (file, Path(cache_from_source(file))):
                        _check_own(Storage(str(path.parent)), path.name, "would be run as code")
                    pending += _imports(file, package)


def _imports(file: Path, package: Sequence[str]) -> Iterator[str]:
    """Yield the names of all modules that a file in a package may import; names from modules may be modules."""
    try:
        nodes = [*ast.walk(ast.parse(file.read_bytes()))]
    except (OSError, SyntaxError, ValueError):  # no line of it can run
        return
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin: list[str] = []
            if isinstance(node, ast.ImportFrom):
                around = package[: len(package) - node.level + 1] if node.level else ()
                origin = [*around, *filter(None, [node.module])]
            yield from (".".join([*origin, alias.name]) for alias in node.names)


def _is_own(path: Path, own: int = 2) -> bool:
    """Return True if nobody but the user can have written what is on a path; links are followed.

    The first ``own`` of the file and the folders around it belong to the user, those above perhaps to root. Others may
    write to a sticky folder, where they cannot replace files, and to nothing else; so may groups with other members.
    """
    for depth, place in enumerate((path, *path.parents)):
        try:
            status = place.lstat()
        except FileNotFoundError:  # a missing file names no code
            continue
        mode = status.st_mode
        if status.st_uid != os.geteuid() and (depth < own or status.st_uid != 0):
            return False
        if stat.S_ISLNK(mode):
            if not _is_own(place.parent / place.readlink(), max(own - depth, 0)):
                return False
        elif not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):
            is_private = False
            with suppress(KeyError):  # of users and groups without a name
                user, group = pwd.getpwuid(status.st_uid).pw_name, grp.getgrgid(status.st_gid)
                is_private = group.gr_name == user and {*group.gr_mem} <= {user}
            if mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not is_private):
                return False
    return True


def _texts(values: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in nested settings with its dotted name."""
    if isinstance(values, str):
        yield place, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _texts(value, f"{place}.{name}" if place else name)
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value, place)
