"""The commands on the models of finished runs: ``predict``, ``evaluate``, ``diff`` and ``export``."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import click

from raypkg.core.errors import UserError, unknown
from raypkg.experiments import export_format

from .options import PLACE, TRUST, ExampleHelp, say

MODEL, SUMMARY = "model.safetensors", "summary.json"  # of a finished run

MOST_ROWS = 20  # predictions, or classes, printed
MOST_LETTERS = 200  # of a text that is printed
PREDICT_HELP = """Predict the class of new samples with the model of a finished run.

SOURCE is an image or a folder of images; a file of texts, as .txt a line each, or .csv, .tsv, .jsonl or .parquet with a
column of texts; or rows as .csv or .parquet with the columns of training. The first are printed.

Example:
    effray embed --model resnet8 --name rows && effray train --name mine --dataset table:runs/embed/rows --model"""
PREDICT_HELP += " linear && effray predict mine runs/embed/rows/test.parquet"


@click.command(cls=ExampleHelp, params=[TRUST, PLACE], help=PREDICT_HELP)
@click.argument("run")
@click.argument("source")
@click.option("--out", metavar="FILE", help="write all predictions: .parquet, .csv or .jsonl")
def predict(run: str, source: str, out: str | None, root: str) -> None:
    """Predict the class of new samples."""
    from rich.table import Table

    from raypkg.experiments.prediction import FORMATS, predictions_of, write_table
    from raypkg.runs.catalog import locate
    from raypkg.runs.document import terminal

    if out is not None and not out.endswith(FORMATS):
        raise unknown("format of predictions", Path(out).suffix, FORMATS)
    predictions = predictions_of(locate(root, run, having=MODEL), source)
    if out is not None:
        write_table(predictions, out)
    table = Table("input", "label", "probability")
    for row in predictions.slice(0, MOST_ROWS).to_pylist():
        given = str(row["input"])
        shortened = given if len(given) <= MOST_LETTERS else f"{given[:MOST_LETTERS]} …"
        table.add_row(shortened, row["label"], f"{row['probability']:.1%}")
    terminal().print(table)
    if (more := len(predictions) - MOST_ROWS) > 0:
        say(f"and {more:,} more{'' if out else ': --out FILE writes all of them'}")
    if out is not None:
        say(out)


@click.command(cls=ExampleHelp, params=[TRUST, PLACE])
@click.argument("run")
@click.option("--dataset", metavar="NAME", help="other data with classes of the same names (default: the run's own)")
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="an option of that data set")
@click.option("--split", type=click.Choice(["test", "train"]), default="test", show_default=True, help="which samples")
def evaluate(run: str, dataset: str | None, pairs: tuple[str, ...], split: str, root: str) -> None:
    """Evaluate the model of a finished run: accuracy, F1, classes, confusions, calibration.

    The predictions and a picture of the confusions are stored in the run folder.

    Example:
        effray train --name mine && effray evaluate mine
    """
    from rich.table import Table

    from raypkg.core.settings import Dataset
    from raypkg.experiments.prediction import evaluate_run
    from raypkg.runs import plots
    from raypkg.runs.catalog import locate
    from raypkg.runs.document import terminal

    from .setting_options import parsed_pairs

    if pairs and dataset is None:
        raise UserError(f"--set {pairs[0]} does nothing without --dataset: the run's own data are as in training")
    options = parsed_pairs(pairs)
    folder = locate(root, run, having=MODEL)
    other = None if dataset is None else Dataset(name=dataset, options=options)
    found, predictions, classes = evaluate_run(folder, other, split)
    by_class = found.by_class
    table = Table("class", *by_class, "most confused with")
    for c in found.hardest[:MOST_ROWS]:
        wrong = found.confusion[c].copy()
        wrong[c] = 0
        confused = f"{classes[wrong.argmax()]} ({wrong.max():,})" if wrong.any() else ""
        numbers = [f"{column[c]:,}" if name == "samples" else f"{column[c]:.1%}" for name, column in by_class.items()]
        table.add_row(classes[c], *numbers, confused)
    console = terminal()
    console.print(table)
    if (more := len(found.hardest) - MOST_ROWS) > 0:
        say(f"and {more:,} more classes, which have a higher F1")
    low, high = found.interval
    say(
        f"{split} accuracy {found.accuracy:.2%} (95 % interval {low:.1%} to {high:.1%}), macro F1 {found.macro_f1:.3f},"
        f" calibration error {found.calibration:.3f}, {len(predictions):,} samples"
    )
    name = split
    if dataset is not None:
        digest = hashlib.blake2b(repr((dataset, options)).encode(), digest_size=4).hexdigest()
        name = f"{split}-{digest}"
    title = f"{found.accuracy:.1%} of {len(predictions):,} {split} samples are right"
    plots.save_plot(folder.storage, f"confusion-{name}", partial(plots.confusion, found.confusion, classes, title))
    folder.storage.write_table(f"evaluations/{name}.parquet", predictions)
    say(f"{folder.storage.root}/evaluations/{name}.parquet and plots/confusion-{name}.png")


@click.command(cls=ExampleHelp, params=[TRUST, PLACE])
@click.argument("run")
@click.argument("other")
def diff(run: str, other: str, root: str) -> None:
    """Compare two finished runs: settings that differ, costs, and accuracy on the same test samples.

    The accuracies are paired sample by sample: a difference of one seed each says nothing about other seeds, for which
    there is `effray compare`.

    Example:
        effray train --name a && effray train --name b --model linear && effray diff a b
    """
    from raypkg.core.config import dotted
    from raypkg.core.settings import APART
    from raypkg.experiments.prediction import pair_runs
    from raypkg.runs.catalog import locate
    from raypkg.runs.document import COLUMNS, Grid

    runs = [locate(root, name, having=SUMMARY) for name in (run, other)]
    for each in runs:
        if each.summary is None:
            raise UserError(f"{each.name} is not finished")
    ours, theirs = (dotted({part: value for part, value in each.config.items() if part not in APART}) for each in runs)
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    rows = [[name, *(str(values.get(name, "–")) for values in (ours, theirs))] for name in names]
    for heading, key, form, total in COLUMNS:
        sums = [total([phase.get(key, 0) for phase in (each.summary or {})["phases"]]) for each in runs]
        if any(sums):
            rows.append([" ".join(heading.split()), *map(form, sums)])
    Grid("", ["setting or cost", *(each.name for each in runs)], rows).print()
    if not all("test_accuracy" in (each.summary or {}) for each in runs):
        return
    paired = pair_runs(*runs)
    if paired is None:
        say("the runs were tested on different samples, so their accuracies are not paired")
        return
    mean, low, high = (100 * value for value in paired.difference)
    say(
        f"accuracy {mean:+.2f} points for {runs[0].name} (95 % interval {low:+.2f} to {high:+.2f}) on {paired.n:,}"
        f" test samples: {paired.only_first:,} right only there, {paired.only_second:,} only in {runs[1].name},"
        f" p = {paired.p:.2g} (McNemar's test, exact)"
    )


@click.command(cls=ExampleHelp, params=[TRUST, PLACE])
@click.argument("run")
@click.option(
    "--to", "form", type=click.Choice(export_format.names), help="default: csr for a sparse model, else safetensors"
)
@click.option("--out", metavar="FOLDER", help="a new local folder (default: RUN-FORMAT)")
def export(run: str, root: str, form: str | None, out: str | None) -> None:
    """Export a finished run's model with a card: for effray, ONNX or transformers, or without pruned weights.

    RUN is a name, or a path to a run folder. csr = compressed sparse rows. ONNX needs `pip install 'effray[onnx]'`; its
    graph takes pixels and rows as they are stored. The card, README.md, has the form of the Hugging Face Hub.

    Example:
        effray sparse --name thin --model mlp --density 0.05 && effray export thin
    """
    from raypkg.experiments.export import export_run
    from raypkg.runs.catalog import locate
    from raypkg.studies.show import verdict_on

    folder = locate(root, run, having=MODEL)
    form = form or ("csr" if "density" in (folder.summary or {}) else "safetensors")
    out = out or f"{folder.name}-{form}"
    export_run(folder, form, out, verdict_on(folder.storage))
    say(f"{out}: {form} with its card, README.md")
