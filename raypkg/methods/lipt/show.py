"""What a run of LiPT is going to do, for those who look on."""

from raypkg.phases.outlook import main_stage, outlook, selection_stage
from raypkg.runs.stages import Stage

from .pretrain import RESULT
from .settings import LiptSettings, Pretrain

LEFT = (RESULT, "pretrained_record.parquet")


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
    return [*stages, selection_stage(), main_stage(settings)]


def _pretraining(settings: Pretrain) -> Stage:
    """Return the pre-training; one of the user's own is taken to be like the dense one."""
    if settings.method == "initial":
        return Stage("pretrain", files=(RESULT,))
    stage = Stage("pretrain", settings.epochs, batch_size=settings.batch_size, files=LEFT)
    if settings.method == "lipt":
        return stage._replace(models=settings.models, size=settings.shard_size)
    return stage
