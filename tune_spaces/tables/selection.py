"""Every selection rule against random subsets, at several shares, on clean and on harder data."""

from raypkg.coresets.rules import coreset
from raypkg.studies.tables import Table

WEIGHTED = ("craig", "gradmatch", "gradmatchpb")  # their weights are half of what they choose
RESELECTED = ("craig", "glister", "gradmatch")  # published with a new selection every few epochs
OTHERS = ("infobatch", "random", "less", "rds_plus")  # no static selection, the baselines, for language models only
FRACTIONS = {"1 %": 0.01, "5 %": 0.05, "10 %": 0.1, "30 %": 0.3}
REGIMES = {
    "clean": {},
    "40 % wrong labels": {"dataset.noise": 0.4},
    "long tail": {"dataset.imbalance": 0.01},
    "duplicates": {"dataset.repeat": 5},
}


def table(scale: str) -> Table:
    """Return the table at a scale."""
    small = scale == "small"
    short, long = (10, 40) if small else (40, 300)
    cifar10 = {"dataset.name": "cifar10", "model.name": "resnet18"}
    return Table(
        title="Coreset selection against random subsets, fixed and redrawn every epoch",
        experiment="lipt",
        baseline="random; fixed",
        shared={
            "pretrain.method": "dense",
            "pretrain.epochs": 5 if small else 20,
            "pretrain.lr": 0.1,
            "pretrain.evaluate_every_epochs": 0,
            "train.evaluate_every_epochs": short,
            **({} if small else cifar10),
        },
        rows=_rows(reselect_every=2 if small else 20),
        cases={
            f"{regime}; {share}; {epochs} epochs": {
                **changes,
                "select.fraction": fraction,
                "train.epochs": epochs,
            }
            for regime, changes in REGIMES.items()
            for share, fraction in FRACTIONS.items()
            for epochs in (short, long)
        },
        columns={"wrong labels\namong the picks": "coreset_wrong_labels"},
    )


def _rows(reselect_every: int) -> dict[str, dict[str, object]]:
    """Return the baselines, every rule that selects once, and rules that reselect by the model in training."""
    untrained = {"pretrain.method": "initial", "select.rule": "random"}
    rows: dict[str, dict[str, object]] = {
        "random; fixed": untrained,
        "random; redrawn": {**untrained, "select.every_epochs": 1},
    }
    for name in coreset.names:
        if name not in OTHERS:
            rows[name] = _selected(name)
    for name in RESELECTED:
        rows[f"{name}; reselected"] = {**_selected(name), "select.every_epochs": reselect_every}
    rows["all samples"] = {**untrained, "select.fraction": 1.0}
    return rows


def _selected(name: str) -> dict[str, object]:
    return {"select.rule": name, "select.weighted": name in WEIGHTED}
