"""The pictures of a run: plain data in, one PNG out; one style, colours for every eye, labels at the lines and bars."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .storage import Storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# From the palette of Okabe & Ito, told apart with the common forms of colour blindness and in grey.
BLUE, ORANGE, VERMILLION, GREY = "#0072B2", "#E69F00", "#D55E00", "#5F6368"
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
Rows = Sequence[dict[str, Any]]
Labels = Sequence[tuple[str, float]]  # (class name, score) of each image
UNITS = {10**9: "G", 10**6: "M", 10**3: "k"}
TINY = 1e-9
NAMED = 200  # classes whose names fit on one picture
COLUMN = 40  # classes in one column of bars


def curves(rows: Rows, path: str | Path) -> None:
    """Draw training loss and held-out accuracy against epochs, phase by phase.

    Args:
        rows: dicts with ``phase``, ``main`` (whether it is the run's main training), ``model`` (its number, or None),
            ``epoch``, ``loss`` and, where it was measured, ``accuracy`` in [0, 1]; values may be None or NaN.
        path: the PNG to write.
    """
    with page(path) as figure:
        loss, accuracy = figure.subplots(1, 2)
        _trace(loss, rows, "loss", "Training loss")
        loss.set_ylim(bottom=0)
        _trace(accuracy, rows, "accuracy", "Held-out accuracy", unit=" %", scale=100)


def costs(phases: Rows, path: str | Path) -> None:
    """Draw the seconds and the samples that each phase cost.

    Args:
        phases: dicts with ``phase``, ``seconds`` and the samples passed ``forward`` and ``backward``.
        path: the PNG to write.
    """
    names = [phase["phase"] for phase in phases]
    seconds, forward, backward = (column(phases, key) for key in ("seconds", "forward", "backward"))
    with page(path) as figure:
        time, samples = figure.subplots(1, 2, sharey=True)
        _bars(time, names, {"seconds": seconds}, [_duration(value) for value in seconds])
        time.set(title=f"The run took {_duration(np.nansum(seconds))}", xlabel="seconds")
        both = [f"{short(f)} + {short(b)}" for f, b in zip(forward, backward, strict=True)]
        _bars(samples, names, {"forward": forward, "backward": backward}, both)
        title = f"{short(np.nansum(forward))} samples forward + {short(np.nansum(backward))} backward"
        samples.set(title=title, xlabel="samples")
        samples.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
        samples.xaxis.set_major_formatter(lambda value, _: short(value))


def composition(picked: Sequence[int], total: Sequence[int], classes: Sequence[str], path: str | Path) -> None:
    """Draw the share of each class that was picked; of more than 200 classes, the 100 lowest and the 100 highest.

    Args:
        picked: samples of each class in the coreset, [C].
        total: samples of each class in the training set, [C].
        classes: their names, [C].
        path: the PNG to write.
    """
    chosen, available = np.asarray(picked, dtype=float), np.asarray(total, dtype=float)  # [C]
    share = 100 * chosen / np.maximum(available, 1)  # [C], per cent
    mean = 100 * chosen.sum() / max(available.sum(), 1)
    shown = np.arange(len(share))
    if len(shown) > NAMED:
        shown = np.argsort(share, kind="stable")[np.r_[: NAMED // 2, -NAMED // 2 : 0]]
    columns = np.array_split(shown, max(1, math.ceil(len(shown) / COLUMN)))
    with page(path) as figure:
        some = f"; extremes of {len(share):,} classes" if len(share) > len(shown) else ""
        figure.suptitle(
            f"{chosen.sum():,.0f} of {available.sum():,.0f} samples picked, {mean:.3g} %{some}", x=0.02, ha="left"
        )
        figure.supxlabel("picked share of the class, % (at the bar: samples; dashed: all classes)", color=GREY)
        panels = figure.subplots(1, len(columns), sharex=True, squeeze=False)[0]
        for axes, part in zip(panels, columns, strict=True):
            names = [cut(classes[c], 60 // len(columns)) for c in part]
            _bars(axes, names, {"share": share[part]}, [f"{chosen[c]:,.0f}" for c in part])
            axes.locator_params(axis="x", nbins=max(2, 6 // len(columns)))
            axes.axvline(mean, color=VERMILLION, linestyle="--", linewidth=1)


def scores(everyone: np.ndarray, picked: np.ndarray, path: str | Path) -> None:
    """Draw which scores were picked: the histogram of all samples, and of the coreset within it.

    Args:
        everyone: scores of all samples that could be picked, [n].
        picked: scores of the coreset, [k].
        path: the PNG to write.
    """
    with page(path) as figure:
        axes = figure.subplots()
        edges = np.histogram_bin_edges(everyone, bins=min(60, 1 + len(everyone) // 4)).tolist()
        axes.hist(everyone, edges, color=BLUE, alpha=0.5, label=f"all {len(everyone):,} samples")
        axes.hist(picked, edges, color=VERMILLION, label=f"the {len(picked):,} picked")
        rank = np.searchsorted(np.sort(everyone), np.median(picked)) / len(everyone) if len(picked) else np.nan
        axes.set(
            title=f"The picks' median score exceeds that of {100 * rank:.0f} % of all samples",
            xlabel="gradient norm",
            ylabel="samples",
        )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
        axes.legend()


def images(easiest: np.ndarray, hardest: np.ndarray, easy: Labels, hard: Labels, path: str | Path) -> None:
    """Draw the easiest and the hardest images of a coreset, each with its class and score.

    Args:
        easiest: uint8 [m, H, W, 3], or [m, H, W, 1] for grey.
        hardest: likewise.
        easy: (class name, score) of each of the easiest.
        hard: likewise of the hardest.
        path: the PNG to write.
    """
    with page(path) as figure:
        parts = figure.subfigures(2, 1, squeeze=False).flat
        sets = [("Easiest", easiest, easy), ("Hardest", hardest, hard)]
        for part, (kind, pixels, labels) in zip(parts, sets, strict=True):
            part.suptitle(f"{kind} {len(pixels)} of the coreset, with their scores", x=0.02, ha="left")
            _gallery(part, pixels, labels)


def save_plot(storage: Storage, name: str, plot: Callable[[Path], None]) -> None:
    """Draw a plot into a run folder, wherever that is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.png"
        plot(path)
        storage.write(f"plots/{name}.png", path.read_bytes())


@contextmanager
def page(path: str | Path) -> "Iterator[Figure]":
    """Give an empty 9 × 6 inch figure in the common style, then write it under a temporary name and rename it."""
    from matplotlib import style
    from matplotlib.figure import Figure  # not pyplot: no backend to choose, no figure left open

    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with style.context(STYLE, after_reset=True):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=(9, 6), layout="constrained")
        yield figure
        figure.savefig(unfinished, format="png", dpi=150)
    os.replace(unfinished, path)


