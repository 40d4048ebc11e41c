"""The commands on all runs: ``list`` and ``rm``."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import click

from raypkg.core.errors import UserError, unknown
from raypkg.experiments import experiment, settings_of

from .options import PLACE, ExampleHelp, confirmed, say

if TYPE_CHECKING:  # it imports pyarrow, which `--help` does not need
    from raypkg.runs.storage import Storage

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
    from raypkg.runs.catalog import in_columns, runs_of
    from raypkg.studies.study import FOLDER, folded

    kinds = experiment.names
    if kind and kind not in (*kinds, FOLDER):
        raise unknown("experiment", kind, [*kinds, FOLDER])
    lines = folded(root, runs_of(root, kinds))
    if kind:
        lines = [line for line in lines if kind in (line.experiment, line.method.partition(" ")[0])]
    lines.sort(key=lambda line: line.time, reverse=True)
    if as_json:
        say(json.dumps([line._asdict() for line in lines[:last]], indent=2))
        return
    of_kind = f" of {kind}" if kind else ""
    texts = in_columns(lines[:last]) if lines else [f"no runs{of_kind} in {root}"]
    say("\n".join(texts))


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
    from raypkg.studies.study import with_studies

    folders, to_lock = with_studies([to_delete(root, run) for run in runs], trials)
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
