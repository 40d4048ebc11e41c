"""AGENT's gradient correction against SGD at several rates, on a convex model and on deep ones."""

from raypkg.studies.tables import Table

CONSTANT = {"train.schedule": "constant", "train.momentum": 0.0, "train.nesterov": False}


def table(scale: str) -> Table:
    """Return the table at a scale."""
    small = scale == "small"
    rates = (0.03, 0.1, 0.3)
    rows: dict[str, dict[str, object]] = {
        "SGD": {},
        "AGENT": {"agent": True},
        "SGD; 2 × epochs": {"multiplier": 2},
        "SGD; 3 × epochs": {"multiplier": 3},
        "AGENT; measured": {"agent.form": "measured"},
        "AGENT; measured; always on": {"agent.form": "measured", "agent.always": True},
        "α-SVRG; linear": {"agent.form": "linear"},
    }
    for rate in rates:
        rows[f"SGD; cosine; rate {rate:g}"] = {
            "train.schedule": "cosine",
            "train.momentum": 0.0,
            "train.nesterov": False,
            "train.lr": rate,
        }
        rows[f"SGD; constant; rate {rate:g}"] = {**CONSTANT, "train.lr": rate}
        rows[f"AGENT; constant; rate {rate:g}"] = {**CONSTANT, "train.lr": rate, "agent": True}
    network = "resnet8" if small else "resnet34"
    return Table(
        title="AGENT against SGD: the same epochs, and SGD at its own best rate beside it",
        experiment="sparse",
        baseline="SGD",
        as_baseline=("SGD; 2 × epochs", "SGD; 3 × epochs"),
        shared={
            "train.epochs": 20 if small else 250,
            "train.evaluate_every_epochs": 1 if small else 5,
            "dataset.augment": [],
        },
        rows=rows,
        cases={
            "linear; convex": {"model.name": "linear", "train.weight_decay": 0.01, "density": False},
            "mlp": {"model.name": "mlp", "density": False},
            "mlp; RigL at 5 %": {"model.name": "mlp", "density": 0.05},
            "lenet5": {"model.name": "lenet5", "density": False},
            network: {"model.name": network, "density": False},
        },
        columns={"variance left": "variance_left", "steps corrected": "corrected_steps"},
        paper={
            "CIFAR-10, ResNet-50, 90 % sparse": {"SGD": "94.2 (RigL)", "AGENT": "95.0 (RigL)"},
            "99 % sparse": {"SGD": "92.5 (RigL)", "AGENT": "93.1 (RigL)"},
            "seconds an epoch": {"SGD": "1", "AGENT": "1.67 (SET) to 2 (RigL)"},
        },
    )
