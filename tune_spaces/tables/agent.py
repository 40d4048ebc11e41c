"""AGENT's gradient correction against SGD at several rates, on a convex model and on deep ones."""

from raypkg.studies.tables import Table

PUBLISHED = {  # RigL and RigL with AGENT on ResNet-50, 250 epochs: arXiv:2301.03573
    "CIFAR-10; ResNet-50; 10 %": ("cifar10", 0.1, 94.2, 95.0),
    "CIFAR-10; ResNet-50; 1 %": ("cifar10", 0.01, 92.5, 93.1),
    "CIFAR-100; ResNet-50; 10 %": ("cifar100", 0.1, 71.6, 72.1),
    "CIFAR-100; ResNet-50; 1 %": ("cifar100", 0.01, 66.0, 66.4),
}
SMALL = {
    "linear; convex": {"model.name": "linear", "train.weight_decay": 0.01, "density": False},
    "mlp": {"model.name": "mlp", "density": False},
    "mlp; RigL at 5 %": {"model.name": "mlp", "density": 0.05},
    "lenet5": {"model.name": "lenet5", "density": False},
    "resnet8": {"model.name": "resnet8", "density": False},
}
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
    cases = {}
    for label, (data, density, _, _) in PUBLISHED.items():
        cases[label] = {"dataset.name": data, "model.name": "resnet50", "density": density}
    return Table(
        title="AGENT against SGD: the same epochs, and SGD at its own best rate beside it",
        experiment="sparse",
        baseline="SGD",
        as_baseline=("SGD; 2 × epochs", "SGD; 3 × epochs"),
        shared={"train.epochs": 20, "train.evaluate_every_epochs": 1, "dataset.augment": []} if small else {},
        rows=rows,
        cases=SMALL if small else cases,
        columns={"variance left": "variance_left", "steps corrected": "corrected_steps"},
        paper={label: {"SGD": f"{plain} %", "AGENT": f"{ours} %"} for label, (*_, plain, ours) in PUBLISHED.items()},
    )
