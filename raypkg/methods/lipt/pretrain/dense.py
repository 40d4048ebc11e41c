"""The usual pre-training, for comparison."""

from raypkg.cluster.workers import Workers
from raypkg.experiments.samples import Samples
from raypkg.experiments.training import Job, train_on_cluster
from raypkg.methods.lipt.settings import LiptSettings
from raypkg.runs.report import Report

from . import RESULT, pretraining


@pretraining("dense")
def pretrain_dense(settings: LiptSettings, report: Report, *, samples: Samples, workers: Workers) -> None:
    """Train one dense model on all samples by DDP."""
    storage = report.folder.storage
    job = Job(settings, settings.pretrain, storage, phase="pretrain", result=RESULT, main=False)
    train_on_cluster(job, samples, report, workers)
