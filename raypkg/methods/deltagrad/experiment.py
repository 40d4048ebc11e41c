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
    from raypkg.phases.coreset_files import origin, save_coreset
    from raypkg.phases.samples import samples
    from raypkg.phases.summary import finish
    from raypkg.phases.training import MODEL, Job, train_on_cluster

    from .recording import announced, begin_log, train_recorded

    found, storage = samples(settings.dataset, settings.seed), report.folder.storage
    settings.check(len(found.kept))
    report.say(announced(settings, found, storage))
    save_coreset(storage, found.everyone, found.data.train, origin(settings))
    job = Job(settings, settings.train, storage, "train", found.everyone, MODEL)
    begin_log(storage, settings, train_on_cluster(job, report, train_recorded), found)
    finish(report.folder, settings, found, epochs=settings.train.epochs)
