"""A space for CREST: lifetime of mini-batch coresets, size of their pool, and learning rate.

The size of the random subsets, crest.subset, is a share of the samples; sensible values depend on the data.
"""

from typing import Any

from ray import tune

METRIC, MODE = "accuracy", "max"


def space() -> dict[str, Any]:
    """Return domains by dotted names of settings."""
    return {
        "crest.tau": tune.loguniform(0.01, 0.3),
        "crest.h": tune.choice([1.0, 3.0, 10.0]),
        "crest.b": tune.choice([1, 3, 5]),
        "train.lr": tune.loguniform(0.03, 0.3),
    }
