"""A sweep as a table on the terminal, with the best trial and the Pareto front, and its pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from raypkg.runs.plots import save_plot
from raypkg.runs.show import findings, terminal

from . import plots as plots
from .sweep_folder import BEST, DONE, SweepFolder, curve, front, judge_proxy, ranked

WIDEST = 1000  # columns
Row = Mapping[str, Any]
Rows = Sequence[Row]


def show_sweep(sweep: SweepFolder, console: Console) -> None:
    """Print the trials, the best of them and how to run it again."""
    results, order, pareto, best = _judged(sweep)
    table = _table(sweep, order, pareto)
    wide = terminal()
    wide.width = max(wide.width, Measurement.get(wide, wide.options.update(max_width=WIDEST), table).maximum)
    wide.print(table)  # with many settings the terminal wraps its lines, and no figure is cut off
    for row in results:
        if row["error"]:
            console.print(f"{row['run']} failed: {row['error']}", soft_wrap=True)
    if best:
        metric, run = sweep.order["metric"], sweep.run(best["trial"])
        concluded = sweep.best == sweep.lasting(best["trial"])  # the file is of the last time that the sweep ended
        at = f"{sweep.storage.root}/{BEST}" if concluded else f"{run.storage.root}/config.toml"
        console.print(f"best: {best['run']}, {metric} {best[metric]:.4g}")
        console.print(findings(run.summary or {})[0], soft_wrap=True)
        console.print(f"its settings: effray {sweep.order['experiment']} --config {at}", soft_wrap=True)
    if found := judge_proxy(sweep):
        console.print(
            f"proxy: Kendall τ {found['kendall']:.2f} over the {found['trials']} trials on all samples;"
            f" {found['backward']:,} samples backward, {found['backward'] / found['backward_without']:.0%} of"
            f" {sweep.order['samples']} trials on all samples to the end",
            soft_wrap=True,
        )
    console.print(sweep.storage.root, style="dim", soft_wrap=True)


def conclude(sweep: SweepFolder) -> None:
    """Write what there is so far: the table of all trials, the settings of the best, and the pictures."""
    results, _, pareto, best = _judged(sweep)
    sweep.conclude(results, best)
    metric, mode, names = sweep.order["metric"], sweep.order["mode"], _names(sweep)
    curves = {row["run"]: curve(sweep.run(row["trial"]), metric) for row in results}
    chosen = best["run"] if best else None
    if found := judge_proxy(sweep):
        sweep.storage.write_json("proxy.json", found)
    alike = [row for row in results if row.get("proxy")] or results  # trained on the same samples
    save_plot(sweep.storage, "settings", lambda path: plots.against_settings(alike, names, metric, path))
    save_plot(sweep.storage, "parallel", lambda path: plots.parallel(alike, names, metric, mode, path))
    save_plot(sweep.storage, "curves", lambda path: plots.learning_curves(curves, metric, chosen, path))
    save_plot(sweep.storage, "pareto", lambda path: plots.pareto(results, pareto, metric, path))


def _judged(sweep: SweepFolder) -> tuple[list[dict[str, Any]], Rows, list[int], Row | None]:
    """Return the results, the same in order, the Pareto front and the best done trial."""
    metric, mode, results = sweep.order["metric"], sweep.order["mode"], sweep.results()
    order = ranked(results, metric, mode)
    done = (row for row in order if row["state"] == DONE and not row.get("proxy"))
    best = next((row for row in done if row.get(metric) is not None), None)
    return results, order, front(results, metric, mode), best


def _table(sweep: SweepFolder, results: Rows, pareto: Sequence[int]) -> Table:
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
        state = f"{row['state']} (proxy)" if row.get("proxy") else row["state"]
        table.add_row(f"{mark}{row['trial']}", state, str(row["epochs"]), *figures, *settings)
    return table


def _names(sweep: SweepFolder) -> list[str]:
    names = dict.fromkeys(name for trial in sweep.trials for name in trial["settings"] or ())
    return [name for name in names if name not in (sweep.order.get("fixed") or {})]


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
