"""LiPT: cheap parallel pre-training selects the coreset that the main model is trained on."""

from raypkg.cluster.workers import Workers
from raypkg.core.config import fields_of
from raypkg.core.settings import Select
from raypkg.experiments import experiment
from raypkg.experiments.phases import main_stage, outlook, selection_stage
from raypkg.experiments.samples import Samples
from raypkg.runs.report import Report, Stage

from . import pretraining
from .settings import RESULT, LiptSettings

FILES = (RESULT, "pretrained_record.parquet")
OURS = ("lipt", "dense", "initial")  # a user's pre-training may depend on any setting
FOR_PRETRAINING = ("seed", "dataset", "model", "pretrain", "cluster")  # batch norm sees each worker's part
FOR_SELECTION = tuple(f"select.{name}" for name in fields_of(Select))  # not if the main training selects again


@outlook("lipt")
def lipt_stages(settings: LiptSettings) -> list[Stage]:
    """Return pre-training, selection and the main training; a user's pre-training is taken to be like the dense one."""
    pretrain = settings.pretrain
    stages = [Stage("pretrain", pretrain.epochs, batch_size=pretrain.batch_size, files=FILES)]
    if pretrain.method == "initial":
        stages = [Stage("pretrain", files=(RESULT,))]
    elif pretrain.method == "lipt":
        stages = [stages[0]._replace(models=pretrain.models, size=pretrain.shard_size)]
        if pretrain.joint_epochs:
            joint = Stage("joint", pretrain.joint_epochs, batch_size=pretrain.joint.batch_size, files=FILES)
            stages = [stages[0]._replace(files=()), joint]
    selection = selection_stage()
    if pretrain.method in OURS:
        stages[-1] = stages[-1]._replace(depends_on=FOR_PRETRAINING)
        selection = selection._replace(depends_on=FOR_PRETRAINING + FOR_SELECTION)
    return [*stages, selection, main_stage(settings)]


@experiment("lipt", source="PMLR 202:29130, reconstructed")
def run(settings: LiptSettings, *, samples: Samples, report: Report, workers: Workers) -> None:
    """Pre-train models on shards in parallel, merge them, select a coreset by the merged gradients, train on it.

    Example:
        effray lipt --dataset digits --model resnet8 --select.rule gradmatch --select.fraction 0.2
    """
    from raypkg.experiments.selection import TrainedModel, check_target_samples, select_in_phase
    from raypkg.experiments.summary import finish
    from raypkg.experiments.training import Job, train_on_cluster

    settings.check(len(samples.train_indices), samples.data)
    check_target_samples(settings.select, samples)
    workers.limit(settings.smallest_batch(len(samples.train_indices)))
    pretrain = pretraining[settings.pretrain.method]
    pretrain(settings, report, samples=samples, workers=workers)

    storage = report.folder.storage
    pretrained = TrainedModel(settings.model, storage, RESULT, settings.pretrain.precision)
    coreset = select_in_phase(settings, settings.select, [pretrained], samples, report, workers)

    initial = RESULT if settings.train.init == "merged" else None
    job = Job(settings, settings.train, storage, coreset=coreset, select=settings.select, initial=initial)
    train_on_cluster(job, samples, report, workers)
    finish(report, settings, samples, epochs=settings.train.epochs)
