"""``--dry-run``: the settings of a run and its plan, as TOML that is a file of settings too; nothing is started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raypkg.core.config import to_toml
from raypkg.core.errors import UserError, redacted
from raypkg.core.memory import readable
from raypkg.core.registry import Entry
from raypkg.core.settings import Cluster, Experiment, RunSettings, Select, Training
from raypkg.experiments.embed import EmbedSettings, planned
from raypkg.experiments.resolve import resolve, selection_of
from raypkg.experiments.train import SelectSettings
from raypkg.runs.folder import RunFolder, check_new
from raypkg.runs.report import Stage
from raypkg.runs.storage import Storage

if TYPE_CHECKING:  # it imports torch, which a mistake in the settings need not wait for
    from raypkg.experiments.samples import Samples

COLUMNS = "{:<9} {:>6} {:>7} {:>7} {:>12} {:>10} {:>14}"
ALWAYS = ("config.toml", "environment.json", "metrics.parquet", "phases/", "plots/", "summary.json")


def dry_run(
    entry: Entry,
    schema: type[RunSettings],
    config: Path | None,
    values: Mapping[str, Any],
    name: str | None,
    root: str,
    resume: str | None,
) -> None:
    """Print the settings that a run would have, and what it would do.

    Raises:
        UserError: what a run would refuse before its first phase; or one is to be resumed, which has its settings.
    """
    from raypkg.experiments.phases import stages_of
    from raypkg.experiments.samples import open_samples

    if resume is not None:
        raise UserError(f"--dry-run is of a new run: what run {resume} is to do, `effray show {resume}` tells")
    settings = resolve(schema, config, values)
    check_new(root, entry.name, name, settings)
    samples = open_samples(settings)
    stages = stages_of(entry.name, settings)
    place = Storage(root) / entry.name / (name or "NAME")
    _check_settings(settings, samples, stages, place)
    lines = [*_plan(settings, samples, stages, place)]
    click.echo(to_toml(settings))
    for line in lines:
        click.echo(f"# {line}")
    click.echo(f"# folder: {redacted(place.root)}{'' if name else ', NAME made up from data, model and time'}")
    files = dict.fromkeys([*ALWAYS, *(file for stage in stages for file in stage.files)])
    click.echo(f"# files: {' '.join(files)} and what the method adds; checkpoints/ until it is done")


def _check_settings(settings: RunSettings, samples: Samples, stages: Sequence[Stage], storage: Storage) -> None:
    """Refuse what an experiment refuses once it knows the samples."""
    from raypkg.coresets.reselection import check_selects_once
    from raypkg.experiments.coreset_files import load_coreset
    from raypkg.experiments.selection import check_target_samples, trained_model
    from raypkg.experiments.trained import first_weights

    n = len(samples.train_indices)
    if isinstance(settings, SelectSettings):
        check_selects_once(settings)
        trained_model(settings, RunFolder(storage), settings.model_from, settings.precision)
    elif isinstance(settings, Experiment):
        given = getattr(settings, "coreset", None)
        if given is not None:
            n = len(load_coreset(given, samples.data.train, samples.held_out, settings.dataset.name))
        settings.check(n if given is None else stages[-1].size(n), samples.data)
        first_weights(settings, samples, storage.parent.parent.root)
    if select := selection_of(settings):
        check_target_samples(select, samples)


def _plan(settings: RunSettings, samples: Samples, stages: Sequence[Stage], storage: Storage) -> Iterator[str]:
    """Yield the lines of the plan."""
    n = len(samples.train_indices)
    train, test = samples.data
    yield (
        f"data: {len(train):,} samples, of which {n:,} to train on and {len(samples.held_out):,} held out, and"
        f" {len(test):,} to test on; {train.num_classes} classes, shape {train.kind.words(train.shape)}"
    )
    if select := selection_of(settings):
        yield _selection(select, n)
    if isinstance(settings, EmbedSettings):
        yield _embedding(settings, samples, storage)
    if isinstance(settings, Experiment):
        yield from _training(settings, samples, stages)
    beside = f"; {settings.actors} actors" if settings.actors else ""
    yield f"workers: {_workers(settings.cluster)}{beside}"


def _embedding(settings: EmbedSettings, samples: Samples, storage: Storage) -> str:
    """Return what is computed, if the disk has room for it."""
    from raypkg.experiments.embedding import check_disk

    embedding = planned(settings, samples.data, RunFolder(storage))
    check_disk(embedding, storage)
    return f"rows: {embedding.describe()} on disk, in {len(embedding.all_parts)} parts"


def _selection(select: Select, n: int) -> str:
    """Return what selects, and how many samples."""
    from raypkg.coresets.budgets import budget_of
    from raypkg.coresets.rules import coreset

    if coreset[select.rule].sizes_itself:
        return f"selection: {select.rule}, of {n:,} samples as many as it sees fit: what follows is the most"
    return f"selection: {select.rule}, {budget_of(select.fraction, n):,} of {n:,} samples"


def _training(settings: Experiment, samples: Samples, stages: Sequence[Stage]) -> Iterator[str]:
    """Yield what is trained, how long, and what that takes."""
    from raypkg.experiments.phases import step_memory
    from raypkg.experiments.samples import new_model

    n = len(samples.train_indices)
    model = new_model(settings, samples.data)
    count = sum(each.numel() for each in model.parameters())
    yield f"model: {settings.model.name}, {count:,} parameters"
    yield COLUMNS.format("phase", "models", "epochs", "batch", "samples", "steps", "backward")
    for stage in stages:
        yield _row(stage, n)
    backward = sum(stage.backward(n) for stage in stages)
    training: Training = settings.train  # type: ignore[attr-defined]  # declared where the experiment is
    full = max(training.epochs, settings.epochs) * n
    yield f"samples backward in the epochs of all phases: {backward:,}, {backward / full:.1%} of as many on all samples"
    batch = min(training.at_once, stages[-1].size(n))
    needed = step_memory(model, samples.data.train, batch, training)
    parts = [
        f"parameters {readable(needed.weights)}",
        f"gradients {readable(needed.gradients)}",
        f"optimiser {readable(needed.state)}",
    ]
    if needed.activations is not None:
        parts.append(f"activations of a batch {readable(needed.activations)}")
    yield f"memory of training: {readable(needed.total)} = {' + '.join(parts)}"


def _row(stage: Stage, n: int) -> str:
    """Return a phase as a row; one without epochs has a name alone."""
    if not stage.rows:
        return stage.phase
    an_epoch = f"{stage.size(n):,}"
    if stage.whole:
        an_epoch = f"{n:,}/{an_epoch}"
    return COLUMNS.format(
        stage.phase,
        stage.models,
        f"{stage.epochs:,}",
        f"{stage.batch_size:,}",
        an_epoch,
        f"{stage.steps(n):,}",
        f"{stage.backward(n):,}",
    )


def _workers(cluster: Cluster) -> str:
    """Return on what it would run, as far as the settings tell: nobody asks a cluster."""
    cpus = cluster.cpus_without_gpu
    threads = f"{cpus} thread" + "s" * (cpus > 1)
    if cluster.workers == 0:
        return f"none, this process with {threads}"
    count = (
        "as many as the cluster has and the batches allow, at most 8" if cluster.workers is None else cluster.workers
    )
    gpus = "a GPU where there are any" if cluster.gpus_per_worker is None else f"{cluster.gpus_per_worker:g} GPUs"
    if cluster.cpus_per_worker is None and cluster.gpus_per_worker != 0:
        threads = "1 thread (with a GPU, a share of its node's CPUs)"
    return f"{count}; {threads} and {gpus} each"
