"""Progress of a run: plain lines without a terminal, a progress bar on one."""

import io

import pytest
from rich.console import Console

from raypkg.core.settings import Experiment
from raypkg.runs.folder import RunFolder, create
from raypkg.runs.report import Report


@pytest.fixture
def folder(tmp_path):
    return create(str(tmp_path), "train", "one", Experiment())


def row(epoch, model=None, phase="train"):
    return {"phase": phase, "main": True, "model": model, "epoch": epoch, "loss": 1 / epoch, "backward": 100 * epoch}


def said(folder, rows, *, times=None, terminal=False, phase="train", **expected):
    """Return the output of a phase that reports rows at given times: by default every 2 s, the first after 62 s."""
    now = 0.0
    printed = io.StringIO()
    width = 80 if terminal else 200
    console = Console(file=printed, width=width, force_terminal=terminal, get_time=lambda: now)
    with Report(folder, None, console) as report:

        def work():
            nonlocal now
            for number, each in enumerate(rows):
                now = times[number] if times else 62.0 + 2 * number
                report(each)
            return {"costs": []}

        report.phase(phase, work, epochs=len(rows), **expected)
    return printed.getvalue()


def test_plain_lines_give_epoch_elapsed_and_remaining_time_throughput_and_loss(folder):
    lines = said(folder, [row(epoch) for epoch in (1, 2, 3)]).splitlines()
    assert lines[:-1] == [
        "train …",
        "train 1/3  0:01:02 elapsed  loss 1.000",
        "train 2/3  0:01:04 elapsed  0:00:02 left  50 samples/s  loss 0.500",
        "train 3/3  0:01:06 elapsed  50 samples/s  loss 0.333",
    ]
    assert lines[-1].startswith("train done in ")


def test_a_long_epoch_has_a_line_now_and_then(folder):
    steps = [row(1) | {"within": 100 * number, "steps": 1000} for number in range(1, 5)]
    lines = said(folder, [*steps, row(1)], times=[15.0, 61.0, 75.0, 130.0, 140.0]).splitlines()
    assert lines[1:3] == ["train  epoch 1: step 200 of 1,000", "train  epoch 1: step 400 of 1,000"]
    assert len(folder.rows) == 1 and len(lines) == 5


def test_the_bill_is_shown_and_not_stored(folder):
    bill = {"seconds": 10.0, "total_seconds": 20.0, "waited": 0.5, "operations": 5e12, "peak": 1e12}
    lines = said(folder, [row(1) | {"bill": bill | {"device_memory": 3 << 30}}, row(2) | {"bill": bill}]).splitlines()
    assert "5% waiting  MFU 25%  GPU 3,072 MiB  loss 1.000" in lines[1]
    assert "waiting  MFU 25%  loss 0.500" in lines[2]
    assert folder.rows == [{k: v for k, v in row(epoch).items() if v is not None} for epoch in (1, 2)]


def test_plain_lines_give_the_model_and_its_epoch(folder):
    rows = [row(epoch, model, "pretrain") for model in range(2) for epoch in (1, 2)]
    lines = said(folder, rows, phase="pretrain", models=2).splitlines()
    assert lines[3].startswith("pretrain 3/4  0:01:06 elapsed  0:00:02 left  model 2 of 2, epoch 1 of 2  50 samples/s")
    assert "  model 4, epoch 1  " in said(folder, [row(1, 3)])


def test_there_are_about_ten_lines_for_any_number_of_epochs(folder):
    assert said(folder, [row(epoch) for epoch in range(1, 251)]).count("samples/s") == 10


def test_rows_from_before_a_restart_are_counted_without_a_line(folder):
    rows = [row(epoch) for epoch in range(1, 7)]
    for each in rows[:4]:
        folder.log(each)
    folder.flush()
    lines = said(RunFolder(folder.storage), rows, times=[20.0] * 4 + [22.0, 24.0]).splitlines()
    assert lines[1:-1] == [
        "train 5/6  0:00:22 elapsed  0:00:02 left  50 samples/s  loss 0.200",
        "train 6/6  0:00:24 elapsed  50 samples/s  loss 0.167",
    ]


def test_a_terminal_has_a_bar_that_fits_and_no_lines(folder):
    rows = [row(epoch, 0, "pretrain") for epoch in (1, 2)]
    text = said(folder, rows, terminal=True, phase="pretrain", models=2)
    assert "━" in text and "2/2" in text and "pretrain …" not in text and "pretrain done" not in text
