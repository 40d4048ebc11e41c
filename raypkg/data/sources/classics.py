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

NAMES = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST")  # as torchvision spells them
BLOCK = 4096  # images


@dataset("cifar10", source="Krizhevsky 2009")
@dataset("cifar100", source="Krizhevsky 2009")
@dataset("mnist", source="LeCun et al. 1998")
@dataset("fashionmnist", source="arXiv:1708.07747")
def load(root: str, *, split: str, cache: Cache, registered: str) -> Split:
    """CIFAR of 60,000 colour images 32×32 in 10 or 100 classes; MNIST and Fashion-MNIST of 70,000 grey ones 28×28.

    The original files are read from, or downloaded to, PATH or the cache; 10,000 images are the test split.
    """
    kind = next(name for name in NAMES if name.lower() == registered)
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
    return stored(cache, registered, split, [], build, root=str(folder.resolve())).as_split()
