"""The optimisers are PyTorch's own to the last bit, and leave its compiler alone."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from raypkg.core.settings import Training
from raypkg.engine.optimizer import build_optimizer

PYTORCHS = {
    "sgd": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True),
    "adamw": lambda weights: torch.optim.AdamW(weights, 0.1, betas=(0.9, 0.999), weight_decay=5e-4, fused=True),
}
WITHOUT_COMPILER = """
import sys
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from raypkg.core.settings import Training
from raypkg.engine.optimizer import build_optimizer

model = nn.Linear(3, 2)
for name in ("sgd", "adamw"):
    chosen = build_optimizer(model, Training(optimizer=name, decay="matrices"))
    model(torch.ones(1, 3)).sum().backward()
    clip_grad_norm_(model.parameters(), 1.0)
    chosen.step()
    chosen.zero_grad()
    chosen.load_state_dict(chosen.state_dict())
assert "torch._dynamo" not in sys.modules
"""


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def take_steps(model, chosen, count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(8, 5, generator=generator)
        model(x).square().sum().backward()
        chosen.step()
        chosen.zero_grad()


@pytest.mark.parametrize("name", PYTORCHS)
def test_trains_as_pytorchs_own_bit_by_bit_also_from_its_state(name):
    ours, theirs = network(), network()
    mine = build_optimizer(ours, Training(optimizer=name))
    reference = PYTORCHS[name](theirs.parameters())
    assert isinstance(mine, type(reference))
    take_steps(ours, mine, 3)
    take_steps(theirs, reference, 3)
    again = build_optimizer(ours, Training(optimizer=name))
    again.load_state_dict(mine.state_dict())
    take_steps(ours, again, 3)
    take_steps(theirs, reference, 3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_does_not_import_the_compiler():
    subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], check=True)
