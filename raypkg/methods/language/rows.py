"""Rows of a pool and a target, computed part by part by a run's workers and joined to files; the selection by them."""

import io
import json
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raypkg.cluster.workers import Workers
from raypkg.core.errors import UserError
from raypkg.core.settings import Dataset
from raypkg.coresets.budgets import budget_of, select
from raypkg.coresets.record import Record
from raypkg.coresets.rows import Rows
from raypkg.coresets.target import target_of
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.batches import plain_batches
from raypkg.engine.loop import autocast
from raypkg.engine.shards import Shard
from raypkg.engine.worker import Cost, Worker
from raypkg.experiments.coreset_files import load_coreset, save_coreset
from raypkg.experiments.embedding import PARTS, Part, bill_of, check_disk, complete, joined, parts_of, write_parts
from raypkg.experiments.samples import Samples, new_model, samples_on
from raypkg.runs.folder import CORESET
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .api import less_rows, over_checkpoints, state_rows
from .projection import Projection
from .settings import POOL, TARGET, InstructSettings
from .warmup import FOLDER, load_checkpoint

PHASE = "rows"


@dataclass(frozen=True)
class RowsPlan:
    """The plan: rows of the pool and of the target at each checkpoint, which stand in its parts' ``draw``."""

    phase = PHASE
    smaller = "use a smaller --rows.width or another --root"
    settings: InstructSettings
    storage: Storage  # the run folder
    rates: tuple[float, ...]  # η of each checkpoint; (1,) for the model as it is built
    parts: dict[str, list[Part]]  # by table

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

    def digest(self, target: Split) -> str:
        """Return a digest of settings, checkpoints and target, from which rows follow."""
        settings = self.settings
        parts = [part.model_dump(mode="json") for part in (settings.model, settings.warmup, settings.rows)]
        checkpoints = [(self.storage / FOLDER).digest(name) for name in self.storage.list(FOLDER)]
        content = json.dumps([parts, settings.seed, checkpoints, Samples.all_of(target).digest(Dataset())])
        return blake2b(content.encode(), digest_size=16).hexdigest()

    @cached_property
    def _here(self) -> dict[str, Any]:
        return {}  # of this process: the model, a checkpoint that it has, and the checkpoint's number

    def compute(self, shard: Shard, part: Part, cost: Cost) -> pa.Table:
        """Return the rows of a part's samples, of length 1, in float16."""
        settings, options, here = self.settings, self.settings.rows, self._here
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
                    here["checkpoint"].restore(model)
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
    digest = plan.digest(split)

    def work() -> dict[str, Any]:
        check_disk(plan, storage)
        complete(plan, digest, report, lambda missing: workers.run(write_on_worker, plan, missing, digest))
        made = [each for name in plan.parts for each in join_rows(plan, name)]
        facts = {"checkpoints": len(rates), "workers": made[0][0]}
        return {"costs": [bill_of(PHASE, made).record()], **facts}

    report.phase(PHASE, work, epochs=sum(map(len, parts.values())))
    for folder in (PARTS, FOLDER):  # only after the phase is recorded, or they would be recomputed
        storage.delete_folder(folder)


def write_on_worker(worker: Worker, plan: RowsPlan, parts: list[Part], digest: str) -> None:
    """Compute a worker's share of the missing parts."""
    data, train_indices, held_out = samples_on(worker, plan.settings)
    shard = Shard(data, train_indices, held_out, worker.device, worker.rank, worker.world)
    write_parts(shard, plan, parts, digest, plan.storage)


def join_rows(plan: RowsPlan, table: str) -> list[tuple[int, Cost]]:
    """Join the parts of a table to one file, those of all checkpoints side by side; return holders and costs."""
    made = []
    by_checkpoint = [[part for part in plan.parts[table] if part.draw == t] for t in range(len(plan.rates))]
    count = sum(map(len, by_checkpoint[0]))
    with plan.storage.new_file(f"{table}.npy") as sink:
        for number, together in enumerate(zip(*by_checkpoint, strict=True)):
            rows = []
            for content, world, cost in joined(plan.storage, together):
                made.append((world, cost))
                values = content["row"].combine_chunks().flatten().to_numpy().reshape(len(content), -1)
                rows.append(torch.from_numpy(values.astype(np.float32)))
            wide = over_checkpoints(rows, plan.rates).half().numpy()
            if number == 0:
                header = {"descr": "<f2", "fortran_order": False, "shape": (count, wide.shape[1])}
                np.lib.format.write_array_header_1_0(sink, header)
            sink.write(wide.tobytes())
    return made


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
