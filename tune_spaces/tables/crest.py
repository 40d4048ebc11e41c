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
    "train.batch_size": 128,
    "train.lr": 0.1,
    "budget": 0.1,
    "train.evaluate_every_epochs": 5,
}
PUBLISHED = {  # arXiv:2306.01244; the preset has the other settings for each data set
    "CIFAR-10; ResNet-20": "cifar10",
    "CIFAR-100; ResNet-18": "cifar100",
    "TinyImageNet; ResNet-50": "folder:tiny-imagenet-200",
}
MODELS = {
    "mlp; no norm": {"model.name": "mlp"},
    "lenet5; no norm": {"model.name": "lenet5"},
    "resnet8; group norm": {"model.name": "resnet8", "model.options.norm": "group"},
    "resnet8; frozen statistics": {"model.name": "resnet8", "model.options.norm": "frozen"},
    "resnet8; batch norm": {"model.name": "resnet8"},
}
ERRORS = {  # relative error, %, at a tenth of training; of random batches also at two tenths
    "cut short": (21.3, 36.5, 32.8),
    "random batches": (7.2, 11.7, 16.0),
    "random batches; 2 × budget": (2.87, 3.66, 3.51),
    "craig": (13.0, 17.2, 28.5),
    "gradmatch": (6.0, 12.7, 27.7),
    "glister": (7.0, 27.6, 32.8),
    "crest": (5.5, 9.4, 15.4),
}


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
        cases=MODELS if scale == "small" else {label: {"dataset.name": data} for label, data in PUBLISHED.items()},
        columns={"pools": "pools"},
        paper={
            label: {row: f"relative error {errors[place]:g} %" for row, errors in ERRORS.items()}
            for place, label in enumerate(PUBLISHED)
        },
    )
