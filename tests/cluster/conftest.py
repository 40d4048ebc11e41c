"""Every test of the cluster starts Ray, and may take long."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/cluster" in str(item.path):
            item.add_marker(pytest.mark.ray)
            item.add_marker(pytest.mark.timeout(600))
