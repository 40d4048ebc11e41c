"""LiPT: cheap parallel pre-training selects the coreset that the main model is trained on."""

from raypkg.experiments import experiment
from raypkg.runs.report import Report

from .settings import LiptSettings


@experiment("lipt", source="PMLR 202:29130, reconstructed")
def run(settings: LiptSettings, *, report: Report) -> None:
    """Pre-train sparse models in parallel, merge them, select a coreset by the merged gradients, train on it.

    Example:
        effray lipt --dataset digits --model resnet8 --select.method gradmatch --select.fraction 0.2
    """
    from raypkg.phases.samples import samples
    from raypkg.phases.selection import select_on_cluster
    from raypkg.phases.summary import finish
    from raypkg.phases.training import MODEL, Job, train_on_cluster

    from .pretrain import PRETRAININGS, RESULT

    found = samples(settings.dataset, settings.seed)
    settings.check(len(found.kept))
    PRETRAININGS[settings.pretrain.method](settings, settings.pretrain, report)
    storage = report.folder.storage
    coreset = select_on_cluster(
        settings,
        settings.model,
        settings.select,
        found,
        report,
        weights=(storage, RESULT),
        precision=settings.pretrain.precision,
    )
    initial = RESULT if settings.train.init == "merged" else None
    train_on_cluster(Job(settings, settings.train, storage, "train", coreset, MODEL, initial, settings.select), report)
    finish(report.folder, settings, found, epochs=settings.train.epochs)
