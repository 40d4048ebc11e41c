"""CREST and its baselines within a budget of training."""

from raypkg.cluster.workers import Workers
from raypkg.core.config import Named
from raypkg.core.settings import Reselect
from raypkg.experiments import experiment
from raypkg.experiments.phases import in_whole_batches, main_stage, outlook
from raypkg.experiments.samples import Samples
from raypkg.runs.report import Report, Stage

from .settings import CrestSettings


@outlook("crest")
def crest_stages(settings: CrestSettings) -> list[Stage]:
    """Return the training within the budget: fewer steps on all samples, or all epochs on a coreset of its size."""
    if not settings.by_batches:
        return [main_stage(settings, settings.budget)]
    stage = main_stage(settings)._replace(epochs=settings.within)
    return [in_whole_batches(stage) if settings.selection == "crest" else stage]


@experiment("crest", source="arXiv:2306.01244")
def run(settings: CrestSettings, *, samples: Samples, report: Report, workers: Workers) -> None:
    """Train on mini-batch coresets, renewed at every step or when a local model of the loss expires, within a budget.

    The learning rate follows its whole schedule within the budget. Baselines at the same budget: --selection.

    Example:
        effray crest --dataset digits --budget 0.25
    """
    from raypkg.experiments.summary import finish
    from raypkg.experiments.training import Job, train_on_cluster

    settings.check(len(samples.train_indices), samples.data)
    storage = report.folder.storage
    within = settings.within
    compressed = settings.train.model_copy(update={"epochs": settings.epochs})  # the whole schedule within the budget
    match settings.selection:
        case "crest":
            crest = Named(name="crest", options=settings.crest.model_dump())
            job = Job(settings, compressed, storage, hooks=(crest,), length=within)
        case "random":
            job = Job(settings, compressed, storage, length=within)
        case "cut":
            job = Job(settings, settings.train, storage, last=within)
        case _:
            every = settings.every_epochs or 1
            chosen = {"rule": settings.selection, "fraction": settings.budget, "weighted": True, "every_epochs": every}
            job = Job(settings, settings.train, storage, select=Reselect(**chosen))
    train_on_cluster(job, samples, report, workers)
    finish(report, settings, samples, epochs=settings.train.epochs)
