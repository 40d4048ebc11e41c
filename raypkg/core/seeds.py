"""Named random generators: every draw is a function of (seed, purpose, counters), never of global state."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, independent of every other purpose.

    >>> derive(0, "shuffle", 3) == derive(0, "shuffle", 3)
    True
    >>> derive(0, "shuffle", 3) == derive(0, "shuffle", 4)
    False
    """
    # A separator that no name contains keeps ("a", "b") apart from ("ab"); PyTorch's seeds are signed: hence 63 bits.
    text = "\x1f".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def generator(seed: int, *purpose: str | int) -> "torch.Generator":
    """Return a CPU generator named by its seed and purpose, such as ``generator(seed, "shuffle", epoch)``."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *purpose))


@contextmanager
def seeded(seed: int, *purpose: str | int) -> "Iterator[None]":
    """Make torch's global generators the named ones inside the block, for layers that draw from them (dropout)."""
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        # Not torch.manual_seed: for devices that are not in use it formats a traceback at each call.
        torch.default_generator.manual_seed(derive(seed, *purpose))
        if devices:
            torch.cuda.manual_seed(derive(seed, *purpose))
        yield
