"""LiPT's pre-training against none and against dense pre-training: agreement of the selections, and cost."""

from raypkg.studies.tables import Table

DENSE = (1, 2, 5, 10)  # epochs
BASELINE = f"dense {DENSE[-1]}"


def table(scale: str) -> Table:
    """Return the table at a scale."""
    rows: dict[str, dict[str, object]] = {
        "lipt": {},
        "lipt; one merge": {"pretrain.rounds": 1},
        "lipt; a joint epoch": {"pretrain.joint_epochs": 1},
        "none": {"pretrain.method": "initial"},
    }
    for epochs in DENSE:
        rows[f"dense {epochs}"] = {
            "pretrain.method": "dense",
            "pretrain.epochs": epochs,
            "pretrain.batch_size": 128,
        }
    return Table(
        title="LiPT's pre-training against none and dense: agreement with dense 10, accuracy, critical path and work",
        experiment="lipt",
        baseline=BASELINE,
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
            f"Spearman\nwith {BASELINE}": "spearman",
            f"picks shared\nwith {BASELINE}": "overlap",
            "AUC of\nwrong labels": "noise_auc",
            "critical path of\npre-training, backward": "critical_path",
            "pre-training,\nworker-seconds": "pretrain.total_seconds",
            "pre-training,\nbackward": "pretrain.backward",
        },
        paper={"speed-up of pre-training": {"lipt": "15.4"}, "speed-up end to end": {"lipt": "2.8"}},
    )
