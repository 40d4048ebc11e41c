"""`effray list`, `rm` and `show` of runs in an object store, here a server of this machine's own."""

import pytest

from raypkg.cli import main
from raypkg.core.config import load_settings
from raypkg.experiments.train import TrainSettings
from raypkg.runs.folder import create
from raypkg.runs.storage import Storage

pytestmark = pytest.mark.attack
SUMMARY = {
    "phases": [{"phase": "train", "backward": 7}],
    "test_accuracy": 0.5,
    "samples": 9,
    "coreset": None,
    "seconds": 1.5,
    "elapsed": 2.0,
    "full_training_backward": 7,
}


@pytest.fixture
def effray(capsys, root):
    """Return a function that runs a command on the store, and gives back its exit code and all that it printed."""

    def effray(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--root", root])
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out + captured.err

    return effray


@pytest.fixture
def runs(root):
    """Two runs, of which the first is done."""
    settings = load_settings(TrainSettings, None, {"model": "linear", "train.epochs": 5})
    folders = [create(root, "train", name, settings) for name in ("one", "two")]
    folders[0].finish(SUMMARY)
    folders[1].log({"phase": "train", "main": True, "epoch": 1, "loss": 1.0})
    folders[1].flush()


def test_list(effray, runs):
    code, text = effray("list")
    states = {line.split()[0]: line.split()[1:6] for line in text.splitlines()[2:]}
    assert not code
    assert states == {
        "one": "done digits linear train 50.00%".split(),
        "two": "unfinished digits linear train –".split(),
    }


def test_list_of_an_empty_bucket_is_a_line(effray, root):
    assert effray("list") == (0, f"no runs in {root}\n")


def test_show_of_an_unfinished_run_tells_when_it_was_written_to_and_how_to_resume_it(effray, runs, root):
    code, text = effray("show", "two")
    assert not code
    assert text.startswith("two: not finished, and it is unknown whether a process is working on it")
    assert "1 of 5" in text and "last written " in text
    assert f"resume with: effray train --resume two --root '{root}'" in text


def test_rm_deletes_every_object_of_a_run_and_none_of_another(effray, runs, root):
    before = Storage(root).list("train/two")
    code, text = effray("rm", "one", "--yes")
    assert not code and text.startswith("deleted s3://bucket/runs")
    assert Storage(root).list("train") == ["two"] and Storage(root).list("train/two") == before


def test_a_deletion_that_was_cut_short_leaves_no_run(effray, runs, root, monkeypatch):
    def delete_folder(storage, name):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete_folder", delete_folder)
        effray("rm", "one", "--yes")
    assert not {"config.toml", "summary.json"} & set(Storage(root).list("train/one"))
    code, _ = effray("rm", "one", "--yes")
    assert not code and Storage(root).list("train") == ["two"]
