"""What SparseTraining adds to a bare loop: steps in turn with those of the same loop without it.

pytest -m bench -s tests/benchmarks/test_sparse_in_a_loop.py
"""

import statistics
import time

import pytest
import torch
import torch.nn.functional as F

from raypkg import SparseTraining
from raypkg.engine.worker import threads
from raypkg.models import build_model

BLOCK, ROUNDS, EVERY = 10, 30, 150  # steps timed together; blocks of each loop; ΔT
CASES = {
    "resnet8, 32 × 32 pixels, batches of 32": ("resnet8", (3, 32, 32), {}, 32),
    "MLP 784-1024-1024-10, batches of 128": ("mlp", (784,), {"hidden": [1024, 1024]}, 128),
    "MLP 784-300-100-10, batches of 128": ("mlp", (784,), {"hidden": [300, 100]}, 128),
}


class Loop:
    def __init__(self, name, shape, options, size, sparse):
        self.model = build_model(name, shape, 10, seed=0, options=options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9, fused=True)
        self.x, self.y = torch.randn(size, *shape), torch.arange(size) % 10
        if sparse:
            SparseTraining(self.model, self.optimizer, 0.1, total_steps=BLOCK * ROUNDS, update_every=EVERY)

    def seconds(self):
        """Return the processor time of a block of steps, which other processes disturb less than wall time."""
        start = time.process_time()
        for _ in range(BLOCK):
            F.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.process_time() - start


@pytest.mark.bench
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES)
def test_steps_in_turn(case):
    name, shape, options, size = CASES[case]
    with threads(1):
        plain, masked = (Loop(name, shape, options, size, sparse) for sparse in (False, True))
        plain.seconds(), masked.seconds()  # warm up
        pairs = []
        for _ in range(ROUNDS // 2):  # each first once: the other's data are in the cache then
            pairs.append((plain.seconds(), masked.seconds()))
            after, before = masked.seconds(), plain.seconds()
            pairs.append((before, after))
    # Blocks that change the masks count too: the sum over blocks, and the median without them.
    whole = sum(after for _, after in pairs) / sum(before for before, _ in pairs)
    median = statistics.median(after / before for before, after in pairs)
    milliseconds = 1e3 * statistics.median(before for before, _ in pairs) / BLOCK
    print(f"\n| {case} | {milliseconds:.2f} ms a step | {median:.3f} | {whole:.3f} with changes every {EVERY} steps |")
