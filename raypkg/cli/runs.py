"""The commands on runs, ``list`` and ``rm``, and on the models of finished ones: predict, evaluate, diff, export."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raypkg.core.errors import UserError, unknown
from raypkg.experiments import experiment, export_format, settings_of

from .options import PLACE, TRUST, ExampleHelp, confirmed, say

if TYPE_CHECKING:  # they import pyarrow, which `--help` does not need
    from raypkg.runs.catalog import Listed
    from raypkg.runs.storage import Storage

MODEL, SUMMARY = "model.safetensors", "summary.json"  # of a finished run
MOST_ROWS = 20  # predictions, or classes, printed
MOST_LETTERS = 200  # of a text that is printed
PREDICT_HELP = """Predict the class of new samples with the model of a finished run.

SOURCE is an image or a folder of images; a file of texts, as .txt a line each, or .csv, .tsv, .jsonl or .parquet with a
column of texts; or rows as .csv or .parquet with the columns of training. The first are printed.

Example:
    effray embed --model resnet8 --name rows && effray train --name mine --dataset table:runs/embed/rows --model"""
PREDICT_HELP += " linear && effray predict mine runs/embed/rows/test.parquet"
# Files, by their paths, that a run or sweep may hold
HELD = re.compile(
    r"((added|checkpoints|evaluations|parts|phases|requests|versions)/([^/]+/)*)?"
    r"[^/]+\.(arrow|digests|html|json(\.gz)?|jsonl|parquet|pt|safetensors|toml)(\.\d+\.part)?"
    r"|plots/[^/]+\.png(\.\d+\.part)?|(claims|ray|wandb)/.+|space\.py|table\.md"
)


@click.command("list", cls=ExampleHelp, params=[PLACE])
@click.argument("kind", metavar="[EXPERIMENT]", required=False)
@click.option("-n", "--last", type=click.IntRange(1), metavar="N", help="the newest N only")
@click.option("--json", "as_json", is_flag=True, help="print a JSON list for programs")
def list_runs(kind: str | None, root: str, last: int | None, as_json: bool) -> None:
    """List runs, the newest first: state, data, model, accuracy, cost and age.

    The trials of a sweep are one line: accuracy of the best, samples of all, seconds of finished ones. EXPERIMENT
    lists the runs and sweeps of one experiment; tune = all sweeps.

    Example:
        effray list --last 20
    """
    from rich.box import SIMPLE
    from rich.table import Table

    from raypkg.runs.catalog import ago, runs_of
    from raypkg.runs.document import print_wide
    from raypkg.studies.study import FOLDER

    kinds = experiment.names
    if kind and kind not in (*kinds, FOLDER):
        raise unknown("experiment", kind, [*kinds, FOLDER])
    lines = folded(root, runs_of(root, kinds))
    if kind:
        sweeps = (FOLDER, "compare") if kind == FOLDER else ()
        lines = [line for line in lines if line.experiment == kind or line.method.startswith(sweeps)]
    lines.sort(key=lambda line: line.time, reverse=True)
    if as_json:
        say(json.dumps([line._asdict() for line in lines[:last]], indent=2))
        return
    if not lines:
        say(f"no runs{f' of {kind}' if kind else ''} in {root}")
        return
    table = Table("run", "state", "data", "model", "method", box=SIMPLE, show_edge=False, pad_edge=False)
    for heading in ("accuracy", "backward", "seconds", "age"):
        table.add_column(heading, justify="right")
    for line in lines[:last]:
        accuracy = "–" if line.accuracy is None else f"{line.accuracy:.2%}"
        backward = "–" if line.backward is None else f"{line.backward:,}"
        seconds = "–" if line.seconds is None else f"{line.seconds:,.1f}"
        table.add_row(*line[1:6], accuracy, backward, seconds, ago(line.time))
    print_wide(table)


def folded(root: str, lines: Iterable[Listed]) -> list[Listed]:
    """Replace the lines of trials by a line for each study: accuracy of the best trial, cost of all.

    Seconds are those of finished trials, as one that was stopped early has no bill of them.
    """
    from raypkg.runs.catalog import DONE, RECORD, Listed, is_study, named, state_of, unreadable
    from raypkg.runs.storage import Storage
    from raypkg.studies.study import FOLDER, RESULTS, Study, ranked

    runs = {(line.experiment, line.name): line for line in lines}
    studies = Storage(root) / FOLDER
    try:
        names, folds = studies.list(), []
    except UserError:
        names, folds = [], [unreadable(studies)]
    for folder in (studies / name for name in names):
        time = None
        try:
            if not is_study(folder):
                continue
            time = max(folder.times().values(), default=0.0)
            study = Study(folder)
            config = study.config
            table = study.storage.read_table(RESULTS)
            state = state_of(study.storage) if study.left() else DONE
        except UserError:
            bad = Listed(FOLDER, folder.name, f"bad {RECORD}", method=FOLDER, time=time or 0.0)
            folds.append(unreadable(folder) if time is None else bad)
            continue
        places = [(study.experiment, study.run_name(number)) for number in range(len(study.trials))]
        trials = {place[1]: runs.pop(place) for place in places if place in runs}
        done = [trial for trial in trials.values() if trial.state == DONE]
        metric = study.order.metric
        rows = {row["run"]: row for row in ([] if table is None else table.to_pylist()) if row["run"] in trials}
        measured = [rows[trial.name] for trial in done if rows.get(trial.name, {}).get(metric) is not None]
        backward = [trial.backward or rows.get(name, {}).get("backward") or 0 for name, trial in trials.items()]
        best = str(ranked(measured, metric, study.order.mode)[0]["run"]) if measured else ""
        title = f"{study.name}: {len(done)} of {max(len(study.trials), study.order.samples)} trials done"
        line = Listed(
            experiment=study.experiment,
            name=f"{title}, best {best}" if best else title,
            state=state,
            data=named(config, "dataset"),
            model=named(config, "model"),
            method=study.command.removeprefix("effray "),
            accuracy=trials[best].accuracy if best in trials else None,
            backward=sum(backward) or None,
            seconds=sum(trial.seconds or 0 for trial in done) if done else None,
            time=max([time, *(trial.time for trial in trials.values())]),
        )
        folds.append(line)
    return [*runs.values(), *folds]


@click.command("rm", cls=ExampleHelp, params=[PLACE])
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--trials", is_flag=True, help="delete a sweep's trials too; by default they stay, as ordinary runs")
@click.option("--yes", is_flag=True, help="do not ask")
def remove_runs(runs: tuple[str, ...], root: str, trials: bool, yes: bool) -> None:
    """Delete runs or sweeps with everything stored in their folders.

    RUN is a name below --root, or a path to a run folder there. All are checked before the first is deleted. A run is
    refused while a process is working on it, and a folder that lacks a run's settings or whose results were changed. A
    single trial is refused, since its sweep would run it again, unless --trials is given.

    Example:
        effray train --name useless && effray rm useless --yes
    """
    from raypkg.runs.catalog import locked, remove, to_delete
    from raypkg.runs.storage import Storage
    from raypkg.studies.study import Study, is_study, study_around

    chosen = {storage.root: storage for storage in (to_delete(root, run) for run in runs)}  # by path: each once
    of_trials: dict[str, Storage] = {}
    around: dict[str, Storage] = {}  # studies that are locked while a trial of theirs is deleted
    for storage in chosen.values():
        if is_study(storage) and trials:
            with suppress(UserError):  # a damaged record names no trials
                study = Study(storage)
                storages = [study.run_storage(number) for number in range(len(study.trials))]
                existing = set(Storage(study.root, study.experiment).list())
                of_trials |= {run.root: run for run in storages if run.name in existing}
        elif not is_study(storage) and (of := study_around(storage)):
            if not trials:
                advice = f"--trials deletes it all the same, and `effray rm {of.name} --trials` the whole sweep"
                raise UserError(f"{storage.name} is a trial of sweep {of.name!r}, which would run it again: {advice}")
            around[of.storage.root] = of.storage
    folders = [*(chosen | of_trials).values()]
    to_lock = [*(chosen | of_trials | around).values()]
    for folder in folders:
        _check_ours(folder, root)
    with locked(to_lock):
        pass
    if not yes:
        count = f"{len(folders)} folder" + "s" * (len(folders) > 1)
        for folder in folders:
            say(folder.root)
        if not confirmed(f"delete {count}"):
            say("nothing is deleted")
            return
    with locked(to_lock):  # not while the user was asked
        for folder in folders:
            remove(folder)
            say(f"deleted {folder.root}")


def _check_ours(storage: Storage, root: str) -> None:
    """Refuse to delete a folder that is not EXPERIMENT/NAME below the root, or is not provably a run's or sweep's.

    A finished run is proven by its results, which have the digests of its manifest. Another folder is proven by
    settings below our digest that are valid for its experiment.
    """
    from raypkg.core.config import load_stored
    from raypkg.runs.folder import CONFIG, SEAL, RunFolder, read_settings
    from raypkg.runs.storage import Storage
    from raypkg.studies.study import FOLDER, Study

    kind = storage.parent.name
    try:
        through_link = storage.local and (storage.local.is_symlink() or storage.local.parent.is_symlink())
        if storage.parent.parent.root != Storage(root).root or through_link:
            raise UserError(f"it is not EXPERIMENT/NAME below --root {root}, or a link leads to it")
        if kind not in (*experiment.names, FOLDER):
            raise unknown("experiment", kind, experiment.names)
        if foreign := sorted(name for name in storage.times(recursive=True) if not HELD.fullmatch(name)):
            raise UserError(f"it holds {foreign[0]!r}, which no run or sweep does")
        if kind == FOLDER:
            kind = Study(storage).experiment
        elif summary := RunFolder(storage).summary:
            RunFolder(storage).check_all()
            if summary.get("files"):
                return
        settings = read_settings(storage)
        if not (storage.read(CONFIG) or b"").startswith(SEAL.encode()):
            raise UserError(f"its {CONFIG} does not begin with a digest")
        load_stored(settings_of(experiment[kind]), settings)
    except UserError as error:
        place = f"{storage.root!r} is no folder of a run or sweep"
        raise UserError(f"{place}: effray deletes none that it has not made: {error}") from None


# Models of finished runs


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
