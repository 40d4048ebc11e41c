"""Settings that nobody should give: each is one line, exit code 2 and no folder, or a setting that is read back."""

import re
import sys

import pytest

from raypkg.cli import main

DEEP = "[" * 5000 + "]" * 5000
LONG = "x" * 5000
SURROGATE = "\udcff"  # what Python makes of the byte 0xff in an argument
QUICK = ("train", "--cluster.workers", "0", "--model", "linear", "--train.epochs", "1")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Return a function that calls a command which must fail in one readable line, and gives back that line."""
    monkeypatch.chdir(tmp_path)

    def refused(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(words)
        out, err = capsys.readouterr()
        assert ended.value.code == 2
        assert err.startswith("effray: ") and err.count("\n") == 1 and err.endswith("\n")
        assert len(err) < 600 and "Traceback" not in out
        assert not list(tmp_path.glob("runs/*"))
        return err

    return refused


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seed", str(2**63), "seed = '9223372036854775808': input should be an integer of at most 64 bits"),
        ("--seed", "1" + "0" * 5000, "seed = '1000.*: unable to parse input string as an integer, exceeded maximum"),
        ("--seed", "true", "seed = 'true': input should be a valid integer"),
        ("--set", "seed=true", "seed = 'true': input should be a valid integer"),
        ("--set", f"model.options.depth={DEEP}", "unknown linear option 'depth'"),
        ("--set", "seed=1\nmodel='mlp'", "seed = "),
        ("--set", "a." * 5000 + "b=1", "no setting has 5001 parts"),
        ("--set", "model.options." + "a." * 5000 + "b=1", "no setting has 5003 parts"),
        ("--set", "seed.deep=1", "seed"),
        ("--set", "=1", "is not of the form KEY=VALUE"),
        ("--set", LONG, "--set 'x+\\.\\.\\.x+' is not of the form KEY=VALUE"),
        ("--set", f"{LONG}=1", "unknown setting 'x+…x+'"),
        ("--set", '"a.b"=1', "unknown setting '\"a'"),
        ("--set", "säd=1", "unknown setting 'säd', did you mean 'seed'"),
        ("--set", "train=false", "train = false: train.epochs would do nothing"),
        ("--set", "hooks=[1]", "hooks.0 = 1: input should be a valid dictionary"),
        ("--set", "hooks=[{}]", "hooks.0.name = {}: field required"),
        ("--set", "hooks={a=1}", "hooks = {'a': 1}: input should be a valid tuple"),
        ("--set", "model.name={a=1}", "model.name = {'a': 1}: input should be a valid string"),
        ("--model", "", "unknown model ''"),
        ("--dataset", "", "unknown dataset ''"),
        ("--model", LONG, "unknown model 'x+…x+'"),
        ("--model", ":", "unknown model or module ':'"),
        ("--model", "../x:net", "unknown model or module '../x:net'"),
        ("--model", "builtins:print", "builtins:print: option 'sep' needs a type and a default"),
        ("--hooks", "builtins:dict", "builtins:dict: its signature cannot be read: no signature found"),
        ("--train.epochs", "1000001", "train.epochs = '1000001': input should be less than or equal to 1000000"),
        ("--train.batch_size", "1" + "0" * 23, "train.batch_size = .*: input should be an integer of at most 64 bits"),
        ("--cluster.cpus_per_worker", "100000", "cluster.cpus_per_worker = '100000': .* less than or equal to 1024"),
        ("--train.schedule", LONG, "unknown train.schedule 'x+…x+'"),
        ("--train.nesterov", "maybe", "train.nesterov = 'maybe': input should be a valid boolean"),
        ("--train.milestones", "1,x", "train.milestones.1 = 'x': input should be a valid number"),
        ("--track.project", "", "track.project = '': string should have at least 1 character"),
        *[("--train.lr", text, "train.lr = ") for text in ("nan", "NaN", "+nan", "inf", "-Infinity", "1e999", "")],
    ],
    ids=lambda text: repr(text)[:40],
)
def test_a_value_that_cannot_be(refused, option, value, message):
    assert re.search(message, refused(*QUICK, option, value))


@pytest.mark.parametrize(
    "option",
    ["--model", "--dataset", "--set", "--config", "--name", "--root", "--resume", "--coreset", "--track.project"],
)
def test_an_argument_that_is_not_text(refused, option):
    assert "is not UTF-8 text" in refused(*QUICK, option, f"a{SURROGATE}=1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed = true", "seed = True: input should be a number, neither true nor false"),
        (b"[train]\nlr = false", "train.lr = False: input should be a number, neither true nor false"),
        (b"[train]\nnesterov = 1", "train.nesterov = 1: input should be true or false, not a number"),
        (b"[train]\nlr = nan", "train.lr = nan: input should be a finite number"),
        (b"seed = 1.5", "seed = 1.5: input should be a valid integer"),
        (b"seed = 2020-01-01", "seed = datetime.date.2020, 1, 1.: input should be a valid integer"),
        (b"seed = " + DEEP.encode(), "'mine.toml' is not valid TOML: its brackets are nested too deeply"),
        (b"[model.options]\nx = " + b"[" * 100 + b"]" * 100, "'mine.toml' has values nested more than 32 deep"),
        (b".".join([b"a"] * 5000) + b" = 1", "'mine.toml' has values nested more than 32 deep"),
        (b"seed = 0x" + b"f" * 5000, "'mine.toml' has an integer of more than 64 bits"),
        (b"seed = 1" + b"0" * 5000, "'mine.toml' is not valid TOML: Exceeds the limit"),
        (b"seed = 1\nseed = 2", "'mine.toml' is not valid TOML: Cannot overwrite a value"),
        (b'"\\"" = 1', "unknown setting '\"'"),
        (b"[dataset]\nname = {a = 1}", "dataset.name = {'a': 1}: input should be a valid string"),
    ],
    ids=lambda text: repr(text)[:40],
)
def test_a_file_of_settings_that_cannot_be(refused, tmp_path, content, message):
    (tmp_path / "mine.toml").write_bytes(content)
    assert re.search(message, refused(*QUICK, "--config", "mine.toml"))


CODE = """
import sys

