"""The training loop that a user of PyTorch writes for CIFAR-10, on images of noise; run as a script, it is timed.

Beside it, what the command needs to be timed on the same images.
"""

import json
import time

import torch
import torch.nn.functional as F

from raypkg.data.split import Split
from raypkg.engine.hooks import Hook, Results
from raypkg.models import build_model

BATCH = 128
STEPS = 24
IMAGES = {"train": BATCH * STEPS, "test": BATCH}


def images(split):
    generator = torch.Generator().manual_seed(0)
    count = IMAGES[split]
    x = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return x, torch.arange(count) % 10


def load(root, *, split):
    """The same images for the command: ``--dataset plain_loop:load``."""
    x, y = images(split)
    return Split.from_tensors(x, y, augment=("crop", "flip"))


class Timer(Hook):
    """Times the command's last epoch: ``--hooks plain_loop:Timer``."""

    def on_epoch(self, run):
        self.clock = Clock()

    def on_epoch_end(self, run):
        self.seconds = self.clock.seconds()

    def results(self, run):
        return Results(facts={"timed": self.seconds})


class Clock:
    """Seconds since it was made, of the wall and of this process on a processor."""

    def __init__(self):
        self.wall = time.perf_counter()
        self.processor = time.process_time()

    def seconds(self):
        return {"wall": time.perf_counter() - self.wall, "processor": time.process_time() - self.processor}


def augmented(x):
    """Crop each image out of a border of 4 pixels, and mirror half of them."""
    padded = F.pad(x, (4, 4, 4, 4))
    tops, lefts = torch.randint(0, 9, (2, len(x))).tolist()
    cut = torch.empty_like(x)
    for i, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        cut[i] = padded[i, :, top : top + 32, left : left + 32]
    mirrored = torch.rand(len(x)) < 0.5
    cut[mirrored] = cut[mirrored].flip(3)
    return cut


def train():
    """Train an epoch with the command's model, layout, precision and settings; return the seconds it took."""
    x, y = images("train")
    mean = x.float().mean((0, 2, 3), keepdim=True)
    std = x.float().std((0, 2, 3), keepdim=True)
    model = build_model("resnet20", (3, 32, 32), 10, seed=0).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    clock = Clock()
    for picked in torch.randperm(len(x)).split(BATCH):
        batch = (augmented(x[picked]) - mean) / std
        batch = batch.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16):
            logits = model(batch)
        loss = F.cross_entropy(logits.float(), y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clock.seconds()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(train()))
