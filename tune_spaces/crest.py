"""What to vary in CREST: how long mini-batch coresets are trusted, how many make a pool, and the learning rate.

The size of their random subsets, crest.subset, is a share of the samples: which ones are sensible depends on the data.
"""

from typing import Any

from ray import tune

METRIC, MODE = "accuracy", "max"


def space() -> dict[str, Any]:
    """Return dotted setting names with what to draw them from."""
    return {
        "crest.tau": tune.loguniform(0.01, 0.3),
        "crest.h": tune.choice([1.0, 3.0, 10.0]),
        "crest.b": tune.choice([1, 3, 5]),
        "train.lr": tune.loguniform(0.03, 0.3),
    }
