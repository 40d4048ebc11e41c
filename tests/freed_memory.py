"""Prints by how many MiB this process has grown when it has freed 128 MiB, at several moments."""

import json
from pathlib import Path

import torch

from raypkg.engine.batches import ahead
from raypkg.engine.worker import forget_peak_memory


def resident():
    """Use and free eight blocks of 16 MiB; return the resident MiB."""
    blocks = [torch.ones(2**24, dtype=torch.uint8) for _ in range(8)]
    del blocks
    return measured()


def measured():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) // 1024


if __name__ == "__main__":
    start = resident()
    of_itself = resident() - start
    list(ahead(abs, [0]))
    after_a_batch = resident() - start
    forget_peak_memory()
    print(json.dumps({"of itself": of_itself, "after a batch": after_a_batch, "forgotten": measured() - start}))
