"""Every command as a user types it: what it prints, what it leaves, and that the same input gives the same run."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import raypkg
from raypkg.experiments import experiment
from raypkg.runs.folder import RunFolder

OTHERS = (
    "crest", "sparse", "predict", "evaluate", "diff", "export", "rm", "tune", "tune crest", "compare", "compare crest",
    "report", "deltagrad", "deltagrad delete", "deltagrad stream", "tutorial",
)  # fmt: skip
COMMANDS = ("", "lipt", "train", "show", "list", "data", "methods")
SHORT = "--model linear --pretrain.models 2 --pretrain.epochs 1 --train.epochs 2"
ONE = f"lipt --name one {SHORT} --select.weighted true --pretrain.joint_epochs 1"
CODE = """
import torch
from torch import nn
from raypkg.data.split import Split
from raypkg.data.coreset import Coreset

def rows(root, *, split, samples: int = 60):
    '''Two columns that tell the classes apart.'''
    y = torch.arange(samples) % 3
    x = torch.randn(samples, 2, generator=torch.Generator().manual_seed(len(split))) + y[:, None]
    return Split.from_tensors(x, y, ['[b]', '[/x]', ':smile:'])

def net(shape, num_classes, *, width: int = 4):
    return nn.Sequential(nn.Linear(shape[0], width), nn.ReLU(), nn.Linear(width, num_classes))

def first(view, budget, *, skip: int = 0):
    return Coreset.uniform(torch.arange(skip, skip + budget))
"""


def content(run, *names):
    """Return what a run's result files hold, byte by byte."""
    return [(Path("runs", run) / name).read_bytes() for name in names]


def results(run):
    """Return all that must not differ between two runs of the same settings."""
    files = ["config.toml", "coreset.parquet", "model.safetensors", "pretrained.safetensors"]
    rows = table(run, "metrics.parquet").sort_by([("phase", "ascending"), ("epoch", "ascending")])
    return content(run, *(name for name in files if Path("runs", run, name).exists())), rows


def summary(run):
    return json.loads(Path("runs", run, "summary.json").read_text())


def settings(run):
    return tomllib.loads(Path("runs", run, "config.toml").read_text())


def table(run, name="coreset.parquet"):
    return pq.read_table(f"runs/{run}/{name}")


def example(help_text):
    """Return the commands of the example that a help text ends with."""
    return [line.strip() for line in help_text.rpartition("Example:\n")[2].split("&&")]


def outside(*words, **environment):
    """Run a command in a process of its own."""
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


@pytest.mark.parametrize("command", (*COMMANDS, *OTHERS))
def test_help_fits_and_ends_with_an_example(effray, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    text = effray(f"{command} --help")
    assert text.startswith(f"Usage: effray {command}".rstrip())
    body, _, last = text.rpartition("Example:\n")
    assert max(map(len, body.splitlines())) <= 80
    assert last.startswith("  effray ") and last.count("\n") == 1
    assert "..." not in body.partition("\n")[2]  # complete sentences
    if command in ("tune", "deltagrad", "compare"):  # groups
        assert effray(command) == text


@pytest.mark.parametrize("command", COMMANDS[1:])  # that of the bare command is among them
def test_the_example_runs_as_printed(call, effray, command):
    for line in example(effray(f"{command} --help")):
        assert line.startswith("effray ")
        assert call(line).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["audit", *(each for each in OTHERS if not each.startswith(("tune", "compare")))])
def test_the_other_examples_run_as_printed(call, effray, command):
    for line in example(effray(f"{command} --help")):
        if line.startswith("effray "):
            told = call(line)
            assert told.code == 0, told.err
        else:  # it pipes into effray
            done = outside("bash", "-c", line)
            assert done.returncode == 0, done.stderr


def test_the_options_are_grouped_by_part(effray):
    text = effray("lipt --help")
    parts = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert parts == ["run", "dataset", "model", "pretrain", "select", "train", "cluster", "track", "Example"]
    for option in ("--config FILE", "--set KEY=VALUE", "--resume NAME", "--pretrain.merge STR"):
        assert option in text
    assert "--pretrain.density FLOAT" in text and "[default: runs]" in text


def test_the_console_script_and_the_module():
    script = Path(sys.executable).with_name("effray")
    for words in ([script], [sys.executable, "-m", "raypkg"]):
        assert outside(*words, "--version").stdout == f"effray, version {raypkg.__version__}\n"
    changes = Path(__file__).parents[2].joinpath("CHANGELOG.md").read_text()
    assert re.findall(r"^## ([\d.]+)", changes, re.MULTILINE)[0] == raypkg.__version__
    done = outside(script, "lipt", "--model", "resnt8")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("effray: unknown model 'resnt8'")


