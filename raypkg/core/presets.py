"""Presets: named settings of an experiment, in a ``presets.toml`` beside its settings class.

``published``, the default, is the method as published; it has a value for every setting that another preset changes.
A preset's table ``on`` has, by name of a data set, what the paper states for it. What a user gives has priority.
"""

import sys
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from .config import Settings, dotted, load_settings, read_toml, with_current_names
from .errors import UserError, unknown

PUBLISHED = "published"
FORMER = ""  # of runs that were stored before there were presets
PresetName = Annotated[str, Field(description="named settings; other options have priority over them")]
NO_METHOD = ("preset", "seed", "dataset", "model", "train", "hooks", "cluster", "track", "adapted")  # around a method
Values = dict[str, Any]  # settings by dotted names


class Preset(NamedTuple):
    """Named settings."""

    about: str  # one line
    values: Values
    on: dict[str, Values]  # by name of a data set

    def stated(self, data: str) -> Values:
        """Return the paper's values for a data set; a path counts by its last part."""
        source, colon, path = data.partition(":")
        return self.on.get(f"{source}{colon}{PurePath(path).name}", {})


@lru_cache
def presets_of(schema: type[Settings]) -> dict[str, Preset]:
    """Return the presets of a settings class by name; empty if it has none."""
    module = sys.modules[schema.__module__].__file__
    if "preset" not in schema.model_fields or module is None:
        return {}
    file = Path(module).with_name("presets.toml")
    tables = read_toml(file) if file.is_file() else {}  # that of `effray select` is its rule's
    presets = {}
    for name, table in tables.items():
        about = table.pop("about")
        on = {data: dotted(values) for data, values in table.pop("on", {}).items()}
        presets[name] = Preset(about, dotted(table), on)
    return presets


def with_preset(schema: type[Settings], base: Mapping[str, Any], values: Mapping[str, Any]) -> Values:
    """Return ``values``, by dotted names, and what their preset sets but neither they nor the nested ``base`` give."""
    presets = presets_of(schema)
    if not presets:
        return dict(values)
    given = dotted(dict(base)) | dict(values)
    name = given.get("preset", PUBLISHED)
    if name == FORMER:  # a trial of an earlier study: the parts that it enables have the defaults of their time
        former = with_current_names(schema, values, former=True)
        return {setting: former[setting] for setting in values}
    if name not in presets:
        raise unknown("preset", str(name), presets)
    if name != base.get("preset", name):
        raise UserError(f"preset = {name}: the settings are those of preset {base['preset']}")

    data = given.get("dataset.name") or given.get("dataset") or schema.model_fields["dataset"].default.name
    published, chosen = presets[PUBLISHED], presets[name]
    # What the paper states for a data set holds for every preset that has no value of its own.
    preset = _layered(published.values, published.stated(data), chosen.values, chosen.stated(data))
    return without(preset, given) | dict(values)


def preset_of_row(schema: type[Settings], row: Mapping[str, Any], shared: Mapping[str, Any]) -> Values:
    """Return a row of a table with the settings of the preset that it names; those of training stay as they are shared.

    Further settings of the method are the published ones, unless ``shared`` gives them, by dotted names.
    """
    presets = presets_of(schema)
    if row["preset"] not in presets:
        raise unknown("preset", row["preset"], presets)
    method = without(presets[PUBLISHED].values, [*NO_METHOD, *shared])
    return _layered(method, presets[row["preset"]].values, row)


def _layered(*layers: Mapping[str, Any]) -> Values:
    """Merge settings by dotted names: a later layer replaces what its names overlap."""
    merged: Values = {}
    for layer in layers:
        merged = without(merged, layer)
        merged.update(layer)
    return merged


def without(values: Mapping[str, Any], others: Collection[str]) -> Values:
    """Return the values whose dotted name is none of the others, and neither a part of one nor has one as a part."""

    def overlap(name: str, other: str) -> bool:
        return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")

    return {name: value for name, value in values.items() if not any(overlap(name, other) for other in others)}


def departures(settings: Settings) -> Values:
    """Return the settings that differ from their preset and were not adapted: of the method, and all in the preset."""
    values = dotted(settings.model_dump(mode="json"))
    if not (values.get("preset") and presets_of(type(settings))):
        return {}
    chosen: Values = {key: values[key] for key in ("preset", "dataset.name") if key in values}
    preset = with_preset(type(settings), {}, chosen)
    expected = dotted(load_settings(type(settings), None, preset).model_dump(mode="json"))
    adapted = [note.partition(" ")[0] for note in values.get("adapted", ())]
    compared = without(without(expected | values, NO_METHOD) | preset, adapted)
    return {key: values.get(key) for key in compared if values.get(key) != expected.get(key)}
