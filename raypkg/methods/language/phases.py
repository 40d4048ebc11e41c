"""The phases of `effray instruct`: warm-up of the adapters, rows of pool and target, and the selection by them.

The warm-up is one training on all workers, or LiPT's models of disjoint shards, merged once. It leaves checkpoints in
the run folder: adapters and Adam's moments at the end of each epoch, with its learning rate. The rows are computed part
by part by the workers, and joined to files.
"""

import io
import json
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raypkg.cluster.workers import Workers
from raypkg.core.config import Named
from raypkg.core.errors import UserError
from raypkg.core.seeds import derive, generator
from raypkg.core.settings import Dataset
from raypkg.coresets.budgets import budget_of, select
from raypkg.coresets.per_sample import trained_linears
from raypkg.coresets.record import Record, Rows
from raypkg.coresets.sharded import target_of
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split, at_hand
from raypkg.engine.batches import plain_batches
from raypkg.engine.loop import autocast, fit
from raypkg.engine.run import Hook, Run
from raypkg.engine.shards import Shard
from raypkg.engine.worker import Cost, Worker
from raypkg.experiments.coreset_files import load_coreset, save_coreset
from raypkg.experiments.embedding import PARTS, Part, bill_of, check_disk, complete, joined, parts_of, write_parts
from raypkg.experiments.samples import Samples, new_model, samples_on
from raypkg.experiments.training import Job, train_on_cluster
from raypkg.methods.lipt.merges import Member, masked_average
from raypkg.runs.checkpoints import StoredCheckpoints, load_state, save_state
from raypkg.runs.folder import CORESET
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .api import Moments, Projection, less_rows, moments_of, over_checkpoints, state_rows
from .settings import POOL, TARGET, InstructSettings

WARMUP = "warmup"
FOLDER = "checkpoints/moments"  # of an unfinished run
ROWS = "rows"

# The warm-up


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

    def on_step(self, run: Run) -> None:
        """Note the learning rate."""
        self.rates.append(run.optimizer.param_groups[0]["lr"])

    def on_epoch_end(self, run: Run) -> None:
        """Write the checkpoint, on rank 0."""
        if run.worker.rank == 0:
            save_checkpoint(self.storage, run.epoch, Checkpoint.of(run, sum(self.rates) / len(self.rates)))
        self.rates.clear()


def warm_up(settings: InstructSettings, samples: Samples, report: Report, workers: Workers) -> None:
    """Carry out the phase, which leaves its checkpoints in the run folder."""
    storage = report.folder.storage
    chosen = settings.warmup
    if chosen.by == "lipt":
        work = partial(workers.run, warm_up_on_shards, settings, storage)
        report.phase(WARMUP, work, epochs=chosen.models * chosen.epochs, models=chosen.models)
        return
    hooks = (Named(name=f"{KeepCheckpoints.__module__}:{KeepCheckpoints.__name__}"),)
    coreset = Coreset.uniform(warmup_samples(settings, samples))
    job = Job(settings, chosen, storage, phase=WARMUP, hooks=hooks, coreset=coreset, result="warmup.safetensors")
    train_on_cluster(job, samples, report, workers)


def warmup_samples(settings: InstructSettings, samples: Samples) -> Tensor:
    """Return the positions of a random share of the pool, int64 [m] ascending."""
    pool = samples.train_indices
    order = torch.randperm(len(pool), generator=generator(settings.seed, WARMUP))
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
    cost = Cost(WARMUP)
    for number in range(worker.rank, chosen.models, worker.world):
        run = Run(
            model=new_model(settings, samples.data),
            split=at_hand(samples.data.train, shards[number]),
            coreset=Coreset.uniform(shards[number]),
            settings=chosen,
            seed=derive(settings.seed, "lipt", number),
            phase=WARMUP,
            worker=replace(worker, rank=0, world=1),  # models exchange no gradients
            augment=(),
            cost=Cost(WARMUP),
            label=number,
            main=False,
        )
        fit(run, checkpoints=StoredCheckpoints(storage / "checkpoints" / WARMUP / f"model_{number:03d}", keep=1))
        members.append(Member(Checkpoint.of(run, chosen.lr).tensors, {}))
        cost = cost.then(run.bills()[0])

    with Cost(WARMUP) as merging:
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


