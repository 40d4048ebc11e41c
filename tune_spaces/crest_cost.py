"""What CREST's work depends on: τ, h, b and r. For --metric accuracy beside the cost, as the Pareto front shows it.

Random subsets are shares of the samples: those below are two to eight batches of 128 out of 45,000.
"""

from typing import Any

from ray import tune

METRIC, MODE = "accuracy", "max"


def space() -> dict[str, Any]:
    """Return dotted setting names with what to draw them from."""
    return {
        "select.tau": tune.loguniform(0.01, 0.5),
        "select.h": tune.choice([1.0, 3.0, 10.0]),
        "select.b": tune.choice([1, 5]),
        "select.subset": tune.choice([0.0057, 0.0114, 0.0228]),
    }
