"""What a run of CREST or one of its baselines is going to do, for those who look on."""

from raypkg.experiments.outlook import in_whole_batches, main_stage, outlook
from raypkg.runs.stages import Stage

from .settings import CrestSettings


@outlook("crest")
def crest_stages(settings: CrestSettings) -> list[Stage]:
    """Return the training within the budget: fewer epochs on all samples, or all of them on a coreset of its size."""
    if not settings.by_batches:
        return [main_stage(settings, settings.budget)]
    stage = main_stage(settings)
    return [in_whole_batches(stage) if settings.selection == "crest" else stage]
