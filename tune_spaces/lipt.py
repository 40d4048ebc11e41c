"""A space for LiPT: number, length and batches of dense models, their merge, and the selection rule."""

from typing import Any

from ray import tune

METRIC, MODE = "accuracy", "max"


def space() -> dict[str, Any]:
    """Return domains by dotted names of settings."""
    return {
        "pretrain.sparsity": False,
        "pretrain.rounds": False,  # merged after every epoch
        "pretrain.models": tune.choice([4, 10, 20]),
        "pretrain.epochs": tune.choice([2, 5, 10]),
        "pretrain.batch_size": tune.choice([16, 32, 64, 128]),
        "pretrain.joint_epochs": tune.choice([0, 1, 2]),
        "pretrain.lr": tune.loguniform(0.01, 0.3),
        "select.rule": tune.choice(["grand", "gradmatch", "glister"]),
    }
