"""Training a sparse model: hooks put together, and what they found kept in the run folder."""

import math
from typing import Any

import numpy as np
import pyarrow as pa

from raypkg.core.errors import UserError
from raypkg.engine.run import Hook
from raypkg.engine.worker import Worker
from raypkg.methods.agent import plots as agent_plots
from raypkg.methods.agent.hook import COLUMNS, Correction
from raypkg.methods.agent.settings import Agent
from raypkg.methods.crest.run import check_crest, train_crest
from raypkg.phases.samples import new_model, samples
from raypkg.phases.training import Job, train_model
from raypkg.runs.plots import save_plot
from raypkg.runs.storage import Storage

from . import plots
from .flops import active_flops, forward_flops
from .hook import NONE, PRUNED_BY, Topology, is_gradual, momentum_rules, update_interval
from .masked import Active, Masked
from .masks import density_of
from .rules import drop, growth, initial, redistribution

TOPOLOGY, CORRECTION = "topology.parquet", "correction.parquet"
CORRECTED = 3  # steps between snapshots: two differences of losses, whose covariance is c


def check_sparse(settings: Any, n: int) -> None:
    """Refuse, before any work, unknown rules, and intervals that training on n samples does not reach.

    Raises:
        UserError: a rule that does not exist, ΔT beyond the end, a correction without a second batch, or what CREST
            refuses.
    """
    if settings.density is not None:
        for rules, chosen in (
            (initial, settings.sparse_init),
            (drop, settings.drop),
            (growth, settings.growth),
            (redistribution, settings.redistribution),
        ):
            if chosen.name != NONE or rules in (initial, drop):
                rules[chosen.name].options(chosen.options)
            elif chosen.options:
                raise UserError(f"{rules.kind} = none: its options {', '.join(chosen.options)} would do nothing")
    per_epoch = -(-n // settings.train.batch_size)
    steps = settings.epochs * per_epoch
    if settings.density is not None and settings.growth.name != NONE:
        if settings.density == 1:
            raise UserError("density = 1 leaves no room to grow: leave --density out, or give less")
        every = update_interval(settings, steps)
        if every >= steps:
            raise UserError(
                f"update_every = {every} is not below the {steps} steps of training: masks would never change"
            )
    if is_gradual(settings):
        _check_pruning(settings, steps)
    if settings.correction == "agent":
        _check_correction(settings, n, per_epoch, steps)
    if settings.compute == "sparse":
        _check_compute(settings)
    if settings.batches == "crest":
        check_crest(settings, settings.epochs, n)


def _check_pruning(settings: Any, steps: int) -> None:
    if settings.drop.name == "threshold":
        raise UserError("drop = threshold lets weights stay, so gradual pruning would not reach its density")
    every = update_interval(settings, steps)
    if -(-math.ceil(PRUNED_BY * steps) // every) * every >= steps:
        raise UserError(
            f"update_every = {every}: no change falls into the last quarter of the {steps} steps, so gradual pruning"
            " would not reach its density"
        )


def _check_compute(settings: Any) -> None:
    if settings.train.compile:
        raise UserError("compute = sparse does not go with train.compile = true: weights change their number")
    if rules := momentum_rules(settings):
        raise UserError(f"compute = sparse has no dense gradient at every step, which {rules[0]} needs")
    if settings.correction == "agent" or settings.batches == "crest":
        other = "correction = agent" if settings.correction == "agent" else "batches = crest"
        raise UserError(f"compute = sparse does not go with {other}, which differentiates other weights, or twice")


def _check_correction(settings: Any, n: int, per_epoch: int, steps: int) -> None:
    agent: Agent = settings.agent
    if agent.samples and not settings.train.batch_size <= agent.samples < n:
        raise UserError(
            f"agent.samples = {agent.samples}: at least a batch, train.batch_size = {settings.train.batch_size}, and"
            f" fewer than all {n}, which are taken when it is left out"
        )
    between = agent.snapshot or per_epoch
    if between >= steps or between // agent.every < CORRECTED or not agent.alpha:
        raise UserError(
            f"correction = agent would correct nothing: of the {between} steps between snapshots, c is estimated from"
            f" {between // agent.every} (at least {CORRECTED}), in a training of {steps} steps, with agent.alpha ="
            f" {agent.alpha:g} (above 0)"
        )


def train_sparse(worker: Worker, job: Job) -> dict[str, Any]:
    """Train on all workers under the masks, with the correction and the batches of the settings."""
    settings: Any = job.experiment
    topology, correction, hooks = None, None, list[Hook]()
    if settings.density is not None:
        assert job.coreset is not None
        steps = job.training.epochs * -(-len(job.coreset) // job.training.batch_size)
        hooks.append(topology := Topology(settings, steps))
    if settings.correction == "agent":
        hooks.append(correction := Correction(settings.agent))
    if topology:
        hooks.append(Active(topology) if settings.compute == "sparse" else Masked(topology.masks))
    record = (train_crest if settings.batches == "crest" else train_model)(worker, job, hooks)
    if worker.rank == 0:
        if topology:
            job.storage.write_table(TOPOLOGY, pa.Table.from_pylist(topology.history))
        if correction:
            columns = np.array(correction.history).T
            job.storage.write_table(CORRECTION, pa.table(dict(zip(COLUMNS, columns, strict=True))))
    return record | facts(job, topology)


def facts(job: Job, topology: Topology | None) -> dict[str, Any]:
    """Return how many weights there are, and what a forward pass of one sample takes, dense and without the others."""
    data = samples(job.experiment.dataset, job.experiment.seed).data
    model, masks = new_model(job.experiment, data), topology.masks if topology else {}
    flops = forward_flops(model, data.train.shape)
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "active_parameters": sum(parameter.numel() for parameter in model.parameters()) - pruned,
        "flops": sum(flops.values()),
        "active_flops": active_flops(flops, masks),
        **({"density": density_of(masks), "explored": topology.explored_share} if topology else {}),
    }


def draw_sparse(storage: Storage) -> None:
    """Draw what the hooks found, into the folder of a run whose training is done."""
    if changes := storage.read_table(TOPOLOGY):
        save_plot(storage, "topology", lambda path: plots.topology(changes.to_pylist(), path))
    if steps := storage.read_table(CORRECTION):
        save_plot(storage, "correction", lambda path: agent_plots.correction(steps.to_pylist(), path))
