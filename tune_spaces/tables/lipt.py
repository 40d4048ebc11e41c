"""LiPT's pre-training against none and against dense pre-training: agreement of the selections, and cost."""

from raypkg.studies.tables import Table

DENSE = (1, 2, 5, 10)  # epochs
REFERENCE = f"dense {DENSE[-1]}"
FULL = "all samples"
SMALL = {
    "gradmatch": {"select.rule": "gradmatch", "select.weighted": True},
    "el2n": {"select.rule": "el2n"},
    "el2n; 40 % wrong labels": {"select.rule": "el2n", "dataset.noise": 0.4},
}
# Its speed-ups, 15.4 of pre-training and 2.8 end to end on CIFAR-10, are of settings that are not all known.
PAPER = {
    f"{data}; ResNet-18; {rule}": {"dataset.name": name, "select.rule": rule}
    for data, name in (("CIFAR-10", "cifar10"), ("CIFAR-100", "cifar100"))
    for rule in ("grand", "gradmatch", "glister")
}


def table(scale: str) -> Table:
    """Return the table at a scale."""
    small = scale == "small"
    shared = {"pretrain.lr": 0.1, "pretrain.evaluate_every_epochs": 0, "select.fraction": 0.3}
    redrawn = {"pretrain.method": "initial", "select.rule": "random", "select.every_epochs": 1}
    rows: dict[str, dict[str, object]] = {
        "random; redrawn": redrawn,
        "random; redrawn; 2 × samples": {**redrawn, "select.fraction": 0.6},
        "random; redrawn; 3 × samples": {**redrawn, "select.fraction": 0.9},
        "random; fixed": {**redrawn, "select.every_epochs": 0},
        FULL: {**redrawn, "select.every_epochs": 0, "select.fraction": 1.0},
        "lipt": {},
        "lipt; ERK": {"pretrain.sparsity": "erk"},
        "lipt; density 0.3": {"pretrain.density": 0.3},
        "lipt; density 1": {"pretrain.sparsity": False},
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
        shared={**shared, "train.epochs": 20} if small else shared,
        rows=rows,
        cases=SMALL if small else PAPER,
        columns={
            "speed-up end\nto end, work": f"{FULL} / work",
            "speed-up end\nto end, seconds": f"{FULL} / seconds",
            f"Spearman\nwith {REFERENCE}": "spearman",
            f"picks shared\nwith {REFERENCE}": "overlap",
            "AUC of\nwrong labels": "noise_auc",
            "critical path of\npre-training, backward": "critical_path",
            "pre-training,\nworker-seconds": "pretrain.total_seconds",
            "pre-training,\nbackward": "pretrain.backward",
        },
    )
