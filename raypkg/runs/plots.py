"""The pictures of a run: plain data in, one PNG out, with labels at the lines and bars; methods draw theirs alike."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raypkg.core.errors import UserError

from .storage import Storage
from .style import BLUE, GREY, NOTE, ORANGE, STYLE, VERMILLION, cut, duration, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Rows = Sequence[dict[str, Any]]
Labels = Sequence[tuple[str, float]]  # (class name, score) of each image
NAMED = 200  # classes whose names fit on one picture
COLUMN = 40  # classes in one column of bars
TILE = 1.5  # height of an image of side 1 with its title
WIDE = 3.5  # a gallery's width over its height


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
    seconds = column(phases, "seconds")
    forward = column(phases, "forward")
    backward = column(phases, "backward")
    with page(path) as figure:
        time, samples = figure.subplots(1, 2, sharey=True)

        _bars(time, names, {"seconds": seconds}, [duration(value) for value in seconds])
        whole = duration(np.nansum(seconds))
        time.set(title=f"The run took {whole}", xlabel="seconds")

        both = [f"{short(f)} + {short(b)}" for f, b in zip(forward, backward, strict=True)]
        _bars(samples, names, {"forward": forward, "backward": backward}, both)
        all_forward = short(np.nansum(forward))
        all_backward = short(np.nansum(backward))
        samples.set(title=f"{all_forward} samples forward + {all_backward} backward", xlabel="samples")
        samples.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
        samples.xaxis.set_major_formatter(lambda value, _: short(value))


def composition(
    picked: Sequence[int],
    total: Sequence[int],
    classes: Sequence[str],
    path: str | Path,
) -> None:
    """Draw the share of each class that was picked; of more than 200 classes, the 100 lowest and the 100 highest.

    Args:
        picked: samples of each class in the coreset, [C].
        total: samples of each class in the training set, [C].
        classes: their names, [C].
        path: the PNG to write.
    """
    chosen = np.asarray(picked, dtype=float)  # [C]
    available = np.asarray(total, dtype=float)  # [C]
    share = 100 * chosen / np.maximum(available, 1)  # [C], per cent
    mean = 100 * chosen.sum() / max(available.sum(), 1)
    shown = _extremes(share)
    title = f"{chosen.sum():,.0f} of {available.sum():,.0f} samples picked, {mean:.3g} %"
    if len(shown) < len(share):
        title += f"; extremes of {len(share):,} classes"
    columns = np.array_split(shown, max(1, math.ceil(len(shown) / COLUMN)))
    with page(path) as figure:
        figure.suptitle(title, x=0.02, ha="left")
        figure.supxlabel("picked share of the class, % (at the bar: samples; dashed: all classes)", color=GREY)
        panels = figure.subplots(1, len(columns), sharex=True, squeeze=False)[0]
        for axes, members in zip(panels, columns, strict=True):
            names = [cut(classes[c], 60 // len(columns)) for c in members]
            counts = [f"{chosen[c]:,.0f}" for c in members]
            _bars(axes, names, {"share": share[members]}, counts)
            axes.locator_params(axis="x", nbins=max(2, 6 // len(columns)))
            axes.axvline(mean, color=VERMILLION, linestyle="--", linewidth=1)


def scores(everyone: np.ndarray, picked: np.ndarray, path: str | Path) -> None:
    """Draw which scores were picked: the histogram of all samples, and of the coreset within it.

    Args:
        everyone: scores of all samples that could be picked, [n].
        picked: scores of the coreset, [k].
        path: the PNG to write.
    """
    rank = np.nan
    if len(picked):
        below = np.searchsorted(np.sort(everyone), np.median(picked))
        rank = below / len(everyone)
    # Few samples get few bars: noise would look like structure.
    bins = min(60, 1 + len(everyone) // 4)
    edges = np.histogram_bin_edges(everyone, bins).tolist()
    with page(path) as figure:
        axes = figure.subplots()
        axes.hist(everyone, edges, color=BLUE, alpha=0.5, label=f"all {len(everyone):,} samples")
        axes.hist(picked, edges, color=VERMILLION, label=f"the {len(picked):,} picked")
        axes.set(
            title=f"The picks' median score exceeds that of {100 * rank:.0f} % of all samples",
            xlabel="gradient norm",
            ylabel="samples",
        )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
        axes.legend(loc="upper right")


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
        (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False)
        _gallery(upper, "Easiest", easiest, easy)
        _gallery(lower, "Hardest", hardest, hard)


def save_plot(storage: Storage, name: str, plot: Callable[[Path], None]) -> None:
    """Draw a plot into a run folder, wherever that is.

    Raises:
        UserError: the disk of the run, or that of temporary files, is full or cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.png"
            plot(path)
            picture = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot draw {name!r} among the temporary files, see TMPDIR: {reason}") from None
    storage.write(f"plots/{name}.png", picture)


