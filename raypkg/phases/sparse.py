"""Training a sparse model: hooks put together, and what they found kept in the run folder."""

from typing import Any

import pyarrow as pa

from raypkg.core.errors import UserError
from raypkg.engine.correction import Correction
from raypkg.engine.hooks import Hook, Masked
from raypkg.engine.topology import NONE, Topology
from raypkg.engine.worker import Worker
from raypkg.methods.sparse.flops import active_flops, forward_flops
from raypkg.methods.sparse.masks import density_of
from raypkg.methods.sparse.rules import drop, growth, initial, redistribution
from raypkg.runs import plots
from raypkg.runs.storage import Storage

from .crest import check as check_crest
from .crest import train_crest
from .samples import new_model, samples
from .summary import save_plot
from .train import Job, train_model

TOPOLOGY, CORRECTION = "topology.parquet", "correction.parquet"


def check(settings: Any, n: int) -> None:
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
    epochs, per_epoch = settings.train.epochs * settings.multiplier, -(-n // settings.train.batch_size)
    if settings.update_every and settings.update_every >= epochs * per_epoch:
        raise UserError(
            f"update_every = {settings.update_every} is not below the {epochs * per_epoch} steps of training: masks"
            " would never change; --growth none keeps them on purpose"
        )
    if settings.correction == "agent" and per_epoch < 2:
        raise UserError(
            f"correction = agent needs two batches an epoch or more: {n} samples make one of"
            f" {settings.train.batch_size}, whose gradient is the full one"
        )
    if settings.batches == "crest":
        check_crest(settings, epochs, n)


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
        hooks.append(Masked(topology.masks))
    record = (train_crest if settings.batches == "crest" else train_model)(worker, job, hooks)
    if worker.rank == 0:
        for file, hook in ((TOPOLOGY, topology), (CORRECTION, correction)):
            if hook:
                job.storage.write_table(file, pa.Table.from_pylist(hook.history))
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
        save_plot(storage, "correction", lambda path: plots.correction(steps.to_pylist(), path))
