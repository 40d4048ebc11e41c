"""InfoBatch against all samples, against as many random ones, and against fewer epochs of the same cost."""

from raypkg.studies.tables import Table

KEPT = 0.7  # share of the samples that InfoBatch back-propagates, about


def table(scale: str) -> Table:
    """Return the table at a scale."""
    epochs = 30 if scale == "small" else 200
    redrawn = {"select.every_epochs": 1}
    return Table(
        title=f"InfoBatch against all samples, {KEPT:.0%} drawn at random every epoch, and {KEPT:.0%} of the epochs",
        experiment="train",
        baseline="all samples",
        shared={"train.epochs": epochs, "train.evaluate_every_epochs": 1 if scale == "small" else 10},
        rows={
            "all samples": {},
            "infobatch": {"select.rule": "infobatch", "select.fraction": 1.0, **redrawn},
            f"random {KEPT:.0%}; redrawn": {"select.rule": "random", "select.fraction": KEPT, **redrawn},
            f"{KEPT:.0%} of the epochs": {"train.epochs": round(KEPT * epochs)},
        },
    )