JOBS = Path(__file__).parents[2] / "jobs"


def test_every_job_is_an_experiment_a_sweep_or_a_comparison(capsys, monkeypatch):
    # `python jobs/lipt.py` looks for modules in the folder of jobs before the standard library
    assert not {job.stem for job in JOBS.glob("*.py")} & sys.stdlib_module_names
    monkeypatch.setattr(sys, "argv", ["job.py", "--help"])
    names = set()
    for job in JOBS.glob("*.py"):
        with pytest.raises(SystemExit):
            runpy.run_path(str(job), run_name="__main__")
        names.add(capsys.readouterr().out.split()[2])
    others = {"tune", "compare"}
    assert {"crest", "deltagrad", "lipt", "sparse", "train", *others} <= names <= {*experiment.entries, *others}


def test_lipt_leaves_a_whole_run_folder(effray, rendered_pictures):
    text = effray(f"lipt --name one {SHORT}")
    files = {str(path.relative_to("runs/lipt/one")) for path in Path("runs/lipt/one").rglob("*") if path.is_file()}
    assert files == {
        *("config.toml", "environment.json", "metrics.parquet", "summary.json"),
        *("coreset.parquet", "scores.parquet", "pretrained.safetensors", "model.safetensors"),
        *("model_record.parquet", "pretrained_record.parquet"),
        *(f"phases/{phase}.json" for phase in ("pretrain", "select", "train")),
        *(f"plots/{plot}.png" for plot in ("curves", "composition", "scores", "images")),
    }
    figures = summary("lipt/one")
    assert (figures["samples"], figures["coreset"], table("lipt/one").num_rows) == (1295, 130, 130)
    assert [phase["phase"] for phase in figures["phases"]] == [
        *("pretrain", "pretrain: evaluate", "select", "train", "train: evaluate")
    ]
    backward = {phase["phase"]: phase["backward"] for phase in figures["phases"]}
    assert backward["train"] == 2 * 130 and backward["pretrain"] == 2 * (647 + 32)  # SNIP: a batch
    assert f"test accuracy {figures['test_accuracy']:.2%}" in text and "trained on 130 of 1,295 samples" in text
    assert text.splitlines()[0] == "lipt one: linear on digits, preset published"
    assert text.splitlines()[-1] == str(Path("runs/lipt/one").absolute())


def test_settings_come_from_a_file_then_from_options(effray):
    Path("mine.toml").write_text(
        'model = "linear"\nseed = 3\n[train]\nepochs = 7\nlr = 0.3\n[pretrain]\nmethod = "initial"\n'
    )
    effray("lipt --config mine.toml --name one --train.epochs 1 --set train.batch_size=50 --set select.options.eps=0.5")
    stored = settings("lipt/one")
    assert stored["model"]["name"] == "linear" and stored["seed"] == 3 and stored["pretrain"]["method"] == "initial"
    assert (stored["train"]["epochs"], stored["train"]["lr"], stored["train"]["batch_size"]) == (1, 0.3, 50)
    assert stored["select"]["options"] == {"eps": 0.5}
    recipe = Path(raypkg.__file__).parent / "models/airbench.toml"
    effray(f"train --config {recipe} --name fast --set model.options.width=8 --train.epochs 1")
    stored = settings("train/fast")
    assert stored["train"]["momentum"] == 0.85 and stored["model"]["options"] == {"width": 8}


def test_a_run_is_named_by_itself_and_found_by_name_or_path(effray):
    effray("train --model linear --train.epochs 1 --root elsewhere")
    (run,) = Path("elsewhere/train").iterdir()
    assert re.fullmatch(r"digits-linear-\d{4}-\d{6}", run.name)
    assert effray(f"show {run.name} --root elsewhere") == effray(f"show {run}") != ""


def test_plain_training_is_on_all_samples_and_a_finished_run_is_only_shown(effray):
    text = effray("train --name one --model linear --train.epochs 1")
    assert "trained on all 1,295 samples" in text
    assert summary("train/one")["coreset"] is None and not Path("runs/train/one/coreset.parquet").exists()
    assert [phase["phase"] for phase in summary("train/one")["phases"]] == ["train", "train: evaluate"]
    before = results("train/one")
    assert effray("train --resume one") == effray("show one")
    assert results("train/one") == before


