"""Plain training, and selection with a model that another run trained."""

from typing import Any, Literal

from pydantic import Field

from raypkg.cluster.workers import Workers
from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment, Reselect, RulePreset, RunSettings, Select, Share, Train
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
    select: TrainSelect | None = Field(
        None, description="selection of the training samples (default: all, or the given coreset)"
    )
    train: Train = Train()

    def check(self, n: int, data: Any) -> None:
        """Refuse a selection that would never happen."""
        select = self.select
        if select is None:
            return
        from raypkg.coresets.reselection import check_schedule

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
    from raypkg.experiments.coreset_files import FILE, GIVEN, given_coreset
    from raypkg.experiments.summary import finish
    from raypkg.experiments.training import Job, train_on_cluster

    settings.check(len(samples.train_indices), samples.data)
    storage = report.folder.storage
    coreset = None
    if settings.coreset is not None:
        replaced = settings.select is not None and settings.select.every_epochs > 0
        coreset = given_coreset(settings, settings.coreset, samples, storage, GIVEN if replaced else FILE)
    job = Job(settings, settings.train, storage, coreset=coreset, select=settings.select)
    train_on_cluster(job, samples, report, workers)
    finish(report, settings, samples, epochs=settings.train.epochs)


class SelectSettings(Select, RunSettings):
    """Settings of `effray select`."""

    preset: RulePreset = None
    model_from: str = Field(
        "", description="run whose model selects, by name or path; A,B = several, for el2n and grand to average over"
    )
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
    from raypkg.coresets.reselection import check_selects_once
    from raypkg.experiments.selection import select_on_actors, trained_models
    from raypkg.experiments.summary import finish

    check_selects_once(settings)
    models = trained_models(settings, samples, report.folder)
    select_on_actors(settings, settings, models, samples, report)
    finish(report, settings, samples)
