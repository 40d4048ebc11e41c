"""Commands called in this process, and what their runs leave, compared."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from raypkg.cli import main


def effray(*words: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert (ended.value.code or 0) == code


def run(root: Path, experiment: str, name: str, *options: object) -> Path:
    """Make a run, and return its folder."""
    effray(experiment, "--root", root, "--name", name, *options)
    return root / experiment / name


def driver(*words: object, **options: Any) -> subprocess.Popen:
    """Start a command in a process of its own, with a cluster of its own."""
    command = [sys.executable, "-m", "raypkg", *map(str, words), "--cluster.address", "local"]
    return subprocess.Popen(command, **options)


def picks(folder: Path) -> list[int]:
    return pq.read_table(folder / "coreset.parquet")["index"].to_pylist()


def same_weights(a: Path, b: Path, tolerance: float, file: str = "model.safetensors") -> None:
    ours, theirs = load_file(a / file), load_file(b / file)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance)


def wait_for(condition, process, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the driver ended before it could be stopped"
        assert time.monotonic() < end
        time.sleep(0.02)
