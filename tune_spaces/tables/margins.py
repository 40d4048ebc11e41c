"""CCS by the margins that LiPT's models recorded, against those of dense trainings and random subsets.

Margins need no pass over the samples: each model records those of its own shard while it trains.
"""

from raypkg.studies.tables import Table

DENSE = (1, 2, 5, 10)  # epochs
# Dense models, merged after every epoch; the published ones are sparse and merged once.
LOCAL = {"pretrain.sparsity": False, "pretrain.rounds": False}


def table(scale: str) -> Table:
    """Return the table at a scale."""
    untrained = {"pretrain.method": "initial", "select.rule": "random"}
    rows: dict[str, dict[str, object]] = {
        "random; fixed": untrained,
        "random; redrawn": {**untrained, "select.every_epochs": 1},
        "all samples": {**untrained, "select.fraction": 1.0},
        "lipt": {"select.rule": "ccs", **LOCAL},
        "lipt; a joint epoch": {"select.rule": "ccs", **LOCAL, "pretrain.joint_epochs": 1},
    }
    for epochs in DENSE:
        rows[f"dense {epochs}"] = {
            "select.rule": "ccs",
            "pretrain.method": "dense",
            "pretrain.epochs": epochs,
            "pretrain.batch_size": 128,
        }
    return Table(
        title="CCS by the margins of LiPT's models, against those of dense trainings and random subsets",
        experiment="lipt",
        baseline="random; fixed",
        shared={
            "pretrain.lr": 0.1,
            "pretrain.evaluate_every_epochs": 0,
            "train.epochs": 40 if scale == "small" else 200,
            "train.evaluate_every_epochs": 20,
        },
        rows=rows,
        cases={
            "10 %": {"select.fraction": 0.1},
            "10 %; 40 % wrong labels": {"select.fraction": 0.1, "dataset.noise": 0.4},
        },
        columns={
            "wrong labels\namong the picks": "coreset_wrong_labels",
            "critical path of\npre-training, backward": "critical_path",
            "pre-training,\nbackward": "pretrain.backward",
        },
    )
