"""Memory and disk limits of this machine, checked before anything is allocated or written."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from platform import node

from raypkg.core.errors import UserError

UNITS = ("B", "kB", "MB", "GB", "TB")
SAMPLES_AT_ONCE = 256  # samples decoded or made dense together


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or the limit of its control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no control group, or no limit in it
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        total = min(total, limit)
    return total


def check_memory(what: str, needed: int, advice: str) -> None:
    """Refuse an allocation of ``needed`` bytes beyond all memory, free or not: the decision is the same every time."""
    available = machine_memory()
    if needed > available:
        needs, has = (f"{size / 2**30:,.1f} GiB" for size in (needed, available))
        raise UserError(f"{what}: needed is {needs} of memory, this machine has {has}; {advice}")


def read_limit() -> int:
    """Return the most bytes of one file's data that are read at once: ``EFFRAY_MEMORY`` in GiB, by default 4."""
    chosen = os.environ.get("EFFRAY_MEMORY") or "4"
    limit = 0
    with suppress(ValueError, OverflowError):
        limit = int(float(chosen) * 2**30)
    if limit <= 0:
        raise UserError(f"EFFRAY_MEMORY = {chosen!r}: must be a number above 0, the GiB of data that are read at once")
    return limit


def check_read(what: str, size: int) -> None:
    """Refuse to read ``size`` bytes, as they lie in memory, if that exceeds the limit of data read at once."""
    if size > (limit := read_limit()):
        expanded, allowed = (f"{each / 2**30:,.3g} GiB" for each in (size, limit))
        raise UserError(f"{what}: {expanded} of memory when read, the limit is {allowed}: EFFRAY_MEMORY raises it")


def check_samples(what: str, size: int, advice: str, count: int = SAMPLES_AT_ONCE) -> None:
    """Refuse samples of ``size`` bytes each if a batch of them, or all ``count`` if fewer, exceeds the memory."""
    batch = min(count, SAMPLES_AT_ONCE)
    check_memory(f"{what}, {batch} at once", batch * size, advice)


def check_cache_room(folder: Path, size: int, what: str) -> None:
    """Refuse to write more bytes than the disk of a cache folder has free."""
    free = shutil.disk_usage(folder).free
    if size > free:
        room = f"the data cache {str(folder)!r} on {node()} has {free / 1e9:.1f} GB of room"
        needed = f"{what} takes {size / 1e9:.1f} GB"
        raise UserError(f"{room}, {needed}: name a folder on a larger disk in EFFRAY_CACHE")


def readable(size: float) -> str:
    """Format a number of bytes for people.

    >>> readable(7.1e12)
    '7.1 TB'
    """
    unit = 0
    while size >= 1000 and unit < len(UNITS) - 1:
        size /= 1000
        unit += 1
    return f"{size:.3g} {UNITS[unit]}"
