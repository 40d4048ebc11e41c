"""No pre-training, for comparison."""

from typing import Any

from raypkg.engine.costs import Cost
from raypkg.experiments.samples import Samples, new_model
from raypkg.methods.lipt.settings import LiptSettings
from raypkg.runs.checkpoints import save_tensors
from raypkg.runs.report import Report

from . import RESULT, pretraining


@pretraining("initial")
def keep_initial(settings: LiptSettings, report: Report, *, samples: Samples) -> None:
    """Select by the gradients of the initial weights."""

    def work() -> dict[str, Any]:
        with Cost("pretrain") as cost:
            model = new_model(settings, samples.data)
            save_tensors(report.folder.storage, RESULT, model.state_dict())
        return {"costs": [cost.record()], "workers": 1}

    report.phase("pretrain", work, epochs=0)
