"""Heavy imports are exempt from garbage collection."""

import subprocess
import sys

import pytest

START = """
import gc
from raypkg.core.registry import heavy_imports
"""
CASES = {
    "PyTorch is frozen and later objects are collected": """
with heavy_imports():
    assert not gc.isenabled()
    import torch
assert gc.isenabled()
frozen = gc.get_freeze_count()
assert frozen > 100_000
with heavy_imports():
    assert gc.isenabled()
    later = []
    later.append(later)
assert gc.get_freeze_count() == frozen
del later
assert gc.collect() > 0
""",
    "a failed import leaves the collector on": """
try:
    with heavy_imports():
        raise ImportError
except ImportError:
    assert gc.isenabled()
""",
    "a disabled collector stays disabled": """
gc.disable()
with heavy_imports():
    import torch
assert not gc.isenabled() and not gc.get_freeze_count()
""",
    "checking names imports PyTorch without collections": """
import sys
from raypkg.experiments.resolve import check_names
from raypkg.experiments.train import TrainSettings
check_names(TrainSettings())
assert "torch" in sys.modules
assert gc.isenabled() and gc.get_freeze_count() > 100_000
""",
}


@pytest.mark.parametrize("case", CASES)
def test_heavy_imports(case):
    subprocess.run([sys.executable, "-c", START + CASES[case]], check=True)
