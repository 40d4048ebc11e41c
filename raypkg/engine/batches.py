"""The stream of training batches: a function of the seed alone, whatever the number of workers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.data.augment import Augmentation, compose
from raypkg.data.coreset import Coreset
from raypkg.data.files import fetched
from raypkg.data.kinds import TEXTS, Empty
from raypkg.data.split import Split, shuffled_by_blocks

from .worker import Worker, keep_freed_memory, waiting

T = TypeVar("T")
J = TypeVar("J")

MOST_AHEAD = 8  # batches loaded ahead of their steps, to even out loading times
AHEAD_BYTES = 256 * 2**20  # bound on their memory; one batch may always be ahead


class Batch(NamedTuple):
    """This worker's slice of one step's samples."""

    x: Tensor  # input of the model: float [b, C, H, W] or [b, D], or int64 [b, 2, l]
    y: Tensor  # [b]
    weights: Tensor  # [b]
    indices: Tensor  # [b], positions in the split
    total: int  # samples of the step over all workers

    def parts(self, most: int | None) -> "list[Batch]":
        """Split the slice into parts of at most ``most`` samples, as even as possible; ``total`` stays the step's.

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
    """The batches of one epoch."""

    steps: int  # number of batches
    batches: Iterator[Batch]


@dataclass(eq=False)
class Batches:
    """Shuffled, augmented, normalised batches of a coreset, prepared ahead in a thread.

    An epoch visits every sample once, in ⌈n / batch_size⌉ batches as even as possible, so that no batch is tiny.
    Order and augmentation are drawn for the whole batch from (seed, epoch) and sliced by rank. Samples read by blocks
    are shuffled within a window of blocks.
    """

    split: Split
    coreset: Coreset
    batch_size: int
    _: KW_ONLY
    seed: int
    augment: Sequence[str]
    worker: Worker
    dtype: torch.dtype = torch.float32
    empty: Empty = torch.empty

    def __post_init__(self) -> None:
        smallest, world = min(self.batch_size, len(self.coreset)), self.worker.world
        if smallest < world:
            problem = f"batches of {smallest} samples cannot be shared by {world} workers"
            raise UserError(f"{problem}: lower cluster.workers or use more samples")
        if self.split.blocks is not None:
            self.split.blocks.hold_for(self.coreset.indices, self.batch_size, 1 + MOST_AHEAD, world)

    def __len__(self) -> int:
        return -(-len(self.coreset) // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield this worker's slice of every batch of an epoch."""
        augment = compose(self.augment)
        blocks = self.split.blocks
        if blocks is None:
            order = shuffled(len(self.coreset), self.batch_size, self.seed, epoch)
        else:
            of = blocks.of[self.coreset.indices]
            order = shuffled_by_blocks(of, blocks.window, self.batch_size, self.seed, epoch)

        def draw_jobs() -> Iterator[tuple[Tensor, Tensor]]:
            rng = generator(self.seed, "augment", epoch)
            sides = alternate(augment, len(self.split), self.seed, epoch)
            for positions in order:
                draws = torch.rand(len(positions), augment.draws, generator=rng)
                draws[:, augment.alternating] = sides[self.coreset.indices[positions]]
                yield positions, draws

        def load(job: tuple[Tensor, Tensor]) -> Batch:
            positions, draws = job
            samples = self.coreset.part(positions)
            return training_batch(self.split, samples, augment, draws, self.worker, self.dtype, self.empty)

        return map(load, draw_jobs()) if augment.is_own else ahead(load, draw_jobs(), loaders_of(self.split))


def shuffled(n: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Return the positions in each batch of an epoch: a permutation of n samples, cut as evenly as possible."""
    order = torch.randperm(n, generator=generator(seed, "shuffle", epoch))
    return order.tensor_split(-(-n // batch_size))


def alternate(augment: Augmentation, n: int, seed: int, epoch: int) -> Tensor:
    """Return the alternating uniforms of n samples in an epoch, 0 or 1, [n, columns]: drawn at first, then by turns."""
    first = torch.randint(2, (n, len(augment.alternating)), generator=generator(seed, "alternate"))
    return (first + epoch) % 2.0


def training_batch(
    split: Split,
    samples: Coreset,
    augment: Augmentation,
    draws: Tensor,
    worker: Worker,
    dtype: torch.dtype = torch.float32,
    empty: Empty = torch.empty,
) -> Batch:
    """Load this worker's slice of one step's samples, augmented and normalised.

    ``samples`` are those of all workers, and so are ``draws``, the uniform numbers [b, augment.draws] for augmentation.
    """
    device = worker.device
    indices = slice_of(samples.indices, worker)
    pixels, y = split.batch(indices)
    numbers = slice_of(draws, worker)
    augmented = augment(to_device(pixels, device), to_device(numbers, device))
    x = split.inputs(augmented, dtype, empty)
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

    By default a batch has 128 samples on a CPU, whose cache holds their activations (512 take 1.4 times as long), and
    512 on other devices; fewer of texts that may have more than 128 tokens.
    """
    size = batch_size or (128 if device.type == "cpu" else 512)
    if batch_size is None and split.kind is TEXTS:
        size = max(1, size * 128 // max(128, split.shape[0]))

    def load(part: Tensor) -> tuple[Tensor, Tensor]:
        pixels, y = split.batch(part)
        x = split.inputs(to_device(pixels, device), dtype)
        return x, to_device(y, device)

    return ahead(load, indices.split(size), loaders_of(split))


def loaders_of(split: Split) -> int:
    """Return the number of threads that load batches: several for remote blocks, whose waiting times would add up."""
    return 1 if split.blocks is None else MOST_AHEAD


def slice_of(tensor: Tensor, worker: Worker) -> Tensor:
    """Return this worker's contiguous slice of a tensor, as even as possible."""
    return tensor if worker.world == 1 else tensor.tensor_split(worker.world)[worker.rank]


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the floating-point type of a model's parameters, which its inputs must have: that of the trained ones."""
    return max(model.parameters(), key=lambda parameter: parameter.requires_grad).dtype


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device, on a GPU without waiting for the copy."""
    if device.type == "cpu":
        return tensor
    # PyTorch caches pinned buffers: it pins a new one only while the copies from all earlier ones are under way.
    return tensor.pin_memory().to(device, non_blocking=True)


def ahead(load: Callable[[J], T], jobs: Iterable[J], threads: int = 1) -> Iterator[T]:
    """Yield ``load(job)`` in order while threads load the jobs that follow; time spent waiting is billed.

    At most ``MOST_AHEAD`` results are ahead, estimated by the size of the last one to fit in ``AHEAD_BYTES``.
    """
    keep_freed_memory()  # the next batch needs as much

    def fitting(latest: T) -> int:
        return max(1, min(MOST_AHEAD, AHEAD_BYTES // max(1, _bytes(latest))))

    return fetched(load, jobs, threads, fitting, waiting)


def _bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, tuple) else 0
