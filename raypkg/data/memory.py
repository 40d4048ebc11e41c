"""Whether something fits this machine's memory or disk, asked before it is allocated or written."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from platform import node

from raypkg.core.errors import UserError

UNITS = ("B", "kB", "MB", "GB", "TB")
SAMPLES_AT_ONCE = 256  # that are decoded, or made dense, together


def machine_memory() -> int:
    """Return the bytes of memory that this machine has, or that its control group allows."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no control group, or no limit in it
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        total = min(total, limit)
    return total


def check_memory(what: str, needed: int, advice: str) -> None:
    """Refuse what this machine could not hold if nothing else were in its memory.

    The bound is all of the memory, not what is free at the moment: what is refused today is refused tomorrow.

    Args:
        what: takes the memory.
        needed: bytes.
        advice: what to do about it.

    Raises:
        UserError: how much it takes, and how much there is.
    """
    available = machine_memory()
    if needed > available:
        raise UserError(f"{what}: needed is {_gib(needed)} of memory, this machine has {_gib(available)}; {advice}")


def check_samples(what: str, size: int, advice: str, count: int = SAMPLES_AT_ONCE) -> None:
    """Refuse samples of so many bytes each that a batch of them, or all, if they are fewer, does not fit the memory."""
    batch = min(count, SAMPLES_AT_ONCE)
    check_memory(f"{what}, {batch} at once", batch * size, advice)


def check_cache_room(folder: Path, size: int, what: str) -> None:
    """Refuse to write more bytes than a cache folder's disk has room for.

    Raises:
        UserError: how much it takes, and how much room there is.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"the data cache {str(folder)!r} on {node()} has {free / 1e9:.1f} GB of room, {what} takes"
            f" {size / 1e9:.1f} GB: name a folder on a larger disk in EFFRAY_CACHE"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def readable(size: float) -> str:
    """Return a number of bytes for people.

    >>> readable(7.1e12)
    '7.1 TB'
    """
    unit = 0
    while size >= 1000 and unit < len(UNITS) - 1:
        size /= 1000
        unit += 1
    return f"{size:.3g} {UNITS[unit]}"
