"""Experiments, one file each: settings and the story of the run. Importing them imports no torch."""

import typing

from raypkg.core.registry import Entry, Registry
from raypkg.core.settings import Experiment

experiment = Registry("experiment", "raypkg.experiments", given=("report",))


def settings_of(entry: Entry) -> type[Experiment]:
    """Return the settings class of an experiment: the type of its function's ``settings``."""
    return typing.get_type_hints(entry.function)["settings"]
