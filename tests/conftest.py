"""Shared set-up: a cache of its own, quiet Ray, single-threaded torch, pictures, and where the real data is."""

import logging
import os
import tempfile
import urllib.request
from pathlib import Path

import pytest

from bucket import BUCKET, query

CPUS = 3  # of the tests' Ray

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("EFFRAY_CACHE", tempfile.mkdtemp(prefix="effray-test-cache-"))
os.environ.setdefault("COLUMNS", "120")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def global_seed():
    """Seed what draws from PyTorch's own generator, so that no test hangs on which others ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    path = Path(os.environ.get("EFFRAY_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data in {path}")
    return path


@pytest.fixture(scope="module")
def blank_pictures():
    """Let the runs of a file compose their pictures, but not render them, which takes most of a short run's time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    def blank(canvas, path, **options):
        Path(path).write_bytes(b"a blank picture")

    original = FigureCanvasAgg.print_png
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FigureCanvasAgg, "print_png", blank)
        yield original


@pytest.fixture
def rendered_pictures(blank_pictures, monkeypatch):
    """Render the pictures of one test in a file of blank ones."""
    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_png", blank_pictures)


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


@pytest.fixture(scope="module")
def port():
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it names every request
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "KEY")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        server.start()
        _, port = server.get_host_and_port()
        yield port
        server.stop()


@pytest.fixture
def bucket(port):
    """An empty bucket: a function from the name of what is in it to its URI."""
    server = f"http://127.0.0.1:{port}"
    for method, address in (("POST", f"{server}/moto-api/reset"), ("PUT", f"{server}/{BUCKET}")):
        urllib.request.urlopen(urllib.request.Request(address, method=method)).close()
    return lambda name: f"s3://{BUCKET}/{name}?{query(port)}"
