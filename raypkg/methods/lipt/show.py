"""What a run of LiPT is going to do, for those who look on."""

from raypkg.core.config import fields_of
from raypkg.core.settings import Select
from raypkg.experiments.outlook import main_stage, outlook, selection_stage
from raypkg.runs.stages import Stage

from .pretrain import RESULT
from .settings import LiptSettings, Pretrain

LEFT = (RESULT, "pretrained_record.parquet")
OURS = ("lipt", "dense", "initial")  # one of the user's own may look at any setting
FOR_PRETRAINING = ("seed", "dataset", "model", "pretrain", "cluster")  # batch norm sees each worker's part
FOR_SELECTION = tuple(f"select.{name}" for name in fields_of(Select))  # not when the main training selects anew


@outlook("lipt")
def lipt_stages(settings: LiptSettings) -> list[Stage]:
    """Return pre-training, selection and the main training."""
    pretrain = settings.pretrain
    stages = [_pretraining(pretrain)]
    if pretrain.method == "lipt" and pretrain.joint_epochs:
        stages = [
            stages[0]._replace(files=()),
            Stage("joint", pretrain.joint_epochs, batch_size=pretrain.joint.batch_size, files=LEFT),
        ]
    selection = selection_stage()
    if pretrain.method in OURS:
        stages[-1] = stages[-1]._replace(depends_on=FOR_PRETRAINING)
        selection = selection._replace(depends_on=FOR_PRETRAINING + FOR_SELECTION)
    return [*stages, selection, main_stage(settings)]


def _pretraining(settings: Pretrain) -> Stage:
    """Return the pre-training; one of the user's own is taken to be like the dense one."""
    if settings.method == "initial":
        return Stage("pretrain", files=(RESULT,))
    stage = Stage("pretrain", settings.epochs, batch_size=settings.batch_size, files=LEFT)
    if settings.method == "lipt":
        return stage._replace(models=settings.models, size=settings.shard_size)
    return stage
