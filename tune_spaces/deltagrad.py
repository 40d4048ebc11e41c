"""What to vary in DeltaGrad: the recorded training, and the batches that decide how large its history is."""

from typing import Any

from ray import tune

METRIC, MODE = "accuracy", "max"


def space() -> dict[str, Any]:
    """Return dotted setting names with what to draw them from."""
    return {
        "train.lr": tune.loguniform(0.03, 1.0),
        "train.batch_size": tune.choice([256, 1024, 16384]),
        "train.weight_decay": tune.loguniform(1e-4, 1e-2),
    }