@pytest.mark.parametrize(
    ("options", "backward", "forward"),
    [
        ("--select.rule random --select.every_epochs 1", 3 * 130, 0),
        ("--select.rule el2n --select.warm_epochs 1", 1295 + 2 * 130, 1295),
        ("--select.rule gradmatch --select.every_epochs 2 --select.weighted true", 3 * 130, 2 * 1295),
        ("--select.rule gradmatch --select.every_epochs 2 --select.target valid", 3 * 130, 2 * (1295 + 142)),
    ],
)
def test_selection_during_training(effray, options, backward, forward):
    effray(f"train --name one --model linear --train.epochs 3 --select.fraction 0.1 {options}")
    phases = {phase["phase"]: phase for phase in summary("train/one")["phases"]}
    assert phases["train"]["backward"] == backward
    assert phases["train: select"]["forward"] == forward
    assert summary("train/one")["coreset"] == table("train/one").num_rows == 130


CREST = "crest --model mlp --train.epochs 20 --budget 0.2 --train.batch_size 64"


def test_crest_spends_its_budget_and_keeps_its_books(effray):
    text = effray(f"{CREST} --name one --crest.subset 0.1 --crest.tau 0.1 --crest.h 3")
    phases, steps = {phase["phase"]: phase for phase in summary("crest/one")["phases"]}, 4 * 21
    assert phases["train"]["backward"] == steps * 64
    assert f"chose {summary('crest/one')['pools']} pools of mini-batch coresets" in text
    assert phases["train: check"]["forward"] == 130 * len(table("crest/one", "crest.parquet"))
    trained = table("crest/one", "steps.parquet")
    assert sum(trained["steps"].to_pylist()) == steps * 64
    assert table("crest/one").num_rows == sum(count > 0 for count in trained["steps"].to_pylist())
    assert {"regions.png", "curves.png"} <= {*os.listdir("runs/crest/one/plots")}


def test_every_selection_spends_a_budget_of_steps_to_the_step(effray):
    command = "crest --model linear --train.epochs 8 --budget 0.1 --train.batch_size 64 --train.warmup 0.2"
    rates = {}
    for selection in ("crest", "random", "cut"):
        planned = effray(f"{command} --selection {selection} --dry-run").splitlines()
        (row,) = (line.split() for line in planned if line.startswith("# train"))
        assert row[3] == "0.8" and row[6] == "17"  # of 21 steps, 16.8
        effray(f"{command} --selection {selection} --name {selection}")
        phases = {phase["phase"]: phase for phase in summary(f"crest/{selection}")["phases"]}
        # Batches of all samples are as even as possible: 14 of 62, then 61.
        expected = 17 * 64 if selection == "crest" else 14 * 62 + 3 * 61
        assert phases["train"]["backward"] == int(row[7].replace(",", "")) == expected
        (metrics,) = table(f"crest/{selection}", "metrics.parquet").to_pylist()
        rates[selection] = metrics["lr"]
    assert rates["crest"] == rates["random"] == pytest.approx(0.1 * 0.1**2)  # both drops are behind
    assert rates["cut"] == pytest.approx(0.1 * (16 / 21 / 8 + 1e-3) / 0.2)


def test_a_given_coreset_is_only_the_first(effray):
    effray("train --name one --model linear --train.epochs 1 --select.fraction 0.1")
    Path("runs/train/one/coreset.parquet").rename("mine.parquet")
    effray(
        "train --name two --model linear --train.epochs 2 --coreset mine.parquet --select.fraction 0.2"
        " --select.every_epochs 1"
    )
    before = content("train/two", "coreset.parquet")
    assert table("train/two").num_rows == 259
    Path("mine.parquet").unlink()
    Path("runs/train/two/summary.json").unlink()
    effray("train --resume two")
    assert content("train/two", "coreset.parquet") == before


@pytest.mark.parametrize("rule", ["craig", "forgetting"])
def test_select_with_the_model_of_another_run(effray, after, rule):
    after("train --name one --model mlp --train.epochs 2")
    text = effray(f"select --name two --model-from one --rule {rule} --fraction 0.1")
    assert text.splitlines()[0] == f"select two: {rule} on digits"
    assert "selected 130 of 1,295 samples (10.0%)" in text
    selected = table("select/two")
    assert {"index", "weight", "class"} <= set(selected.column_names)
    facts = json.loads(selected.schema.metadata[b"effray"])
    assert (facts["model_from"], facts["rule"], facts["samples"]) == ("one", rule, 1437)
    effray("train --name three --model mlp --train.epochs 1 --coreset runs/select/two/coreset.parquet")
    assert summary("train/three")["coreset"] == 130


