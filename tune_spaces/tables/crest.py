"""CREST against random batches: at equal samples backward, at equal work, at twice the rate, with and without norms."""

from raypkg.studies.tables import Table

SMALL = {
    "train.epochs": 20,
    "train.batch_size": 32,
    "train.lr": 0.05,
    "budget": 0.2,
    "train.evaluate_every_epochs": 1,
}
PAPER = {
    "train.epochs": 200,
    "train.batch_size": 128,
    "train.lr": 0.1,
    "budget": 0.1,
    "train.evaluate_every_epochs": 5,
}
ERRORS = {  # relative error, %, at a tenth of training: arXiv:2306.01244
    "CIFAR-10, ResNet-20": (21.3, 7.2, 13.0, 6.0, 7.0, 5.5),
    "CIFAR-100, ResNet-18": (36.5, 11.7, 17.2, 12.7, 27.6, 9.4),
    "TinyImageNet, ResNet-50": (32.8, 16.0, 28.5, 27.7, 32.8, 15.4),
}
COMPARED = ("cut short", "random batches", "craig", "gradmatch", "glister", "crest")


def table(scale: str) -> Table:
    """Return the table at a scale."""
    shared = SMALL if scale == "small" else PAPER
    budget = shared["budget"]
    rate = shared["train.lr"]
    random = {"selection": "random"}
    twice = {"budget": round(2 * budget, 3)}
    return Table(
        title="CREST against random batches at equal samples backward, at equal work, and at twice the rate",
        experiment="crest",
        baseline="random batches",
        as_baseline=("random batches; 2 × budget", "random batches; 3 × budget", "full training"),
        shared=shared,
        rows={
            "random batches": random,
            "crest": {},
            "crest; each step": {"preset": "each-step"},
            "crest; released": {"preset": "released"},
            "crest; fast": {"preset": "fast"},
            # What CREST's forward passes would have bought: as many steps on larger batches, or more steps.
            "random batches; 2 × batch": {**twice, **random, "train.batch_size": 2 * shared["train.batch_size"]},
            "random batches; 2 × budget": {**twice, **random},
            "random batches; 3 × budget": {**random, "budget": round(3 * budget, 3)},
            # The released code trains at twice its baseline's rate.
            "random batches; 2 × rate": {**random, "train.lr": 2 * rate},
            "crest; 2 × rate": {"train.lr": 2 * rate},
            "crest; no exclusion": {"crest.exclude_below": 0.0},
            "crest; first order": {"crest.order": 1},
            "crest; no averages": {"crest.smoothing": "none"},
            "crest; h 10 and b 1": {"crest.h": 10.0, "crest.b": 1},
            "cut short": {"selection": "cut"},
            "craig": {"selection": "craig"},
            "gradmatch": {"selection": "gradmatch"},
            "glister": {"selection": "glister"},
            "full training": {**random, "budget": 1.0},
        },
        cases=_models(scale),
        columns={"pools": "pools"},
        paper={
            f"relative error, %: {data}": dict(zip(COMPARED, figures, strict=True)) for data, figures in ERRORS.items()
        },
    )


def _models(scale: str) -> dict[str, dict[str, object]]:
    """Return models without norm, with norms of each sample by itself, and with batch norm."""
    network = "resnet8" if scale == "small" else "resnet20"
    return {
        "mlp; no norm": {"model.name": "mlp"},
        "lenet5; no norm": {"model.name": "lenet5"},
        f"{network}; group norm": {"model.name": network, "model.options.norm": "group"},
        f"{network}; frozen statistics": {"model.name": network, "model.options.norm": "frozen"},
        f"{network}; batch norm": {"model.name": network},
    }
