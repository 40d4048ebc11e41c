"""`effray list`, `effray rm`, and `effray show` of what is not done: what they print, and what they leave alone."""

import csv
import fcntl
import json
import os
import re
import shutil
import sys
from base64 import b64encode
from pathlib import Path

import click
import pytest

from raypkg.core.config import load_settings
from raypkg.experiments.train import TrainSettings
from raypkg.methods.crest.settings import CrestSettings
from raypkg.methods.deltagrad.settings import DeltaGradSettings
from raypkg.methods.lipt.settings import LiptSettings
from raypkg.runs.folder import RunFolder, create
from raypkg.runs.storage import Storage
from raypkg.studies.show import conclude
from raypkg.studies.study import Order, Trial, create_study

SUMMARY = {
    "phases": [
        {"phase": "train", "backward": 1000, "seconds": 1.5},
        {"phase": "train: select", "backward": 234, "seconds": 0},
    ],
    "test_accuracy": 0.875,
    "test_loss": 0.5,
    "samples": 100,
    "coreset": None,
    "seconds": 1.5,
    "elapsed": 2.0,
    "full_training_backward": 1000,
}
ORDER = Order(experiment="crest", metric="accuracy", mode="max", samples=3)


def begun(kind="train", name="one", settings=None, *, done=False, root="runs", time=None, **values):
    """Make a run's folder, without any training."""
    settings = load_settings(settings or TrainSettings, None, {"model": "linear", **values})
    folder = create(root, kind, name, settings)
    if done:
        folder.finish(SUMMARY)
    if time is not None:
        for file in Path(root, kind, name).iterdir():
            os.utime(file, (time, time))
    return folder


def row(phase, epoch, model=None, **figures):
    return {"phase": phase, "main": phase == "train", "model": model, "epoch": epoch, "loss": 1 / epoch, **figures}


def listed(text):
    """Return the lines of a list, each as its words."""
    return [line.split() for line in text.splitlines()[2:]]


# show


@pytest.fixture
def stopped(call):
    """A run of LiPT that was stopped in its main training."""
    settings = {"pretrain.models": 3, "pretrain.epochs": 2, "train.epochs": 40}
    folder = begun("lipt", "one", LiptSettings, **settings)
    for model in range(3):
        for epoch in (1, 2):
            folder.log(row("pretrain", epoch, model))
    for phase in ("pretrain", "select"):
        folder.finish_phase(phase, {"costs": [], "elapsed": 1.0})
    for epoch in range(1, 13):
        folder.log(row("train", epoch, accuracy=0.8))
    folder.flush()
    return folder


def phases(text):
    return {words[0]: words[1:] for words in listed(text) if words[0] in ("pretrain", "select", "train")}


def test_show_of_a_stopped_run_tells_how_far_each_phase_is_and_how_to_resume_it(effray, stopped):
    text = effray("show one")
    assert text.startswith("one: not finished, no process is working on it\n")
    assert phases(text) == {
        "pretrain": "done 3 of 3 6 of 6 0.500 –".split(),
        "select": "done – – – –".split(),
        "train": "stopped – 12 of 40 0.083 80.0%".split(),
    }
    assert "\nresume with: effray lipt --resume one\n" in text
    assert re.search(r"last written \d+ s ago: (metrics.parquet|phases/select.json)", text)
    folder = begun("lipt", "two", LiptSettings, **{"pretrain.models": 3, "pretrain.epochs": 2})
    for model, epoch in ((0, 1), (1, 1), (0, 2)):
        folder.log(row("pretrain", epoch, model))
    folder.flush()
    found = phases(effray("show two"))
    assert found["pretrain"] == "stopped 1 of 3 3 of 6 1.000 –".split()  # models whose last epoch has come
    assert found["select"][:2] == found["train"][:2] == ["to", "come"]


