"""Runs in lines: what each is, its state, what it reached and cost. Of every run only two small files are read."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from rich.cells import cell_len

from raypkg.core.errors import UserError

from .activity import DONE, ago, state_of, written
from .sealed import CONFIG, read_settings
from .storage import Storage

SUMMARY = "summary.json"
MARKS = {CONFIG, SUMMARY, "environment.json", "metrics.parquet"}  # files of which a run has at least one
AT_ONCE = 16  # runs that are read at a time: an object store takes long to answer, and answers many
COLUMNS = ("run", "state", "data", "model", "method")
FIGURES = ("accuracy", "backward", "seconds", "age")
ALIGNED = ("left",) * len(COLUMNS) + ("right",) * len(FIGURES)
GAP = "   "


class Listed(NamedTuple):
    """A line of the list.

    Attributes:
        experiment: whose run it is.
        name: of the run.
        state: it is in, or which of its files is damaged.
        method: the experiment, with what it selects by.
        accuracy: on the test samples; None where there is none.
        backward: samples back-propagated over all phases, once it is done.
        seconds: of work on the critical path, once it is done.
        time: when it was last written to, in seconds since 1970.
    """

    experiment: str
    name: str
    state: str
    data: str
    model: str
    method: str
    accuracy: float | None
    backward: int | None
    seconds: float | None
    time: float


def runs_of(root: str, experiments: Iterable[str]) -> list[Listed]:
    """Return a line for each run of some experiments, in no order; folders that are no runs are left out.

    Args:
        root: of all runs.
        experiments: their names.

    Raises:
        UserError: the root cannot be listed.
    """
    runs = Storage(root)
    kinds = set(runs.list()) & set(experiments)
    places = [(kind, name) for kind in kinds for name in (runs / kind).list()]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        lines = list(pool.map(lambda place: listed(root, *place), places))
    return [line for line in lines if line is not None]


def listed(root: str, experiment: str, name: str) -> Listed | None:
    """Return the line of a run, whatever is wrong with it, or None where a folder is none."""
    storage = Storage(root) / experiment / name
    try:
        times = written(root, experiment, name)
    except UserError:  # of another user
        return None
    if not MARKS & times.keys():
        return None
    config, damaged = _config(storage)
    figures: tuple[float | None, int | None, float | None] = (None, None, None)
    if SUMMARY not in times:
        state = state_of(storage)
    else:
        state = DONE
        try:
            figures = _figures(storage.read_json(SUMMARY))
        except (UserError, AttributeError, LookupError, TypeError, ValueError):
            damaged = SUMMARY
    return Listed(
        experiment,
        name,
        f"bad {damaged}" if damaged else state,
        named(config, "dataset"),
        named(config, "model"),
        _method(experiment, config),
        *figures,
        time=max(times.values()),
    )


def named(config: Mapping[str, Any], part: str) -> str:
    """Return the name in a part of stored settings, without the folder of a data set.

    >>> named({"dataset": {"name": "parquet:/data/cifar10"}}, "dataset")
    'cifar10'
    """
    chosen = config.get(part)
    name = chosen.get("name") if isinstance(chosen, dict) else None
    return _printable(str(name).rpartition("/")[2]) if name else "–"


def in_columns(lines: Sequence[Listed]) -> list[str]:
    """Return lines as text in columns below a heading; a table of `rich` takes a second for a thousand."""
    rows = [[*COLUMNS, *FIGURES], *map(_cells, lines)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    texts = [GAP.join(map(_padded, row, widths, ALIGNED)).rstrip() for row in rows]
    rule = "─" * (sum(widths) + len(GAP) * (len(widths) - 1))
    return [texts[0], rule, *texts[1:]]


def _cells(line: Listed) -> list[str]:
    return [
        line.name,
        line.state,
        line.data,
        line.model,
        line.method,
        "–" if line.accuracy is None else f"{line.accuracy:.2%}",
        "–" if line.backward is None else f"{line.backward:,}",
        "–" if line.seconds is None else f"{line.seconds:,.1f}",
        ago(line.time),
    ]


def _padded(text: str, width: int, aligned: str) -> str:
    """Return a text filled up to a width, in which some letters take two places."""
    space = " " * (width - cell_len(text))
    return f"{text}{space}" if aligned == "left" else f"{space}{text}"


def _config(storage: Storage) -> tuple[dict[str, Any], str]:
    """Return the settings of a run, and the name of their file if it is damaged."""
    try:
        return read_settings(storage), ""
    except UserError:
        return {}, CONFIG


def _figures(summary: Any) -> tuple[float | None, int, float]:
    """Return accuracy, samples back-propagated and seconds of a finished run.

    Raises:
        AttributeError, LookupError, TypeError or ValueError: they are not what a run writes.
    """
    accuracy = summary.get("test_accuracy")
    backward = sum(int(phase["backward"]) for phase in summary["phases"])
    return None if accuracy is None else float(accuracy), backward, float(summary["seconds"])


def _method(experiment: str, config: Mapping[str, Any]) -> str:
    """Return the experiment with what it selects by: wherever its settings say so."""
    select = config.get("select")
    inner = _rule(select) if isinstance(select, dict) else None
    chosen = inner or config.get("selection") or _rule(config) or experiment
    return experiment if chosen == experiment else f"{experiment} {_printable(str(chosen))}"


def _rule(select: Mapping[str, Any]) -> Any:
    return select.get("rule") or select.get("method")  # its name before version 0.3


def _printable(text: str) -> str:
    """Return a text of a file that may be anybody's without what would steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
