"""What is imported once and stays is no business of the garbage collector."""

import subprocess
import sys

FIRST = """
import gc
from raypkg.core.imports import heavy_imports

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
"""
FAILING = """
import gc
from raypkg.core.imports import heavy_imports

try:
    with heavy_imports():
        raise ImportError
except ImportError:
    assert gc.isenabled()
"""
UNASKED = """
import gc
from raypkg.core.imports import heavy_imports

gc.disable()
with heavy_imports():
    import torch
assert not gc.isenabled() and not gc.get_freeze_count()
"""
NAMES = """
import gc
import sys
from raypkg.experiments.resolve import check_names
from raypkg.experiments.train import TrainSettings

check_names(TrainSettings())
assert "torch" in sys.modules
assert gc.isenabled() and gc.get_freeze_count() > 100_000
"""


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pytorch_is_frozen_and_what_comes_later_is_collected():
    run(FIRST)


def test_a_failed_import_leaves_the_collector_on():
    run(FAILING)


def test_a_collector_that_is_off_stays_as_it_is():
    run(UNASKED)


def test_checking_names_imports_pytorch_without_collections():
    run(NAMES)
