"""The Python files that users may add to: those of the working folder, and beneath them those of this package."""

from pathlib import Path

import raypkg

SUFFIX = ".py"
SPACES = "tune_spaces"
TABLES = "tune_spaces/tables"


def shipped_files(folder: str) -> dict[str, Path]:
    """Return the Python files in a folder of that name by their names; one of the working folder wins."""
    package = Path(raypkg.__file__).parent
    files: dict[str, Path] = {}
    # Later ones win: of a clone, of an installed package, of the working folder.
    for parent in (package.parent, package, Path()):
        for file in sorted(parent.glob(f"{folder}/*{SUFFIX}")):
            files[file.stem] = file
    return files
