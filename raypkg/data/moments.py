"""Mean and standard deviation per channel of data that passes by in blocks."""

from typing import Any

import numpy as np

SMALLEST = float(np.finfo(np.float32).tiny)  # deviation whose inverse float32 holds; those below count as none


class Moments:
    """Running mean and population standard deviation over all axes but the last.

    Blocks are merged by the update of Chan, Golub & LeVeque (1979), in float64:
    ``M₂ ← M₂ + M₂' + δ²·n·n'/(n + n')`` with ``δ`` the difference of the two means.

    >>> moments = Moments()
    >>> moments.update(np.array([[0.0, 5.0]])), moments.update(np.array([[2.0, 5.0]]))
    (None, None)
    >>> moments.mean, moments.std
    ((1.0, 5.0), (1.0, 1.0))
    """

    rows_at_once = 1 << 18  # bounds the float64 copy

    def __init__(self) -> None:
        self._n = 0
        self._mean: np.ndarray = np.zeros(1)  # [C] after the first block
        self._m2: np.ndarray = np.zeros(1)  # sum of squared distances from the mean

    def update(self, block: np.ndarray) -> None:
        """Merge a block [..., C]; uint8 counts in units of 1/255."""
        unit = 255.0 if block.dtype == np.uint8 else 1.0
        rows = block.reshape(-1, block.shape[-1])  # [m, C]
        for start in range(0, len(rows), self.rows_at_once):
            chunk = rows[start : start + self.rows_at_once]
            self._merge(chunk.astype(np.float64) / unit)

    def _merge(self, rows: np.ndarray) -> None:
        n = len(rows)
        mean = rows.mean(0)
        rows -= mean  # in place: update() made this copy
        m2 = np.einsum("nc,nc->c", rows, rows)
        total = self._n + n
        delta = mean - self._mean
        # The blocks' own spreads do not see how far their means lie apart: the last term does.
        self._m2 = self._m2 + m2 + delta**2 * (self._n * n / total)
        self._mean = self._mean + delta * (n / total)
        self._n = total

    @classmethod
    def restored(cls, state: dict[str, Any]) -> "Moments":
        """Return moments of that state, bit for bit, also when it went through JSON."""
        moments = cls()
        moments._n = state["n"]
        moments._mean = np.array(state["mean"])
        moments._m2 = np.array(state["m2"])
        return moments

    @property
    def state(self) -> dict[str, Any]:
        """All that they hold, as JSON can keep it."""
        return {"n": self._n, "mean": self._mean.tolist(), "m2": self._m2.tolist()}

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean per channel."""
        return tuple(self._mean.tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation per channel; 1 for a constant channel, so that dividing by it is harmless."""
        std = np.sqrt(self._m2 / self._n)
        return tuple(np.where(std > SMALLEST, std, 1.0).tolist())
