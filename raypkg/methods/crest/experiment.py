"""CREST: trains on mini-batch coresets within a budget, beside the baselines at the same budget."""

from raypkg.core.settings import Reselect
from raypkg.experiments import experiment
from raypkg.runs.report import Report

from .settings import CrestSettings


@experiment("crest", source="arXiv:2306.01244")
def run(settings: CrestSettings, *, report: Report) -> None:
    """Train on mini-batch coresets, chosen anew when a local model of the loss expires, within a budget.

    The learning rate runs through its whole schedule within the budget. Baselines at the same budget: --selection.

    Example:
        effray crest --dataset digits --budget 0.25
    """
    from raypkg.phases.coreset_files import origin, save_coreset
    from raypkg.phases.samples import samples
    from raypkg.phases.summary import finish
    from raypkg.phases.training import MODEL, Job, train_model, train_on_cluster

    from .run import draw_regions, train_crest

    found, storage, epochs = samples(settings.dataset, settings.seed), report.folder.storage, settings.train.epochs
    settings.check(len(found.kept))
    compressed = settings.train.model_copy(update={"epochs": settings.within})
    match settings.selection:
        case "crest" | "random":
            job = Job(settings, compressed, storage, "train", found.everyone, MODEL)
        case "none":
            job = Job(settings, settings.train, storage, "train", found.everyone, MODEL, last=settings.within)
        case method:
            select = Reselect(
                method=method, fraction=settings.budget, weighted=True, every=settings.every or max(1, epochs // 10)
            )
            job = Job(settings, settings.train, storage, "train", None, MODEL, select=select)
    if settings.selection in ("random", "none"):
        save_coreset(storage, found.everyone, found.data.train, origin(settings))
    train_on_cluster(job, report, train_crest if settings.selection == "crest" else train_model)
    if settings.selection == "crest":
        draw_regions(storage, settings.select)
    finish(report.folder, settings, found, epochs=epochs)