def test_show_of_a_run_that_is_going_does_not_resume_it(effray, stopped):
    with stopped.storage.locked("it"):
        text = effray("show one")
    assert text.startswith("one: not finished, a process is working on it\n")
    assert phases(text)["train"][0] == "going" and "resume" not in text
    with stopped.storage.locked("it"):
        assert listed(effray("list"))[0][:2] == ["one", "going"]
    assert listed(effray("list"))[0][:2] == ["one", "stopped"]
    folder = os.open(stopped.storage.local, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_SH)  # as another `show` holds it briefly
    assert "no process" in effray("show one")
    os.close(folder)


def test_the_command_that_resumes_is_that_of_the_experiment_and_names_the_root(effray, tmp_path):
    begun("deltagrad", "two", DeltaGradSettings)
    begun(root="my runs")
    begun(root="elsewhere")
    Path("bomb.py").write_text("raise SystemExit('imported')")
    begun("train", "three", **{"model": "bomb:net", "dataset": "bomb:rows"})  # whose code is not imported
    for shown, command in (
        ("three", "train --resume three"),
        ("two", "deltagrad train --resume two"),
        ("one --root 'my runs'", "train --resume one --root 'my runs'"),
        ("elsewhere/train/one", f"train --resume one --root {tmp_path}/elsewhere"),
    ):
        assert f"resume with: effray {command}\n" in effray(f"show {shown}")


def test_show_of_a_stopped_run_with_damaged_settings_says_why_nothing_resumes_it(effray, stopped):
    Path("runs/lipt/one/config.toml").write_text("")
    text = effray("show one")
    assert "resume with: nothing: " in text and "config.toml' is missing or empty" in text
    assert phases(text)["train"] == "stopped – 12 0.083 80.0%".split()


def test_show_of_a_stopped_sweep_or_trial_resumes_the_sweep(effray, sweep, tmp_path):
    resume = "resume with: effray tune crest --resume s"
    text = effray("show s")
    assert "s: 1 trials are left, no process is working on it" in text and text.endswith(f"{resume}\n")
    assert f"{resume}\n" in effray("show s-002")
    with sweep.storage.locked("it"):
        assert "a process is working on it" in effray("show s-002")
        text = effray("show s")
        assert "a process is working on it" in text and "resume" not in text
    shutil.move("runs", "elsewhere")
    assert effray("show elsewhere/tune/s").endswith(f"{resume} --root {tmp_path}/elsewhere\n")


# list


@pytest.fixture
def sweep(call):
    """A sweep of three trials, of which two are done."""
    trials = [{"crest.tau": tau} for tau in (0.1, 0.2, 0.3)]
    sweep = create_study("runs", "s", ORDER, CrestSettings(), "", [Trial(settings=values) for values in trials])
    for number, accuracy in enumerate((0.5, 0.7, 0.9)):
        folder = begun("crest", sweep.run_name(number), CrestSettings)
        sweep.started(number, trials[number])
        folder.log(row("train", 1, accuracy=accuracy))
        folder.flush()
        if number < 2:
            folder.finish({**SUMMARY, "test_accuracy": accuracy})
            sweep.ended(number, None)
    return sweep


def test_list_is_the_newest_first_with_what_each_run_is_reached_and_cost(call, effray):
    begun(name="old", done=True, time=1e9, **{"select.fraction": 0.5})
    begun("lipt", "new", LiptSettings)
    begun(name="middle", done=True, time=1.5e9, dataset="parquet:/data/cifar10")
    new, middle, old = listed(effray("list"))
    assert new[:-2] == "new stopped digits linear lipt gradmatch – – –".split() and new[-1] == "s"
    assert middle[:-2] == "middle done cifar10 linear train 87.50% 1,234 1.5".split() and middle[-1] == "d"
    assert old[:-2] == "old done digits linear train random 87.50% 1,234 1.5".split() and old[-1] == "d"


