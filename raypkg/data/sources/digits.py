"""Optical Recognition of Handwritten Digits (E. Alpaydin and C. Kaynak, 1998), which ship with the package.

UCI Machine Learning Repository, doi:10.24432/C50P49, licensed CC BY 4.0; its 1,797 test samples. Pixel values 0 … 16
are scaled to 0 … 255 here. They are held in memory: a training on them imports nothing of the store.
"""

from importlib.resources import as_file, files

import numpy as np
import pyarrow.parquet as pq

from raypkg.core.errors import UserError
from raypkg.data.split import Split

from . import dataset


@dataset("digits", source="doi:10.24432/C50P49")
def digits(root: str, *, split: str) -> Split:
    """Handwritten digits, 8×8 grey: 1,437 to train, 360 to test.

    The file's column ``test`` fixes the split, which is stratified by class.
    """
    if root:
        raise UserError(f"dataset 'digits' ships with the package and takes no path, got {root!r}")
    # Read by path: Arrow's threads may outlive a file that Python has opened.
    with as_file(files("raypkg.data.sources") / "digits.parquet") as path:
        table = pq.read_table(path)
    rows = table["test"].to_numpy() == (split == "test")  # [n]
    images = b"".join(table["x"].to_pylist())
    levels = np.frombuffer(images, np.uint8).reshape(-1, 1, 8, 8)  # 0 … 16
    pixels = (levels[rows].astype(np.uint16) * 255 + 8) // 16  # to the nearest of 0 … 255
    y = table["y"].to_numpy()[rows]
    return Split.from_tensors(pixels.astype(np.uint8), y, augment=("crop",))
