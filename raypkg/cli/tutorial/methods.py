"""Three rules that choose a tenth of the samples, against random samples at equal work."""

from raypkg.studies.tables import Table

TENTH = {"select.fraction": 0.1, "select.every_epochs": 5}


def table(scale):
    """Return the rows to compare: the settings of each in which it differs from the shared ones."""
    random = {**TENTH, "select.rule": "random", "select.every_epochs": 1}
    return Table(
        title="A tenth of the samples, chosen by three rules or at random",
        experiment="train",
        shared={"model.name": "resnet8", "train.epochs": 20, "train.evaluate_every_epochs": 5},
        baseline="random",
        as_baseline=["random; 2 × epochs", "random; 4 × epochs"],
        rows={
            "random": random,
            "random; 2 × epochs": {**random, "train.epochs": 40},
            "random; 4 × epochs": {**random, "train.epochs": 80},
            "el2n": {**TENTH, "select.rule": "el2n"},
            "craig": {**TENTH, "select.rule": "craig"},
            "gradmatch": {**TENTH, "select.rule": "gradmatch", "select.weighted": True},
        },
    )
