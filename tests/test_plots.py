"""Each plot is one PNG of its path, whatever the data: none, one point, NaN, many classes."""

import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from raypkg.methods.crest import plots as crest_plots
from raypkg.runs import plots

NAN = float("nan")


def row(phase="train", model=None, epoch=1, **values):
    return {"phase": phase, "model": model, "epoch": epoch, **values}


def two_phases():
    models = [row("pretrain", m, e, loss=2 / e + 0.1 * m) for m in range(3) for e in range(1, 5)]
    return models + [row(epoch=e, main=True, loss=1 / e, accuracy=0.9 - 0.5 / e) for e in range(1, 21)]


def check(step, **changes):
    values = {"update": step // 3, "rho": 0.1 / step, "interval": 3, "pool": 15, "active": 900 - step}
    return {"step": step, **values, "coreset_error": 0.01, "random_error": 0.1, **changes}


def pixels(count, channels):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)


def labels(count):
    return [(f"class with a long name {i}", i / 10) for i in range(count)]


def counts(classes):
    picked = np.random.default_rng(0).integers(0, 100, classes)
    return picked, np.full(classes, 100), [f"class {c}" for c in range(classes)]


def check_texts(canvas):
    """Refuse labels in TeX, and titles that end beyond the picture."""
    from matplotlib.text import Text

    figure = canvas.figure
    titles = {axes.get_title("left") for axes in figure.axes} - {""}
    for text in figure.findobj(Text):
        assert "mathdefault" not in text.get_text()
        assert text.get_text() not in titles or text.get_window_extent().x1 <= figure.bbox.x1, text.get_text()


@pytest.mark.parametrize(
    ("plot", "data"),
    [
        (plots.curves, [two_phases()]),
        (plots.curves, [[]]),
        (plots.curves, [[row(loss=NAN, accuracy=None), row(epoch=2, loss=math.inf, accuracy=NAN)]]),
        (plots.composition, counts(200)),
        (plots.composition, ([], [], [])),
        (plots.composition, ([0, 1], [0, 4], ["none at all", "$one$ 日本"])),
        (plots.confusion, [np.array([[3, 0], [1, 0]]), ["$one$ 日本", "b"], "two classes"]),
        (plots.scores, [np.random.default_rng(0).gamma(1, 1, 900), np.random.default_rng(1).gamma(3, 1, 90)]),
        (crest_plots.checks, [[check(step) for step in range(1, 50)], 0.05]),
        (crest_plots.checks, [[check(1, rho=0.0, coreset_error=0.0, random_error=0.0)], 0.05]),
        (plots.gallery, [[("one", pixels(1, 1), labels(1)), ("many", pixels(11, 1), [("seven", NAN)] * 11)]]),
        (plots.gallery, [[("none", pixels(0, 3), []), ("neither", pixels(0, 3), [])]]),
    ],
)
def test_writes_one_png(plot, data, tmp_path, monkeypatch):
    path = tmp_path / "plot.png"
    save = FigureCanvasAgg.print_png
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda canvas, path: (save(canvas, path), check_texts(canvas)))
    plot(*data, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    assert int.from_bytes(content[16:20]) == 1350 and int.from_bytes(content[20:24]) == 900  # width and height
    assert len(content) > 5_000
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_plot_leaves_the_old_one(tmp_path):
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError):
        plots.curves([row(loss="high")], path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
