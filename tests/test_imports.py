"""Heavy imports are exempt from garbage collection."""

import subprocess
import sys

PROGRAM = """
import gc
from raypkg.core.registry import heavy_imports
try:
    with heavy_imports():
        raise ImportError
except ImportError:
    assert gc.isenabled()

import sys
from raypkg.experiments.resolve import check_names
from raypkg.experiments.train import TrainSettings
check_names(TrainSettings())  # imports PyTorch
assert "torch" in sys.modules and gc.isenabled()
frozen = gc.get_freeze_count()
assert frozen > 100_000
with heavy_imports():
    assert gc.isenabled()  # everything heavy is there
    later = []
    later.append(later)
assert gc.get_freeze_count() == frozen
del later
assert gc.collect() > 0
"""


def test_pytorch_is_frozen_and_later_objects_are_collected():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
