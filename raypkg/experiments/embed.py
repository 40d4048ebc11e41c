"""Features of a frozen model, computed once, as a data set that every other experiment takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raypkg.core.errors import UserError
from raypkg.core.registry import Lookup
from raypkg.core.settings import Count, Dataset, Model, RunSettings
from raypkg.models import model
from raypkg.runs.report import Report

from . import experiment
from .samples import Samples

if TYPE_CHECKING:  # PyTorch, which `--help` does not need
    from raypkg.data import Data
    from raypkg.experiments.embedding import Embedding
    from raypkg.runs.folder import RunFolder


class FrozenModel(Model):
    """The frozen model, by name."""

    name: str = Field("", description="a model as it is built: torchvision:NAME, package.module:function or another")


class WholeDataset(Dataset):
    """A data set without a held-out set: all its samples are embedded."""

    validation: float = Field(0.0, ge=0, le=0, description="0: rows are held out where they are trained on")


class EmbedSettings(RunSettings):
    """Settings of `effray embed`."""

    apart: ClassVar[tuple[str, ...]] = tuple(f"dataset.{name}" for name in ("digest", "validation", "only", "augment"))

    dataset: WholeDataset = WholeDataset()
    model: FrozenModel = FrozenModel()
    model_from: str = Field("", description="run whose model it is, by name or path; default of the data set")
    draws: int = Field(0, ge=0, description="augmented rows of each training sample; 0 = one, unchanged")
    rows_per_part: Count = Field(4096, description="rows that a resumed run may have to recompute")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="precision of the forward pass")

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if bool(self.model.name) == bool(self.model_from):
            raise UserError("embed needs a model: give one of --model NAME and --model-from RUN")
        if self.model_from and self.model.options:
            raise UserError("model.options would do nothing: the model of --model-from is as its run has it")
        return self

    @model_validator(mode="after")
    def _every_sample(self) -> Self:
        if self.dataset.only is not None:
            raise UserError("dataset.only: embed takes every sample; choose among the rows where you train on them")
        if self.dataset.augment and not self.draws:
            raise UserError("dataset.augment would do nothing: give --draws, the number of rows of each sample")
        return self

    def lookups(self) -> list[Lookup]:
        """Return the model, if it is chosen by name."""
        return [Lookup(model, self.model.name, self.model.options)] if self.model.name else []


@experiment("embed")
def run(settings: EmbedSettings, *, samples: Samples, report: Report) -> None:
    """Compute the features of all samples by a frozen model, once: `table:RUN_FOLDER` is then a data set of rows.

    Its rows have the labels and the ids of the samples. The same seed holds out the same samples as of the data itself.

    Example:
        effray embed --model resnet8 --name rows && effray train --dataset table:runs/embed/rows --model linear
    """
    from raypkg.experiments.embedding import embed
    from raypkg.experiments.summary import finish

    data = samples.data
    embed(planned(settings, data, report.folder), data, settings.dataset, settings.cluster, report)
    finish(report, settings, samples)


def planned(settings: EmbedSettings, data: Data, folder: RunFolder) -> Embedding:
    """Return the plan of a run, with its backbone."""
    from raypkg.experiments.embedding import Embedding
    from raypkg.experiments.samples import augmentations
    from raypkg.experiments.trained import named_backbone, trained_backbone

    augment = augmentations(settings.dataset, data)
    if settings.draws and not augment:
        raise UserError(f"draws = {settings.draws}: {settings.dataset.name} has no augmentation, so all would be equal")
    if settings.model_from:
        backbone = trained_backbone(folder, settings.model_from, settings.dataset, data, settings.precision)
    else:
        backbone = named_backbone(settings.model, data, settings.precision, settings.seed)
    return Embedding.of(backbone, data, settings.draws, settings.rows_per_part, augment, settings.seed)
