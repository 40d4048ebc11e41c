"""A sweep as a table on the terminal, with the best trial and the Pareto front, and its pictures."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from . import sweep_plots as plots
from .show import findings
from .sweep import SweepFolder, curve, front, ranked

WIDEST = 1000  # columns


def show_sweep(sweep: SweepFolder, console: Console) -> None:
    """Write results, best settings and pictures of what there is so far, and print the table."""
    metric, mode = sweep.order["metric"], sweep.order["mode"]
    results = sweep.results()
    order = ranked(results, metric, mode)
    best = order[0] if order and order[0]["state"] == "done" and order[0].get(metric) is not None else None
    pareto = front(results, metric, mode)
    sweep.conclude(results, best)
    _draw(sweep, results, pareto)
    table = _table(sweep, order, pareto)
    whole = Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
    console.print(table, width=max(console.width, whole), crop=False)  # many settings: the terminal may wrap lines
    if best:
        at = f"{sweep.storage.root}/best.toml"
        console.print(f"best: {best['run']}, {metric} {best[metric]:.4g}")
        console.print(findings(sweep.run(best["trial"]).summary or {})[0], soft_wrap=True)
        console.print(f"its settings: effray {sweep.order['experiment']} --config {at}", soft_wrap=True)
    console.print(sweep.storage.root, style="dim", soft_wrap=True)


def _table(sweep: SweepFolder, results: Sequence[Mapping[str, Any]], pareto: Sequence[int]) -> Table:
    metric, names = sweep.order["metric"], _names(sweep)
    title = f"{sweep.name}: * = on the Pareto front of {metric} against samples backward"
    table = Table(title=title, title_justify="left", box=SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("\ntrial", justify="right")
    table.add_column("\nstate")
    for heading in ("\nepochs", f"\n{metric}", "samples\nbackward", "\nseconds"):
        table.add_column(heading, justify="right")
    for name in names:
        part, _, rest = name.rpartition(".")
        table.add_column(f"{part}\n{rest}", justify="right")
    for row in results:
        mark = "*" if row["trial"] in pareto else ""
        figures = [_number(row.get(metric)), _count(row.get("backward")), _number(row.get("seconds"))]
        settings = [_number(row.get(name)) for name in names]
        table.add_row(f"{mark}{row['trial']}", row["state"], str(row["epochs"]), *figures, *settings)
    return table


def _draw(sweep: SweepFolder, results: Sequence[dict[str, Any]], pareto: Sequence[int]) -> None:
    metric, mode, names = sweep.order["metric"], sweep.order["mode"], _names(sweep)
    curves = {row["run"]: curve(sweep.run(row["trial"]), metric) for row in results}
    _save(sweep, "settings", lambda path: plots.against_settings(results, names, metric, path))
    _save(sweep, "parallel", lambda path: plots.parallel(results, names, metric, mode, path))
    _save(sweep, "curves", lambda path: plots.learning_curves(curves, metric, mode, path))
    _save(sweep, "pareto", lambda path: plots.pareto(results, pareto, metric, path))


def _save(sweep: SweepFolder, name: str, plot: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.png"
        plot(path)
        sweep.storage.write(f"plots/{name}.png", path.read_bytes())


def _names(sweep: SweepFolder) -> list[str]:
    return list(dict.fromkeys(name for trial in sweep.trials for name in trial["settings"] or ()))


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
