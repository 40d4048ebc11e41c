"""Selecting a coreset with the gradients of a model that another run trained."""

from typing import Annotated, Literal

from pydantic import Field

from raypkg.core.settings import RunSettings, Select
from raypkg.runs.report import Report

from . import experiment
from .samples import Samples


class SelectSettings(Select, RunSettings):
    """Settings of `effray select`."""

    model_from: Annotated[str, Field(description="run whose model selects: a name under --root, or a path")] = ""
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], Field(description="of the forward pass; auto = what the processor has")
    ] = "auto"


@experiment("select")
def run(settings: SelectSettings, *, samples: Samples, report: Report) -> None:
    """Select a coreset with the last-layer gradients of another run's model, or by what its training recorded.

    The data set, the seed and the held-out share must be those of that run.

    Example:
        effray train --name first --train.epochs 5 && effray select --model-from first --rule craig --fraction 0.2
    """
    from raypkg.coresets.reselection import check_selects_once
    from raypkg.experiments.selection import select_on_actors, trained_model
    from raypkg.experiments.summary import finish

    check_selects_once(settings)
    model = trained_model(settings, report.folder, settings.model_from, settings.precision)
    select_on_actors(settings, settings, model, samples, report)
    finish(report, settings, samples)
