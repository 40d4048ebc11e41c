"""What a run says while it works: plain lines without a terminal, a moving bar on one."""

import io
import itertools

import pytest
from rich.console import Console

from raypkg.core.settings import Experiment
from raypkg.runs import report as module
from raypkg.runs.folder import RunFolder, create
from raypkg.runs.report import Report


class Nowhere:
    def log(self, row):
        pass

    def abandon(self):
        pass


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Let every look at the clock be a second later."""
    seconds = itertools.count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(seconds)))


@pytest.fixture
def folder(tmp_path):
    return create(str(tmp_path), "train", "one", Experiment())


def row(epoch, model=None, phase="train"):
    return {"phase": phase, "main": True, "model": model, "epoch": epoch, "loss": 1 / epoch, "backward": 100 * epoch}


def said(folder, rows, *, terminal=False, width=200, phase="train", **asked):
    """Return what is printed while a phase reports some rows."""
    printed = io.StringIO()
    console = Console(file=printed, width=width, force_terminal=terminal)
    with Report(folder, Nowhere(), console) as report:

        def work():
            for each in rows:
                report(each)
            return {"costs": []}

        report.phase(phase, work, epochs=len(rows), **asked)
    return printed.getvalue()


def test_plain_lines_tell_loss_speed_and_the_time_that_is_left(folder):
    lines = said(folder, [row(epoch) for epoch in (1, 2, 3)]).splitlines()
    assert lines == [
        "train …",
        "train 1/3  100 samples/s  2 s left  loss 1.000",
        "train 2/3  100 samples/s  1 s left  loss 0.500",
        "train 3/3  100 samples/s  loss 0.333",
        "train done in 4.0 s",
    ]


def test_plain_lines_tell_which_model_and_which_of_its_epochs(folder):
    rows = [row(epoch, model, "pretrain") for model in range(2) for epoch in (1, 2)]
    told = said(folder, rows, phase="pretrain", models=2).splitlines()
    assert told[3].startswith("pretrain 3/4  model 2 of 2, epoch 1 of 2  100 samples/s  1 s left")


def test_where_nobody_says_how_many_models_there_are_their_number_is_told(folder):
    assert "  model 4, epoch 1  " in said(folder, [row(1, 3)])


def test_there_are_about_ten_lines_however_many_epochs(folder):
    assert said(folder, [row(epoch) for epoch in range(1, 251)]).count("samples/s") == 10


def test_known_rows_of_before_a_restart_are_counted_and_not_told_again(folder):
    rows = [row(epoch) for epoch in range(1, 7)]
    for each in rows[:4]:
        folder.log(each)
    folder.flush()
    lines = said(RunFolder(folder.storage), rows).splitlines()
    assert lines[1:-1] == [
        "train 5/6  100 samples/s  1 s left  loss 0.200",
        "train 6/6  100 samples/s  loss 0.167",
    ]


def test_a_terminal_has_a_bar_that_fits_and_no_lines(folder):
    rows = [row(epoch, 0, "pretrain") for epoch in (1, 2)]
    text = said(folder, rows, terminal=True, width=80, phase="pretrain", models=2)
    assert "━" in text and "2/2" in text and "pretrain …" not in text and "pretrain done" not in text