# Rows, and the selection by them


@dataclass(frozen=True)
class RowsPlan:
    """The plan: rows of the pool and of the target at each checkpoint, which stand in its parts' ``draw``."""

    phase = ROWS
    smaller = "use a smaller --rows.width or another --root"
    settings: InstructSettings
    storage: Storage  # the run folder
    rates: tuple[float, ...]  # η of each checkpoint; (1,) for the model as it is built
    parts: dict[str, list[Part]]  # by table
    here: dict[str, Any] = field(default_factory=dict)  # of this process: the model, its checkpoint, and its number

    @property
    def rows(self) -> int:
        """The number of rows, of both tables and all checkpoints."""
        return sum(len(part) for parts in self.parts.values() for part in parts)

    @property
    def size(self) -> int:
        """Bytes of the tables of gradients; embeddings are narrow."""
        width = self.settings.rows.width if self.settings.by_gradients else 0
        return 2 * width * self.rows

    def describe(self) -> str:
        """Return the numbers of rows and of numbers in each, for users."""
        each = f"{len(self.rates)} checkpoints of {self.settings.rows.width:,} numbers"
        return f"rows of {self.rows // len(self.rates):,} samples at {each}"

    def compute(self, shard: Shard, part: Part, cost: Cost) -> pa.Table:
        """Return the rows of a part's samples, of length 1, in float16."""
        settings, options, here = self.settings, self.settings.rows, self.here
        split, indices = samples_of(settings, Samples(shard.data, shard.indices, shard.valid), part.split)
        chosen = indices[part.start : part.stop]
        if not here:
            here["model"] = new_model(settings, shard.data).to(shard.device)
        model = here["model"]
        batches = (x for x, _ in plain_batches(split, chosen, shard.device, options.batch_size))
        with autocast(options.precision, shard.device):
            if settings.by_gradients:
                if here.get("number") != part.draw:
                    here |= {"number": part.draw, "checkpoint": load_checkpoint(self.storage, part.draw)}
                    model.load_state_dict(here["checkpoint"].part("w"), strict=False)
                moments = here["checkpoint"].moments if part.split == POOL else None
                betas = (settings.warmup.momentum, 0.999)
                rows = less_rows(model, batches, Projection(settings.seed, options.width), moments, betas=betas)
            else:
                rows = state_rows(model, batches)
        cost.forward += len(chosen)
        cost.backward += len(chosen) * settings.by_gradients
        numbers = pa.array(rows.half().numpy().reshape(-1))
        return pa.table({"row": pa.FixedSizeListArray.from_arrays(numbers, rows.shape[1])})


def samples_of(settings: InstructSettings, samples: Samples, table: str) -> tuple[Split, Tensor]:
    """Return a table's split with the positions of its samples, int64 [n]."""
    target = target_of(settings.select)
    if table == POOL or target is None:  # the pool may be its own target
        return samples.data.train, samples.train_indices
    reached = target.reached_by(Shard(samples.data, samples.train_indices, samples.held_out))
    return reached.data.train, reached.indices


