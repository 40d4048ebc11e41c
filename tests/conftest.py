"""Shared set-up: a cache of its own, quiet Ray, single-threaded torch, pictures, and where the real data is."""

import os
import tempfile
from pathlib import Path

import pytest

CPUS = 3  # of the tests' Ray

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("EFFRAY_CACHE", tempfile.mkdtemp(prefix="effray-test-cache-"))
os.environ.setdefault("COLUMNS", "120")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def real_data() -> Path:
    path = Path(os.environ.get("EFFRAY_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data in {path}")
    return path


@pytest.fixture(scope="module")
def blank_pictures():
    """Let the runs of a file compose their pictures, but not render them, which takes most of a short run's time."""
    from matplotlib.figure import Figure

    def blank(figure, path, **options):
        Path(path).write_bytes(b"a blank picture")

    original = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", blank)
        yield original


@pytest.fixture
def rendered_pictures(blank_pictures, monkeypatch):
    """Render the pictures of one test in a file of blank ones."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", blank_pictures)


@pytest.fixture(scope="module")
def ray():
    """One Ray for all, with the dashboard, which Ray Train needs to give CPUs back.

    Tests that need a cluster of their own shut this one down; the next module that asks for it gets it again.
    """
    from raypkg.cluster.session import prepare

    prepare()
    import ray

    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # workers import the tests' data set
    if not (ray.is_initialized() and ray.cluster_resources().get("CPU") == CPUS):
        ray.shutdown()
        ray.init(address="local", num_cpus=CPUS, log_to_driver=False, logging_level="ERROR")
    return ray
