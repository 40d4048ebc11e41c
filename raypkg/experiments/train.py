"""Plain training on all samples, a coreset selected along the way, or a given one: the honest baselines."""

from typing import Annotated

from pydantic import Field

from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment, Reselect, Share, Train
from raypkg.runs.report import Report

from . import experiment


class TrainSelect(Reselect):
    """Selection of what to train on, before and during training."""

    method: Annotated[str, Field(description="random, infobatch or another; see `effray methods`")] = "random"
    fraction: Annotated[Share, Field(description="share of the training samples in use at a time")] = 1.0


class TrainSettings(Experiment):
    """Settings of `effray train`."""

    coreset: Annotated[str | None, Field(description="a coreset.parquet to begin with")] = None
    select: TrainSelect = TrainSelect()
    train: Train = Train()

    def check(self, n: int) -> None:
        """Refuse settings of a selection that never comes.

        Raises:
            UserError: what is wrong.
        """
        from raypkg.coresets.reselection import check_schedule

        if self.coreset is not None and not self.select.every and self.select != TrainSelect(warm=self.select.warm):
            raise UserError("--coreset is given and select.every is 0: select.* but select.warm would do nothing")
        if self.coreset is None or self.select.every or self.select.warm:
            check_schedule(self.select, self.epochs)


@experiment("train")
def run(settings: TrainSettings, *, report: Report) -> None:
    """Train a model on all samples, on a coreset of another run, or on one selected before or during training.

    Example:
        effray train --dataset digits --model resnet8 --select.fraction 0.5 --train.epochs 10
    """
    from raypkg.phases.coreset_files import FILE, GIVEN, given_coreset
    from raypkg.phases.samples import samples
    from raypkg.phases.summary import finish
    from raypkg.phases.training import MODEL, Job, train_on_cluster

    found, storage, select = samples(settings.dataset, settings.seed), report.folder.storage, settings.select
    settings.check(len(found.kept))
    coreset = None
    if settings.coreset is not None:
        coreset = given_coreset(settings, settings.coreset, found, storage, GIVEN if select.every else FILE)
    train_on_cluster(Job(settings, settings.train, storage, "train", coreset, MODEL, select=select), report)
    finish(report.folder, settings, found, epochs=settings.train.epochs)
