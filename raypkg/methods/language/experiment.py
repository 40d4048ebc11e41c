"""Instruction tuning on the samples of a pool that serve a target: LESS, RDS+, or a random baseline."""

from raypkg.cluster.workers import Workers
from raypkg.experiments import experiment
from raypkg.experiments.phases import main_stage, outlook, selection_stage
from raypkg.experiments.samples import Samples
from raypkg.runs.report import Report, Stage

from .settings import POOL, TARGET, InstructSettings


@outlook("instruct")
def instruct_stages(settings: InstructSettings) -> list[Stage]:
    """Return warm-up, rows, selection and training, those that the rule needs."""
    stages = [selection_stage(), main_stage(settings)]
    if settings.sees_rows:
        stages.insert(0, Stage("rows", files=(f"{POOL}.npy", f"{TARGET}.npy")))
    if settings.by_gradients:
        warmup = settings.warmup
        models = warmup.models if warmup.by == "lipt" else 1
        stage = Stage("warmup", warmup.epochs, models=models, batch_size=warmup.batch_size)
        stages.insert(0, stage._replace(size=lambda n: -(-settings.warmup_size(n) // models)))
    return stages


@experiment("instruct", source="arXiv:2402.04333, arXiv:2503.01807")
def run(settings: InstructSettings, *, samples: Samples, report: Report, workers: Workers) -> None:
    """Select the instructions of a pool that serve a target by LESS or RDS+, and fine-tune adapters on them.

    Example:
        effray instruct --dataset instructions:pool --select.target instructions:few --model transformers-lm:FOLDER
    """
    from raypkg.experiments.selection import check_target_samples
    from raypkg.experiments.summary import finish
    from raypkg.experiments.training import Job, train_on_cluster

    from .phases import compute_rows, select_instructions, warm_up

    settings.check(len(samples.train_indices), samples.data)
    check_target_samples(settings.select, samples)
    workers.limit(settings.smallest_batch(len(samples.train_indices)))
    if settings.by_gradients:
        warm_up(settings, samples, report, workers)
    if settings.sees_rows:
        compute_rows(settings, samples, report, workers)
    coreset = select_instructions(settings, samples, report)
    job = Job(settings, settings.train, report.folder.storage, coreset=coreset)
    train_on_cluster(job, samples, report, workers)
    finish(report, settings, samples, epochs=settings.train.epochs)
