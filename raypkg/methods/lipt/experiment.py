"""LiPT: cheap parallel pre-training selects the coreset that the main model is trained on."""

from raypkg.cluster.workers import Workers
from raypkg.experiments import experiment
from raypkg.experiments.samples import Samples
from raypkg.runs.report import Report

from .settings import LiptSettings


@experiment("lipt", source="PMLR 202:29130, reconstructed")
def run(settings: LiptSettings, *, samples: Samples, report: Report, workers: Workers) -> None:
    """Pre-train models on shards in parallel, merge them, select a coreset by the merged gradients, train on it.

    Example:
        effray lipt --dataset digits --model resnet8 --select.rule gradmatch --select.fraction 0.2
    """
    from raypkg.experiments.selection import TrainedModel, check_target_samples, select_on_workers
    from raypkg.experiments.summary import finish
    from raypkg.experiments.training import Job, train_on_cluster

    from .pretrain import RESULT, pretraining

    settings.check(len(samples.train_indices), samples.data)
    check_target_samples(settings.select, samples)
    workers.limit(settings.smallest_batch(len(samples.train_indices)))
    pretrain = pretraining[settings.pretrain.method]
    pretrain(settings, report, samples=samples, workers=workers)

    storage = report.folder.storage
    pretrained = TrainedModel(settings.model, storage, RESULT, settings.pretrain.precision)
    coreset = select_on_workers(settings, settings.select, pretrained, samples, report, workers)

    merged = settings.train.init == "merged"
    job = Job(
        settings,
        settings.train,
        storage,
        coreset=coreset,
        select=settings.select,
        initial=RESULT if merged else None,
    )
    train_on_cluster(job, samples, report, workers)
    finish(report, settings, samples, epochs=settings.train.epochs)
