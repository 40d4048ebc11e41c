"""What a sweep is asked for: filled in, and refused where it cannot be carried out, before anything starts."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from raypkg.core.config import Settings, leaves, read_toml
from raypkg.core.errors import UserError, shown, unknown

from .figures import METRICS
from .spaces import MOST, Space

SAMPLES = 8  # trials
ALL_TO_THE_END = "fifo"  # the scheduler that stops none
EVALUATE = "train.evaluate_every_epochs"  # 1 in a sweep, unless given: schedulers compare trials epoch by epoch


@dataclass(frozen=True)
class Order:
    """What was asked for; None = left out."""

    experiment: str
    space: str | None = None
    samples: int | None = None
    metric: str | None = None
    mode: str | None = None
    scheduler: str | None = None
    search: str | None = None
    concurrent: int | None = None
    time_budget: float | None = None

    @classmethod
    def options(cls) -> list[str]:
        """Return the names of what a user may ask for."""
        return [field.name for field in fields(cls) if field.name != "experiment"]


def filled(order: Order, space: Space) -> Order:
    """Return the order with nothing left out.

    Raises:
        UserError: it cannot be carried out.
    """
    metric = space.metric if order.metric is None else order.metric
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    mode = order.mode or (space.mode if metric == space.metric else METRICS[metric].mode)
    if mode not in ("max", "min"):
        raise unknown("mode", str(mode), ("max", "min"))
    scheduler = order.scheduler or "asha"
    search = order.search or "random"
    if scheduler != ALL_TO_THE_END and not METRICS[metric].each_epoch:
        raise UserError(
            f"metric {metric} is known only at the end of a trial, so --scheduler {scheduler} could not act on it:"
            f" give --scheduler {ALL_TO_THE_END}, or --metric accuracy"
        )
    check_counts(order)
    if search == "grid" and order.samples is not None:
        raise UserError(f"--samples {order.samples}: a grid has as many trials as combinations")
    samples = SAMPLES if order.samples is None else order.samples
    return replace(
        order,
        samples=samples,
        metric=metric,
        mode=mode,
        scheduler=scheduler,
        search=search,
    )


def check_counts(order: Order) -> None:
    """Refuse too few or too many trials, in all or at once."""
    for option, count in (("samples", order.samples), ("concurrent", order.concurrent)):
        if count is not None and not 1 <= count <= MOST:
            raise UserError(f"--{option} {shown(count)}: at least 1 and at most {MOST:,}")


def base_of(schema: type[Settings], config: Path | None) -> dict[str, Any]:
    """Return what the file sets, with an evaluation after every epoch unless it says otherwise."""
    base = read_toml(config) if config else {}
    train = base.get("train", {})
    evaluates = EVALUATE in dict(leaves(schema))
    if evaluates and isinstance(train, dict):
        base["train"] = {"evaluate_every_epochs": 1, **train}
    return base
