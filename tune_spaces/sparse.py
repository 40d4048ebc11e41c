"""What to vary in sparse training: how few weights exist, how they are chosen, and how often that changes."""

from typing import Any

from ray import tune

METRIC, MODE = "accuracy", "max"


def space() -> dict[str, Any]:
    """Return dotted setting names with what to draw them from."""
    return {
        "density": tune.choice([0.02, 0.05, 0.1, 0.2]),
        "growth": tune.choice(["random", "gradient", "momentum"]),
        "death_rate": tune.uniform(0.1, 0.7),
        "train.lr": tune.loguniform(0.03, 0.3),
    }
