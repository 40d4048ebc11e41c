"""Comparisons on Ray: as many trials at once as fit, and the same figures as without it."""

import pyarrow.parquet as pq
import pytest

from ray_runs import effray

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
