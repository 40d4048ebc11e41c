"""What to vary in LiPT: how many models, how long, how sparse, and which method selects."""

from typing import Any

from ray import tune

METRIC, MODE = "accuracy", "max"


def space() -> dict[str, Any]:
    """Return dotted setting names with what to draw them from."""
    return {
        "pretrain.models": tune.choice([4, 10, 20]),
        "pretrain.epochs": tune.choice([2, 5, 10]),
        "pretrain.density": tune.uniform(0.2, 1.0),
        "pretrain.lr": tune.loguniform(0.01, 0.3),
        "select.method": tune.choice(["grand", "gradmatch", "glister"]),
    }
