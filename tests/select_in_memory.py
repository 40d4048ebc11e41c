"""Selects from rows mapped from a file while the data of this process may grow by a few MiB only; prints the picks."""

import json
import resource
import sys
from pathlib import Path

import torch

from raypkg.coresets.rows import Rows
from raypkg.coresets.rules import coreset

MEBIBYTE = 2**20


def data():
    """Private memory of this process in bytes: what RLIMIT_DATA bounds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmData:")).split()[1]) * 1024


if __name__ == "__main__":
    rows = Rows.mapped(sys.argv[1])
    target = rows[torch.arange(0, len(rows), len(rows) // 20)]
    found = {}
    for name, allowed in (("less", 48), ("rds_plus", 64)):
        coreset[name](rows[:2000], 10, target=target)  # what the libraries need once
        resource.setrlimit(resource.RLIMIT_DATA, (data() + allowed * MEBIBYTE, resource.RLIM_INFINITY))
        found[name] = coreset[name](rows, 500, target=target).indices.tolist()
    print(json.dumps(found))