def _trace(axes: "Axes", rows: Rows, key: str, name: str, unit: str = "", scale: float = 1) -> None:
    """Draw one bold line per phase, the mean over its models, with the models as thin lines behind it."""
    ends = []  # (value, epoch, label, colour) where each bold line stops
    for phase in dict.fromkeys(row["phase"] for row in rows):
        of_phase = [row for row in rows if row["phase"] == phase]
        model, epoch, value = _points(of_phase, key)
        if not len(value):
            continue
        colour = VERMILLION if any(row.get("main") for row in of_phase) else BLUE
        models = np.unique(model)
        for one in models:
            axes.plot(epoch[model == one], scale * value[model == one], color=colour, alpha=0.4, linewidth=1)
        epochs, group = np.unique(epoch, return_inverse=True)
        mean = scale * np.bincount(group, value) / np.bincount(group)  # [epochs]
        axes.plot(epochs, mean, color=colour, linewidth=2.2, marker="o", markevery=[-1])
        ends.append((mean[-1], epochs[-1], f"{phase}, mean of {len(models)}" if len(models) > 1 else phase, colour))
    axes.set(title=f"{name} ends at {ends[-1][0]:.3g}{unit}" if ends else f"{name}: nothing recorded", xlabel="epoch")
    axes.margins(y=0.15)  # room for the labels
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.axis("on" if ends else "off")
    _label(axes, ends)


