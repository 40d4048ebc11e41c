"""The plots of a run: plain data in, one PNG out, labels at the lines and bars. Plots of methods share the style."""

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raypkg.core.errors import UserError

from .storage import Storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure, SubFigure

Rows = Sequence[dict[str, Any]]
Labels = Sequence[tuple[str, float]]  # (class name, score) of each image
MOST_BARS = 200  # classes; more do not fit on one picture
COLUMN = 40  # classes in one column of bars
TILE = 1.6  # height of an image of side 1 with its title
LETTERED = 12  # classes whose samples are written into a matrix
WIDE = 3.5  # width of a gallery over its height
UNITS = {10**9: "G", 10**6: "M", 10**3: "k"}
# From the palette of Okabe & Ito, distinguishable with common forms of colour blindness and in grey.
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
NOTE: dict[str, Any] = {  # a label at its point, on a white patch that hides the lines behind it
    "textcoords": "offset points",
    "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
}


def curves(rows: Rows, path: str | Path) -> None:
    """Draw training loss and held-out accuracy, or perplexity, against epochs, phase by phase.

    Rows have ``phase``, ``main`` (whether it is the run's main training), ``model`` (its number, or None), ``epoch``,
    ``loss`` and, if measured, ``accuracy`` in [0, 1] and ``perplexity``; values may be None or NaN.
    """
    measured = "perplexity" if any(row.get("perplexity") is not None for row in rows) else "accuracy"
    unit, scale = (" %", 100) if measured == "accuracy" else ("", 1)
    panels = [("loss", "Training loss", "", 1), (measured, f"Held-out {measured}", unit, scale)]
    drawn = [panel for panel in panels if has_curve(rows, panel[0])] or panels
    with page(path) as figure:
        for axes, (key, name, unit, scale) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
            # One bold line per phase, the mean over its models, with the models as thin lines behind it
            ends: list[tuple[float, float, str, str]] = []  # value and epoch of a line's last point, label, colour
            for phase in dict.fromkeys(row["phase"] for row in rows):
                of_phase = [row for row in rows if row["phase"] == phase]
                colour = VERMILLION if any(row.get("main") for row in of_phase) else BLUE
                epoch, value = column(of_phase, "epoch"), scale * column(of_phase, key)
                model = np.nan_to_num(column(of_phase, "model"))  # a phase of one model has no number
                order = np.argsort(epoch, kind="stable")
                order = order[np.isfinite(value[order])]
                if not len(order):
                    continue
                epoch, value, model = epoch[order], value[order], model[order]
                models = np.unique(model)
                for one in models:
                    own = model == one
                    axes.plot(epoch[own], value[own], color=colour, alpha=0.4, linewidth=1)
                epochs, group = np.unique(epoch, return_inverse=True)
                mean = np.bincount(group, value) / np.bincount(group)  # [epochs]
                axes.plot(epochs, mean, color=colour, linewidth=2.2, marker="o", markevery=[-1])
                label = f"{phase}, mean of {len(models)}" if len(models) > 1 else phase
                ends.append((mean[-1], epochs[-1], label, colour))
            title = f"{name} ends at {ends[-1][0]:.3g}{unit}" if ends else f"{name}: nothing recorded"
            axes.set(title=title, xlabel="epoch")
            axes.margins(y=0.15)  # space for the labels
            axes.locator_params(axis="x", integer=True, min_n_ticks=1)
            axes.axis("on" if ends else "off")
            # The higher the line, the further above its end is the label, so that no two meet.
            for rank, (height, last, label, colour) in enumerate(sorted(ends)):
                side = "right" if last > np.mean(axes.get_xlim()) else "left"
                offset = (0, 8 + 14 * rank)  # points
                note(axes, label, (last, height), offset, ha=side, color=colour, weight="bold")
            if key == "loss":
                axes.set_ylim(bottom=0)


def has_curve(rows: Rows, key: str) -> bool:
    """Return True if a phase has a figure at two epochs: a single point is in the text of the run."""
    epochs = {(row["phase"], row["epoch"]) for row in rows if row.get(key) is not None}
    return len(epochs) > len({phase for phase, _ in epochs})


