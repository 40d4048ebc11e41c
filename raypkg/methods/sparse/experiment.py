"""Sparse training: SET, RigL and ITOP, static masks, gradual pruning, with or without AGENT's gradient correction."""

from raypkg.experiments import experiment
from raypkg.runs.report import Report

from .settings import SparseSettings


@experiment("sparse", source="arXiv:2301.03573")
def run(settings: SparseSettings, *, report: Report) -> None:
    """Train a model of which few weights exist at a time, those that matter changing as training goes on.

    Masks are applied to dense arithmetic, which saves nothing: linear layers compute with what exists by --compute
    sparse, and `effray export --format csr` leaves out the rest.

    Example:
        effray sparse --dataset digits --model mlp --density 0.1 --growth gradient --correction agent
    """
    from raypkg.phases.coreset_files import FILE, given_coreset, origin, save_coreset
    from raypkg.phases.samples import samples
    from raypkg.phases.summary import finish
    from raypkg.phases.training import MODEL, Job, train_on_cluster

    from .run import draw_sparse, train_sparse

    found, storage = samples(settings.dataset, settings.seed), report.folder.storage
    if settings.coreset is not None:
        coreset = given_coreset(settings, settings.coreset, found, storage, FILE)
    else:
        coreset = found.everyone
        save_coreset(storage, coreset, found.data.train, origin(settings))
    settings.check(len(coreset))
    training = settings.train.model_copy(update={"epochs": settings.epochs})
    train_on_cluster(Job(settings, training, storage, "train", coreset, MODEL), report, train_sparse)
    draw_sparse(storage)
    finish(report.folder, settings, found, epochs=settings.epochs)
