"""What CREST's work depends on: τ, h, b and r, for its accuracy beside its cost as the Pareto front shows them."""

from typing import Any

from ray import tune

METRIC, MODE = "accuracy", "max"


def space() -> dict[str, Any]:
    """Return dotted setting names with what to draw them from."""
    return {
        "crest.tau": tune.loguniform(0.01, 0.5),
        "crest.h": tune.choice([1.0, 3.0, 10.0]),
        "crest.b": tune.choice([1, 5]),
        "crest.subset": tune.choice([0.01, 0.02]),  # shares of the samples
    }