def composition(picked: Sequence[int], total: Sequence[int], classes: Sequence[str], path: str | Path) -> None:
    """Draw the picked share of each class; of more than 200 classes, the 100 lowest and the 100 highest.

    ``picked`` counts the samples of each class in the coreset, ``total`` those in the training set, both [C].
    """
    chosen = np.asarray(picked, dtype=float)
    available = np.asarray(total, dtype=float)
    share = 100 * chosen / np.maximum(available, 1)  # [C], per cent
    mean = 100 * chosen.sum() / max(available.sum(), 1)
    title = f"{chosen.sum():,.0f} of {available.sum():,.0f} samples picked, {mean:.3g} %"
    drawn = np.arange(len(share))
    if len(share) > MOST_BARS:
        order = np.argsort(share, kind="stable")
        drawn = np.concatenate([order[: MOST_BARS // 2], order[-MOST_BARS // 2 :]])
        title += f"; extremes of {len(share):,} classes"
    columns = np.array_split(drawn, max(1, math.ceil(len(drawn) / COLUMN)))
    with page(path) as figure:
        headline(figure, title)
        figure.supxlabel("picked share of the class, % (at the bar: samples; dashed: all classes)", color=GREY)
        panels = figure.subplots(1, len(columns), sharex=True, squeeze=False)[0]
        for axes, members in zip(panels, columns, strict=True):
            rows = np.arange(len(members))  # horizontal bars, the first on top
            axes.barh(rows, share[members], color=BLUE, height=0.6)
            size = min(10, 300 / max(len(members), 1))  # points, so that 40 rows do not touch
            for row, c in enumerate(members):
                at = {"va": "center_baseline", "color": GREY, "size": size}
                note(axes, f"{chosen[c]:,.0f}", (share[c], row), (4, 0), **at)
            axes.set_yticks(rows, [cut(classes[c], 60 // len(columns)) for c in members], fontsize=size)
            axes.set_ylim(max(len(members), 4) - 0.5, -0.5)  # few bars stay slim
            axes.grid(axis="y", visible=False)
            axes.margins(x=0.3)  # space for the labels
            axes.axis("on" if len(members) else "off")
            axes.locator_params(axis="x", nbins=max(2, 6 // len(columns)))
            axes.axvline(mean, color=VERMILLION, linestyle="--", linewidth=1)


def scores(everyone: np.ndarray, picked: np.ndarray, path: str | Path) -> None:
    """Draw the histogram of all samples' scores [n], and that of the coreset's [k] within it."""
    rank = np.nan
    if len(picked):
        rank = np.searchsorted(np.sort(everyone), np.median(picked)) / len(everyone)
    bins = min(60, 1 + len(everyone) // 4)  # few samples get few bars: noise would look like structure
    edges = np.histogram_bin_edges(everyone, bins).tolist()
    with page(path) as figure:
        axes = figure.subplots()
        axes.hist(everyone, edges, color=BLUE, alpha=0.5, label=f"all {len(everyone):,} samples")
        axes.hist(picked, edges, color=VERMILLION, label=f"the {len(picked):,} picked")
        axes.set_title(f"The picks' median score exceeds that of {100 * rank:.0f} % of all samples")
        axes.set(xlabel="gradient norm", ylabel="samples", yscale="log")
        count_axis(axes.yaxis)
        axes.legend(loc="upper right")


def gallery(groups: Sequence[tuple[str, np.ndarray, Labels]], path: str | Path) -> None:
    """Draw groups of images below their titles, with the class name and the score of each image.

    Images are uint8 [m, H, W, 3], or 1 channel for grey. Those of a group are in up to three rows of at least eight.
    """
    with page(path, height=2.5 * len(groups)) as whole:
        for (title, pixels, labels), (figure,) in zip(
            groups, whole.subfigures(len(groups), squeeze=False), strict=True
        ):
            headline(figure, f"{title}, with their scores")
            columns = max(1, min(len(pixels), max(8, math.ceil(len(pixels) / 3))))
            rows = max(1, math.ceil(len(pixels) / columns))
            pitch = WIDE * rows * TILE / columns  # the columns fill the gallery
            axes = figure.subplots()  # one frame: many frames take long to draw
            for place, (image, (name, score)) in enumerate(zip(pixels, labels, strict=False)):
                row, column = divmod(place, columns)
                x, y = column * pitch, row * TILE  # the middle of the image; its larger side is 1
                height, width = np.divide(image.shape[:2], max(image.shape[:2]))
                top = y - height / 2
                extent = (x - width / 2, x + width / 2, top + height, top)
                axes.imshow(image, extent=extent, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                label = f"{cut(name, 14)}\n{score:.3g}"
                axes.annotate(label, (x, top), (0, 2), ha="center", size=7, textcoords="offset points", in_layout=False)
            axes.set_axis_off()
            axes.set_xlim(-pitch / 2, (columns - 0.5) * pitch)
            axes.set_ylim((rows - 1) * TILE + 0.5, 0.5 - TILE)  # the first row on top, its titles above


def confusion(counts: np.ndarray, classes: Sequence[str], title: str, path: str | Path) -> None:
    """Draw samples by true and predicted class, [C, C], as shares of the true class; numbers where they fit."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    n = len(classes)
    with page(path) as figure:
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="predicted class", ylabel="true class", title=title)
        axes.grid(False)
        shown = range(0, n, max(1, n // COLUMN))
        axes.set_xticks(shown, [cut(classes[c], 12) for c in shown], rotation=90 if n > LETTERED else 0)
        axes.set_yticks(shown, [cut(classes[c], 20) for c in shown])
        if n <= LETTERED:
            for true, predicted in zip(*np.nonzero(counts), strict=True):
                ink = "white" if share[true, predicted] > 0.5 else "black"
                count = f"{counts[true, predicted]:,}"
                axes.text(predicted, true, count, ha="center", va="center", color=ink, fontsize=9)


def save_plot(storage: Storage, name: str, plot: Callable[[Path], None]) -> None:
    """Draw a plot into a run folder, local or remote; refuse a full or read-only disk."""
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
def page(path: str | Path, height: float = 5) -> "Iterator[Figure]":
    """Give an empty figure, 7.5 inches wide, in the common style, then write it."""
    # Not pyplot, which chooses a backend and keeps figures open. Imported here, as matplotlib takes a second to load.
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(STYLE, after_reset=True), warnings.catch_warnings():  # without the user's matplotlibrc
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # such letters become boxes
        figure = Figure(figsize=(7.5, height), dpi=180, layout="constrained")
        yield figure
        FigureCanvasAgg(figure).print_png(path)  # savefig would draw everything twice


def note(axes: "Axes", text: str, point: Sequence[float], offset: tuple[float, float], **look: Any) -> None:
    """Write a text at a point; the offset is in points."""
    axes.annotate(text, (point[0], point[1]), offset, **NOTE, **look)


def name_points(axes: "Axes", points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names (x, y, name, colour) beside the axes at the heights of their points, moved apart where they meet."""
    if not points:
        return
    low, high = axes.get_ylim()
    step = 0.04  # of the height: a line of text
    spots: list[float] = []
    ordered = sorted(points, key=lambda point: point[1])
    for _, y, *_ in ordered:
        spots.append(max((y - low) / (high - low), spots[-1] + step if spots else 0.0))
    for place in range(len(spots) - 1, -1, -1):  # down again from the upper edge
        spots[place] = min(spots[place], 1 - step * (len(spots) - 1 - place))
    for spot, (x, y, name, colour) in zip(spots, ordered, strict=True):
        thin = {"arrowstyle": "-", "color": colour, "alpha": 0.35, "linewidth": 0.7}
        axes.annotate(
            name, (x, y), (1.02, spot), textcoords="axes fraction", va="center", size=9, color=colour, arrowprops=thin
        )


def line_ends(axes: "Axes", at: float, ends: dict[str, tuple[float, str]]) -> None:
    """Write the name of each line at its end (value, colour)."""
    for name, (value, colour) in ends.items():
        note(axes, name, (at, value), (-4, 6), ha="right", color=colour, weight="bold")


def headline(figure: "Figure | SubFigure", text: str) -> None:
    """Write the title of several panels above the first of them."""
    figure.suptitle(text, x=0.02, ha="left")


def count_axis(axis: "Axis") -> None:
    """Label an axis with counts of three digits, a logarithmic one also at 2 and 5."""
    axis.set_major_formatter(lambda value, _: short(value))
    axis.set_minor_formatter(lambda value, _: short(value) if f"{value:e}"[0] in "25" else "")


def column(rows: Rows, key: str) -> np.ndarray:
    """Return a column of rows as floats; a missing value becomes NaN."""
    return np.array([row.get(key) for row in rows], dtype=float)


# Numbers and names


def cut(name: str, length: int) -> str:
    """Return a name shortened to at most ``length`` characters."""
    return name if len(name) <= length else name[: length - 1] + "…"


def short(count: float) -> str:
    """Return a count with three digits and its unit.

    >>> short(950), short(12_345), short(999_999), short(float("nan"))
    ('950', '12.3 k', '1 M', '–')
    """
    if not math.isfinite(count):
        return "–"
    rounded = float(f"{count:.3g}")  # first: 999,999 is 1 M, not 1000 k
    step = next((step for step in UNITS if abs(rounded) >= step), 1)
    return f"{rounded / step:.3g} {UNITS.get(step, '')}".rstrip()


def in_full(value: Any) -> str:
    """Return a count with separators, any other number with four digits, and a text as it is.

    >>> in_full(30_176), in_full(0.98765), in_full("done"), in_full(None)
    ('30,176', '0.9877', 'done', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Return seconds in one or two units.

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
