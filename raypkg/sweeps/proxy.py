"""Tuning on a coreset: the trials train on a share of the samples, the best of them again on all."""

from typing import Any

from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.settings import Train
from raypkg.experiments import carry_out, check_names, experiment
from raypkg.experiments.train import TrainSettings
from raypkg.runs.folder import RunFolder, create
from raypkg.runs.storage import Storage

from .order import Order, samples_of
from .spaces import Space
from .sweep_folder import UNFINISHED, SweepFolder, ranked

ONLY = "dataset.only"
WARM = 5  # epochs on all samples of the model whose gradients select
FINALISTS = 4  # fewer cannot tell much of the order


def coreset_of(root: str, name: str) -> str:
    """Return where the coreset of a sweep will be: in a run of its own.

    Raises:
        UserError: there is a run of that name.
    """
    runs = Storage(root) / "train"
    if f"{name}-proxy" in runs.list():
        raise UserError(f"run {name}-proxy exists in {runs.root}, as the proxy's would be called: give another --name")
    return f"{(runs / f'{name}-proxy').root}/coreset.parquet"


def selection(settings: Any, fraction: float, method: str, workers: int) -> TrainSettings:
    """Return the settings of the run that makes the coreset, with the model that is tuned.

    Raises:
        UserError: unknown method, or a fraction outside (0, 1].
    """
    parts = settings.model_dump(mode="json", include={"seed", "dataset", "model", "cluster", "train"})
    parts["train"] = {name: value for name, value in parts["train"].items() if name in Train.model_fields}
    chosen = load_settings(
        TrainSettings,
        parts,
        {
            "select.method": method,
            "select.fraction": fraction,
            "select.warm_epochs": WARM,
            "train.epochs": WARM + 1,
            "train.evaluate_every_epochs": 0,
            "cluster.workers": workers,
        },
    )
    check_names(chosen)
    return chosen


def select_proxy(sweep: SweepFolder, settings: Any, workers: int, console: Any) -> None:
    """Make the coreset of a sweep, unless it is there."""
    name = f"{sweep.name}-proxy"
    chosen = selection(settings, sweep.order["proxy"], sweep.order["proxy_method"], workers)
    runs = Storage(sweep.root) / "train"
    run = RunFolder(runs / name) if name in runs.list() else create(sweep.root, "train", name, chosen)
    if not run.summary:
        carry_out(experiment["train"], chosen, run, console)


def enlist(sweep: SweepFolder) -> bool:
    """Add the best trials on the coreset as trials on all samples, once all on the coreset have ended."""
    samples, results = sweep.order["samples"], sweep.results()
    ended = not sweep.further() and all(row["state"] != UNFINISHED for row in results)
    if not sweep.order["proxy"] or not ended or len(sweep.trials) > samples:
        return False
    metric = sweep.order["metric"]
    best = [row for row in ranked(results, metric, sweep.order["mode"]) if row.get(metric) is not None]
    for number, row in enumerate(best[:FINALISTS], samples):
        values = sweep.trials[row["trial"]]["settings"]
        sweep.started(number, {name: value for name, value in values.items() if name != ONLY})
    return bool(best)


def check_proxy(order: Order, settings: Any, space: Space) -> None:
    """Refuse a proxy that would do nothing or cannot be made.

    Raises:
        UserError: a method without a fraction, a fraction of all, a method that cannot select before training, a
            coreset that is given already, or a space whose trials would hold out other samples.
    """
    if order.proxy is None:
        if order.proxy_method is not None:
            raise UserError(f"--proxy-method {order.proxy_method} needs --proxy, the share of the samples to tune on")
        return
    if not 0 < order.proxy < 1:
        raise UserError(f"--proxy {order.proxy:g}: a share of the samples, above 0 and below 1")
    if settings.dataset.only is not None:
        raise UserError(f"--proxy chooses the samples, so dataset.only = {settings.dataset.only} cannot be given")
    if getattr(settings, "coreset", None) is not None:
        raise UserError(f"--proxy chooses the samples, so --coreset {settings.coreset} cannot be given")
    for name in space.domains:
        if name == "seed" or name.partition(".")[0] == "dataset":
            raise UserError(f"--proxy: its coreset is of one data set and seed, so {name} cannot be varied")
    assert order.proxy_method is not None
    selection(settings, order.proxy, order.proxy_method, 0).check(samples_of(settings))
