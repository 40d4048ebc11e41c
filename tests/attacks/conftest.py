"""Every test here attacks: by bad input, full disks and other processes, or (marker `chaos`) by killing."""

import pytest

HERE = "tests/attacks/"


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in str(item.path) and not item.get_closest_marker("chaos"):
            item.add_marker(pytest.mark.attack)


@pytest.fixture
def root(bucket):
    """A root in an empty bucket."""
    return bucket("runs")
