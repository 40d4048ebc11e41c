"""DeltaGrad: training whose every step is recorded, so that samples can be deleted and added without training again."""

from raypkg.experiments import experiment
from raypkg.runs.report import Report

from .settings import DeltaGradSettings


@experiment("deltagrad", source="arXiv:2006.14755")
def run(settings: DeltaGradSettings, *, report: Report) -> None:
    """Train and record every step; `delete` and `add` then update the model in a fraction of the time of retraining.

    The history takes 2 · steps · parameters numbers: made for convex heads, small networks and large batches.

    Example:
        effray deltagrad train --dataset digits
    """
    from raypkg.phases.samples import open_samples
    from raypkg.phases.summary import finish
    from raypkg.phases.training import Job, train_on_cluster

    from .recording import announced, begin_log

    samples = open_samples(settings)
    settings.check(len(samples.kept))
    storage = report.folder.storage
    report.say(announced(settings, samples, storage))
    record = train_on_cluster(Job(settings, settings.train, storage, hooks=("deltagrad",)), report)
    begin_log(storage, settings, record, samples)
    finish(report, settings, samples, epochs=settings.train.epochs)
