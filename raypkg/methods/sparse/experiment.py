"""Sparse training: SET, RigL and ITOP, static masks, gradual pruning, with or without AGENT's gradient correction."""

from raypkg.cluster.workers import Workers
from raypkg.experiments import experiment
from raypkg.experiments.phases import in_whole_batches, main_stage, outlook
from raypkg.experiments.samples import Samples
from raypkg.runs.report import Report, Stage

from .settings import SparseSettings


@outlook("sparse")
def sparse_stages(settings: SparseSettings) -> list[Stage]:
    """Return the extended training, on mini-batch coresets if CREST chooses the batches."""
    stage = main_stage(settings)
    return [in_whole_batches(stage) if settings.crest else stage]


@experiment("sparse", source="arXiv:2301.03573")
def run(settings: SparseSettings, *, samples: Samples, report: Report, workers: Workers) -> None:
    """Train a model in which few weights exist at a time, and which of them do changes as training proceeds.

    Masks are applied to dense arithmetic, which saves nothing: linear layers compute with what exists by --compute
    sparse, and `effray export --to csr` leaves out the rest.

    Example:
        effray sparse --dataset digits --model mlp --density 0.1 --growth gradient --agent
    """
    from raypkg.experiments.coreset_files import given_coreset
    from raypkg.experiments.summary import finish
    from raypkg.experiments.training import Job, train_on_cluster
    from raypkg.runs.folder import CORESET

    storage = report.folder.storage
    coreset = None
    if settings.coreset is not None:
        coreset = given_coreset(settings, settings.coreset, samples, storage, CORESET)
    settings.check(len(samples.train_indices) if coreset is None else len(coreset), samples.data)
    job = Job(settings, settings.extended, storage, hooks=settings.hooks_used, coreset=coreset)
    train_on_cluster(job, samples, report, workers)
    finish(report, settings, samples, epochs=settings.epochs)
