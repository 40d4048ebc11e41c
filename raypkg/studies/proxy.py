"""Tuning on a coreset: the trials train on a share of the samples, the best of them again on all."""

from rich.console import Console

from raypkg.core.config import fields_of, load_settings
from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment, Train
from raypkg.experiments import carry_out, experiment
from raypkg.experiments.names import check_names, with_tokenizer
from raypkg.experiments.train import TrainSettings
from raypkg.runs.folder import RunFolder, create
from raypkg.runs.storage import Storage

from .order import Order
from .spaces import Space
from .standing import ONLY, ranked
from .sweep_folder import UNFINISHED, SweepFolder
from .trial_settings import samples_of

WARM = 5  # epochs on all samples of the model whose gradients select
FINALISTS = 4  # fewer cannot tell much of the order


def coreset_of(root: str, name: str) -> str:
    """Return where the coreset of a sweep will be: in a run of its own.

    Raises:
        UserError: there is a run of that name.
    """
    runs = Storage(root) / "train"
    run = _run_name(name)
    if run in runs.list():
        raise UserError(f"run {run} exists in {runs.root}, as the proxy's would be called: give another --name")
    return f"{(runs / run).root}/coreset.parquet"


def selection(settings: Experiment, fraction: float, method: str, workers: int) -> TrainSettings:
    """Return the settings of the run that makes the coreset, with the model that is tuned.

    Args:
        settings: that all trials share.
        fraction: of the samples, to select.
        method: that selects.
        workers: of the run.

    Raises:
        UserError: unknown method, or a fraction outside (0, 1].
    """
    parts = settings.model_dump(mode="json", include={"seed", "dataset", "model", "cluster", "train"})
    parts["train"] = {name: value for name, value in parts["train"].items() if name in fields_of(Train)}
    chosen = load_settings(
        TrainSettings,
        parts,
        {
            "select.method": method,
            "select.fraction": fraction,
            "select.warm_epochs": WARM,
            "train.epochs": WARM + 1,
            "train.evaluate_every_epochs": 0,
            "train.keep": "last",
            "cluster.workers": workers,
        },
    )
    check_names(chosen)
    return with_tokenizer(chosen)


def select_proxy(sweep: SweepFolder, settings: Experiment, workers: int, console: Console) -> None:
    """Make the coreset of a sweep, unless it is there."""
    name = _run_name(sweep.name)
    chosen = selection(settings, sweep.order["proxy"], sweep.order["proxy_method"], workers)
    runs = Storage(sweep.root) / "train"
    if name in runs.list():
        run = RunFolder(runs / name)
    else:
        run = create(sweep.root, "train", name, chosen)
    if not run.summary:
        carry_out(experiment["train"], chosen, run, console)


def enlist(sweep: SweepFolder) -> bool:
    """Add the best trials on the coreset as trials on all samples, once all on the coreset have ended."""
    samples = sweep.order["samples"]
    enlisted = len(sweep.trials) > samples
    if not sweep.on_proxy or enlisted or sweep.further():
        return False
    results = sweep.results()
    if any(row["state"] == UNFINISHED for row in results):
        return False
    metric = sweep.metric
    order = ranked(results, metric, sweep.mode)
    best = [row for row in order if row.get(metric) is not None][:FINALISTS]
    for number, row in enumerate(best, samples):
        values = dict(sweep.trials[row["trial"]]["settings"])
        del values[ONLY]
        sweep.started(number, values)
    return bool(best)


def check_proxy(order: Order, settings: Experiment, space: Space) -> None:
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
    coreset = getattr(settings, "coreset", None)
    if coreset is not None:
        raise UserError(f"--proxy chooses the samples, so --coreset {coreset} cannot be given")
    if name := next((name for name in space.domains if name.partition(".")[0] in ("seed", "dataset")), None):
        raise UserError(f"--proxy: its coreset is of one data set and seed, so {name} cannot be varied")
    assert order.proxy_method is not None
    chosen = selection(settings, order.proxy, order.proxy_method, workers=0)
    chosen.check(samples_of(settings))


def _run_name(sweep: str) -> str:
    return f"{sweep}-proxy"
