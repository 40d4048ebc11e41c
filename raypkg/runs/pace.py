"""How fast a phase goes and how long it will take, by the rows of metrics that come."""

from collections.abc import Mapping
from typing import Any


class Pace:
    """Samples a second, and the seconds that are left, of a phase whose epochs take about equally long.

    Rows of several models may come from several workers at once: what counts is all of them over the time since work
    began. That it began when the first row came, less one epoch, is known as soon as a model has had two: starting
    workers takes longer than many an epoch. A row that was known before is one of a restart, and took no time: from
    there on everything is measured anew.

    Args:
        rows: that are to come in all.
        now: the time, in seconds.

    Attributes:
        rate: samples back-propagated in a second; None before the first new row.

    >>> pace = Pace(rows=4, now=0.0)
    >>> for epoch in (1, 2):
    ...     pace.take({"epoch": epoch, "backward": 600 * epoch}, True, now=60.0 + 2.0 * epoch)
    >>> pace.rate, pace.left
    (300.0, 4.0)
    """

    def __init__(self, rows: int, now: float):
        self.rate: float | None = None
        self._rows = rows
        self._row_seconds: float | None = None
        self._seen: set[tuple[Any, Any]] = set()  # model and epoch
        self._backward: dict[Any, int] = {}  # by model, the samples so far
        self._begin(now)

    def _begin(self, now: float) -> None:
        """Measure from now on."""
        self._began = now
        self._first: float | None = None  # when a new row came
        self._times: dict[Any, float] = {}  # by model, the same
        self._samples = 0
        self._new = 0

    def take(self, row: Mapping[str, Any], is_new: bool, now: float) -> None:
        """Take a row as it comes.

        Args:
            row: with epoch, samples back-propagated by its model so far and, where there are several, the model.
            is_new: whether it was not known from before a restart.
            now: the time, in seconds.
        """
        model = row.get("model")
        before = self._backward.get(model, 0)
        self._backward[model] = row.get("backward", before)
        self._seen.add((model, row["epoch"]))
        if not is_new:
            self._begin(now)
            return
        if self._first is None:
            self._first = now
        if model in self._times:
            one_epoch = now - self._times[model]
            self._began = max(self._began, self._first - one_epoch)
        self._times.setdefault(model, now)
        self._samples += self._backward[model] - before
        self._new += 1
        if now > self._began:
            self.rate = self._samples / (now - self._began)
            self._row_seconds = (now - self._began) / self._new

    @property
    def left(self) -> float | None:
        """Seconds until the last row; None before the first new one."""
        if self._row_seconds is None:
            return None
        return max(0, self._rows - len(self._seen)) * self._row_seconds


def in_words(seconds: float) -> str:
    """Return a time to wait, as exactly as it can be known.

    >>> in_words(48.2), in_words(1234), in_words(12345)
    ('48 s', '21 min', '3.4 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
