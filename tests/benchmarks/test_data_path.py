"""What one core feeds: a store of CIFAR-10's size to normalised batches, and JPEG to pixels. Prints a table."""

import time
from functools import partial
from statistics import median

import numpy as np
import pytest
import torch

import samples
from raypkg.core.seeds import generator
from raypkg.data.augment import compose
from raypkg.data.store.arrow import Block, Header, Store, write
from raypkg.data.store.decode import decode_all

pytestmark = pytest.mark.bench

BATCH = 128


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.mark.parametrize("names", [["crop", "flip"], ["crop", "flip", "randaugment"]], ids="+".join)
def test_pixels_to_batches(tmp_path, names):
    n = 50_000
    x, y = samples.pixels(n, 32, 32), np.arange(n) % 10
    header = Header("pixels", (3, 32, 32), tuple("0123456789"))
    write(
        tmp_path / "store",
        header,
        (Block(x[i : i + 5000], y[i : i + 5000], x[i : i + 5000]) for i in range(0, n, 5000)),
    )
    split, augment = Store(tmp_path / "store").as_split(), compose(names)
    draws = generator(0, "bench")
    orders = iter(torch.randperm(n, generator=draws).repeat(100).split(BATCH))
    u = torch.rand(BATCH, augment.draws, generator=draws)
    batch = split.batch(torch.randperm(n, generator=draws)[:BATCH])[0]

    def augmented(step):
        return step(batch, u[:, : step.draws])

    def whole():
        return split.inputs(augment(split.batch(next(orders))[0], u))

    print_table(
        f"32×32, batches of {BATCH}, {' + '.join(names)}, one thread",
        {
            "gather": rate(lambda: split.batch(next(orders)), BATCH),
            **{name: rate(partial(augmented, compose([name])), BATCH) for name in names},
            "float and normalise": rate(lambda: split.inputs(batch), BATCH),
            "all of it": rate(whole, BATCH),
        },
    )


@pytest.mark.parametrize(("side", "count"), [(64, 512), (256, 32)])
def test_jpeg_to_pixels(side, count):
    noise = samples.pixels(count, side // 8, side // 8)  # enlarged, so that it compresses like a photograph
    images = [samples.encode(image.repeat(8, 0).repeat(8, 1), "JPEG") for image in noise]
    kilobytes = sum(map(len, images)) / count / 1000
    print_table(
        f"JPEG {side}×{side}, {kilobytes:.1f} kB, one thread",
        {
            f"decode to {to}×{to}": rate(lambda shape=(3, to, to): decode_all(images, shape, str), count, 5, 4)
            for to in (side, side // 2)
        },
    )
