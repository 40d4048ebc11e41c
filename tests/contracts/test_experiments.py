"""Every experiment runs with its defaults, reruns from its stored settings, and resumes as if it had never stopped."""

import json
import shlex
from contextlib import chdir
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raypkg.cli import main
from raypkg.experiments import experiment
from raypkg.runs.folder import RunFolder
from tiny_language import instructions, tiny_language

TINY = {  # options that keep a run short; an experiment that is not here has to run with nothing but this
    "audit": "trained",
    "crest": "--model mlp --train.epochs 4 --budget 0.5",
    "deltagrad": "--train.epochs 3",
    "embed": "--model mlp",
    "instruct": "--dataset instructions:pool --select.target instructions:few --model transformers-lm:tiny"
    " --set model.options.rank=2 --set model.options.alpha=4 --set dataset.options.length=64 --rows.width 64"
    " --warmup.epochs 2 --warmup.fraction 0.2 --select.fraction 0.2 --train.epochs 1 --train.batch_size 8",
    "lipt": "--model linear --train.epochs 2 --pretrain.models 2 --pretrain.epochs 1",
    "select": "--model-from trained --rule grand",
    "sparse": "--model mlp --train.epochs 2 --density 0.2 --agent",
    "train": "--model linear --train.epochs 2 --train.keep best --train.evaluate_every_epochs 1 --train.micro_batch 50"
    " --train.clip 1 --train.decay matrices",
}
GROUPS = {"deltagrad": "deltagrad train"}


def effray(line, code=0):
    """Run a command in this process; it must end as is said."""
    with pytest.raises(SystemExit) as ended:
        main([*shlex.split(line), "--cluster.workers", "0"])
    assert (ended.value.code or 0) == code


@pytest.fixture(scope="module", params=list(experiment.entries))
def command(request, tmp_path_factory, blank_pictures):
    """Return an experiment with its command and options, in a working folder that holds its finished run ``one``."""
    name = request.param
    call = GROUPS.get(name, name)
    options = TINY.get(name, "--model linear --train.epochs 2")
    with chdir(tmp_path_factory.mktemp(name)):
        if name in ("audit", "select"):
            effray("train --name trained --model linear --train.epochs 1")
        if name == "instruct":
            tiny_language("tiny")
            for folder, n in (("pool", 60), ("few", 6)):
                for split in ("train", "test"):
                    instructions(folder, n, name=f"{split}.jsonl")
        effray(f"{call} --name one {options}")
        yield name, call, options


def left(name, run):
    """Return all that a run computed: its settings, tensors, tables, and figures without times."""
    folder = Path("runs", name, run)
    files = [*folder.glob("*.toml"), *folder.glob("*.safetensors")]
    summary = json.loads((folder / "summary.json").read_text())
    figures = {key: value for key, value in summary.items() if key in ("test_accuracy", "coreset", "samples")}
    bills = [(cost["phase"], cost["forward"], cost["backward"]) for cost in summary["phases"]]
    tables = {file.name: str(pq.read_table(file).to_pylist()) for file in folder.glob("*.parquet")}
    return {file.name: file.read_bytes() for file in files}, tables, figures, bills


def test_it_reruns_from_its_stored_settings(command):
    name, call, _ = command
    effray(f"{call} --name again --config runs/{name}/one/config.toml")
    assert left(name, "one") == left(name, "again")


def test_resumed_equals_never_stopped(command, monkeypatch):
    name, call, options = command

    def finish(folder, summary):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", finish)
        effray(f"{call} --name two {options}", code=2)
    effray(f"{call} --resume two")
    assert left(name, "one") == left(name, "two")
