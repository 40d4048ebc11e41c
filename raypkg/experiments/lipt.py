"""LiPT: cheap parallel pre-training selects the coreset that the main model is trained on."""

from typing import Annotated, Literal

from pydantic import Field

from raypkg.core.settings import Experiment, Pretrain, Reselect, Train
from raypkg.runs.report import Report

from . import experiment


class LiptTrain(Train):
    """Training of the main model on the coreset."""

    init: Annotated[
        Literal["scratch", "merged"], Field(description="first weights: drawn anew, or the pre-trained model's")
    ] = "scratch"


class LiptSettings(Experiment):
    """Settings of `effray lipt`."""

    pretrain: Pretrain = Pretrain()
    select: Reselect = Reselect()
    train: LiptTrain = LiptTrain()

    def check(self, n: int) -> None:
        """Refuse a method that acts during training only, and selections that never come.

        Raises:
            UserError: what is wrong.
        """
        from raypkg.engine.reselection import check_schedule
        from raypkg.phases.select import check

        check(self.select)
        if self.select.every or self.select.warm:
            check_schedule(self.select, self.epochs)


@experiment("lipt", source="PMLR 202:29130, reconstructed")
def run(settings: LiptSettings, *, report: Report) -> None:
    """Pre-train sparse models in parallel, merge them, select a coreset by the merged gradients, train on it.

    Example:
        effray lipt --dataset digits --model resnet8 --select.method gradmatch --select.fraction 0.2
    """
    from raypkg.phases.pretrain import PRETRAININGS, RESULT
    from raypkg.phases.samples import samples
    from raypkg.phases.select import select_on_cluster
    from raypkg.phases.summary import finish
    from raypkg.phases.train import MODEL, Job, train_on_cluster

    found = samples(settings.dataset, settings.seed)
    settings.check(len(found.kept))
    PRETRAININGS[settings.pretrain.method](settings, settings.pretrain, report)
    storage = report.folder.storage
    coreset = select_on_cluster(
        settings,
        settings.model,
        settings.select,
        found,
        report,
        weights=(storage, RESULT),
        precision=settings.pretrain.precision,
    )
    initial = RESULT if settings.train.init == "merged" else None
    train_on_cluster(Job(settings, settings.train, storage, "train", coreset, MODEL, initial, settings.select), report)
    finish(report.folder, settings, found, epochs=settings.train.epochs)
