"""What a machine's threads feed, and how long training waits for it: pixels, JPEG and rows. Prints tables.

python -m pytest -q -s -m bench tests/benchmarks/test_data_path.py
"""

import io
import time
from functools import partial
from statistics import median
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import samples
from raypkg.core.seeds import generator
from raypkg.core.settings import Training
from raypkg.data import load_data
from raypkg.data.augment import compose
from raypkg.data.store.arrow import Block, Header, Store, write
from raypkg.data.store.images import decode_all, open_images
from raypkg.engine.batches import Batches
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.engine.worker import threads
from raypkg.models import build_model

pytestmark = pytest.mark.bench

BATCH = 128
TEN = tuple("0123456789")
THREADS = [1, 2]
PHOTOGRAPH = (375, 500)  # the usual size in ImageNet


def rate(function, batch, repeats=9, batches=60):
    """Return the median number of samples a second over several repeats."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(batches):
            function()
        seconds.append(time.perf_counter() - start)
    return batch * batches / median(seconds)


def print_table(title, rates):
    print(f"\n{title}\n" + "\n".join(f"  {name:<34}{value:>12,.0f} images/s" for name, value in rates.items()))


def photographs(count, height, width):
    """Return JPEG files that are as smooth, and hence as large, as photographs."""
    coarse = samples.pixels(count, height // 8, width // 8)
    smooth = [Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC) for image in coarse]
    return [samples.encode(np.asarray(image), "JPEG", quality=90) for image in smooth]


def stored(path, header, x):
    y = np.arange(len(x)) % 10
    parts = [slice(start, start + 5000) for start in range(0, len(x), 5000)]
    write(path, header, (Block(x[part], y[part], x[part]) for part in parts))
    return Store(path).as_split()


@pytest.mark.parametrize("names", [["crop", "flip"], ["crop", "flip", "randaugment"]], ids="+".join)
def test_pixels_to_batches(tmp_path, names):
    n = 50_000
    augment = compose(names)
    split = stored(tmp_path / "store", Header("pixels", (3, 32, 32), TEN), samples.pixels(n, 32, 32))
    draws = generator(0, "bench")
    orders = iter(torch.randperm(n, generator=draws).repeat(100).split(BATCH))
    u = torch.rand(BATCH, augment.draws, generator=draws)
    batch = split.batch(torch.randperm(n, generator=draws)[:BATCH])[0]

    def augmented(step):
        return step(batch, u[:, : step.draws])

    def whole():
        return split.inputs(augment(split.batch(next(orders))[0], u))

    with threads(1):
        print_table(
            f"32×32, batches of {BATCH}, {' + '.join(names)}, one thread",
            {
                "gather": rate(lambda: split.batch(next(orders)), BATCH),
                **{name: rate(partial(augmented, compose([name])), BATCH) for name in names},
                "float and normalise": rate(lambda: split.inputs(batch), BATCH),
                "all of it": rate(whole, BATCH),
            },
        )


@pytest.mark.parametrize(("sides", "to", "count"), [((64, 64), 64, 512), ((224, 224), 224, 64), (PHOTOGRAPH, 224, 32)])
def test_jpeg_to_pixels(sides, to, count):
    images = photographs(count, *sides)
    kilobytes = sum(map(len, images)) / count / 1000
    height, width = sides
    rates = {}
    for number in THREADS:
        with threads(number):
            for side in (to, to // 2):
                decoded = partial(decode_all, images, (3, side, side), str)
                rates[f"to {side}×{side}, {number} threads"] = rate(decoded, count, 5, 4)
    print_table(f"JPEG {height}×{width}, {kilobytes:.1f} kB", rates)


def pixel_store(folder):
    return stored(folder / "pixels", Header("pixels", (3, 32, 32), TEN, ("crop", "flip")), samples.pixels(2560, 32, 32))


def jpeg_store(folder):
    files = photographs(64, *PHOTOGRAPH)

    def batches(start):
        yield files, np.arange(len(files)) % 10

    source = SimpleNamespace(length=len(files), classes=TEN, batches=batches, name=str)
    return open_images("train", lambda name: folder / f"{name}.arrow", lambda name: source, {"train": []}, 224)


def row_store(folder):
    rows = np.random.default_rng(0).random((40_000, 64), np.float32)
    return stored(folder / "rows", Header("rows", (64,), TEN), rows)


CASES = [  # store, model, samples a step
    ("32×32 pixels", pixel_store, "resnet8", BATCH),
    ("224×224 from JPEG", jpeg_store, "torchvision:resnet18", 16),
    ("rows of 64", row_store, "mlp", BATCH),
    ("rows of 64", row_store, "linear", BATCH),
]


def loading_rate(run):
    """Return the samples a second that are loaded while nobody computes."""
    split, settings = run.split, run.settings
    batches = Batches(split, run.coreset, settings.batch_size, seed=1, augment=split.augment, worker=run.worker)
    start = time.perf_counter()
    loaded = sum(len(batch.y) for batch in batches.epoch(0))
    return loaded / (time.perf_counter() - start)


@pytest.mark.parametrize("number", THREADS)
@pytest.mark.parametrize(("what", "store", "name", "batch"), CASES)
def test_training_waits(tmp_path, monkeypatch, what, store, name, batch, number):
    monkeypatch.setattr("raypkg.data.store.images.DECODED_BYTES", 0)
    split = store(tmp_path)
    with threads(number):
        rounds = []
        for _ in range(3):
            model = build_model(name, split.shape, 10, seed=0)
            run = Run.simple(model, split, Training(epochs=1, batch_size=batch, lr=0.001))
            loading = loading_rate(run)
            fit(run)
            cost = run.cost
            rounds.append((cost.waited / cost.seconds, loading, len(split) / cost.seconds))
    waited, loading, training = (median(values) for values in zip(*rounds, strict=True))
    speeds = f"loads {loading:>9,.0f}/s, trains {training:>9,.1f}/s, waits {waited:6.2%}"
    print(f"\n{what:<20}{name:<22}{number} threads: {speeds}")


def test_importing_cifar10(real_data, tmp_path):
    """CPU seconds on one thread: the import, and Pillow's reading of the same images one by one, in turn."""
    source = real_data / "cifar10"
    tables = [pq.read_table(file) for file in sorted(source.rglob("*.parquet"))]
    encoded = [row["bytes"] for table in tables for row in table["img"].to_pylist()]
    found = []
    for number in range(5):
        times = [time.process_time()]
        with threads(1):
            load_data(f"parquet:{source}", cache=tmp_path / str(number))
        times.append(time.process_time())
        for image in encoded:
            with Image.open(io.BytesIO(image)) as opened:
                np.asarray(opened)
        found.append(np.diff([*times, time.process_time()]))
    ours, pillow = np.median(found, axis=0)
    print(f"\nCIFAR-10: import {ours:.1f} s, Pillow alone {pillow:.1f} s: {ours / pillow:.2f}")
