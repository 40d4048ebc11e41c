"""Shared set-up: a cache of its own, quiet Ray, single-threaded torch, and where the real data is."""

import os
import tempfile
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def ray():
    """One Ray for all, with the dashboard, which Ray Train needs to give CPUs back."""
    from raypkg.cluster.session import prepare

    prepare()
    import ray

    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # workers import the tests' data set
    ray.init(address="local", num_cpus=3, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
