"""One Ray for all cluster tests, with the dashboard, which Ray Train needs to give CPUs back."""

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/cluster" in str(item.path):
            item.add_marker(pytest.mark.ray)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def ray():
    from raypkg.cluster.session import prepare

    prepare()
    import ray

    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # workers import the tests' data set
    ray.init(address="local", num_cpus=3, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
