"""CPU time of a training step with `train.compile`, in turn with the same step without, on one thread.

pytest -m bench -s tests/benchmarks/test_compile.py
"""

import statistics
import time

import pytest
import torch

from raypkg.core.settings import Training
from raypkg.data.split import Split
from raypkg.engine.loop import train_step
from raypkg.engine.run import Run
from raypkg.engine.worker import threads
from raypkg.models import build_model

ROUNDS, BATCH = 7, 128


@pytest.mark.bench
@pytest.mark.parametrize(("name", "shape", "steps"), [("resnet8", (1, 8, 8), 20), ("resnet20", (3, 32, 32), 3)])
def test_steps_of_a_compiled_model(name, shape, steps):
    x = torch.randint(0, 256, (BATCH, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = Split.from_tensors(x, torch.arange(BATCH) % 10)
    settings = Training(batch_size=BATCH, precision="float32")
    kinds, times = {}, {"plain": [], "compiled": []}
    with threads(1):
        for kind in times:
            run = Run.simple(build_model(name, shape, 10, seed=0), split, settings)
            model = torch.compile(run.model) if kind == "compiled" else run.model
            kinds[kind] = run, model.train(), next(run.batches().batches)
            train_step(*kinds[kind])  # compiles
        for _ in range(ROUNDS):
            for kind, step in kinds.items():
                start = time.process_time()
                for _ in range(steps):
                    train_step(*step)
                times[kind].append((time.process_time() - start) / steps)
    plain, compiled = (1e3 * statistics.median(each) for each in times.values())
    print(f"{name}: {plain:.1f} ms a step, compiled {compiled:.1f} ms, {plain / compiled:.2f} x")
