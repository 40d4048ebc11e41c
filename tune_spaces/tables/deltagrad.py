"""DeltaGrad against retraining: seconds and distance after one deletion, or after consecutive requests."""

from raypkg.studies.tables import Table

ONE = "raypkg.methods.deltagrad.experiment:delete_some"
ONLINE = "raypkg.methods.deltagrad.experiment:delete_one_after_another"


def table(scale: str) -> Table:
    """Return the table at a scale."""
    small = scale == "small"
    rows: dict[str, dict[str, object]] = {
        "deltagrad": {},
        "m 8": {"replay.pairs": 8},
        "T0 20; j0 5": {"replay.period": 20, "replay.burn_in": 5},
        "m 8; T0 20; j0 5": {"replay.pairs": 8, "replay.period": 20, "replay.burn_in": 5},
        "every step exact": {"replay.period": 1},
        "deltagrad; one after another": {},
        "m 8; one after another": {"replay.pairs": 8},
    }
    return Table(
        title="DeltaGrad against retraining after deletions: seconds, and distance from the retrained weights",
        experiment="deltagrad",
        baseline="deltagrad",
        gain="ratio",
        shared={"train.evaluate_every_epochs": 0, **({"train.batch_size": 256} if small else {})},
        rows=rows,
        seeds=tuple(range(10)),
        columns={
            "retraining, s": "retraining_seconds",
            "answer, s": "answer_seconds",
            "ratio": "ratio",
            "distance": "distance",
            "over the norm": "relative_distance",
            "exact steps": "exact_share",
        },
        paper={  # MNIST, logistic regression: arXiv:2006.14755 and its released logs
            "ratio; 0.1 % deleted": {"deltagrad": 2.4},
            "distance; 0.1 % deleted": {"deltagrad": "4.4e-3 → 8e-5"},
            "ratio; 1 %; full batch": {"deltagrad": 2.7, "T0 20; j0 5": 6.4},
            "distance; 1 %; full batch": {"deltagrad": "1.3e-2 → 5.0e-5", "T0 20; j0 5": "→ 1.4e-3"},
            "ratio; 100 requests": {"deltagrad; one after another": 2.54},
        },
        after={row: ONLINE if row.endswith("one after another") else ONE for row in rows},
    )
