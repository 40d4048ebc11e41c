"""DeltaGrad: training whose every step is recorded, so that samples can be deleted and added without training again."""

from raypkg.cluster.workers import Workers
from raypkg.core.config import Named
from raypkg.experiments import experiment
from raypkg.runs.report import Report

from .settings import DeltaGradSettings


@experiment("deltagrad", source="arXiv:2006.14755")
def run(settings: DeltaGradSettings, *, report: Report, workers: Workers) -> None:
    """Train and record every step; `delete` and `add` then update the model in a fraction of the time of retraining.

    The history takes 2 · steps · parameters numbers: made for convex heads, small networks and large batches.

    Example:
        effray deltagrad train --dataset digits
    """
    from raypkg.experiments.samples import new_model, open_samples
    from raypkg.experiments.summary import finish
    from raypkg.experiments.training import Job, train_on_cluster

    from .history import Layout, check_room, history_folder
    from .recorded_run import begin_log

    samples = open_samples(settings)
    settings.check(len(samples.train_indices))
    storage = report.folder.storage
    layout = Layout.of(new_model(settings, samples.data), settings.history.dtype)
    per_epoch = -(-len(samples.train_indices) // settings.train.batch_size)
    steps = settings.train.epochs * per_epoch
    check_room(history_folder(storage, 0), layout, steps)
    report.say(f"history: {layout.describe(steps)}")
    job = Job(settings, settings.train, storage, hooks=(Named(name="deltagrad"),))
    record = train_on_cluster(job, report, workers)
    begin_log(storage, settings, samples, record["history"])
    finish(report, settings, samples, epochs=settings.train.epochs)
