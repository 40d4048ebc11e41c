"""LiPT's pre-training against none and against dense pre-training: agreement of the selections, and cost."""

from raypkg.studies.tables import Table

DENSE = (1, 2, 5, 10)  # epochs
REFERENCE = f"dense {DENSE[-1]}"


def table(scale: str) -> Table:
    """Return the table at a scale."""
    redrawn = {"pretrain.method": "initial", "select.rule": "random", "select.every_epochs": 1}
    rows: dict[str, dict[str, object]] = {
        "random; redrawn": redrawn,
        "random; redrawn; 2 × samples": {**redrawn, "select.fraction": 0.6},
        "random; redrawn; 3 × samples": {**redrawn, "select.fraction": 0.9},
        "random; fixed": {**redrawn, "select.every_epochs": 0},
        "lipt": {},
        "lipt; local SGD": {"preset": "local-sgd"},
        "lipt; local SGD; a joint epoch": {"preset": "local-sgd", "pretrain.joint_epochs": 1},
        "none": {"pretrain.method": "initial"},
    }
    for epochs in DENSE:
        rows[f"dense {epochs}"] = {
            "pretrain.method": "dense",
            "pretrain.epochs": epochs,
            "pretrain.batch_size": 128,
        }
    return Table(
        title="LiPT against random samples, none and dense pre-training: accuracy, work, agreement with dense 10",
        experiment="lipt",
        baseline="random; redrawn",
        as_baseline=("random; redrawn; 2 × samples", "random; redrawn; 3 × samples"),
        reference=REFERENCE,
        shared={
            "pretrain.lr": 0.1,
            "pretrain.evaluate_every_epochs": 0,
            "train.epochs": 20 if scale == "small" else 200,
            "train.evaluate_every_epochs": 5 if scale == "small" else 20,
            "select.fraction": 0.3,
        },
        rows=rows,
        cases={
            "gradmatch": {"select.rule": "gradmatch", "select.weighted": True},
            "el2n": {"select.rule": "el2n"},
            "el2n; 40 % wrong labels": {"select.rule": "el2n", "dataset.noise": 0.4},
        },
        columns={
            f"Spearman\nwith {REFERENCE}": "spearman",
            f"picks shared\nwith {REFERENCE}": "overlap",
            "AUC of\nwrong labels": "noise_auc",
            "critical path of\npre-training, backward": "critical_path",
            "pre-training,\nworker-seconds": "pretrain.total_seconds",
            "pre-training,\nbackward": "pretrain.backward",
        },
        paper={"speed-up of pre-training": {"lipt": "15.4"}, "speed-up end to end": {"lipt": "2.8"}},
    )
