"""Features of all samples, computed part by part by the holders of the data, and joined to one table per split.

A resumed run computes the missing parts. Parts and the batches within them do not depend on who computes them, so the
features do not either, on machines of one kind: CPUs, or GPUs, of one model.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import product
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from raypkg.cluster.actors import hold
from raypkg.core.errors import UserError
from raypkg.core.memory import readable
from raypkg.core.seeds import generator
from raypkg.core.settings import Model
from raypkg.data import Data
from raypkg.data.augment import Augmentation, compose
from raypkg.data.coreset import Coreset
from raypkg.data.sources.table import FEATURES, LABEL, features_schema
from raypkg.data.split import Split
from raypkg.engine.batches import ahead, alternate, loaders_of, training_batch
from raypkg.engine.loop import autocast
from raypkg.engine.shards import Shard
from raypkg.engine.worker import Cost, Worker
from raypkg.models import build_model
from raypkg.models.classifier import classifier, in_mode
from raypkg.runs.catalog import locate
from raypkg.runs.folder import MODEL, RunFolder
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .samples import augmentations, open_samples
from .train import EmbedSettings
from .trained import check_same_tokens, restored_model, settings_of_trained

PHASE = "embed"
PART_BYTES = 64 << 20
BATCH = {"cpu": 128, "cuda": 512}  # samples of a forward pass; the features' last bits depend on it
GLANCE = 1.0  # seconds between two looks at the finished parts
PARTS = "parts"  # folder of the parts that are not joined yet
FACTS = b"part"  # metadata key of a part's backbone, holders and cost
FORM: dict[str, Any] = {"compression": "none", "use_dictionary": [LABEL], "write_page_checksum": True}


class Part(NamedTuple):
    """Consecutive samples of a split whose rows are computed and written together."""

    file: str
    split: str  # train or test
    draw: int  # number of the augmentation's draw
    start: int  # of the positions
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def parts_of(split: str, n: int, draws: int, size: int) -> list[Part]:
    """Cut the rows of a split's n samples, draw by draw, into parts of at most a size.

    >>> [(part.file, part.draw, part.start, part.stop) for part in parts_of("test", 5, 1, 3)]
    [('test-00000.parquet', 0, 0, 3), ('test-00001.parquet', 0, 3, 5)]
    """
    parts: list[Part] = []
    for draw, start in product(range(draws), range(0, n, size)):
        parts.append(Part(f"{split}-{len(parts):05d}.parquet", split, draw, start, min(start + size, n)))
    return parts


@dataclass(frozen=True)
class Backbone:
    """The features of a frozen model and the normalisation of its samples; it can be pickled."""

    features: nn.Module  # x [b, …] → h [b, D]
    width: int  # D
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str  # of the forward passes

    @property
    def digest(self) -> str:
        """A digest of weights, normalisation and precision, from which a sample's features follow."""
        digest = blake2b(digest_size=16)
        digest.update(repr((self.width, self.mean, self.std, self.precision)).encode())
        for name, value in self.features.state_dict().items():
            digest.update(name.encode())
            digest.update(value.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def embed(
        self, split: Split, indices: Tensor, augment: Augmentation, draws: Tensor, device: torch.device
    ) -> Tensor:
        """Return the features of samples, float32 [n, D] on the CPU."""
        model = self.features.to(device).to(memory_format=torch.channels_last)  # fastest for images
        normalised = replace(split, mean=self.mean, std=self.std)
        worker = Worker(device=device)

        def load(part: Tensor) -> Tensor:
            samples = Coreset.uniform(indices[part])
            return training_batch(normalised, samples, augment, draws[part], worker).x

        parts = torch.arange(len(indices)).split(BATCH[device.type])
        with in_mode(model, training=False), torch.inference_mode(), autocast(self.precision, device):
            return torch.cat([model(x).float().cpu() for x in ahead(load, parts, loaders_of(split))])


def named_backbone(chosen: Model, data: Data, precision: str, seed: int) -> Backbone:
    """Return the features of a model as it is built, with the normalisation that its weights were trained with.

    If that is unknown, samples are normalised by their own statistics. The model must be head(features(x)). Features
    of a sentence transformer are means of the last hidden states if its checkpoint says so, also where the head's
    input is something else.
    """
    train = data.train
    built = build_model(chosen.name, train.shape, train.num_classes, seed=seed, options=chosen.options)
    model = classifier(built, "a frozen backbone")
    mean, std = model.trained_with or (train.mean, train.std)
    stated = getattr(model.features, "frozen_features", None)
    features, width = stated or (model.features, model.head.in_features)
    return Backbone(features.float(), width, mean, std, precision)


@dataclass(frozen=True)
class Embedding:
    """The plan: features of a backbone for the parts of both splits."""

    phase = PHASE
    smaller = "use fewer --draws, a narrower model or another --root"
    backbone: Backbone
    parts: dict[str, list[Part]]  # by split, in the order of the rows
    augment: list[str]  # augmentations of training samples
    seed: int  # of their draws

    def rows(self, split: str) -> int:
        """Return the number of rows of a split."""
        return sum(len(part) for part in self.parts[split])

    @property
    def size(self) -> int:
        """Approximate bytes of the two tables: a row is its features, a label and an id."""
        return (self.rows("train") + self.rows("test")) * (4 * self.backbone.width + 16)

    def describe(self) -> str:
        """Return the numbers of rows and features, for users."""
        width = self.backbone.width
        return f"{self.rows('train'):,} training and {self.rows('test'):,} test rows of {width:,} features"

    def compute(self, shard: Shard, part: Part, cost: Cost) -> pa.Table:
        """Return id, label and features of a part's samples; refuse features that are infinite or NaN."""
        split: Split = getattr(shard.data, part.split)
        positions = torch.arange(part.start, part.stop)
        augment = compose(self.augment if part.split == "train" else ())
        rng = generator(self.seed, PHASE, part.draw)
        draws = torch.rand(len(split), augment.draws, generator=rng)  # of all samples, so that parts do not matter
        draws[:, augment.alternating] = alternate(augment, len(split), self.seed, part.draw)
        features = self.backbone.embed(split, positions, augment, draws[positions], shard.device)
        finite = features.isfinite().all(1)
        if not finite.all():
            sample = part.start + int(finite.int().argmin())
            raise UserError(f"{part.split} sample {sample}: its features hold NaN or infinity")
        cost.forward += len(part)
        ids = positions if split.ids is None else split.ids[positions]
        labels = np.array(split.classes, object)[split.y[positions].numpy()]
        schema = features_schema(features.shape[1], split.classes)
        numbers = pa.array(features.numpy().reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(numbers, type=schema.field(FEATURES).type)
        return pa.table([ids.numpy(), labels, vectors], schema=schema)


def planned(settings: EmbedSettings, data: Data, folder: RunFolder) -> Embedding:
    """Plan ``draws`` augmented rows of each training sample, or one without augmentation, and one per test sample."""
    draws, augment = settings.draws, augmentations(settings.dataset, data)
    if draws and not augment:
        raise UserError(f"draws = {draws}: {settings.dataset.name} has no augmentation, so all would be equal")
    if settings.model_from:  # with that run's normalisation
        other = locate(folder.storage.parent.parent.root, settings.model_from, having=MODEL)
        theirs = settings_of_trained(other)
        there = open_samples(theirs).data
        seen = there.train
        if seen.shape != data.train.shape:
            shapes = f"{list(seen.shape)}, those here have {list(data.train.shape)}"
            raise UserError(f"the model of run {other.name!r} takes samples of shape {shapes}")
        check_same_tokens(settings.dataset, theirs.dataset, data, other.name)
        model = classifier(restored_model(other, theirs, there), "a frozen backbone")
        width = model.head.in_features
        backbone = Backbone(model.features.float(), width, seen.mean, seen.std, settings.precision)
    else:
        backbone = named_backbone(settings.model, data, settings.precision, settings.seed)
    size = min(settings.rows_per_part, max(1, PART_BYTES // (4 * backbone.width)))  # fewer rows of wide features
    train = parts_of("train", len(data.train), max(1, draws), size)
    test = parts_of("test", len(data.test), 1, size)
    return Embedding(backbone, {"train": train, "test": test}, augment if draws else [], settings.seed)


def embed(settings: EmbedSettings, data: Data, report: Report) -> None:
    """Compute all missing features, and leave train.parquet and test.parquet in the run folder."""
    storage = report.folder.storage
    embedding = planned(settings, data, report.folder)
    cluster = settings.cluster
    digest = embedding.backbone.digest
    nobody = torch.empty(0, dtype=torch.int64)

    def compute(missing: list[Part]) -> None:
        def shards_for(holders: int) -> list[Shard]:
            source = data if cluster.workers == 0 else settings.dataset
            world = min(holders, len(missing))
            return [Shard(source, nobody, nobody, rank=rank, world=world) for rank in range(world)]

        with hold(shards_for, cluster) as shards:
            shards.map(write_parts, embedding, missing, digest, storage)

    def work() -> dict[str, Any]:
        check_disk(embedding, storage)
        complete(embedding, digest, report, compute)
        made = []
        schema = features_schema(embedding.backbone.width, data.train.classes)
        for split, parts in embedding.parts.items():
            made += join_parts(storage, parts, f"{split}.parquet", schema)
        finding = f"{embedding.describe()}: the folder below is a data set of them, --dataset table:PATH"
        rows = {"rows": embedding.rows("train"), "test_rows": embedding.rows("test")}
        facts = {**rows, "width": embedding.backbone.width, "main": True, "findings": [finding]}
        return {"costs": [bill_of(PHASE, made).record()], **facts}

    report.phase(PHASE, work, epochs=sum(map(len, embedding.parts.values())))
    storage.delete_folder(PARTS)  # only after the phase is recorded, or they would be recomputed


# Tables in parts, whatever their rows are


class Plan(Protocol):
    """Tables to compute in parts; a copy of it goes to each holder."""

    phase: str  # name on the bill and in the metrics
    smaller: str  # advice where the disk is too small

    @property
    def parts(self) -> dict[str, list[Part]]:
        """The parts by table."""

    @property
    def size(self) -> int:
        """Approximate bytes of the tables."""

    def describe(self) -> str:
        """Return the numbers of rows and columns, for users."""

    def compute(self, shard: Shard, part: Part, cost: Cost) -> pa.Table:
        """Return a part's rows, and add the samples that passed through a model to the bill."""


def check_disk(plan: Plan, storage: Storage) -> None:
    """Refuse tables for which the disk has no room: for a moment it holds the parts and the joined tables."""
    folder = storage.local
    if folder is None:
        return
    written = sum(file.stat().st_size for file in folder.glob(f"{PARTS}/*"))
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if 2 * plan.size - written > free:
        twice = f"{plan.describe()}, about {readable(plan.size)}, and as much again while parts are joined"
        raise UserError(f"{twice}, do not fit {str(folder)!r}, which has {readable(free)} left: {plan.smaller}")


def complete(plan: Plan, digest: str, report: Report, compute: Callable[[list[Part]], object]) -> None:
    """Have all parts computed that are missing or not of the digest; report each once any process has written it."""
    storage = report.folder.storage
    parts = [part for parts in plan.parts.values() for part in parts]
    missing = [part for part in parts if not is_there(storage, part, digest)]
    done = threading.Event()
    reported: set[str] = set()

    def tell(there: Iterable[str]) -> None:
        fresh = set(there) - reported
        for number, part in enumerate(parts, 1):
            if part.file in fresh:
                report({"phase": plan.phase, "epoch": number, "rows": len(part)})
        reported.update(fresh)

    def follow() -> None:
        while not done.wait(GLANCE):
            with suppress(OSError):  # of a distant storage: the next look finds as much
                tell(storage.list(PARTS))

    with ThreadPoolExecutor(1, "progress") as pool:
        following = pool.submit(follow)
        try:
            if missing:
                compute(missing)
        finally:
            done.set()
    following.result()
    tell(part.file for part in parts)


def write_parts(shard: Shard, plan: Plan, parts: Sequence[Part], digest: str, storage: Storage) -> None:
    """Compute and write a holder's share of consecutive missing parts."""
    shares = np.array_split(np.arange(len(parts)), shard.world)
    for number in shares[shard.rank]:
        part = parts[number]
        if is_there(storage, part, digest):  # written by a holder that died later in its share
            continue
        with Cost(plan.phase) as cost:
            table = plan.compute(shard, part, cost)
        write_part(storage, part, table, [digest, shard.world, cost.record()])


def write_part(storage: Storage, part: Part, table: pa.Table, made: list[Any]) -> None:
    """Write a part with the digest of its contents and the facts of its making."""
    facts = json.dumps([digest_of(table), *made])
    storage.write_table(f"{PARTS}/{part.file}", table.replace_schema_metadata({FACTS: facts}), **FORM)


def digest_of(table: pa.Table) -> str:
    """Return a digest of the contents of a part: numbers, lists of numbers and texts."""
    digest = blake2b(digest_size=16)
    for column in table.columns:
        values = column.combine_chunks()
        if pa.types.is_fixed_size_list(values.type):
            values = values.flatten()
        is_number = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
        numbers = values.to_numpy(zero_copy_only=False).tobytes() if is_number else None
        digest.update(numbers or json.dumps(values.to_pylist()).encode())
    return digest.hexdigest()


def read_part(storage: Storage, part: Part) -> tuple[pa.Table, str, int, Cost] | None:
    """Return a part with its maker's digest, number of holders and cost; None if missing, damaged or edited."""
    content = storage.read(f"{PARTS}/{part.file}")
    if content is None:
        return None
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        table = file.read(use_threads=False)  # Arrow's own threads may outlive the interpreter
        contents, digest, world, cost = json.loads(table.schema.metadata[FACTS])
        return (table, digest, world, Cost(**cost)) if contents == digest_of(table) else None
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError, AttributeError):
        return None


def is_there(storage: Storage, part: Part, digest: str) -> bool:
    """Return True if a part is complete, undamaged and of a maker with a digest."""
    found = read_part(storage, part)
    return found is not None and found[1] == digest and len(found[0]) == len(part)


def joined(storage: Storage, parts: Iterable[Part]) -> Iterator[tuple[pa.Table, int, Cost]]:
    """Yield each part's table with its number of holders and cost, one part in memory at a time."""
    for part in parts:
        found = read_part(storage, part)
        if found is None:
            raise UserError(f"{storage.root}/{PARTS}/{part.file} is damaged: --resume computes it again")
        table, _, world, cost = found
        yield table, world, cost


def join_parts(storage: Storage, parts: Iterable[Part], name: str, schema: pa.Schema) -> list[tuple[int, Cost]]:
    """Join the parts of a split to one table; return holders and cost of each."""
    made = []
    with storage.new_file(name) as sink, pq.ParquetWriter(sink, schema, **FORM) as writer:
        for table, world, cost in joined(storage, parts):
            writer.write_table(table)
            made.append((world, cost))
    return made


def bill_of(phase: str, made: Iterable[tuple[int, Cost]]) -> Cost:
    """Return one bill for parts, each with the number of holders that were at work together."""
    bill = Cost(phase)
    for world, cost in made:
        bill = bill.then(cost)
        bill.seconds += cost.seconds / world - cost.seconds
    return bill
