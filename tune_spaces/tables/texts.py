"""CREST on texts: a transformer without batch norm, at a tenth and a quarter of its full training."""

from raypkg.studies.tables import Table

SMALL = {
    "model.name": "transformer",
    "train.epochs": 20,
    "train.batch_size": 32,
    "train.optimizer": "adamw",
    "train.lr": 1e-3,
    "train.weight_decay": 0.01,
    "train.warmup": 0.1,
    "train.evaluate_every_epochs": 0,
}
PAPER = {  # lengths of trainings and schedules are not printed there, so its figures stay out of the table
    **SMALL,
    "train.lr": 1e-5,
    "train.decay": "matrices",
}
SNLI = {
    "dataset.name": "text:snli",
    "dataset.options.length": 128,
    "dataset.options.unlabelled": True,
    "dataset.validation": 0.0,
    "model.name": "transformers:roberta-base",
    "train.epochs": 10,
}
EACH_STEP = {"crest.tau": 0.0, "crest.subset": "4m", "crest.exclude_after": 5, "crest.keep_active": 0.8}
MODEL = {  # a local model of the loss, of one coreset of the pool, with paired checks
    **EACH_STEP,
    "crest.tau": 0.05,
    "crest.h": 4.0,
    "crest.checked_on": "pool",
    "crest.smoothing": "coreset",
    "crest.settle": 0.05,
    "crest.model_batches": 1,
    "crest.curvature": False,
}


def table(scale: str) -> Table:
    """Return the table at a scale."""
    small = scale == "small"
    subset = {} if small else {"crest.subset": 0.005}
    crest = {**MODEL, **subset}
    random = {"selection": "random"}
    data, settings = ("", {}) if small else ("SNLI; RoBERTa; ", SNLI)
    return Table(
        title="CREST on texts against random batches, at a tenth and a quarter of full training",
        experiment="crest",
        baseline="random batches",
        shared=SMALL if small else PAPER,
        rows={
            "random batches": random,
            "cut short": {"selection": "cut"},
            "crest": EACH_STEP,
            "crest; as published": {"crest.h": 4.0, **subset},
            "crest; h 4": crest,
            "crest; h 4; no exclusion": {**crest, "crest.exclude_below": 0.0},
            "full training": {**random, "budget": 1.0},
        },
        cases={f"{data}10 %": {**settings, "budget": 0.1}, f"{data}25 %": {**settings, "budget": 0.25}},
        columns={"pools": "pools"},
    )
