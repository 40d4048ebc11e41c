"""A stored run of somebody else brings no code along, unless the user trusts it."""

import grp
import os
import pwd
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from raypkg.cli import main
from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment
from raypkg.experiments import resolve
from raypkg.methods.deltagrad.journal import Journal
from raypkg.runs.folder import RunFolder, create
from raypkg.runs.storage import Storage

CODE = """
from pathlib import Path

Path("imported").touch()

def net(shape, num_classes):
    raise AssertionError
"""


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Return a function that stores a run with a model, and what loads its settings."""
    monkeypatch.delenv(resolve.TRUST, raising=False)

    def stored(name):
        return create(str(tmp_path / "runs"), "train", "one", Experiment(model={"name": name}))

    return stored


@pytest.fixture
def of_somebody_else(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)


def open_settings(folder, says):
    """Open a run's settings; None, or what a refusal says."""
    with pytest.raises(UserError, match=says) if says else nullcontext():
        resolve.stored_settings(folder)


MODEL = '[model]\nname = "{}"\n'
CODE_NAMES = ["my_code:net", "package.module:Net", "größe:netz", "my_code:"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        *((MODEL.format(name), name) for name in CODE_NAMES),
        *((MODEL.format(name), None) for name in ("resnet8", "torchvision:resnet18", "a b:c", "8:00")),
        ('[[hooks]]\nname = "ema"\n[hooks.options]\ninner = ["my_code:ema"]\n', "my_code:ema"),
        ('[[hooks]]\nname = "torchvision:x"\n', "torchvision:x"),  # a name of another registry
        ('[select.target]\nname = "my_code:few"\n', "my_code:few"),
        ('[select.target]\nname = "table:few"\n', None),
    ],
)
def test_code_of_somebody_else_is_found_wherever_it_is_named_and_refused_unless_trusted(
    stored, monkeypatch, text, code
):
    folder = stored("resnet8")
    folder.storage.write("config.toml", text.encode())
    open_settings(folder, None)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    open_settings(folder, code and f"config.toml is not your own alone and names code, '{code}': --trust lets it run")
    monkeypatch.setenv(resolve.TRUST, "1")
    open_settings(folder, None)


def opened(path, mode=0o666):
    """Let others write to a file or folder."""
    path.chmod(path.stat().st_mode | mode)


def linked(file, to):
    """Put a link in the place of a file or folder."""
    to.parent.mkdir(exist_ok=True)
    file.rename(to)
    file.symlink_to(to)


def elsewhere(file, shared, to_open="."):
    """Link a file or folder to a place that others may write to."""
    linked(file, shared / file.name)
    opened(shared / to_open, 0o002)


SETTINGS = "config.toml is not your own alone and names code, 'my_code:net'"
CHANGES = {  # of a run's folder, its place and the code in the working folder; what is said, if anything
    "nothing": (lambda run: None, None),
    "its settings": (lambda run: opened(run / "config.toml", 0o002), SETTINGS),
    "its settings, for a group": (lambda run: opened(run / "config.toml", 0o020), SETTINGS),
    "its folder": (lambda run: opened(run), SETTINGS),
    "the folder of all runs": (lambda run: opened(run.parents[1], 0o002), SETTINGS),
    "a link's target": (lambda run: elsewhere(run / "config.toml", run.parents[2] / "shared", "config.toml"), SETTINGS),
    "a linked folder": (lambda run: elsewhere(run.parent, run.parents[2] / "shared"), SETTINGS),
    "a sticky folder": (lambda run: opened(run.parents[1], 0o1777), None),
    "the working folder": (lambda run: opened(Path.cwd(), 0o002), "my_code.py is not your own alone"),
    "a module": (lambda run: opened(Path("my_code.py"), 0o002), "my_code.py is not your own alone"),
    "an imported module": (lambda run: opened(Path("helper.py"), 0o002), "helper.py is not your own alone"),
    "a package": (lambda run: opened(Path("inner/__init__.py"), 0o002), "inner/__init__.py is not your own alone"),
    "a relative module": (lambda run: opened(Path("inner/deep.py"), 0o002), "inner/deep.py is not your own alone"),
    "without a package": (lambda run: opened(Path("plain/part.py"), 0o002), "plain/part.py is not your own alone"),
    "compiled modules": (lambda run: opened(Path("__pycache__"), 0o002), r"__pycache__/my_code\..*pyc is not your own"),
    "a module without its import": (lambda run: opened(Path("other.py"), 0o002), None),
    "invalid Python": (lambda run: Path("helper.py").write_text("(" * 3), None),
}