def _points(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return model, epoch and value of the rows that hold one, by epoch."""
    table = np.array([[row.get("model") or 0, row["epoch"], row.get(key)] for row in rows], dtype=float).reshape(-1, 3)
    table = table[np.isfinite(table[:, 2])]
    return tuple(table[np.argsort(table[:, 1], kind="stable")].T)


def line_ends(axes: "Axes", at: float, ends: dict[str, tuple[float, str]]) -> None:
    """Write the name of each line, in its colour, at its end."""
    for name, (value, colour) in ends.items():
        axes.annotate(name, (at, value), (-4, 6), ha="right", color=colour, weight="bold", **NOTE)


def _label(axes: "Axes", ends: list[tuple[float, float, str, str]]) -> None:
    """Write the labels above the ends of their lines, the higher the further off, so that no two meet."""
    for rank, (value, epoch, label, colour) in enumerate(sorted(ends)):
        side = "right" if epoch > np.mean(axes.get_xlim()) else "left"
        place = (0, 8 + 14 * rank)  # points
        axes.annotate(label, (epoch, value), place, ha=side, color=colour, weight="bold", **NOTE)


def _bars(axes: "Axes", names: Sequence[str], parts: dict[str, np.ndarray], labels: list[str]) -> None:
    """Draw stacked horizontal bars, the first on top, each with its label at the end."""
    rows, end = np.arange(len(names)), np.zeros(len(names))
    for (part, values), colour in zip(parts.items(), [BLUE, ORANGE], strict=False):
        axes.barh(rows, np.nan_to_num(values), left=end, color=colour, height=0.6, label=part)
        end = end + np.nan_to_num(values)
    size = min(10, 300 / max(len(names), 1))  # points, so that 40 rows do not touch
    for row, (where, label) in enumerate(zip(end, labels, strict=True)):
        axes.annotate(label, (where, row), (4, 0), va="center_baseline", color=GREY, size=size, **NOTE)
    axes.set_yticks(rows, names, fontsize=size)
    axes.set_ylim(max(len(names), 4) - 0.5, -0.5)  # few bars stay slim
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.3)  # room for the labels
    axes.locator_params(axis="x", nbins=5)
    axes.axis("on" if len(names) else "off")


def _gallery(figure: "SubFigure", pixels: np.ndarray, labels: Labels) -> None:
    """Draw the images in up to three rows, the first filled to eight at least."""
    columns = max(1, min(len(pixels), max(8, math.ceil(len(pixels) / 3))))
    grid = figure.subplots(max(1, math.ceil(len(pixels) / columns)), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, (name, score) in zip(grid.flat, pixels, labels, strict=False):  # the last row may stay short
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(f"{cut(name, 14)}\n{score:.3g}", loc="center", fontsize=8, pad=3)


def column(rows: Rows, key: str) -> np.ndarray:
    """Return a column of rows as numbers; a missing value becomes NaN."""
    return np.array([row.get(key) for row in rows], dtype=float)


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
    count = float(f"{count:.3g}")
    step = next((step for step in UNITS if abs(count) >= step), 1)
    return f"{count / step:.3g} {UNITS.get(step, '')}".rstrip()


def _duration(seconds: float) -> str:
    """Write seconds as people say them.

    >>> _duration(0.512), _duration(75), _duration(7_500), _duration(float("nan"))
    ('0.512 s', '1 min 15 s', '2 h 5 min', '–')
    """
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