def test_list_can_be_of_one_experiment_and_of_the_newest_and_leaves_out_what_is_no_run(effray):
    for number in range(3):
        begun(name=f"run-{number}", time=1e9 + number)
    begun("lipt", "other", LiptSettings)
    assert [words[0] for words in listed(effray("list train -n 2"))] == ["run-2", "run-1"]
    assert [words[0] for words in listed(effray("list lipt"))] == ["other"]
    assert "no runs of crest in runs" in effray("list crest")
    for foreign in ("train/empty", "train/mine/deep", "photos/2024", "train/run-0/plots"):
        Path("runs", foreign).mkdir(parents=True)
    Path("runs/train/README").write_text("")
    Path("runs/photos/2024/config.toml").write_text("")
    Path("runs/train/link").symlink_to("/nowhere")
    assert [line["name"] for line in json.loads(effray("list train --json"))] == ["run-2", "run-1", "run-0"]
    for place in ("nowhere", "runs/train/README"):
        assert effray(f"list --root {place}") == f"no runs in {place}\n"


def test_tables_of_a_run_in_other_formats(effray, refusal):
    begun(done=True)
    assert json.loads(effray("show one --format json"))["test_accuracy"] == 0.875
    _, first, *_ = csv.reader(effray("show one --format csv").splitlines())
    assert first[:4] == ["costs of one", "train", "1.5", "0.0"]
    latex = effray("show one --format latex").splitlines()
    assert latex[:3] == ["% costs of one", r"\begin{tabular}{lrrrrrr}", r"\toprule"] and r"~~select & " in latex[6]
    assert "| train | 1.5 |" in effray("show one --format markdown")
    begun(name="two")
    assert "run 'two' is not finished, so there is nothing to report yet" in refusal("show two --format csv")


def test_list_folds_the_trials_of_a_sweep(effray, sweep):
    begun("crest", "alone", CrestSettings, time=1e9)
    for state, title in (("stopped", ""), ("stopped", ", best s-001")):
        text = effray("list")
        fold, alone = text.splitlines()[2:]
        assert fold.startswith(f"s: 2 of 3 trials done{title}  ") and f" {state} " in fold
        assert " tune crest " in fold and " 2,468 " in fold and " 3.0 " in fold
        assert alone.startswith("alone ")
        conclude(sweep)
    assert " 70.00% " in fold
    assert [words[:-2] for words in listed(effray("list tune"))] == [fold.split()[:-2]]
    with sweep.storage.locked("it"):
        assert " going " in effray("list tune")


BAD = '{"phases": [{"backward": "x"}], "seconds": 1}'
DAMAGED = {  # a file or folder, its new content or None for a link to itself, and the words of its line
    "runs/train/one/config.toml": ("", ["one", "bad", "config.toml"]),
    "runs/train/one/summary.json": (BAD, ["one", "bad", "summary.json"]),
    "runs/tune/s/sweep.json": ('{"order": {}, "trials": []}', ["s", "bad", "sweep.json"]),
    "runs/sparse": (None, ["sparse", "unreadable"]),
    "runs/tune/t": (None, ["t", "unreadable"]),
}


@pytest.mark.parametrize("place", DAMAGED)
def test_list_tells_what_is_damaged_and_lists_the_others(effray, sweep, place):
    content, words = DAMAGED[place]
    begun(done=True)
    before = {line["name"] for line in json.loads(effray("list --json"))}
    if content is None:
        Path(place).symlink_to(Path(place).name)
    else:
        Path(place).write_text(content)
    lines = listed(effray("list"))
    assert words in [line[: len(words)] for line in lines]
    trials = {"s-000", "s-001", "s-002"} if words[0] == "s" else set()
    assert {line[0].rstrip(":") for line in lines} >= trials | {name.partition(":")[0] for name in before} | {words[0]}


@pytest.mark.parametrize("what", ["file", "folder", "pipe"])
def test_report_embeds_regular_files_of_its_own_folder_only(effray, what):
    begun(done=True).storage.write("plots/curves.png", b"own picture")
    plots = Path("runs/train/one/plots")
    Path("elsewhere").mkdir()
    Path("elsewhere/other.png").write_bytes(b"not for you")
    if what == "file":
        (plots / "other.png").symlink_to(Path("elsewhere/other.png").absolute())
    elif what == "pipe":
        os.mkfifo(plots / "other.png")
    else:
        shutil.rmtree(plots)
        plots.symlink_to(Path("elsewhere").absolute())
    effray("report one")
    page = Path("runs/train/one/report.html").read_text()
    assert b64encode(b"not for you").decode() not in page and "plots/other.png is not a regular file" in page
    assert (b64encode(b"own picture").decode() in page) is (what != "folder")


