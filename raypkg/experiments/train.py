"""Plain training, selection with a model that another run trained, and the features of a frozen model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raypkg.cluster.workers import Workers
from raypkg.core.errors import UserError
from raypkg.core.registry import Lookup
from raypkg.core.settings import (
    Count,
    Dataset,
    Experiment,
    Model,
    Reselect,
    RulePreset,
    RunSettings,
    Select,
    Share,
    Train,
)
from raypkg.models import model
from raypkg.runs.folder import CORESET
from raypkg.runs.report import Report

from . import experiment
from .samples import Samples


class TrainSelect(Reselect):
    """Selection of the training samples, before and during training."""

    rule: str = Field("random", description="random, infobatch or another; see `effray methods`")
    fraction: Share = Field(1.0, description="share of the training samples in use at a time")
    preset: RulePreset = None


class TrainSettings(Experiment):
    """Settings of `effray train`."""

    plain = True

    coreset: str | None = Field(None, description="a coreset.parquet to begin with")
    select: TrainSelect | None = Field(None, description="selection of training samples (default: all, or the coreset)")
    train: Train = Train()

    def check(self, n: int, data: Any) -> None:
        """Refuse a selection that would never happen."""
        select = self.select
        if select is None:
            return
        from raypkg.coresets.sharded import check_schedule

        once = TrainSelect(warm_epochs=select.warm_epochs)
        if self.coreset is not None and not select.every_epochs and select != once:
            problem = "select.* but select.warm_epochs would do nothing"
            raise UserError(f"--coreset is given and select.every_epochs is 0: {problem}")
        check_schedule(select, self.epochs, given=self.coreset is not None)


@experiment("train")
def run_training(settings: TrainSettings, *, samples: Samples, report: Report, workers: Workers) -> None:
    """Train a model on all samples, on a coreset of another run, or on one selected before or during training.

    Example:
        effray train --dataset digits --model resnet8 --select.fraction 0.5 --train.epochs 10
    """
    from raypkg.experiments.summary import finish
    from raypkg.experiments.training import Job, train_on_cluster

    settings.check(len(samples.train_indices), samples.data)
    storage = report.folder.storage
    coreset = None
    if settings.coreset is not None:
        from raypkg.experiments.coreset_files import GIVEN, given_coreset

        replaced = settings.select is not None and settings.select.every_epochs > 0
        coreset = given_coreset(settings, settings.coreset, samples, storage, GIVEN if replaced else CORESET)
    job = Job(settings, settings.train, storage, coreset=coreset, select=settings.select)
    train_on_cluster(job, samples, report, workers)
    finish(report, settings, samples, epochs=settings.train.epochs)


class SelectSettings(Select, RunSettings):
    """Settings of `effray select`."""

    preset: RulePreset = None
    model_from: str = Field("", description="run whose model selects, by name or path; A,B = several (el2n, grand)")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="precision of the forward pass; auto = bfloat16 where the processor computes in it"
    )


@experiment("select")
def run_selection(settings: SelectSettings, *, samples: Samples, report: Report) -> None:
    """Select a coreset with the last-layer gradients of another run's model, or by what its training recorded.

    The data set, the seed and the held-out share are those of that run.

    Example:
        effray train --name first --train.epochs 5 && effray select --model-from first --rule craig --fraction 0.2
    """
    from raypkg.coresets.sharded import check_selects_once
    from raypkg.experiments.selection import select_in_phase, trained_models
    from raypkg.experiments.summary import finish

    check_selects_once(settings)
    models = trained_models(settings, samples, report.folder)
    select_in_phase(settings, settings, models, samples, report)
    finish(report, settings, samples)


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
    def _check_unused(self) -> Self:
        if bool(self.model.name) == bool(self.model_from):
            raise UserError("embed needs a model: give one of --model NAME and --model-from RUN")
        if self.model_from and self.model.options:
            raise UserError("model.options would do nothing: the model of --model-from is as its run has it")
        if self.dataset.only is not None:
            raise UserError("dataset.only: embed takes every sample; choose among the rows where you train on them")
        if self.dataset.augment and not self.draws:
            raise UserError("dataset.augment would do nothing: give --draws, the number of rows of each sample")
        return self

    def lookups(self) -> list[Lookup]:
        """Return the model, if it is chosen by name."""
        return [Lookup(model, self.model.name, self.model.options)] if self.model.name else []


@experiment("embed")
def run_embedding(settings: EmbedSettings, *, samples: Samples, report: Report) -> None:
    """Compute the features of all samples by a frozen model, once: `table:RUN_FOLDER` is then a data set of rows.

    Its rows have the labels and the ids of the samples. The same seed holds out the same samples as of the data itself.

    Example:
        effray embed --model resnet8 --name rows && effray train --dataset table:runs/embed/rows --model linear
    """
    from raypkg.experiments.embedding import embed
    from raypkg.experiments.summary import finish

    embed(settings, samples.data, report)
    finish(report, settings, samples)