def test_select_averages_over_the_models_of_several_runs(effray, refusal):
    for seed in (0, 1):
        effray(f"train --name run{seed} --seed {seed} --model mlp --train.epochs 1 --dataset.validation 0")
    several = "select --name two --model-from run0,run1 --fraction 0.1 --dataset.validation 0"
    assert "model_from = run0,run1: craig selects by one model" in refusal(f"{several} --rule craig")
    effray(f"{several} --rule grand --set options.gradients=full")
    assert [(bill["forward"], bill["backward"]) for bill in summary("select/two")["phases"]] == [(4 * 1437, 2 * 1437)]


LIPT = f"lipt {SHORT} --train.epochs 3 --train.evaluate_every_epochs 1 --pretrain.epochs 2 --model mlp"


@pytest.mark.parametrize("rows", [1, 6])  # 2 models of 2 epochs, then 3 epochs
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(effray, refusal, after, monkeypatch, rows):
    def log(folder, row):
        original(folder, row)
        if len(folder.rows) == rows:
            raise KeyboardInterrupt

    original = RunFolder.log
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", log)
        message = refusal(f"{LIPT} --name one", leaves=1)
    assert message == "effray: interrupted; resume with: effray lipt --resume one\n"
    assert "one: not finished" in effray("show one")
    effray("lipt --resume one")
    after(f"{LIPT} --name two")
    assert results("lipt/one") == results("lipt/two")
    work = [[(p["phase"], p["backward"]) for p in summary(f"lipt/{run}")["phases"]] for run in ("one", "two")]
    assert work[0] == work[1]


def test_a_coreset_with_weights_repeats_the_main_training_and_is_compared(effray, after):
    after(ONE)
    weights = table("lipt/one")["weight"].to_numpy()
    assert len(set(weights)) > 10 and weights.min() >= 0
    effray("train --name three --model linear --train.epochs 2 --coreset runs/lipt/one/coreset.parquet")
    assert content("lipt/one", "model.safetensors") == content("train/three", "model.safetensors")
    assert summary("train/three")["coreset"] == 130
    shutil.copytree("runs/lipt/one", "runs/lipt/two")
    assert effray("show one --against two").splitlines()[-1] == (
        "one against two: rank correlation of the scores 1.000; 130 of 130 picks in common (100.0%; by chance 10.0%)"
    )


def test_methods_lists_everything(effray, call):
    text = effray("methods")
    assert len(text.splitlines()) <= 24  # a screen
    for name in ("lipt", "train", "gradmatch", "glister", "el2n", "grand", "random", "resnet20", "wrn-16-8", "parquet"):
        assert re.search(rf"\b{name}\b", text)
    for name in ("coreset", "gradmatch"):
        text = effray(f"methods {name}")
        assert re.search(r"^│ gradmatch +│", text, re.MULTILINE) and "arXiv:2103.00123" in text
        assert ("glister" in text) == (name == "coreset")
    assert "did you mean 'gradmatch'?" in call("effray methods gradmach").err


def test_data_describes(effray):
    text = effray("data digits")
    for fact in ("1,437 train, 360 test", "1 × 8 × 8", "10: 0, 1, 2, 3", "139 to 146", "crop", "0.305, 0.376"):
        assert fact in text


def test_the_user_s_own_code(effray, tmp_path, monkeypatch):
    (tmp_path / "own_code.py").write_text(CODE)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    effray(
        "lipt --name one --dataset own_code:rows --set dataset.options.samples=90 --model own_code:net"
        " --set model.options.width=5 --select.rule own_code:first --set select.options.skip=1"
        " --pretrain.models 2 --pretrain.epochs 1 --pretrain.randaugment false --train.epochs 1"
    )
    assert table("lipt/one").num_rows == 8 and summary("lipt/one")["samples"] == 81
    assert "[b], [/x], :smile:" in effray("data own_code:rows")  # printed as they are, not as markup
    assert "30 to 30" in effray("data own_code:rows --set samples=90")


@pytest.mark.slow
@pytest.mark.parametrize(("options", "code"), [("", 0), ("--dataset folder:nowhere", 2)])
def test_wandb_offline(tmp_path, monkeypatch, options, code):
    monkeypatch.chdir(tmp_path)
    script = shutil.which("effray") or ""
    words = shlex.split(f"train --name one --model linear --train.epochs 1 --cluster.workers 0 --track wandb {options}")
    done = outside(script, *words, WANDB_MODE="offline", OMP_NUM_THREADS="1")
    assert done.returncode == code
    if code:
        assert done.stderr.count("\n") == 1 and not list(Path("runs").glob("*/*"))
    else:
        (run,) = Path("runs/train/one/wandb").glob("offline-run-*")
        assert f"wandb sync {run.absolute()}" in done.stdout
