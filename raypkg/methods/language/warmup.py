"""The warm-up of the adapters: one training on all workers, or LiPT's models of disjoint shards, merged once.

It leaves checkpoints in the run folder: adapters and Adam's moments at the end of each epoch, with its learning rate.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raypkg.cluster.workers import Workers
from raypkg.core.config import Named
from raypkg.core.errors import UserError
from raypkg.core.seeds import derive, generator
from raypkg.coresets.per_sample import trained_linears
from raypkg.data.coreset import Coreset
from raypkg.data.split import at_hand
from raypkg.engine.loop import fit
from raypkg.engine.run import Hook, Run
from raypkg.engine.worker import Cost, Worker
from raypkg.experiments.samples import Samples, new_model, samples_on
from raypkg.experiments.training import Job, train_on_cluster
from raypkg.methods.lipt.merges import Member, masked_average
from raypkg.runs.checkpoints import StoredCheckpoints, load_state, save_state
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .api import Moments, moments_of
from .settings import InstructSettings

PHASE = "warmup"
RESULT = "warmup.safetensors"
FOLDER = "checkpoints/moments"  # of an unfinished run


class Checkpoint(NamedTuple):
    """One epoch of the warm-up."""

    rate: float  # η, the mean learning rate of the epoch's steps
    tensors: dict[str, Tensor]  # "w.", "m." or "v." and a trained parameter's name → weight, moments

    @classmethod
    def of(cls, run: Run, rate: float) -> "Checkpoint":
        """Return the present state of a run, on the CPU."""
        moments = moments_of(run.model, run.optimizer)
        weights = {f"w.{name}": run.model.get_parameter(name).detach().to("cpu", copy=True) for name in moments}
        parts = {f"{kind}.{name}": getattr(pair, kind) for name, pair in moments.items() for kind in ("m", "v")}
        return cls(rate, weights | parts)

    def part(self, kind: str) -> dict[str, Tensor]:
        """Return the tensors of one kind, by the parameters' names."""
        return {name[2:]: tensor for name, tensor in self.tensors.items() if name[0] == kind}

    @property
    def moments(self) -> dict[str, Moments]:
        """Adam's moments by the parameters' names."""
        v = self.part("v")
        return {name: Moments(m, v[name]) for name, m in self.part("m").items()}

    def restore(self, model: nn.Module) -> None:
        """Overwrite a model's trained parameters."""
        model.load_state_dict(self.part("w"), strict=False)


def save_checkpoint(storage: Storage, number: int, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into a run folder."""
    save_state(storage / FOLDER, f"{number:05d}.pt", checkpoint._asdict())


def load_checkpoint(storage: Storage, number: int) -> Checkpoint:
    """Read a checkpoint of the warm-up."""
    state = load_state(storage / FOLDER, f"{number:05d}.pt")
    if state is None:
        raise UserError(f"{storage.root}/{FOLDER} is damaged: run it again under another name")
    return Checkpoint(**state)


class KeepCheckpoints(Hook):
    """Writes a checkpoint at the end of every epoch; a resumed run repeats the epoch in progress."""

    def __init__(self, *, job: Job):
        self.storage = job.storage
        self.rates: list[float] = []  # of the epoch's steps

    def on_start(self, run: Run) -> None:
        """Refuse trained parameters that are not of linear layers."""
        trained_linears(run.model)

    def on_epoch(self, run: Run) -> None:
        """Forget the steps before."""
        self.rates.clear()

    def on_step(self, run: Run) -> None:
        """Note the learning rate."""
        self.rates.append(run.optimizer.param_groups[0]["lr"])

    def on_epoch_end(self, run: Run) -> None:
        """Write the checkpoint, on rank 0."""
        if run.worker.rank == 0:
            save_checkpoint(self.storage, run.epoch, Checkpoint.of(run, sum(self.rates) / len(self.rates)))


def warm_up(settings: InstructSettings, samples: Samples, report: Report, workers: Workers) -> None:
    """Carry out the phase, which leaves its checkpoints in the run folder."""
    storage = report.folder.storage
    chosen = settings.warmup
    if chosen.by == "lipt":
        work = partial(workers.run, warm_up_on_shards, settings, storage)
        report.phase(PHASE, work, epochs=chosen.models * chosen.epochs, models=chosen.models)
        return
    hooks = (Named(name=f"{KeepCheckpoints.__module__}:{KeepCheckpoints.__name__}"),)
    coreset = Coreset.uniform(warmup_samples(settings, samples))
    job = Job(settings, chosen, storage, phase=PHASE, hooks=hooks, coreset=coreset, result=RESULT)
    train_on_cluster(job, samples, report, workers)


def warmup_samples(settings: InstructSettings, samples: Samples) -> Tensor:
    """Return the positions of a random share of the pool, int64 [m] ascending."""
    pool = samples.train_indices
    order = torch.randperm(len(pool), generator=generator(settings.seed, PHASE))
    return pool[order[: settings.warmup_size(len(pool))]].sort().values


def warm_up_on_shards(worker: Worker, settings: InstructSettings, storage: Storage) -> dict[str, Any]:
    """Train models r, r + W, … on worker r of W, each on its own shard, and average weights and moments of all.

    This is LiPT's merge (PMLR 202:29130) without masks. The average of the moments is ours: LESS has one model.
    """
    chosen = settings.warmup
    samples = samples_on(worker, settings)
    drawn = warmup_samples(settings, samples)
    order = torch.randperm(len(drawn), generator=generator(settings.seed, "shards"))
    shards = drawn[order].tensor_split(chosen.models)
    initial = trained_linears(new_model(settings, samples.data))
    members = []
    cost = Cost(PHASE)
    for number in range(worker.rank, chosen.models, worker.world):
        run = Run(
            model=new_model(settings, samples.data),
            split=at_hand(samples.data.train, shards[number]),
            coreset=Coreset.uniform(shards[number]),
            settings=chosen,
            seed=derive(settings.seed, "lipt", number),
            phase=PHASE,
            worker=replace(worker, rank=0, world=1),  # models exchange no gradients
            augment=(),
            cost=Cost(PHASE),
            label=number,
            main=False,
        )
        fit(run, checkpoints=StoredCheckpoints(storage / "checkpoints" / PHASE / f"model_{number:03d}", keep=1))
        members.append(Member(Checkpoint.of(run, chosen.lr).tensors, {}))
        cost = cost.then(run.bills()[0])

    with Cost(PHASE) as merging:
        first = {f"{kind}.{name}": w.detach() for kind in "wmv" for name, (w, _) in initial.items()}
        merged = masked_average(first, members, worker.sum)
        if worker.world > 1:
            merging.sent += 2 * 8 * sum(w.numel() for w in first.values())
    if worker.rank == 0:
        save_checkpoint(storage, 0, Checkpoint(chosen.lr, merged))
    slowest = max(worker.gather(cost.seconds))
    finding = f"warm-up by LiPT (ours, not LESS's): {chosen.models} models of disjoint shards, merged once"
    costs = [cost.gathered(worker).then(merging.gathered(worker)).record()]
    return {"costs": costs, "models": chosen.models, "slowest_worker_seconds": slowest, "findings": [finding]}
