"""A command imports nothing that it does not use: help and refusals come at once, and short runs stay short."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from raypkg.cli import main

try:
    main()
finally:
    unused = {unused} & sys.modules.keys()
    assert not unused, unused
"""
HEAVY = {"torch", "ray", "wandb", "matplotlib"}
UNUSED_IN_ONE_PROCESS = {"torch._dynamo", "torchvision", "matplotlib.pyplot", "ray", "wandb"}


def ended(arguments, unused, folder, **environment):
    """Return how a command in a process of its own ends; it fails if it imports what it should not."""
    command = [sys.executable, "-c", CODE.format(unused=unused), *arguments.split()]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", ["lipt --help", "compare selection --help", "--version"])
def test_help_imports_neither_torch_nor_ray(arguments, tmp_path):
    done = ended(arguments, HEAVY, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_variable_names_the_root(tmp_path):
    done = ended("show t", HEAVY, tmp_path, EFFRAY_RUNS="ftp://x")
    assert done.returncode == 2 and "cannot use 'ftp://x' as a folder" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --model resnt8", "unknown model 'resnt8', did you mean 'resnet8'? "),
        ("train --dataset digts", "unknown dataset 'digts', did you mean 'digits'? "),
        ("train --hooks agnt", "unknown hook 'agnt', did you mean 'agent'? "),
        ("lipt --select.rule gradmtch", "unknown coreset rule 'gradmtch', did you mean 'gradmatch'? "),
        ("lipt --pretrain.merge men", "unknown merge 'men', did you mean 'mean'? "),
        ("sparse --density 0.1 --growth randm", "unknown growth rule 'randm', did you mean 'random'? "),
        ("deltagrad train --model linea", "unknown model 'linea', did you mean 'linear'? "),
    ],
)
def test_an_unknown_name_is_refused_before_torch_is_imported(arguments, message, tmp_path):
    done = ended(f"{arguments} --cluster.workers 0", {"torch"}, tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"effray: {message}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        "lipt --model resnet8 --pretrain.models 2 --pretrain.epochs 1 --train.epochs 1 --train.optimizer adamw",
        "crest --model mlp --train.epochs 2 --budget 0.5",
        "sparse --model mlp --train.epochs 2 --density 0.2 --growth gradient --agent",
        "deltagrad train --train.epochs 2",
    ],
)
def test_a_run_in_one_process_imports_neither_the_compiler_nor_ray(arguments, tmp_path):
    done = ended(f"{arguments} --cluster.workers 0", UNUSED_IN_ONE_PROCESS, tmp_path)
    warnings = [line for line in done.stderr.splitlines() if not line.startswith("effray: CREST at step")]
    assert done.returncode == 0 and not warnings
    assert list(tmp_path.glob("runs/*/*/summary.json"))