@contextmanager
def page(path: str | Path) -> "Iterator[Figure]":
    """Give an empty 9 × 6 inch figure in the common style, then write it under a temporary name and rename it."""
    # Not pyplot, which chooses a backend and keeps figures open. Imported here, as matplotlib takes a second to load.
    from matplotlib import style
    from matplotlib.figure import Figure

    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with style.context(STYLE, after_reset=True):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=(9, 6), layout="constrained")
        yield figure
        figure.savefig(unfinished, format="png", dpi=150)
    os.replace(unfinished, path)


def line_ends(axes: "Axes", at: float, ends: dict[str, tuple[float, str]]) -> None:
    """Write the name of each line, in its colour, at its end."""
    for name, (value, colour) in ends.items():
        axes.annotate(name, (at, value), (-4, 6), ha="right", color=colour, weight="bold", **NOTE)


def column(rows: Rows, key: str) -> np.ndarray:
    """Return a column of rows as numbers; a missing value becomes NaN."""
    return np.array([row.get(key) for row in rows], dtype=float)


class _End(NamedTuple):
    """Where a line stops, and what to write there."""

    value: float
    epoch: float
    label: str
    colour: str


def _trace(axes: "Axes", rows: Rows, key: str, name: str, unit: str = "", scale: float = 1) -> None:
    """Draw one bold line per phase, the mean over its models, with the models as thin lines behind it."""
    ends = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        of_phase = [row for row in rows if row["phase"] == phase]
        end = _trace_phase(axes, phase, of_phase, key, scale)
        if end:
            ends.append(end)
    title = f"{name} ends at {ends[-1].value:.3g}{unit}" if ends else f"{name}: nothing recorded"
    axes.set(title=title, xlabel="epoch")
    axes.margins(y=0.15)  # room for the labels
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.axis("on" if ends else "off")
    _label(axes, ends)


def _trace_phase(axes: "Axes", phase: str, rows: Rows, key: str, scale: float) -> _End | None:
    """Draw the lines of one phase; return where the bold one ends, or None if nothing was measured."""
    model, epoch, value = _points(rows, key)
    if not len(value):
        return None
    main = any(row.get("main") for row in rows)
    colour = VERMILLION if main else BLUE
    models = np.unique(model)
    for one in models:
        own = model == one
        axes.plot(epoch[own], scale * value[own], color=colour, alpha=0.4, linewidth=1)
    epochs, group = np.unique(epoch, return_inverse=True)
    mean = scale * np.bincount(group, value) / np.bincount(group)  # [epochs]
    axes.plot(epochs, mean, color=colour, linewidth=2.2, marker="o", markevery=[-1])
    label = f"{phase}, mean of {len(models)}" if len(models) > 1 else phase
    return _End(mean[-1], epochs[-1], label, colour)


