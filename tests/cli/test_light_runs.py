"""A run in one process imports nothing that it does not use, which would be most of a short run's time, nor warns."""

import subprocess
import sys

import pytest

ONE_PROCESS = """
import sys
from raypkg.cli import main

try:
    main()
finally:
    unused = {"torch._dynamo", "torchvision", "matplotlib.pyplot", "ray", "wandb"}
    assert not unused & sys.modules.keys(), unused & sys.modules.keys()
"""


@pytest.mark.parametrize(
    "arguments",
    [
        "train --model resnet8 --train.epochs 1 --train.optimizer adamw --select.fraction 0.5",
        "lipt --model resnet8 --pretrain.models 2 --pretrain.epochs 1 --train.epochs 1",
        "crest --model mlp --train.epochs 2 --budget 0.5",
        "sparse --model mlp --train.epochs 2 --density 0.2 --growth gradient --agent",
        "deltagrad train --train.epochs 2",
    ],
)
def test_a_run_in_one_process_imports_neither_compiler_nor_ray(arguments, tmp_path):
    command = [sys.executable, "-c", ONE_PROCESS, *arguments.split(), "--cluster.workers", "0"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    told = [line for line in done.stderr.splitlines() if not line.startswith("effray: CREST at step")]  # its look
    assert not told
    assert list(tmp_path.glob("runs/*/*/summary.json"))
