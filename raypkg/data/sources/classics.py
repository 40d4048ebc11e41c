"""Small classics that torchvision downloads."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from raypkg.core.address import is_uri
from raypkg.core.errors import UserError
from raypkg.data.augment import default_augment
from raypkg.data.split import Split
from raypkg.data.store.arrow import Block, Header
from raypkg.data.store.cache import Cache, cache_folder, stored

from . import dataset

BLOCK = 4096  # images


@dataset("cifar10", source="Krizhevsky 2009")
def cifar10(root: str, *, split: str, cache: Cache) -> Split:
    """CIFAR-10: 50,000 and 10,000 colour images 32×32 of 10 classes."""
    return _from_torchvision("CIFAR10", root, split, cache)


@dataset("cifar100", source="Krizhevsky 2009")
def cifar100(root: str, *, split: str, cache: Cache) -> Split:
    """CIFAR-100: 50,000 and 10,000 colour images 32×32 of 100 classes."""
    return _from_torchvision("CIFAR100", root, split, cache)


@dataset("mnist", source="LeCun et al. 1998")
def mnist(root: str, *, split: str, cache: Cache) -> Split:
    """MNIST: 60,000 and 10,000 grey images 28×28 of handwritten digits."""
    return _from_torchvision("MNIST", root, split, cache)


@dataset("fashionmnist", source="arXiv:1708.07747")
def fashionmnist(root: str, *, split: str, cache: Cache) -> Split:
    """Fashion-MNIST: 60,000 and 10,000 grey images 28×28 of clothes."""
    return _from_torchvision("FashionMNIST", root, split, cache)


def _from_torchvision(kind: str, root: str, split: str, cache: Cache) -> Split:
    """Open the store of a split; original files are read from, or downloaded to, ``root`` or the cache."""
    folder = Path(root) if root else cache_folder(cache) / "torchvision"
    if is_uri(root) or "\0" in root:
        raise UserError(f"{kind} is read from a local folder, not from {root!r}")

    def build() -> tuple[Header, Iterator[Block]]:
        from torchvision import datasets

        raw = folder / kind / "raw"  # created by torchvision before it downloads
        new = [path for path in (raw, *raw.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            source = getattr(datasets, kind)(folder, train=split == "train", download=True)
            y = np.asarray(source.targets, np.int64)
            pixels = np.asarray(source.data)
            if not pixels.size or len(y) != len(pixels) or y.max() >= len(source.classes):
                raise ValueError(f"its files hold {len(pixels)} images and {len(y)} labels up to {y.max(initial=0)}")
        except Exception as error:  # damaged files raise anything
            for path in new:
                with suppress(OSError):  # it was not created, or contains files
                    path.rmdir()
            hint = "place its files there, or use parquet:PATH or folder:PATH"
            raise UserError(f"cannot fetch {kind} into {str(folder)!r} ({error!r}): {hint}") from None
        if pixels.ndim == 3:  # grey
            pixels = pixels[..., None]
        _, height, width, channels = pixels.shape
        shape = (channels, height, width)

        def blocks() -> Iterator[Block]:
            for start in range(0, len(y), BLOCK):
                block = slice(start, start + BLOCK)
                yield Block(pixels[block], y[block], sample=pixels[block])

        return Header("pixels", shape, tuple(source.classes), default_augment(shape)), blocks()

    # The files do not identify the store: they never change, and may be gone once it is built.
    return stored(cache, kind.lower(), split, [], build, root=str(folder.resolve())).as_split()