def _points(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return model, epoch and value of the rows that hold one, by epoch."""
    points = [[row.get("model") or 0, row["epoch"], row.get(key)] for row in rows]
    table = np.array(points, dtype=float).reshape(-1, 3)  # a value of None becomes NaN
    table = table[np.isfinite(table[:, 2])]
    order = np.argsort(table[:, 1], kind="stable")
    model, epoch, value = table[order].T
    return model, epoch, value


def _label(axes: "Axes", ends: list[_End]) -> None:
    """Write the labels above the ends of their lines, the higher the further off, so that no two meet."""
    for rank, end in enumerate(sorted(ends)):
        side = "right" if end.epoch > np.mean(axes.get_xlim()) else "left"
        offset = (0, 8 + 14 * rank)  # points
        axes.annotate(
            end.label,
            (end.epoch, end.value),
            offset,
            ha=side,
            color=end.colour,
            weight="bold",
            **NOTE,
        )


def _bars(
    axes: "Axes",
    names: Sequence[str],
    parts: Mapping[str, np.ndarray],
    labels: Sequence[str],
) -> None:
    """Draw stacked horizontal bars, the first on top, each with its label at the end."""
    rows = np.arange(len(names))
    end = np.zeros(len(names))  # of the bars so far
    for (part, values), colour in zip(parts.items(), [BLUE, ORANGE], strict=False):
        lengths = np.nan_to_num(values)
        axes.barh(rows, lengths, left=end, color=colour, height=0.6, label=part)
        end = end + lengths
    size = min(10, 300 / max(len(names), 1))  # points, so that 40 rows do not touch
    for row, label in enumerate(labels):
        axes.annotate(label, (end[row], row), (4, 0), va="center_baseline", color=GREY, size=size, **NOTE)
    axes.set_yticks(rows, names, fontsize=size)
    axes.set_ylim(max(len(names), 4) - 0.5, -0.5)  # few bars stay slim
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.3)  # room for the labels
    axes.locator_params(axis="x", nbins=5)
    axes.axis("on" if len(names) else "off")


def _extremes(share: np.ndarray) -> np.ndarray:
    """Return the classes to draw: all if their names fit, else as many of the lowest shares as of the highest."""
    if len(share) <= NAMED:
        return np.arange(len(share))
    half = NAMED // 2
    order = np.argsort(share, kind="stable")
    return np.concatenate([order[:half], order[-half:]])


def _gallery(figure: "SubFigure", kind: str, pixels: np.ndarray, labels: Labels) -> None:
    """Draw the images in up to three rows, the first filled to eight at least, in one frame: many take long to draw."""
    figure.suptitle(f"{kind} {len(pixels)} of the coreset, with their scores", x=0.02, ha="left")
    columns = max(8, math.ceil(len(pixels) / 3))
    columns = max(1, min(len(pixels), columns))
    rows = max(1, math.ceil(len(pixels) / columns))
    pitch = WIDE * rows * TILE / columns  # so that the columns fill the gallery
    axes = figure.subplots()
    for place, (image, (name, score)) in enumerate(zip(pixels, labels, strict=True)):
        row, column = divmod(place, columns)
        middle = (column * pitch, row * TILE)
        _tile(axes, image, middle, f"{cut(name, 14)}\n{score:.3g}")
    axes.set_axis_off()
    axes.set_xlim(-pitch / 2, (columns - 0.5) * pitch)
    axes.set_ylim((rows - 1) * TILE + 0.5, 0.5 - TILE)  # the first row on top, its titles above


def _tile(axes: "Axes", image: np.ndarray, middle: tuple[float, float], title: str) -> None:
    """Draw an image, its larger side 1, and its title above."""
    height, width = np.divide(image.shape[:2], max(image.shape[:2]))
    x, y = middle
    top = y - height / 2
    extent = (x - width / 2, x + width / 2, top + height, top)
    axes.imshow(image, extent=extent, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.annotate(title, (x, top), (0, 3), ha="center", size=8, textcoords="offset points", in_layout=False)
