"""A space for sparse training: density, growth rule, share of weights replaced, and learning rate."""

from typing import Any

from ray import tune

METRIC, MODE = "accuracy", "max"


def space() -> dict[str, Any]:
    """Return domains by dotted names of settings."""
    return {
        "density": tune.choice([0.02, 0.05, 0.1, 0.2]),
        "growth": tune.choice(["random", "gradient", "momentum"]),
        "death_rate": tune.uniform(0.1, 0.7),
        "train.lr": tune.loguniform(0.03, 0.3),
    }
