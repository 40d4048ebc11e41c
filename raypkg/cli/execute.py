"""Running, resuming, showing and planning experiments: settings → run folder → phases → results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import ceil
from typing import Any

from click import Group, get_current_context

from raypkg.core.config import load_stored, to_toml
from raypkg.core.errors import Interruption, UserError, shown
from raypkg.core.memory import readable
from raypkg.core.presets import departures
from raypkg.core.registry import Entry
from raypkg.core.settings import APART, Experiment, RunSettings, Training
from raypkg.experiments import carry_out, experiment, open_run, settings_of
from raypkg.experiments.phases import stages_of, step_memory, with_workers
from raypkg.experiments.resolve import resolve, selection_of, stored_settings
from raypkg.experiments.samples import Samples
from raypkg.experiments.train import EmbedSettings, SelectSettings
from raypkg.runs.catalog import DONE, GOING, STATES, ago, find, resuming, state_of
from raypkg.runs.document import Grid, show_run, terminal
from raypkg.runs.folder import RunFolder, check_new, create
from raypkg.runs.report import Stage
from raypkg.runs.storage import Storage

from .options import say

COLUMNS = "{:<9} {:>6} {:>7} {:>7} {:>12} {:>10} {:>14}"
ALWAYS = ("config.toml", "environment.json", "metrics.parquet", "phases/", "summary.json")


def execute(entry: Entry, base: Mapping[str, Any], values: Mapping[str, Any], name: str | None, root: str) -> None:
    """Run an experiment in a new run folder; a mistake found before any result leaves no folder behind."""
    settings = resolve(settings_of(entry), base, values)
    check_new(root, entry.name, name, settings)
    settings, samples = open_run(settings)
    settings, note = with_workers(settings, samples, stages_of(entry.name, settings), root)
    folder = create(root, entry.name, name, settings)
    with folder.storage.locked(f"run {folder.name!r}"):  # only this process may discard it
        try:
            _run(entry, settings, samples, folder, root, note)
        except BaseException:
            if not folder.started:
                folder.storage.delete_folder()
            raise


def resume_run(entry: Entry, name: str, values: Mapping[str, Any], root: str, refused: Mapping[str, Any]) -> None:
    """Resume an interrupted run, or show a finished one; refuse settings that would change the result."""
    changed = [option for option, value in refused.items() if value is not None]
    changed += [setting for setting in values if setting.partition(".")[0] not in APART]
    if changed:
        raise UserError(f"--resume {name} keeps the settings: {changed[0]} cannot change, only cluster.* and track.*")
    folder = find(root, entry.name, name)
    settings = load_stored(settings_of(entry), stored_settings(folder), values)
    if folder.summary:
        folder.check_all()
        show_run(folder, terminal())
        return
    with folder.storage.locked(f"run {name!r}"):
        latest = RunFolder(folder.storage)  # another process may have held the lock until now
        settings, samples = open_run(settings)
        _run(entry, settings, samples, latest, root)


def _run(entry: Entry, settings: RunSettings, samples: Samples, folder: RunFolder, root: str, note: str = "") -> None:
    console = terminal()
    model = getattr(settings, "model", None)
    subject = model.name if model else getattr(settings, "rule", "")
    subject = subject or f"the model of {getattr(settings, 'model_from', '')}"
    preset = getattr(settings, "preset", None) or ""
    try:
        console.print(
            f"{entry.name} {folder.name}: {subject} on {settings.dataset.name}{preset and f', preset {preset}'}"
        )
        if note:
            console.print(note, soft_wrap=True)
        changed = ", ".join(f"{name} = {shown(value)}" for name, value in departures(settings).items())
        for what, text in (("changed", changed), ("adapted", "; ".join(getattr(settings, "adapted", ())))):
            if text:
                console.print(f"{what}: {text}", soft_wrap=True)
        line = carry_out(entry, settings, samples, folder, console)
    except (KeyboardInterrupt, SystemExit, Interruption) as error:
        kind, reason = (type(error), str(error)) if isinstance(error, Interruption) else (Interruption, "interrupted")
        hint = f"; resume with: {resume_command(folder, root)}" if folder.started else ""
        raise kind(f"{reason}{hint}") from error
    show_run(folder, console)
    if line:
        console.print(line, soft_wrap=True)


def resume_command(folder: RunFolder, root: str) -> str:
    """Return the command that resumes a run, or its study if it is a trial."""
    from raypkg.studies.study import study_around

    storage = folder.storage
    if study := study_around(storage):
        return resuming(study.command, study.storage, root)
    name = storage.parent.name
    context = get_current_context().find_root()
    group = context.command
    command = group.get_command(context, name) if isinstance(group, Group) else None
    train = " train" if isinstance(command, Group) else ""  # the experiment is the first command of a group
    return resuming(f"effray {name}{train}", storage, root)


def show_unfinished(folder: RunFolder, root: str) -> None:
    """Print the progress of a run's phases, its last write, and the command that resumes it, or why none does.

    The code that its settings name is not imported.
    """
    from raypkg.studies.study import study_around

    stages: list[Stage] = []
    storage = folder.storage
    name = storage.parent.name
    try:
        values = folder.config
        if name not in experiment:
            raise UserError(f"there is no experiment {name!r}, whose run it would be by the folder that it is in")
        stages = stages_of(name, load_stored(settings_of(experiment[name]), values))
        if study := study_around(storage):
            storage = study.storage  # the process that runs the study holds its lock
        resume = resume_command(folder, root)
    except UserError as error:
        resume = f"nothing: {error}"
    state = state_of(storage)
    console = terminal()
    console.print(f"{folder.name}: not finished, {STATES[state]}", soft_wrap=True)

    # A row for each planned phase in order, then for others with results: state, progress, last figures.
    table = []
    finished = [file.removesuffix(".json") for file in folder.storage.list("phases")]
    plans = {stage.phase: stage for stage in stages}
    phases = dict.fromkeys([*plans, *(row["phase"] for row in folder.rows), *finished])
    present = next((phase for phase in phases if phase not in finished), None)
    for phase in phases:
        plan = plans.get(phase, Stage(phase))
        rows = [row for row in folder.rows if row["phase"] == phase]
        is_done = phase in finished
        done = plan.models if is_done else sum(row["epoch"] == ceil(plan.epochs) for row in rows)
        progress = DONE if is_done else state if phase == present else "to come"
        models = f"{done} of {plan.models}" if plan.models > 1 else "–"
        epochs = f"{len(rows):,}{f' of {plan.rows:,}' if plan.rows else ''}" if rows or plan.rows else "–"
        last: dict[str, Any] = {}  # of each figure the latest
        for row in rows:
            last |= row
        loss = f"{last['loss']:.3f}" if "loss" in last else "–"
        measured = f"{last['accuracy']:.1%}" if "accuracy" in last else "–"
        if "perplexity" in last:
            measured = f"perplexity {last['perplexity']:.2f}"
        table.append([phase, progress, models, epochs, loss, measured])
    Grid("", ["phase", "state", "models", "epochs", "loss", "accuracy"], table).print()
    with suppress(UserError):  # a run that is going may delete a folder while it is listed
        if times := folder.storage.times(recursive=True):
            newest = max(times, key=times.__getitem__)
            console.print(f"last written {ago(times[newest])} ago: {newest}", soft_wrap=True)
    if state != GOING:
        console.print(f"resume with: {resume}", soft_wrap=True)
    console.print(folder.storage.root, style="dim", soft_wrap=True)


# `--dry-run`: the settings of a new run as a TOML file, with its plan in comments; nothing is started


def dry_run(
    entry: Entry, base: Mapping[str, Any], values: Mapping[str, Any], name: str | None, root: str, resume: str | None
) -> None:
    """Print the settings and the plan of a new run; refuse whatever it would refuse before its first phase."""
    if resume is not None:
        raise UserError(f"--dry-run is of a new run: what run {resume} is to do, `effray show {resume}` tells")
    settings = resolve(settings_of(entry), base, values)
    check_new(root, entry.name, name, settings)
    _, samples = open_run(settings)
    stages = stages_of(entry.name, settings)
    settings, note = with_workers(settings, samples, stages, root)
    place = Storage(root) / entry.name / (name or "NAME")
    _check_settings(settings, samples, stages, place)
    lines = [*_plan(settings, samples, stages, place)]  # all before the first is printed: some may be refused
    if note:
        lines.append(note)
    say(to_toml(settings))
    for line in lines:
        say(f"# {line}")
    say(f"# folder: {place.root}{'' if name else ', NAME generated from data, model and time'}")
    files = dict.fromkeys([*ALWAYS, *(file for stage in stages for file in stage.files)])
    say(f"# files: {' '.join(files)} and plots and what else the method adds; checkpoints/ until it is done")


def _check_settings(settings: RunSettings, samples: Samples, stages: Sequence[Stage], storage: Storage) -> None:
    """Refuse what an experiment refuses once it knows the samples."""
    from raypkg.coresets.sharded import check_selects_once
    from raypkg.experiments.coreset_files import load_coreset
    from raypkg.experiments.selection import check_target_samples, trained_models
    from raypkg.experiments.trained import first_weights

    n = len(samples.train_indices)
    if isinstance(settings, SelectSettings):
        check_selects_once(settings)
        trained_models(settings, samples, RunFolder(storage))
    elif isinstance(settings, Experiment):
        given = getattr(settings, "coreset", None)
        if given is not None:
            load_coreset(given, samples, settings.dataset)
            n = stages[-1].size(n)
        settings.check(n, samples.data)
        first_weights(settings, samples, storage.parent.parent.root)
    if select := selection_of(settings):
        check_target_samples(select, samples)


def _plan(settings: RunSettings, samples: Samples, stages: Sequence[Stage], storage: Storage) -> Iterator[str]:
    """Yield the lines of the plan."""
    from raypkg.coresets.budgets import budget_of
    from raypkg.coresets.rules import coreset
    from raypkg.experiments.embedding import check_disk, planned
    from raypkg.experiments.samples import new_model

    n = len(samples.train_indices)
    train, test = samples.data
    yield (
        f"data: {len(train):,} samples, of which {n:,} to train on and {len(samples.held_out):,} held out, and"
        f" {len(test):,} to test on; {train.num_classes} classes, shape {train.kind.words(train.shape)}"
    )
    if select := selection_of(settings):
        if coreset[select.rule].sizes_itself:
            yield f"selection: {select.rule}, of {n:,} samples as many as it sees fit: what follows is the most"
        else:
            yield f"selection: {select.rule}, {budget_of(select.fraction, n):,} of {n:,} samples"
    if isinstance(settings, EmbedSettings):
        embedding = planned(settings, samples.data, RunFolder(storage))
        check_disk(embedding, storage)
        parts = sum(map(len, embedding.parts.values()))
        yield f"rows: {embedding.describe()}, about {readable(embedding.size)} on disk, in {parts} parts"
    if isinstance(settings, Experiment):
        model = new_model(settings, samples.data)
        count = sum(each.numel() for each in model.parameters())
        yield f"model: {settings.model.name}, {count:,} parameters"
        yield COLUMNS.format("phase", "models", "epochs", "batch", "samples", "steps", "backward")
        for stage in stages:
            if not stage.rows:  # a phase without epochs
                yield stage.phase
                continue
            an_epoch = f"{stage.size(n):,}"
            if stage.whole:
                an_epoch = f"{n:,}/{an_epoch}"
            epochs, batch_size = f"{stage.epochs:,g}", f"{stage.batch_size:,}"
            steps, backward_samples = f"{stage.steps(n):,}", f"{stage.backward(n):,}"
            yield COLUMNS.format(stage.phase, stage.models, epochs, batch_size, an_epoch, steps, backward_samples)
        backward = sum(stage.backward(n) for stage in stages)
        training: Training = settings.train  # type: ignore[attr-defined]  # declared by each experiment
        full = max(training.epochs, settings.epochs) * n
        yield f"samples backward in the epochs of all phases: {backward:,}, {backward / full:.1%} of full training"

        batch = min(training.at_once, stages[-1].size(n))
        needed = step_memory(model, train, batch, training)
        terms = " + ".join(f"{name} {readable(size)}" for name, size in needed.items())
        yield f"memory of training: {readable(sum(needed.values()))} = {terms}"
    # Number and size of the workers by the settings alone, without a cluster
    cluster = settings.cluster
    cpus = cluster.cpus_without_gpu
    threads = f"{cpus} thread" + "s" * (cpus > 1)
    if cluster.workers == 0:
        yield f"workers: none, this process with {threads}"
        return
    several = cluster.workers or "as many as the cluster has and the batches allow, at most 8"
    gpus = "a GPU where there are any" if cluster.gpus_per_worker is None else f"{cluster.gpus_per_worker:g} GPUs"
    if cluster.cpus_per_worker is None and cluster.gpus_per_worker != 0:
        threads = "1 thread (with a GPU, a share of its node's CPUs)"
    yield f"workers: {several}; {threads} and {gpus} each"
