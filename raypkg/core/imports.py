"""Heavy imports, over which the garbage collector does not walk."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

HEAVY = "torch"


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import PyTorch and what needs it in this block, without collecting garbage; it lasts as long as the process.

    PyTorch consists of a quarter of a million objects. The collector would walk over them again and again, here and in
    every later import, which takes a quarter of a short run. Where PyTorch is imported already, this does nothing.
    """
    if HEAVY in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
