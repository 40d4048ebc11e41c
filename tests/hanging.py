"""Digits whose reader waits in the middle of a run, until a file is there: time to kill somebody."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from raypkg.data.digits import load as load_digits
from raypkg.data.split import Split

BATCHES = 30  # read before the wait


def load(root: str, *, split: str, go: str = "", kill: bool = False) -> Split:
    """Wait for the file ``go``; or make it and kill this process, once."""
    honest, read = load_digits(root, split=split), []

    def take(indices):
        read.append(len(indices))
        if len(read) == BATCHES and kill and not Path(go).exists():
            Path(go).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while len(read) >= BATCHES and not Path(go).exists():
            time.sleep(0.1)
        return honest.take(indices)

    return replace(honest, take=take)
