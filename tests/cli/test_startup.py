"""A command imports nothing that it does not use: help and refusals come at once, and short runs stay short."""

import os
import subprocess
import sys

from raypkg.experiments.train import TrainSettings
from raypkg.runs.folder import create

CODE = """
import sys
from raypkg.cli import main

for arguments in {commands}:
    try:
        main(arguments.split())
    except SystemExit as ended:
        assert (ended.code or 0) == {code}, arguments
    unused = {unused} & sys.modules.keys()
    assert not unused, (arguments, unused)
"""
OPTIMIZERS = """
from torch import nn
from raypkg.core.settings import Training
from raypkg.engine.run import build_optimizer

for name in ("sgd", "adamw"):
    optimizer = build_optimizer(nn.Linear(3, 2), Training(optimizer=name))
    optimizer.load_state_dict(optimizer.state_dict())  # as in a resumed run
assert "torch._dynamo" not in sys.modules
"""
HEAVY = {"torch", "ray", "wandb", "matplotlib"}
UNUSED_IN_ONE_PROCESS = {"torch._dynamo", "torchvision", "matplotlib.pyplot", "ray", "wandb"}


def in_a_new_process(commands, folder, *, code, unused, then="", **environment):
    """Run commands, check their exit codes and that they leave modules unimported, and return the output."""
    program = CODE.format(commands=commands, code=code, unused=unused) + then
    variables = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_help_imports_neither_torch_nor_ray(tmp_path):
    create(f"{tmp_path}/runs", "train", "one", TrainSettings())
    commands = ["--help", "lipt --help", "compare --help", "compare selection --help", "--version", "list"]
    assert not in_a_new_process(commands, tmp_path, code=0, unused=HEAVY).stderr


def test_a_variable_names_the_root(tmp_path):
    done = in_a_new_process(["show t"], tmp_path, code=2, unused=HEAVY, EFFRAY_RUNS="ftp://x")
    assert "cannot use 'ftp://x' as a folder" in done.stderr


def test_an_unknown_name_is_refused_before_torch_is_imported(tmp_path):
    refusals = {
        "train --model resnt8": "unknown model 'resnt8', did you mean 'resnet8'? ",
        "train --dataset digts": "unknown dataset 'digts', did you mean 'digits'? ",
        "train --hooks agnt": "unknown hook 'agnt', did you mean 'agent'? ",
        "select --rule gradmtch": "unknown coreset rule 'gradmtch', did you mean 'gradmatch'? ",
        "lipt --select.rule gradmtch": "unknown coreset rule 'gradmtch', did you mean 'gradmatch'? ",
        "lipt --pretrain.method lipd": "unknown pre-training 'lipd', did you mean 'lipt'? ",
        "lipt --pretrain.merge men": "unknown merge 'men', did you mean 'mean'? ",
        "lipt --pretrain.sparsity snp": "unknown sparse initialisation 'snp', did you mean 'snip'? ",
        "sparse --density 0.1 --growth randm": "unknown growth rule 'randm', did you mean 'random'? ",
        "sparse --density 0.1 --drop sett": "unknown drop rule 'sett', did you mean 'set'? ",
        "crest --model resnt8": "unknown model 'resnt8', did you mean 'resnet8'? ",
        "deltagrad train --model linea": "unknown model 'linea', did you mean 'linear'? ",
    }
    commands = [f"{line} --cluster.workers 0" for line in refusals]
    lines = in_a_new_process(commands, tmp_path, code=2, unused={"torch"}).stderr.splitlines()
    for line, message in zip(lines, refusals.values(), strict=True):
        assert line.startswith(f"effray: {message}")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_neither_starts_nor_imports_ray(tmp_path):
    done = in_a_new_process(["lipt --dry-run --train.epochs 4000"], tmp_path, code=0, unused={"ray"})
    assert "as many as the cluster has" in done.stdout and not list(tmp_path.iterdir())


def test_a_run_in_one_process_imports_neither_the_compiler_nor_ray(tmp_path):
    runs = [
        "lipt --model resnet8 --pretrain.models 2 --pretrain.epochs 1 --train.epochs 1 --train.optimizer adamw"
        " --train.decay matrices --train.clip 1",
        "crest --model mlp --train.epochs 2 --budget 0.5",
        "sparse --model mlp --train.epochs 2 --density 0.2 --growth gradient --agent",
        "deltagrad train --train.epochs 2",
    ]
    commands = [f"{run} --cluster.workers 0" for run in runs]
    done = in_a_new_process(commands, tmp_path, code=0, unused=UNUSED_IN_ONE_PROCESS, then=OPTIMIZERS)
    assert not [line for line in done.stderr.splitlines() if not line.startswith("effray: CREST at step")]
    assert len(list(tmp_path.glob("runs/*/*/summary.json"))) == len(runs)
