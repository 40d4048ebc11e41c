"""A space for DeltaGrad: the recorded training, and the batch size, which determines the size of its history."""

from typing import Any

from ray import tune

METRIC, MODE = "accuracy", "max"


def space() -> dict[str, Any]:
    """Return domains by dotted names of settings."""
    return {
        "train.lr": tune.loguniform(0.03, 1.0),
        "train.batch_size": tune.choice([256, 1024, 16384]),
        "train.weight_decay": tune.loguniform(1e-4, 1e-2),
    }
