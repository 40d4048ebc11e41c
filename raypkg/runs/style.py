"""How every plot looks: colours for every eye, one style, and numbers and names that are short enough to read."""

import math
from typing import Any

# From the palette of Okabe & Ito, told apart with the common forms of colour blindness and in grey.
BLUE = "#0072B2"
ORANGE = "#E69F00"
VERMILLION = "#D55E00"
GREY = "#5F6368"
STYLE: dict[str, Any] = {
    "font.size": 10,
    "text.parse_math": False,  # a class may be called $
    "figure.titlesize": 12,
    "figure.labelsize": 10,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.12,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": GREY,
    "axes.edgecolor": "#BDC1C6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8EAED",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}
NOTE: dict[str, Any] = {  # a label beside its point, on a patch of paper where it crosses a line
    "textcoords": "offset points",
    "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
}
UNITS = {10**9: "G", 10**6: "M", 10**3: "k"}


def cut(name: str, length: int) -> str:
    """Return a name of at most so many characters."""
    return name if len(name) <= length else name[: length - 1] + "…"


def short(count: float) -> str:
    """Write a count with three digits and its unit.

    >>> short(950), short(12_345), short(999_999), short(float("nan"))
    ('950', '12.3 k', '1 M', '–')
    """
    if not math.isfinite(count):
        return "–"
    rounded = float(f"{count:.3g}")  # first: 999,999 is 1 M, not 1000 k
    step = next((step for step in UNITS if abs(rounded) >= step), 1)
    unit = UNITS.get(step, "")
    return f"{rounded / step:.3g} {unit}".rstrip()


def in_full(value: Any) -> str:
    """Write a figure: a count with separators, any other number with four digits, a text as it is.

    >>> in_full(30_176), in_full(0.98765), in_full("done"), in_full(None)
    ('30,176', '0.9877', 'done', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Write seconds as people say them.

    >>> duration(0.512), duration(75), duration(7_500), duration(float("nan"))
    ('0.512 s', '1 min 15 s', '2 h 5 min', '–')
    """
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
