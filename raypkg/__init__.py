"""effray: gradient-based, data-efficient training on Ray.

What a notebook or a script of one's own needs is here, imported when it is first used:

>>> from raypkg import Run, build_model, evaluate, fit, load_data, select
>>> digits = load_data("digits")
>>> model = build_model("linear", digits.train.shape, digits.train.num_classes, seed=0)
>>> run = fit(Run.simple(model, digits.train, epochs=5, lr=0.1))
>>> evaluate(run.model, digits.test)["accuracy"] > 0.75
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .core.errors import UserError as UserError
    from .coresets.budgets import select as select
    from .coresets.gradients import HeadView as HeadView
    from .coresets.gradients import head_view as head_view
    from .coresets.loader import CoresetLoader as CoresetLoader
    from .coresets.record import Rows as Rows
    from .data import load_data as load_data
    from .data.coreset import Coreset as Coreset
    from .data.split import Split as Split
    from .engine.loop import evaluate as evaluate
    from .engine.loop import fit as fit
    from .engine.run import Hook as Hook
    from .engine.run import Run as Run
    from .experiments.trained import load_model as load_model
    from .methods.agent.correction import GradientCorrection as GradientCorrection
    from .methods.crest.loader import CrestLoader as CrestLoader
    from .methods.deltagrad import head as deltagrad  # noqa: F401 - a module under another name
    from .methods.deltagrad.estimator import DeltaGrad as DeltaGrad
    from .methods.language import api as language  # noqa: F401 - likewise
    from .methods.lipt import api as lipt  # noqa: F401 - likewise
    from .methods.sparse.training import SparseTraining as SparseTraining
    from .models import build_model as build_model
    from .studies.show import load_study as load_study
    from .studies.tables import Table as Table

__version__ = "0.3.0"
_PLACES = {
    "Coreset": "data.coreset",
    "CoresetLoader": "coresets.loader",
    "CrestLoader": "methods.crest.loader",
    "DeltaGrad": "methods.deltagrad.estimator",
    "GradientCorrection": "methods.agent.correction",
    "HeadView": "coresets.gradients",
    "Hook": "engine.run",
    "Rows": "coresets.record",
    "Run": "engine.run",
    "SparseTraining": "methods.sparse.training",
    "Split": "data.split",
    "Table": "studies.tables",
    "UserError": "core.errors",
    "build_model": "models",
    "evaluate": "engine.loop",
    "fit": "engine.loop",
    "head_view": "coresets.gradients",
    "load_data": "data",
    "load_model": "experiments.trained",
    "load_study": "studies.show",
    "select": "coresets.budgets",
}
_MODULES = {"deltagrad": "methods.deltagrad.head", "language": "methods.language.api", "lipt": "methods.lipt.api"}
__all__ = sorted({*_PLACES, *_MODULES})


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    if name not in _PLACES:
        raise AttributeError(f"module 'raypkg' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
