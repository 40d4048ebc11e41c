"""What a run of CREST or one of its baselines is going to do, for those who look on."""

from raypkg.phases.outlook import main_stage, outlook
from raypkg.runs.stages import Stage

from .settings import CrestSettings


@outlook("crest")
def crest_stages(settings: CrestSettings) -> list[Stage]:
    """Return the training within the budget: fewer epochs on all samples, or all of them on a coreset of its size."""
    return [main_stage(settings, None if settings.by_batches else settings.budget)]
