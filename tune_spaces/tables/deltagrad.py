"""DeltaGrad against retraining: seconds and distance after one deletion, or after consecutive requests."""

from raypkg.studies.tables import Table

AFTER = "raypkg.methods.deltagrad.experiment:"
FULL_BATCH = {"train.batch_size": 20_000_000}  # more than there are samples
RARE = {"replay.period": 20, "replay.burn_in": 5}
MNIST = {"dataset.name": "mnist", "dataset.validation": 0.0}
SYNTHETIC = {"dataset.name": "synthetic"}
PAPER = {  # rows of the real shapes are made up; T0 and j0 are the published ones
    "MNIST; linear": MNIST,
    "MNIST; 784-300-10": {
        **MNIST,
        "model.name": "mlp",
        "model.options.hidden": [300],
        "replay.period": 2,
        "replay.burn_in": 100,
    },
    "covtype's shape": {**SYNTHETIC, "dataset.options.like": "covtype", "replay.period": 5, "replay.burn_in": 10},
    "HIGGS's shape": {**SYNTHETIC, "dataset.options.like": "higgs", "replay.period": 3, "replay.burn_in": 300},
    "RCV1's shape": {**SYNTHETIC, "dataset.options.like": "rcv1", "replay.period": 10, "replay.burn_in": 10},
}


def table(scale: str) -> Table:
    """Return the table at a scale."""
    small = scale == "small"
    rows: dict[str, dict[str, object]] = {
        "deltagrad": {},
        "m 8": {"replay.pairs": 8},
        "T0 20; j0 5": RARE,
        "m 8; T0 20; j0 5": {"replay.pairs": 8, **RARE},
        "every step exact": {"replay.period": 1},
        "deltagrad; one after another": {},
        "m 8; one after another": {"replay.pairs": 8},
        "deltagrad; 1 %": {},
        "full batch; 1 %": FULL_BATCH,
        "full batch; T0 20; j0 5; 1 %": {**FULL_BATCH, **RARE},
    }
    after = {}
    for row in rows:
        if row.endswith("one after another"):
            after[row] = AFTER + ("delete_one_after_another" if small else "delete_a_hundred")
        else:
            after[row] = AFTER + ("delete_a_hundredth" if row.endswith("1 %") else "delete_some")
    return Table(
        title="DeltaGrad against retraining after deletions: seconds, and distance from the retrained weights",
        experiment="deltagrad",
        baseline="deltagrad",
        gain="ratio",
        shared={"train.evaluate_every_epochs": 0, **({"train.batch_size": 256} if small else {})},
        rows=rows,
        cases={"all": {}} if small else PAPER,
        seeds=tuple(range(10)),
        columns={
            "retraining, s": "retraining_seconds",
            "answer, s": "answer_seconds",
            "ratio": "ratio",
            "distance": "distance",
            "over the norm": "relative_distance",
            "exact steps": "exact_share",
        },
        # The released example. Lengths and rates of the paper's other rows are not known: see the card.
        paper={"MNIST; linear": {"deltagrad": "ratio 2.8; 2.7e-3 → 7.2e-5"}},
        after=after,
    )
