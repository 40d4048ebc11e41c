"""A space for the cost of CREST: τ, h, b and r, for the Pareto front of accuracy against samples backward."""

from typing import Any

from ray import tune

METRIC, MODE = "accuracy", "max"


def space() -> dict[str, Any]:
    """Return domains by dotted names of settings."""
    return {
        "crest.tau": tune.loguniform(0.01, 0.5),
        "crest.h": tune.choice([1.0, 3.0, 10.0]),
        "crest.b": tune.choice([1, 5]),
        "crest.subset": tune.choice([0.01, 0.02]),  # shares of the samples
    }
