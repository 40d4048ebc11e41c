"""LiPT: cheap parallel pre-training selects the coreset that the main model is trained on."""

from typing import Annotated, Literal

from pydantic import Field

from raypkg.core.settings import Experiment, Pretrain, Select, Train
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
    select: Select = Select()
    train: LiptTrain = LiptTrain()


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
    from raypkg.phases.train import Job, train_on_cluster

    found = samples(settings.dataset, settings.seed)
    PRETRAININGS[settings.pretrain.method](settings, settings.pretrain, report)
    coreset = select_on_cluster(
        settings, settings.select, found, report, model=RESULT, precision=settings.pretrain.precision
    )
    initial = RESULT if settings.train.init == "merged" else None
    job = Job(settings, settings.train, report.folder.storage, "train", coreset, "model.safetensors", initial)
    train_on_cluster(job, report)
    finish(report.folder, found, coreset, epochs=settings.train.epochs)
