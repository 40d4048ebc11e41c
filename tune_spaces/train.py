"""A space for plain training: the optimiser."""

from typing import Any

from ray import tune

METRIC, MODE = "accuracy", "max"


def space() -> dict[str, Any]:
    """Return domains by dotted names of settings."""
    return {
        "train.lr": tune.loguniform(0.01, 0.5),
        "train.weight_decay": tune.loguniform(1e-5, 1e-2),
        "train.batch_size": tune.choice([32, 64, 128]),
    }
