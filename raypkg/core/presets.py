"""Presets: named settings of an experiment, in a ``presets.toml`` beside its settings class.

``published``, the default, is the method as published; it has a value for every setting that another preset changes.
A preset's table ``on`` has, by name of a data set, what the paper states for it. What a user gives has priority.
"""

import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from .config import Settings, dotted, leaves, load_settings, part_of, read_toml
from .errors import UserError, unknown

FILE = "presets.toml"
PUBLISHED = "published"
FORMER = ""  # of runs that were stored before there were presets
PresetName = Annotated[str, Field(description="named settings; other options have priority over them")]
NO_METHOD = ("preset", "seed", "dataset", "model", "train", "hooks", "cluster", "track", "adapted")
Values = dict[str, Any]  # settings by dotted names


class Preset(NamedTuple):
    """Named settings."""

    about: str  # one line
    values: Values
    on: dict[str, Values]  # by name of a data set


@lru_cache
def presets_of(schema: type[Settings]) -> dict[str, Preset]:
    """Return the presets of a settings class by name; empty if it has none."""
    file = sys.modules[schema.__module__].__file__
    if "preset" not in schema.model_fields or file is None:
        return {}
    presets = {}
    for name, table in read_toml(Path(file).with_name(FILE)).items():
        about, on = table.pop("about"), table.pop("on", {})
        presets[name] = Preset(about, dotted(table), {data: dotted(values) for data, values in on.items()})
    return presets


def with_preset(schema: type[Settings], base: Mapping[str, Any], values: Mapping[str, Any]) -> Values:
    """Return ``values``, by dotted names, and what their preset sets but neither they nor the nested ``base`` give.

    Raises:
        UserError: an unknown preset, or another one than the base's.
    """
    presets = presets_of(schema)
    given = dotted(dict(base)) | dict(values)
    name = given.get("preset", PUBLISHED)
    if not presets:
        return dict(values)
    if name == FORMER:  # a trial of an earlier study enables a part with the defaults of its time
        parts = {key: part_of(field) for key, field in leaves(schema)}
        enabled = {key: dict(part.former) for key, part in parts.items() if part and values.get(key) in (True, "true")}
        return dict(values) | enabled
    if name not in presets:
        raise unknown("preset", str(name), presets)
    if name != base.get("preset", name):
        raise UserError(f"preset = {name}: the settings are those of preset {base['preset']}")
    data = given.get("dataset.name", given.get("dataset", schema.model_fields["dataset"].default.name))
    own = presets[PUBLISHED].on.get(data, {}) | presets[name].values | presets[name].on.get(data, {})
    return _without(_without(presets[PUBLISHED].values, own) | own, given) | dict(values)


def preset_of_row(schema: type[Settings], row: Mapping[str, Any], shared: Mapping[str, Any]) -> Values:
    """Return a row of a table with the settings of the preset that it names; those of training stay as they are shared.

    Further settings of the method are the published ones, unless ``shared`` gives them, by dotted names.
    """
    presets = presets_of(schema)
    if row["preset"] not in presets:
        raise unknown("preset", str(row["preset"]), presets)
    own = presets[row["preset"]].values
    method = {
        name: value for name, value in presets[PUBLISHED].values.items() if name.partition(".")[0] not in NO_METHOD
    }
    return _without(_without(method, {**shared, **own}) | own, row) | dict(row)


def _without(values: Values, others: Mapping[str, Any]) -> Values:
    """Return the values whose dotted name is none of the others, and neither a part of one nor has one as a part."""

    def overlap(name: str, other: str) -> bool:
        return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")

    return {name: value for name, value in values.items() if not any(overlap(name, other) for other in others)}


def departures(settings: Settings) -> Values:
    """Return the settings that differ from their preset: those of the method, and those of training in the preset.

    Values adapted to the data do not count.
    """
    values = dotted(settings.model_dump(mode="json"))
    chosen: Values = {key: values[key] for key in ("preset", "dataset.name") if key in values}
    if not chosen.get("preset"):
        return {}
    preset = with_preset(type(settings), {}, chosen)
    expected = dotted(load_settings(type(settings), None, preset).model_dump(mode="json"))
    adapted = {note.partition(" ")[0] for note in values.get("adapted", ())}
    changed = {}
    for key in {**expected, **values}:
        is_of_method = key in preset or key.partition(".")[0] not in NO_METHOD
        if is_of_method and key not in adapted and values.get(key) != expected.get(key):
            changed[key] = values.get(key)
    return changed
