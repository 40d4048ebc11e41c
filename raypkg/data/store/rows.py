"""Rows of numbers on the disk: one file, of which a share is held for the test, or a folder with a file for each."""

from pathlib import Path

import numpy as np
import torch

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator


def row_files(root: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Return the file of each split; a single file is that of both.

    Raises:
        UserError: no file with one of the suffixes, or several for a split.
    """
    path = Path(root)
    files = (
        {name: _only(path, name, suffixes) for name in ("train", "test")}
        if path.is_dir()
        else {"train": path, "test": path}
    )
    for file in files.values():
        if not file.is_file() or not file.name.endswith(suffixes):
            raise UserError(f"table {str(file)!r} is not a file with one of the endings {', '.join(suffixes)}")
    return files


def held_out(n: int, test: float, split: str, path: Path) -> np.ndarray:
    """Return the rows of one split of a single file, int64, a draw that depends on nothing but its length.

    Raises:
        UserError: there would be none.
    """
    order = torch.randperm(n, generator=generator(0, "test split"))
    held = round(test * n)
    rows = np.sort((order[:held] if split == "test" else order[held:]).numpy())
    if not len(rows):
        raise UserError(f"option test = {test:g} leaves no {split} samples of the {n} in {str(path)!r}")
    return rows


def _only(folder: Path, split: str, suffixes: tuple[str, ...]) -> Path:
    found = [folder / f"{split}{suffix}" for suffix in suffixes if (folder / f"{split}{suffix}").is_file()]
    if len(found) != 1:
        names = f"{', '.join(f'{split}{suffix}' for suffix in suffixes[:-1])} and {split}{suffixes[-1]}"
        raise UserError(f"folder {str(folder)!r} needs one of {names}, it has {len(found)}")
    return found[0]
