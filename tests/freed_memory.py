"""Prints by how many MiB this process has grown when it has freed 128 MiB, at several moments."""

import json
from pathlib import Path

import torch

from raypkg.engine.batches import ahead
from raypkg.engine.worker import forget_peak_memory

MEBIBYTE = 2**20
BLOCKS = 8
SIZE = 16  # MiB of a block


def use():
    blocks = [torch.ones(SIZE * MEBIBYTE, dtype=torch.uint8) for _ in range(BLOCKS)]
    del blocks


def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmRSS:"))
    return int(line.split()[1]) // 1024


if __name__ == "__main__":
    use()
    start = resident()
    use()
    of_itself = resident() - start
    list(ahead(abs, [0]))
    use()
    after_a_batch = resident() - start
    forget_peak_memory()
    forgotten = resident() - start
    print(json.dumps({"of itself": of_itself, "after a batch": after_a_batch, "forgotten": forgotten}))
