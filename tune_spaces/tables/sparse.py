"""Sparse training by fixed masks, SET and RigL, each with and without AGENT, beside the dense model."""

from raypkg.studies.tables import Table

PUBLISHED = {  # SET-ITOP with AGENT, 250 epochs: arXiv:2301.03573
    "CIFAR-10; VGG-C; 1 %": ("vgg-c", "88.6 % at epoch 240"),
    "CIFAR-10; ResNet-34; 1 %": ("resnet34", "92.5 % at epoch 240"),
}
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
    cases = {}
    for label, (network, _) in PUBLISHED.items():
        cases[label] = {"dataset.name": "cifar10", "model.name": network, "density": 0.01}
    return Table(
        title="Sparse training by fixed masks, SET and RigL, and AGENT, at 5 and 1 % of the weights",
        experiment="sparse",
        baseline="static",
        as_baseline=("static; 2 × epochs", "static; 3 × epochs"),
        shared={"model.name": "mlp", "train.epochs": 12, "train.evaluate_every_epochs": 3} if small else {},
        rows=rows,
        cases={"5 %": {"density": 0.05}, "1 %": {"density": 0.01}} if small else cases,
        columns={"density": "density", "R_s: share\never active": "explored"},
        paper={label: {"SET + AGENT": figure} for label, (_, figure) in PUBLISHED.items()},
    )