def compute_rows(settings: InstructSettings, samples: Samples, report: Report, workers: Workers) -> None:
    """Carry out the phase, which leaves pool.npy and target.npy in the run folder, float16 [n, T·d]."""
    storage, size = report.folder.storage, settings.rows.per_part
    split, indices = samples_of(settings, samples, TARGET)
    if not len(indices):
        raise UserError(f"select.target = {settings.select.target}: it has no samples")
    rates: tuple[float, ...] = (1.0,)
    if settings.by_gradients:
        rates = tuple(load_checkpoint(storage, number).rate for number in range(len(storage.list(FOLDER))))
    counts = {POOL: len(samples.train_indices), TARGET: len(indices)}
    parts = {name: parts_of(name, n, len(rates), size) for name, n in counts.items()}
    plan = RowsPlan(settings, storage, rates, parts)
    # Rows follow from settings, checkpoints and target.
    fixed = [part.model_dump(mode="json") for part in (settings.model, settings.warmup, settings.rows)]
    checkpoints = [(storage / FOLDER).digest(name) for name in storage.list(FOLDER)]
    content = json.dumps([fixed, settings.seed, checkpoints, Samples.all_of(split).digest(Dataset())])
    digest = blake2b(content.encode(), digest_size=16).hexdigest()

    def work() -> dict[str, Any]:
        check_disk(plan, storage)
        complete(plan, digest, report, lambda missing: workers.run(write_on_worker, plan, missing, digest))
        # Rows of all checkpoints stand side by side; one part of each is in memory.
        made = []
        for table, of_table in plan.parts.items():
            by_checkpoint = [[part for part in of_table if part.draw == t] for t in range(len(rates))]
            with storage.new_file(f"{table}.npy") as sink:
                for number, together in enumerate(zip(*by_checkpoint, strict=True)):
                    rows = []
                    for content, world, cost in joined(storage, together):
                        made.append((world, cost))
                        values = content["row"].combine_chunks().flatten().to_numpy().reshape(len(content), -1)
                        rows.append(torch.from_numpy(values.astype(np.float32)))
                    wide = over_checkpoints(rows, rates).half().numpy()
                    if number == 0:
                        header = {"descr": "<f2", "fortran_order": False, "shape": (counts[table], wide.shape[1])}
                        np.lib.format.write_array_header_1_0(sink, header)
                    sink.write(wide.tobytes())
        facts = {"checkpoints": len(rates), "workers": made[0][0]}
        return {"costs": [bill_of(ROWS, made).record()], **facts}

    report.phase(ROWS, work, epochs=sum(map(len, parts.values())))
    for folder in (PARTS, FOLDER):  # only after the phase is recorded, or they would be recomputed
        storage.delete_folder(folder)


def write_on_worker(worker: Worker, plan: RowsPlan, parts: list[Part], digest: str) -> None:
    """Compute a worker's share of the missing parts."""
    data, train_indices, held_out = samples_on(worker, plan.settings)
    shard = Shard(data, train_indices, held_out, worker.device, worker.rank, worker.world)
    write_parts(shard, plan, parts, digest, plan.storage)


def stored_rows(storage: Storage, table: str, tasks: Tensor | None = None) -> Rows:
    """Return a table's rows, mapped if the run folder is on a disk."""
    file = f"{table}.npy"
    try:
        if storage.local:
            return Rows.mapped(str(storage.local / file), tasks)
        return Rows(torch.from_numpy(np.load(io.BytesIO(storage.read(file) or b""))), tasks)
    except (OSError, ValueError) as error:
        raise UserError(f"{storage.root}/{file} is missing or damaged: {error}") from None


def select_instructions(settings: InstructSettings, samples: Samples, report: Report) -> Coreset:
    """Select by the rows in the run folder, store the coreset there unless an earlier attempt did, and return it.

    The score of a sample is its largest inner product with a target sample: a cosine, averaged over checkpoints.
    """
    storage = report.folder.storage
    chosen = settings.select
    pool = samples.train_indices

    def work() -> dict[str, Any]:
        common: dict[str, Any] = {"seed": settings.seed, "options": chosen.options, "balanced": chosen.balanced}
        scores = None
        findings = []
        with Cost("select") as cost:
            of: Rows | Record = Record.empty(samples.data.train.y[pool])
            if settings.sees_rows:
                split, indices = samples_of(settings, samples, TARGET)
                of = stored_rows(storage, POOL)
                common["target"] = target = stored_rows(storage, TARGET, split.y[indices])
                scores = torch.cat([products.amax(dim=1) for products in of.similarities(target.values)])
            picked = select(of, budget_of(chosen.fraction, len(pool)), chosen.rule, **common)
            if scores is not None:
                mean, all_mean = scores[picked.indices].mean(), scores.mean()
                findings = [f"similarity to the nearest target sample: {mean:.3f} of the picks, {all_mean:.3f} of all"]
        ascending = picked.indices.argsort()
        coreset = Coreset(picked.indices[ascending], picked.weights[ascending]).at(pool)
        if not chosen.weighted:
            coreset = Coreset.uniform(coreset.indices)
        save_coreset(storage, coreset, samples, settings, chosen.model_dump(), pool, scores)
        return {"costs": [cost.record()], "size": len(coreset), "findings": findings}

    report.phase("select", work, epochs=0)
    return load_coreset(f"{storage.root}/{CORESET}", samples, settings.dataset)
