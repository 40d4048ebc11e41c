"""What a run of CREST or one of its baselines is going to do, for those who look on."""

from functools import partial

from raypkg.core.settings import Training
from raypkg.phases.outlook import main_stage, outlook
from raypkg.runs.stages import Stage

from .settings import CrestSettings


@outlook("crest")
def crest_stages(settings: CrestSettings) -> list[Stage]:
    """Return the training within the budget: fewer epochs on all samples, or all of them on a coreset of its size."""
    if not settings.by_batches:
        return [main_stage(settings, settings.budget)]
    stage = main_stage(settings)
    if settings.selection == "crest":
        return [stage._replace(size=partial(_in_whole_batches, settings.train))]
    return [stage]


def _in_whole_batches(training: Training, n: int) -> int:
    """Return the samples in an epoch's mini-batch coresets, each of which is as large as a batch."""
    return training.steps_per_epoch(n) * training.batch_size