# rm


def everything(folder="."):
    return sorted(str(path) for path in Path(folder).rglob("*"))


def test_rm_deletes_a_run_and_leaves_others(call, effray, tmp_path):
    begun(name="one").storage.write("model.safetensors", b"weights")
    begun(name="one.part.x")
    Path("runs/train/one.part").mkdir()  # somebody's
    Path("kept").mkdir()
    Path("kept/file").touch()
    Path("runs/train/one/ray").symlink_to(Path("kept").absolute())
    RunFolder(Storage("runs/train/one")).finish(SUMMARY)
    Path("runs/train/one/config.toml").write_text("junk")  # the manifest's digests tell that the run is whole
    begun(name="two")
    others = {"runs/train/one.part", *everything("runs/train/two"), *everything("runs/train/one.part.x")}
    assert effray("rm one --yes") == f"deleted {tmp_path}/runs/train/one\n"
    assert {*everything("runs/train")} == {"runs/train/two", "runs/train/one.part.x", *others}
    effray("rm train/two train/one.part.x --yes")
    assert everything("runs") == ["runs/train", "runs/train/one.part"] and everything("kept") == ["kept/file"]


def test_rm_takes_a_path_or_a_name_below_the_root_whatever_is_in_the_working_folder(call, effray):
    begun(root="elsewhere")
    effray("rm elsewhere/train/one/ --yes --root elsewhere")
    assert everything("elsewhere") == ["elsewhere/train"]
    begun()
    begun(root=".", kind="x")
    shutil.move("x/one", "one")
    assert effray("rm one train/one runs/train/one --yes").count("deleted") == 1
    assert Path("one/config.toml").exists() and os.listdir("runs/train") == []


def test_rm_asks_on_a_terminal_and_deletes_nothing_without_one(call, refusal, monkeypatch):
    begun()
    for stdin in (sys.stdin, None):  # None = closed
        monkeypatch.setattr(sys, "stdin", stdin)
        assert "there is no terminal to ask on whether to delete 1 folder: --yes" in refusal("rm one")
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    for answer in (False, True):
        monkeypatch.setattr(click, "confirm", lambda question, yes=answer: question == "delete 1 folder?" and yes)
        assert call("effray rm one").code == 0
        assert Path("runs/train/one").exists() is not answer


def test_rm_checks_all_runs_before_it_deletes_the_first(call, refusal):
    begun(name="one")
    going = begun(name="two")
    assert "unknown run" in refusal("rm one three --yes")
    with going.storage.locked("it"):
        assert "train/two is being worked on by another process" in refusal("rm one two --yes")
    assert "deletes none that it has not made" in refusal(f"rm one {Path('runs').absolute()} --yes")


def test_rm_of_a_name_of_several_runs_asks_which(call, refusal, effray):
    begun()
    begun("crest", "one", CrestSettings)
    assert "there is a run 'one' of crest and of train: give crest/one" in refusal("rm one --yes")
    effray("rm crest/one --yes")
    assert os.listdir("runs/crest") == [] and os.listdir("runs/train") == ["one"]
    begun("crest", "one", CrestSettings)  # the name is free again


def changed(folder, file, content):
    (folder / file).write_text(content)


def moved(folder, to, link=False):
    target = Path(to)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
    if link:
        folder.symlink_to(target.absolute())


def linked_around(folder):
    moved(folder.parent, "elsewhere", link=True)