import torch
from torch import nn

from raypkg import Hook


def exits(shape, num_classes):
    sys.exit(3)


def load(root, *, split):
    raise SystemExit("no data today")


class Exits(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 5:
            quit()
        return self.head(x.flatten(1))


def later(shape, num_classes):
    return Exits()


def frozen(shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes)).requires_grad_(False)


class Leaves(Hook):
    def on_step(self, run):
        sys.exit()


def method(view, budget):
    sys.exit(1)


def untypable(shape, num_classes, *, inner: nn.Module = None):
    return frozen(shape, num_classes)


def unresolved(shape, num_classes, *, inner: "Missing" = None):
    return frozen(shape, num_classes)
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    (tmp_path / "leaving_code.py").write_text(CODE)
    (tmp_path / "leaving_module.py").write_text("import sys\nsys.exit(4)\n")
    (tmp_path / "broken_module.py").write_text("def (:\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield
    sys.modules.pop("leaving_code", None)


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--model", "exits", r"'leaving_code:exits' ended the process by SystemExit\(3\), in leaving_code"),
        ("--model", "later", r"the model, the data or a hook ended the process by SystemExit\(None\)"),
        ("--dataset", "load", r"'leaving_code:load' ended the process by SystemExit\('no data today'\)"),
        (
            "--hooks",
            "Leaves",
            r"the model, the data or a hook ended the process by SystemExit\(None\), in leaving_code",
        ),
        ("--select.rule", "method", r"'leaving_code:method' ended the process by SystemExit\(1\)"),
        ("--model", "frozen", "has no parameter to train: it has none at all, or all of them are frozen"),
        ("--model", "untypable", "leaving_code:untypable: its options inner cannot be settings"),
        ("--model", "unresolved", "leaving_code:unresolved: its signature cannot be read: name 'Missing'"),
    ],
)
def test_code_of_the_user_that_ends_the_process_or_cannot_be_used(refused, own_code, option, name, message):
    line = refused(*QUICK, option, f"leaving_code:{name}", "--set", "select.fraction=0.5")
    assert re.search(message, line) and "interrupted" not in line


@pytest.mark.parametrize("experiment", ["train", "lipt", "crest", "sparse"])
def test_a_frozen_model_is_refused_before_any_work(refused, own_code, capsys, experiment):
    line = refused(experiment, "--cluster.workers", "0", "--model", "leaving_code:frozen")
    assert "has no parameter to train: it has none at all, or all of them are frozen" in line


def test_more_epochs_than_there_can_be_by_multiplication(refused):
    message = refused("sparse", "--cluster.workers", "0", "--density", "0.5", "--multiplier", "1" + "0" * 12)
    assert "multiplier = 1000000000000 of 40 epochs: at most 1,000,000 in all" in message


def test_modules_that_cannot_be_imported(refused, own_code):
    assert "importing 'leaving_module:net' ended the process by SystemExit(4)" in refused(
        *QUICK, "--model", "leaving_module:net"
    )
    assert "'broken_module:net': its module is not valid Python" in refused(*QUICK, "--model", "broken_module:net")


def test_the_largest_seed_and_threads_are_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*QUICK, "--seed", str(2**63 - 1), "--name", "one"])
    assert not ended.value.code
    assert f"seed = {2**63 - 1}" in (tmp_path / "runs/train/one/config.toml").read_text()


TRACKED = (*QUICK, "--track", "wandb")


@pytest.fixture
def wandb_here(tmp_path, monkeypatch):
    """W&B without an account, whose server is a port of this machine where nobody listens."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch.setenv


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WANDB_MODE", "online", "W&B: No API key configured. Use `wandb login`"),
        ("WANDB_API_KEY", "short", "W&B: WANDB_API_KEY invalid: API key must have 40.* WANDB_MODE=offline"),
        ("WANDB_API_KEY", "0123456789" * 4, "W&B: .*connection refused; see `wandb login`, or go without a server by"),
        ("WANDB_INIT_TIMEOUT", "soon", "W&B: WANDB_INIT_TIMEOUT = 'soon': Input should be a valid number"),
    ],
)
def test_an_environment_that_wandb_does_not_take(refused, wandb_here, name, value, message):
    wandb_here(name, value)
    assert re.search(message, refused(*TRACKED))


def test_what_wandb_would_refuse_is_refused_before_there_is_a_folder(refused, wandb_here, monkeypatch):
    def make(*arguments):
        raise AssertionError("a folder is made")

    monkeypatch.setattr("raypkg.cli.execute.create", make)
    assert "Invalid project name" in refused(*TRACKED, "--track.project", "a/b")
