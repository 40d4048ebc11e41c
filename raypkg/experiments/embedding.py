"""Features of all samples, computed where the data is, part by part, and joined to a table for each split.

A run that was stopped computes the parts that are missing. Which samples share a part, and a batch within it, does not
depend on who computes them, so neither do their features, on machines of one kind: processors, or GPUs, of one model.
"""

import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raypkg.cluster.actors import hold
from raypkg.core.errors import UserError
from raypkg.core.memory import readable
from raypkg.core.seeds import generator
from raypkg.core.settings import Cluster, Dataset
from raypkg.data import Data
from raypkg.data.augment import compose
from raypkg.data.split import Split
from raypkg.engine.costs import Cost
from raypkg.engine.shards import Shard
from raypkg.runs.report import Report
from raypkg.runs.storage import Storage

from .backbone import Backbone
from .embedded_parts import PARTS, Made, Part, is_there, join_parts, parts_of, write_part
from .summary import draw_plots

PHASE = "embed"
PART_BYTES = 64 << 20
GLANCE = 1.0  # seconds between two looks at what is done
FIGURES = ("rows", "test_rows", "width")


@dataclass(frozen=True)
class Embedding:
    """What is to be computed.

    Attributes:
        backbone: whose features.
        parts: of each split, by its name, in the order of their rows.
        augment: names of the augmentations of training samples.
        seed: of their draws.
    """

    backbone: Backbone
    parts: dict[str, list[Part]]
    augment: tuple[str, ...]
    seed: int

    @classmethod
    def of(
        cls, backbone: Backbone, data: Data, *, draws: int, rows_per_part: int, augment: Sequence[str], seed: int
    ) -> "Embedding":
        """Plan the rows: so many draws of each training sample, or one without augmentation; one of each test sample.

        Args:
            backbone: whose features.
            data: the samples.
            draws: of the augmentation; 0 = none.
            rows_per_part: at most; fewer where the features are wide.
            augment: names of the augmentations.
            seed: of the draws.
        """
        size = min(rows_per_part, max(1, PART_BYTES // (4 * backbone.width)))
        train = parts_of("train", len(data.train), max(1, draws), size)
        test = parts_of("test", len(data.test), 1, size)
        return cls(backbone, {"train": train, "test": test}, tuple(augment) if draws else (), seed)

    @property
    def all_parts(self) -> list[Part]:
        """The parts of both splits."""
        return [part for parts in self.parts.values() for part in parts]

    def rows(self, split: str) -> int:
        """Return how many rows a split gets."""
        return sum(len(part) for part in self.parts[split])

    @property
    def size(self) -> int:
        """About how many bytes the two tables take: a row is its features, a label and an id."""
        rows = self.rows("train") + self.rows("test")
        return rows * (4 * self.backbone.width + 16)

    def describe(self) -> str:
        """Tell the user what will be there."""
        train = f"{self.rows('train'):,} training rows"
        test = f"{self.rows('test'):,} test rows of {self.backbone.width:,} features"
        return f"{train} and {test}, about {readable(self.size)}"

    def features(self, backbone: Backbone, split: Split, part: Part, device: torch.device) -> Tensor:
        """Return the features of a part's samples, float32 [m, D].

        Args:
            backbone: that of the plan, on the device.
            split: that the part is of.
            part: which samples.
            device: where to compute.

        Raises:
            UserError: some are not finite.
        """
        augment = compose(self.augment if part.split == "train" else ())
        rng = generator(self.seed, PHASE, part.draw)
        draws = torch.rand(len(split), augment.draws, generator=rng)  # of all samples, however they are cut into parts
        features = backbone.embed(split, part.positions, augment, draws[part.start : part.stop], device)
        finite = features.isfinite().all(1)
        if not finite.all():
            sample = part.start + int(finite.int().argmin())
            raise UserError(f"{part.split} sample {sample}: its features hold NaN or infinity")
        return features


def check_disk(embedding: Embedding, storage: Storage) -> None:
    """Refuse features that the disk has no room for: for a moment there are the parts and the tables made of them.

    Raises:
        UserError: how much it takes, and how much there is.
    """
    folder = storage.local
    if folder is None:
        return
    written = sum(file.stat().st_size for file in folder.glob(f"{PARTS}/*"))
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if 2 * embedding.size - written > free:
        raise UserError(
            f"{embedding.describe()}, and as much again while parts are joined, do not fit {str(folder)!r}, which has"
            f" {readable(free)} left: use fewer --draws, a narrower model or another --root"
        )


def embed(embedding: Embedding, data: Data, dataset: Dataset, cluster: Cluster, report: Report) -> None:
    """Compute all features that are not there yet, and leave train.parquet and test.parquet in the run folder.

    Args:
        embedding: what is to be computed.
        data: the samples, as this process has them open.
        dataset: where others find them.
        cluster: who computes.
        report: progress and run folder.

    Raises:
        UserError: features that are not finite, a full disk, or a part that was damaged.
    """
    storage = report.folder.storage
    source = data if cluster.workers == 0 else dataset

    def work() -> dict[str, Any]:
        check_disk(embedding, storage)
        _compute(embedding, source, cluster, report)
        return _join(embedding, data.train.classes, storage)

    report.phase(PHASE, work, epochs=len(embedding.all_parts))
    storage.delete_folder(PARTS)  # not before the phase is on record: they would be computed anew


def finish_embedding(report: Report, samples: int) -> None:
    """Draw what it cost, and write the manifest.

    Args:
        report: of the run, with the record of its phase.
        samples: in the training split.
    """
    folder = report.folder
    record = report.records[PHASE]
    costs = record["costs"]
    rows = f"{record['rows']:,} training and {record['test_rows']:,} test rows of {record['width']:,} features"
    summary = {
        **{name: record[name] for name in FIGURES},
        "samples": samples,
        "coreset": None,
        "phases": costs,
        "seconds": sum(cost["seconds"] for cost in costs),
        "elapsed": record["elapsed"],
        "full_training_backward": 0,
        "findings": [f"{rows}: the folder below is a data set of them, --dataset table:PATH"],
    }
    draw_plots(folder.storage, (), costs)
    folder.finish(summary)


def write_parts(shard: Shard, embedding: Embedding, parts: Sequence[Part], digest: str, storage: Storage) -> None:
    """Compute and write a holder's share of parts: consecutive ones.

    Args:
        shard: which of how many holders this is, and where the samples are.
        embedding: what is to be computed.
        parts: those that are missing.
        digest: of the backbone.
        storage: the run folder.
    """
    backbone = embedding.backbone.to(shard.device)
    shares = np.array_split(np.arange(len(parts)), shard.world)
    for number in shares[shard.rank]:
        part = parts[number]
        if is_there(storage, part, digest):  # written by a holder that died in the middle of its share
            continue
        split: Split = getattr(shard.data, part.split)
        with Cost(PHASE) as cost:
            features = embedding.features(backbone, split, part, shard.device)
        cost.forward += len(part)
        write_part(storage, part, features, split, Made(digest, shard.world, cost))


def _compute(embedding: Embedding, source: Dataset | Data, cluster: Cluster, report: Report) -> None:
    """Compute the parts that are missing."""
    storage = report.folder.storage
    digest = embedding.backbone.digest
    everything = embedding.all_parts
    missing = [part for part in everything if not is_there(storage, part, digest)]
    nobody = torch.empty(0, dtype=torch.int64)

    def shards_for(holders: int) -> list[Shard]:
        world = min(holders, len(missing))
        return [Shard(source, nobody, nobody, rank=rank, world=world) for rank in range(world)]

    with _followed(everything, report):
        if missing:
            with hold(shards_for, cluster) as shards:
                shards.map(write_parts, embedding, missing, digest, storage)


def _join(embedding: Embedding, classes: Sequence[str], storage: Storage) -> dict[str, Any]:
    """Join the parts of each split; return the phase's record, with the bill of all parts, whoever computed them."""
    made = []
    for split, parts in embedding.parts.items():
        made += join_parts(storage, parts, f"{split}.parquet", embedding.backbone.width, classes)
    bill = Cost(PHASE)
    for _, world, cost in made:
        bill = bill.then(cost)
        bill.seconds += cost.seconds / world - cost.seconds  # the others were at work meanwhile
    return {
        "costs": [bill.record()],
        "rows": embedding.rows("train"),
        "test_rows": embedding.rows("test"),
        "width": embedding.backbone.width,
    }


@contextmanager
def _followed(parts: Sequence[Part], report: Report) -> Iterator[None]:
    """Report each part as a row of metrics once it is there, whoever writes it, until the block ends."""
    storage = report.folder.storage
    done = threading.Event()
    reported: set[str] = set()

    def tell(there: Iterable[str]) -> None:
        fresh = set(there) - reported
        for number, part in enumerate(parts, 1):
            if part.file in fresh:
                report({"phase": PHASE, "epoch": number, "rows": len(part)})
        reported.update(fresh)

    def follow() -> None:
        while not done.wait(GLANCE):
            with suppress(OSError):  # of a distant storage: the next look finds as much
                tell(storage.list(PARTS))

    with ThreadPoolExecutor(1, "progress") as pool:
        following = pool.submit(follow)
        try:
            yield
        finally:
            done.set()
    following.result()
    tell(part.file for part in parts)  # all of them: the block has ended
