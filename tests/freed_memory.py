"""Prints how much memory stays with this process after it was freed, in MiB, before and after a stream of batches."""

import json
from pathlib import Path

import torch

from raypkg.engine.batches import ahead

MEBIBYTE = 2**20
BLOCKS = 8
SIZE = 16  # MiB of a block


def left():
    before = resident()
    blocks = [torch.ones(SIZE * MEBIBYTE, dtype=torch.uint8) for _ in range(BLOCKS)]
    del blocks
    return resident() - before


def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmRSS:"))
    return int(line.split()[1]) // 1024


if __name__ == "__main__":
    before = left()
    list(ahead(abs, [0]))
    print(json.dumps({"before": before, "after": left()}))
