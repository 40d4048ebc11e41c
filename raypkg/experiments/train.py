"""Plain training on all samples, a random part of them, or a given coreset: the honest baseline."""

from typing import Annotated

from pydantic import Field

from raypkg.core.settings import Experiment, Share, Train
from raypkg.runs.report import Report

from . import experiment


class TrainSettings(Experiment):
    """Settings of `effray train`."""

    fraction: Annotated[Share, Field(description="share of the training samples, drawn class by class")] = 1.0
    coreset: Annotated[str | None, Field(description="a coreset.parquet to train on instead")] = None
    train: Train = Train()


@experiment("train")
def run(settings: TrainSettings, *, report: Report) -> None:
    """Train a model on all samples, on a random part of them, or on the coreset of another run.

    Example:
        effray train --dataset digits --model resnet8 --fraction 0.5 --train.epochs 10
    """
    from raypkg.phases.coresets import load_coreset, save_coreset
    from raypkg.phases.samples import random_subset, samples
    from raypkg.phases.summary import finish
    from raypkg.phases.train import Job, train_on_cluster

    found, storage = samples(settings.dataset, settings.seed), report.folder.storage
    split = found.data.train
    if settings.coreset:
        coreset = load_coreset(settings.coreset, split, held_out=found.valid)
    else:
        coreset = random_subset(split.y, found.kept, settings.fraction, settings.seed)
    source = settings.coreset or f"random {settings.fraction:g}"
    save_coreset(storage, coreset, split, {"seed": settings.seed, "source": source})
    train_on_cluster(Job(settings, settings.train, storage, "train", coreset, "model.safetensors"), report)
    finish(report.folder, found, coreset, epochs=settings.train.epochs)
