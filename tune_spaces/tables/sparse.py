"""Sparse training by fixed masks, SET and RigL, each with and without AGENT, beside the dense model."""

from raypkg.studies.tables import Table

RULES = {"SET": {"growth": "random"}, "RigL": {"growth": "gradient"}}


def table(scale: str) -> Table:
    """Return the table at a scale."""
    small = scale == "small"
    # Without batch norm, first weights must suit the inputs that exist: by far the stronger form of every row.
    suited: dict[str, object] = {"fan_in": "sparse"} if small else {}
    static = {"growth": False, **suited}
    rows: dict[str, dict[str, object]] = {
        "static": static,
        "static; 2 × epochs": {**static, "multiplier": 2},
        "static; 3 × epochs": {**static, "multiplier": 3},
    }
    for name, rule in RULES.items():
        rows[name] = {**rule, **suited}
        rows[f"{name}; 2 × epochs"] = {**rule, **suited, "multiplier": 2}
        rows[f"{name} + AGENT"] = {**rule, **suited, "agent": True}
    rows["dense"] = {"density": False}
    rows["dense + AGENT"] = {"density": False, "agent": True}
    return Table(
        title="Sparse training by fixed masks, SET and RigL, and AGENT, at 5 and 1 % of the weights",
        experiment="sparse",
        baseline="static",
        as_baseline=("static; 2 × epochs", "static; 3 × epochs"),
        shared={
            "model.name": "mlp" if small else "vgg-c",
            "train.epochs": 12 if small else 250,
            "train.evaluate_every_epochs": 3 if small else 10,
        },
        rows=rows,
        cases={"5 %": {"density": 0.05}, "1 %": {"density": 0.01}},
        columns={"density": "density", "R_s: share\never active": "explored"},
        paper={
            "CIFAR-10, VGG-C, 1 %, SET-ITOP with AGENT, epoch 240": {"SET + AGENT": 88.6},
            "CIFAR-10, ResNet-34, 1 %, SET-ITOP with AGENT, epoch 240": {"SET + AGENT": 92.5},
        },
    )