@pytest.mark.parametrize("what", CHANGES)
def test_code_runs_only_if_nobody_else_can_write_what_leads_to_it(stored, monkeypatch, tmp_path, what):
    change, says = CHANGES[what]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for folder in ("inner", "plain", "__pycache__"):
        Path(folder).mkdir()
    sources = {
        "my_code.py": "import torch\nimport helper\nimport wandb",
        "helper.py": "def f():\n    from inner.deeper import *\n    import plain.part",
        "inner/__init__.py": "",
        "inner/deeper.py": "from . import deep",
        "inner/deep.py": "from .. import nothing",
        "plain/part.py": "from .... import nothing",
        "other.py": "",
    }
    for name, text in sources.items():
        Path(name).write_text(text)
    monkeypatch.setattr(grp, "getgrgid", lambda number: SimpleNamespace(gr_name="staff", gr_mem=[]))
    folder = stored("my_code:net")
    change(folder.storage.local)
    open_settings(folder, says)


@pytest.mark.parametrize(("members", "says"), [([], None), (["me"], None), (["me", "you"], SETTINGS)])
def test_a_group_of_the_owner_alone_is_nobody_else(stored, monkeypatch, members, says):
    monkeypatch.setattr(pwd, "getpwuid", lambda number: SimpleNamespace(pw_name="me"))
    monkeypatch.setattr(grp, "getgrgid", lambda number: SimpleNamespace(gr_name="me", gr_mem=members))
    folder = stored("my_code:net")
    opened(folder.storage.local, 0o020)
    open_settings(folder, says)


def test_a_space_runs_only_with_modules_of_ones_own(stored, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    storage = stored("resnet8").storage
    storage.write("space.py", b"def space():\n    import helper")
    Path("helper.py").touch()
    resolve.check_file_of_code(storage, "space.py")
    opened(Path("helper.py"), 0o002)
    with pytest.raises(UserError, match=r"helper.py is not your own alone and would be run as code: --trust lets it"):
        resolve.check_file_of_code(storage, "space.py")


def test_a_link_of_somebody_else_is_not_ones_own(stored, monkeypatch, tmp_path):
    folder = stored("my_code:net")
    linked(folder.storage.local / "config.toml", tmp_path / "mine.toml")
    lstat = Path.lstat

    def of_the_link(path):
        status = lstat(path)
        return os.stat_result((*status[:4], os.getuid() + 1, *status[5:])) if os.path.islink(path) else status

    monkeypatch.setattr(Path, "lstat", of_the_link)
    open_settings(folder, SETTINGS)


def test_an_object_store_has_no_owners(stored, monkeypatch):
    folder = stored("my_code:net")
    monkeypatch.setattr(Storage, "local", None)
    open_settings(RunFolder(folder.storage), "is not your own alone and names code")
    with pytest.raises(UserError, match=r"space.py is not your own alone and would be run as code: --trust lets it"):
        resolve.check_file_of_code(folder.storage, "space.py")


COMMANDS = [
    "train --resume one",
    "export one",
    "select --model-from one --rule grand",
    "deltagrad delete one --ids 1",
    "deltagrad log one",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_imports_it(stored, of_somebody_else, monkeypatch, capsys, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "foreign_code.py").write_text(CODE)
    folder = stored("foreign_code:net")
    folder.storage.write("model.safetensors", b"")
    digest = folder.storage.digest("model.safetensors")
    Journal(folder.storage).append({"settings": "", "rows": "", "samples": 1, "model": digest})
    costs = dict.fromkeys(["seconds", "elapsed", "full_training_backward"], 0)
    folder.finish({"phases": [], "samples": 1, "coreset": None, **costs})
    local = [] if command in ("export one", "deltagrad log one") else ["--cluster.workers", "0"]
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), *local])
    assert ended.value.code == 2
    assert "is not your own alone and names code, 'foreign_code:net'" in capsys.readouterr().err
    assert not Path("imported").exists()


def test_trusting_is_an_option(stored, of_somebody_else, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(resolve.TRUST, "")  # so that it is put back afterwards
    (tmp_path / "trusted_code.py").write_text(CODE)
    stored("trusted_code:net")
    with pytest.raises(SystemExit):
        main(["train", "--resume", "one", "--trust", "--cluster.workers", "0"])
    assert "trusted_code.py, line 7, in net: AssertionError" in capsys.readouterr().err and Path("imported").exists()


def test_a_sweep_of_somebody_else_is_not_resumed(of_somebody_else, monkeypatch, capsys, tmp_path):
    from raypkg.studies.study import Order, Trial, create_study

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(resolve.TRUST, raising=False)
    order = Order(experiment="train", metric="accuracy", mode="max", samples=1)
    create_study("runs", "one", order, Experiment(), CODE, [Trial(settings={})])
    with pytest.raises(SystemExit):
        main(["tune", "train", "--resume", "one"])
    assert "space.py is not your own alone and would be run as code" in capsys.readouterr().err
    assert not Path("imported").exists()
