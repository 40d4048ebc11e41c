"""Digits whose reader notes when the first batch was read: what stands before it is the start of a run."""

import os
import time
from dataclasses import replace
from pathlib import Path

from raypkg.data.sources.digits import digits as load_digits
from raypkg.data.split import Split

ROWS = 16  # of a split, that the digest of a run's data reads
FIRST = "EFFRAY_FIRST_BATCH"  # the variable that names the file for the note


def load(root: str, *, split: str) -> Split:
    honest = load_digits(root, split=split)
    note = Path(os.environ[FIRST])

    def take(indices):
        if len(indices) > ROWS and not note.exists():
            note.write_text(str(time.time()))
        return honest.take(indices)

    return replace(honest, take=take, augment=honest.augment)
