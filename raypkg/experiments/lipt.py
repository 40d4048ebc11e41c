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


@experiment("lipt", source="PMLR 202:29130, reconstructed")
def run(settings: LiptSettings, *, report: Report) -> None:
    """Pre-train sparse models in parallel, merge them, select a coreset by the merged gradients, train on it.

    Example:
        effray lipt --dataset digits --model resnet8 --select.method gradmatch --select.fraction 0.2
    """
    from raypkg.engine.reselection import check_schedule
    from raypkg.phases.pretrain import PRETRAININGS, RESULT
    from raypkg.phases.samples import samples
    from raypkg.phases.select import check, select_on_cluster
    from raypkg.phases.summary import finish
    from raypkg.phases.train import MODEL, Job, train_on_cluster

    check(settings.select)
    if settings.select.every or settings.select.warm:
        check_schedule(settings.select, settings.train.epochs)
    found = samples(settings.dataset, settings.seed)
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
