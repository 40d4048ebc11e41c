"""Sparse training by fixed masks, SET and RigL, each with and without AGENT, beside the dense model."""

from raypkg.studies.tables import Table

RULES = {"static": {"growth": False}, "SET": {"growth": "random"}, "RigL": {"growth": "gradient"}}


def table(scale: str) -> Table:
    """Return the table at a scale."""
    small = scale == "small"
    dense = {"density": False}
    rows: dict[str, dict[str, object]] = {"dense": dense, "dense + AGENT": {**dense, "agent": True}}
    for density in (0.05, 0.01):
        for name, rule in RULES.items():
            sparse = {"density": density, **rule}
            if small and name == "static":
                sparse["fan_in"] = "sparse"  # the stronger baseline where there is no batch norm
            rows[f"{name}; {density:.0%}"] = sparse
            rows[f"{name} + AGENT; {density:.0%}"] = {**sparse, "agent": True}
    return Table(
        title="Sparse training against dense: fixed masks, SET and RigL at 5 and 1 % of the weights, and AGENT",
        experiment="sparse",
        baseline="dense",
        shared={
            "model.name": "mlp" if small else "vgg-c",
            "train.epochs": 12 if small else 250,
            "train.evaluate_every_epochs": 3 if small else 10,
        },
        rows=rows,
        columns={"density": "density", "R_s: share\never active": "explored"},
        paper={
            "CIFAR-10, VGG-C, SET-ITOP with AGENT, epoch 240": {"SET + AGENT; 1%": 88.6},
            "CIFAR-10, ResNet-34, SET-ITOP with AGENT, epoch 240": {"SET + AGENT; 1%": 92.5},
        },
    )
