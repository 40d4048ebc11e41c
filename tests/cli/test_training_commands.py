"""Training with first weights of another run, the best epoch, and settings of the step, as a user types it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raypkg.runs.folder import RunFolder

FIRST = "train --name first --model mlp --train.epochs 2"
STILL = "--model mlp --train.epochs 1 --train.lr 1e-12 --train.evaluate_every_epochs 0"  # the weights hardly move


def left(run, file="model.safetensors"):
    return load_file(f"runs/{run}/{file}")


def findings(run):
    return json.loads(Path(f"runs/{run}/summary.json").read_text())["findings"]


def near(one, other, names=None):
    return all(torch.allclose(one[name].to(other[name]), other[name], atol=1e-6) for name in names or one)


@pytest.mark.parametrize(
    "command",
    [
        f"train {STILL}",
        f"train {STILL} --train.from runs/train/first/model.safetensors",
        f"crest {STILL} --selection random --budget 1 --train.warmup 0",
        f"sparse {STILL} --density false",
        f"lipt {STILL} --pretrain.method initial --select.fraction 0.5",
        "deltagrad train --model mlp --train.epochs 1 --train.lr 1e-12",
    ],
)
def test_every_experiment_may_begin_with_the_weights_of_a_run_or_file(effray, after, command):
    after(FIRST)
    effray(f"{command}{'' if '--train.from' in command else ' --train.from first'} --name second")
    kind, _ = command.split(maxsplit=1)
    assert near(left(f"{kind}/second"), left("train/first"))
    assert "first weights: 6 tensors from" in findings(f"{kind}/second")[0]


def test_first_masks_are_drawn_by_them(effray, after):
    after(FIRST)
    thin = f"sparse {STILL} --density 0.5 --growth false --sparse_init snip"
    effray(f"{thin} --name second --train.from first")
    effray(f"{thin} --name drawn")
    weights = left("sparse/second")
    for name, weight in weights.items():
        exists = weight != 0
        assert torch.allclose(weight[exists], left("train/first")[name][exists], atol=1e-6), name
    assert not torch.equal(weights["head.weight"] != 0, left("sparse/drawn")["head.weight"] != 0)


def test_the_weights_are_the_runs_own_from_its_start(call, effray, after, monkeypatch):
    after(FIRST)
    line = "train --model mlp --train.epochs 2 --train.from first --train.keep best --train.evaluate_every_epochs 1"
    effray(f"{line} --name straight")

    def finish_phase(folder, name, record):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish_phase", finish_phase)
        assert call(f"{line} --name stopped").code == 2
    shutil.rmtree("runs/train/first")
    shutil.rmtree("runs/train/stopped/checkpoints/train")  # as if it had been stopped before its first epoch ended
    effray("train --resume stopped")
    assert near(left("train/stopped"), left("train/straight"))
    assert findings("train/stopped") == findings("train/straight")
    assert not Path("runs/train/straight/checkpoints").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("frist", "unknown run in"),
        ("nowhere/some.safetensors", "train.from: there is no file nowhere/some.safetensors"),
        ("damaged.safetensors", "damaged.safetensors is corrupt"),
        ("other.safetensors", "no tensor fits this model: there it has encoder.weight, here features.1.weight,"),
        ("changed", "model.safetensors has been changed or cut short: it is not the one that run 'changed' left"),
        ("going", "run 'going' is not finished: it has no model yet"),
        ("chosen", "run 'chosen' has no model.safetensors: it trained no model"),
    ],
)
def test_what_cannot_be_begun_with_is_one_line(effray, refusal, after, source, message):
    after(FIRST)
    Path("damaged.safetensors").write_bytes(b"none")
    save_file({"encoder.weight": torch.ones(2)}, "other.safetensors")
    if source == "chosen":
        effray("select --model-from first --rule random --fraction 0.5 --name chosen")
    if source == "changed":
        shutil.copytree("runs/train/first", "runs/train/changed")
        Path("runs/train/changed/model.safetensors").write_bytes(b"changed")
    if source == "going":
        shutil.copytree("runs/train/first", "runs/train/going")
        Path("runs/train/going/summary.json").unlink()
    before = sorted(Path("runs").rglob("*"))
    for dry in ("--dry-run", ""):
        assert message in refusal(f"train --model mlp --train.epochs 1 --train.from {source} {dry}")
    assert sorted(Path("runs").rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "lipt --train.init merged --train.from x",
            "train.init = merged begins with the pre-trained model: train.from",
        ),
        ("deltagrad train --train.decay matrices", "train.decay = matrices: DeltaGrad is derived for SGD"),
        ("crest --model mlp --train.label_smoothing 0.1", "train.label_smoothing = 0.1: CREST chooses by gradients of"),
        ("train --train.keep best --dataset.validation 0", "train.keep = best is by held-out samples"),
        ("train --train.sync_bn true --train.micro_batch 8", "train.sync_bn = true excludes train.micro_batch"),
        ("crest --train.keep best --train.epochs 20", "train.evaluate_every_epochs = 5 of 2 epochs evaluates none"),
    ],
)
def test_what_does_not_go_together_is_one_line(refusal, line, message):
    assert message in refusal(line)


@pytest.mark.parametrize(
    "command",
    [
        "train --model mlp --train.epochs 2 --train.label_smoothing 0.1",
        "crest --model mlp --train.epochs 2 --budget 0.5 --train.optimizer adamw --train.lr 1e-3",
        "crest --model mlp --train.epochs 2 --budget 0.5 --selection random --train.label_smoothing 0.1",
        "sparse --model mlp --train.epochs 2 --density 0.2 --growth gradient --agent --train.label_smoothing 0.1",
        "lipt --model mlp --train.epochs 2 --pretrain.models 2 --pretrain.epochs 1 --pretrain.clip 1"
        " --pretrain.micro_batch 40 --pretrain.schedule linear --pretrain.decay matrices",
    ],
)
def test_they_all_go_together(effray, command):
    told = effray(
        f"{command} --name one --train.decay matrices --train.schedule linear --train.warmup 0.1 --train.clip 1"
        " --train.micro_batch 40 --train.keep best --train.evaluate_every_epochs 1"
    )
    assert "the model is that of epoch" in told
    (run,) = Path("runs").glob("*/one")
    assert json.loads((run / "summary.json").read_text())["kept_epoch"] in (1, 2)


def test_the_plan_has_the_memory_of_what_goes_through_at_once(effray):
    def activations(options):
        return effray(f"train --model mlp {options} --dry-run").partition("activations of a batch ")[2].splitlines()[0]

    assert activations("--train.micro_batch 16") == activations("--train.batch_size 16")
    assert activations("--train.micro_batch 16") != activations("")


def test_weights_that_saw_what_is_held_out_here_are_refused(effray, refusal):
    effray("train --name first --model mlp --train.epochs 1")
    line = refusal("train --model mlp --train.epochs 1 --seed 1 --train.from first")
    assert "train.from = first: it trained on samples that are held out here: its seed is 0" in line
    effray("train --model mlp --train.epochs 1 --seed 1 --train.from first --dataset.validation 0")
