"""Selects from rows mapped from a file, and prints by how many MiB this process has grown, and the picks."""

import json
import resource
import sys

import torch

from raypkg.coresets.record import Rows
from raypkg.coresets.rules import coreset


def peak():
    """Largest resident memory so far in MiB, pages of mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    rows = Rows.mapped(sys.argv[1])
    target = rows[torch.arange(0, len(rows), len(rows) // 20)]
    picks = {}
    for name in ("less", "rds_plus"):
        coreset[name](rows[:2000], 10, target=target)  # what the libraries need once
    before = peak()
    for name in ("less", "rds_plus"):
        picks[name] = coreset[name](rows, 500, target=target).indices.tolist()
    print(json.dumps({"grown": peak() - before, "picks": picks}))
