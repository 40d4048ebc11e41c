"""Comparisons on Ray: as many trials at once as fit, the same figures as without it, and a driver that dies."""

import os
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from ray_runs import effray, wait_for

TABLE = """
from raypkg.studies.tables import Table

def table(scale):
    return Table(
        title="Rates",
        experiment="train",
        baseline="0.1",
        shared={"model": "mlp", "train.epochs": 3, "train.precision": "float32"},
        rows={"0.1": {}, "0.03": {"train.lr": 0.03}},
        seeds=(0, 1),
    )
"""


@pytest.fixture
def compared(tmp_path):
    """Return a function that runs the table and gives back the rows of its results."""
    (tmp_path / "mine.py").write_text(TABLE)

    def compared(name, *arguments):
        effray("compare", tmp_path / "mine.py", "--root", tmp_path, "--name", name, *arguments)
        rows = pq.read_table(tmp_path / "tune" / name / "results.parquet").to_pylist()
        return {(row["row"], row["seed"]): row["test_accuracy"] for row in rows if row["state"] == "done"}

    return compared


def test_with_and_without_ray_the_figures_are_the_same(ray, compared):
    assert compared("here", "--cluster.workers", "0") == compared("there")


def test_what_a_killed_driver_had_finished_is_not_run_again(compared, tmp_path):
    command = [sys.executable, "-c", "from raypkg.cli import script; script()", "compare", str(tmp_path / "mine.py")]
    driver = subprocess.Popen(
        [*command, "--root", str(tmp_path), "--name", "k"], start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: list(tmp_path.glob("train/k-*/summary.json")), driver)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    done = {file: file.stat().st_mtime_ns for file in tmp_path.glob("train/k-*/summary.json")}
    assert len(compared("k")) == 4
    assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in done.items())
