"""What requests that failed or were killed have left in a run's folder, and histories that were replaced."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from raypkg.core.errors import UserError

OF_REQUESTS = ("requests", "added")  # folders with a file for each request, by its number in the log


def drop_leftovers(run: Path, last: int, unfinished: str) -> None:
    """Delete every file of a run's folder that its log does not have.

    Args:
        run: the folder.
        last: number of the log's last entry.
        unfinished: ends the names of files that are being written.

    Raises:
        UserError: one cannot be deleted.
    """
    for path in [*_replaced(run, last), *_unlogged(run, last), *_unfinished(run, unfinished)]:
        _delete(path)
    for name in OF_REQUESTS:
        with suppress(OSError):  # it is not empty, or not there
            (run / name).rmdir()


def _replaced(run: Path, last: int) -> Iterator[Path]:
    """Yield the folders of all histories but the current one, begun ones too."""
    for path in run.glob("versions/*"):
        if path.name != f"{last:05d}" and path.is_dir():
            yield path


def _unlogged(run: Path, last: int) -> Iterator[Path]:
    for name in OF_REQUESTS:
        for path in run.glob(f"{name}/*"):
            number = path.name.partition(".")[0]
            if number.isdecimal() and int(number) > last:
                yield path


def _unfinished(run: Path, ending: str) -> Iterator[Path]:
    for name in (".", *OF_REQUESTS):
        yield from run.glob(f"{name}/*{ending}")


def _delete(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # it may have been listed twice
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot delete {str(path)!r}, which no longer belongs to the run: {reason}") from None
