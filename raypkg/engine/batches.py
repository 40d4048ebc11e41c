"""The stream of training batches: a function of the seed alone, whatever the number of workers."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.data.augment import Augmentation, compose
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split, shuffled_by_blocks

from .costs import waiting
from .worker import Worker, keep_freed_memory

T = TypeVar("T")
J = TypeVar("J")

MOST_AHEAD = 8  # batches that wait for their steps: enough to even out that some take longer to load than others
AHEAD_BYTES = 256 * 2**20  # of memory that they may take, or else one of them


class Batch(NamedTuple):
    """This worker's slice of one step's samples; ``total`` counts the step's samples over all workers."""

    x: Tensor  # what the model is given: float [b, C, H, W] or [b, D], or int64 [b, 2, l]
    y: Tensor  # [b]
    weights: Tensor  # [b]
    indices: Tensor  # [b], positions in the split
    total: int

    def parts(self, most: int | None) -> "list[Batch]":
        """Return the slice in parts of at most so many samples, as even as possible; ``total`` stays the step's.

        >>> batch = Batch(*torch.arange(20).view(4, 5), total=5)
        >>> [part.y.tolist() for part in batch.parts(2)]
        [[5, 6], [7, 8], [9]]
        """
        if most is None or most >= len(self.y):
            return [self]
        count = -(-len(self.y) // most)
        x, y, weights, indices = (tensor.tensor_split(count) for tensor in self[:4])
        parts = zip(x, y, weights, indices, strict=True)
        return [Batch(*part, total=self.total) for part in parts]


class Epoch(NamedTuple):
    """The batches of one epoch, and how many they are."""

    steps: int
    batches: Iterator[Batch]


class Batches:
    """Shuffled, augmented, normalised batches of a coreset, prepared ahead in a thread.

    An epoch visits every sample once, in ⌈n / batch_size⌉ batches as even as possible, so that no batch is tiny.
    Order and augmentation are drawn for the whole batch from (seed, epoch) and sliced by rank. Samples that are read
    by blocks are shuffled within a window of these.
    """

    def __init__(
        self,
        split: Split,
        coreset: Coreset,
        batch_size: int,
        *,
        seed: int,
        augment: Sequence[str],
        worker: Worker,
        dtype: torch.dtype = torch.float32,
    ):
        smallest = min(batch_size, len(coreset))
        if smallest < worker.world:
            raise UserError(
                f"batches of {smallest} samples cannot be shared by {worker.world} workers: lower cluster.workers or"
                " use more samples"
            )
        self.split = split
        self.coreset = coreset
        self.batch_size = batch_size
        self.seed = seed
        self.augment = compose(augment)
        self.worker = worker
        self.dtype = dtype
        if split.blocks is not None:
            split.blocks.hold_for(coreset.indices, batch_size, 1 + MOST_AHEAD, worker.world)

    def __len__(self) -> int:
        return -(-len(self.coreset) // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield this worker's slice of every batch of an epoch."""
        return ahead(self._load, self._jobs(epoch), loaders_of(self.split))

    def _jobs(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield positions in the coreset and uniform numbers for augmentation, of every whole batch."""
        rng = generator(self.seed, "augment", epoch)
        for positions in self._order(epoch):
            yield positions, torch.rand(len(positions), self.augment.draws, generator=rng)

    def _order(self, epoch: int) -> tuple[Tensor, ...]:
        """Return which positions in the coreset are in each batch."""
        blocks = self.split.blocks
        if blocks is None:
            return shuffled(len(self.coreset), self.batch_size, self.seed, epoch)
        of = blocks.of[self.coreset.indices]
        return shuffled_by_blocks(of, blocks.window, self.batch_size, self.seed, epoch)

    def _load(self, job: tuple[Tensor, Tensor]) -> Batch:
        positions, draws = job
        return training_batch(self.split, self.coreset.part(positions), self.augment, draws, self.worker, self.dtype)


def shuffled(n: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Return which of n samples are in each batch of an epoch: a permutation, cut as evenly as possible."""
    order = torch.randperm(n, generator=generator(seed, "shuffle", epoch))
    return order.tensor_split(-(-n // batch_size))


def training_batch(
    split: Split,
    samples: Coreset,
    augment: Augmentation,
    draws: Tensor,
    worker: Worker,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Load this worker's slice of one step's samples, augmented and normalised.

    Args:
        split: where the samples are.
        samples: all of the step.
        augment: the augmentation.
        draws: uniform random numbers for it, of all samples [b, augment.draws].
        worker: which slice, and where to.
        dtype: of the model.
    """
    device = worker.device
    indices = slice_of(samples.indices, worker)
    pixels, y = split.batch(indices)
    numbers = slice_of(draws, worker)
    augmented = augment(to_device(pixels, device), to_device(numbers, device))
    x = split.inputs(augmented, dtype)
    weights = to_device(slice_of(samples.weights, worker), device)
    return Batch(x, to_device(y, device), weights.to(dtype), indices, len(samples))


def plain_batches(
    split: Split,
    indices: Tensor,
    device: torch.device,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x, y) in the order of the indices, normalised and not augmented, for scores and evaluation.

    Left to itself, a batch has 128 samples on a processor, whose cache holds the activations of so many images (512
    take 1.4 times as long), and 512 elsewhere.
    """
    size = batch_size or (128 if device.type == "cpu" else 512)

    def load(part: Tensor) -> tuple[Tensor, Tensor]:
        pixels, y = split.batch(part)
        x = split.inputs(to_device(pixels, device), dtype)
        return x, to_device(y, device)

    return ahead(load, indices.split(size), loaders_of(split))


def loaders_of(split: Split) -> int:
    """Return how many threads load batches: blocks that are elsewhere are waited for, which one thread would add up."""
    return 1 if split.blocks is None else MOST_AHEAD


def slice_of(tensor: Tensor, worker: Worker) -> Tensor:
    """Return this worker's contiguous slice of a tensor, as even as possible."""
    return tensor.tensor_split(worker.world)[worker.rank]


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return what a model computes in, hence what its inputs must be."""
    return next(model.parameters()).dtype


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor without waiting where the device allows it."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def ahead(load: Callable[[J], T], jobs: Iterable[J], threads: int = 1) -> Iterator[T]:
    """Yield ``load(job)`` in order while threads work on the jobs that follow; waiting for them is billed.

    At most ``MOST_AHEAD`` results wait, of no more than ``AHEAD_BYTES`` if they are as large as the last one; one may
    always wait.
    """
    keep_freed_memory()  # the next batch takes as much
    coming = iter(jobs)
    pending: deque[Future[T]] = deque()
    depth = 1
    pool = ThreadPoolExecutor(threads, "batches")
    try:
        while True:
            missing = 1 + depth - len(pending)  # one to yield, the others to wait
            pending.extend(pool.submit(load, job) for job in islice(coming, max(0, missing)))
            if not pending:
                return
            value = _awaited(pending.popleft())
            depth = max(1, min(MOST_AHEAD, AHEAD_BYTES // max(1, _bytes(value))))
            yield value
    finally:
        # Nobody wants the others. Not waited for: Python's collector may be what ends this, in any thread.
        pool.shutdown(wait=False, cancel_futures=True)


def _bytes(value: object) -> int:
    """Return the memory of the tensors in a batch."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, tuple) else 0


def _awaited(future: Future[T]) -> T:
    with waiting():
        return future.result()