SEALED = "does not begin with a digest"
FOREIGN = {  # what was done to a run's folder, the argument of rm, what is said
    "only a config": (lambda run: [file.unlink() for file in run.glob("*.json")], "one", None),  # a run all the same
    "foreign settings": (lambda run: changed(run, "config.toml", "title = 'mine'"), "one", SEALED),
    "no settings": (lambda run: (run / "config.toml").unlink(), "one", "is missing"),
    "of no experiment": (lambda run: moved(run, "runs/site/one"), "site/one", "unknown experiment 'site'"),
    "other results": (
        lambda run: changed(run, "summary.json", json.dumps(SUMMARY | {"files": {"a.parquet": "0" * 32}})),
        "one",
        "a.parquet is",
    ),
    "a bad manifest": (lambda run: changed(run, "summary.json", "[1]"), "one", "summary.json is corrupt"),
    "elsewhere": (
        lambda run: moved(run, "other/train/one"),
        "other/train/one",
        "not EXPERIMENT/NAME below --root runs",
    ),
    "a link": (lambda run: moved(run, "other/train/one", link=True), "one", "or a link leads to it"),
    "below a link": (linked_around, "one", "or a link leads to it"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_rm_deletes_only_what_is_provably_a_run(call, refusal, case):
    change, name, says = FOREIGN[case]
    begun()
    change(Path("runs/train/one"))
    before = everything()
    if says is None:
        assert call(f"effray rm {name} --yes").code == 0
    else:
        assert re.search(says, refusal(f"rm {name} --yes"))
        assert everything() == before


def test_rm_deletes_no_trials_that_a_changed_record_places_elsewhere(refusal, sweep):
    shutil.copytree("runs/crest", "docs")
    record = Path("runs/tune/s/sweep.json")
    record.write_text(record.read_text().replace('"crest"', '"../docs"'))
    before = everything()
    assert "sweep.json is missing or damaged (its digest is another" in refusal("rm s --trials --yes")
    assert everything() == before


@pytest.mark.parametrize("name", ["..", "../runs/train/one/.", "a%2F..", "#x", "*", ""])
def test_rm_reads_no_name_as_more_than_a_name(call, name):
    begun()
    before = everything("runs")
    result = call(f"effray rm '{name}' --yes")
    assert result.code == 2 and result.err.count("\n") == 1
    assert everything("runs") == before


@pytest.mark.parametrize("step", ["rename", "delete", "rmtree", "unlink", "end"])
def test_a_deletion_that_was_cut_short_leaves_nothing_that_looks_like_a_run_and_can_be_finished(
    call, effray, monkeypatch, step
):
    begun(done=True).storage.write("phases/train.json", b"{}")
    begun(name="two")
    place = {"rename": Path, "delete": Storage, "unlink": Path, "rmtree": shutil, "end": shutil}[step]
    name = step.replace("end", "rmtree")
    original = getattr(place, name)

    def interrupted(path, *others, **options):
        if step != "end" or Path(path).name.endswith(".part"):
            raise KeyboardInterrupt
        original(path, *others, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupted)
        assert call("effray rm one --yes").code == 130
    whole = Path("runs/train/one").exists()
    assert whole is (step == "rename")
    assert [words[0] for words in listed(effray("list"))].count("one") == whole
    effray("rm one --yes")
    assert os.listdir("runs/train") == ["two"]


def test_rm_of_a_sweep_leaves_its_trials_unless_they_are_meant_too(effray, refusal, sweep):
    for copy in ("copy", "damaged"):
        shutil.copytree("runs", copy)
    effray("rm s --yes")
    assert os.listdir("runs/tune") == [] and len(os.listdir("runs/crest")) == 3
    begun("crest", "s-003", CrestSettings, root="copy")  # no trial of it
    effray("rm s --trials --yes --root copy")
    assert os.listdir("copy/crest") == ["s-003"] and os.listdir("copy/tune") == []
    Path("damaged/tune/s/sweep.json").write_text("{")
    assert "deletes none that it has not made" in refusal("rm s --trials --yes --root damaged")
    assert len(everything("damaged/tune/s")) > 2


def test_rm_of_a_trial_is_refused_unless_trials_are_meant(effray, refusal, sweep):
    assert "s-001 is a trial of sweep 's', which would run it again: --trials" in refusal("rm s-001 --yes")
    with sweep.storage.locked("it"):
        assert "tune/s is being worked on" in refusal("rm s-001 --trials --yes")
    effray("rm s-001 --trials --yes")
    assert sorted(os.listdir("runs/crest")) == ["s-000", "s-002"] and Path("runs/tune/s").exists()
