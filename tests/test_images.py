"""A store of images is built from a source that is read once."""

import numpy as np
import pytest

import samples
from raypkg.core.errors import UserError
from raypkg.data.store import images
from raypkg.data.store.images import open_images, surveyed

N = 12
COLOURS = [samples.encode(image) for image in samples.pixels(N)]
GREYS = [samples.encode(image) for image in samples.pixels(N, channels=1)]


class Source:
    """Images that are streamed four at a time; counts the passes."""

    classes = ("a",)

    def __init__(self, encoded):
        self.encoded = encoded
        self.length = len(encoded)
        self.passes = 0

    def batches(self, first):
        self.passes += 1
        for start in range(first, len(self.encoded), 4):
            part = self.encoded[start : start + 4]
            yield part, np.zeros(len(part), np.int64)

    def name(self, i):
        return f"image {i}"


def opened(tmp_path, encoded, kind, monkeypatch, size=0):
    """Build a store of these images; return its train split and the source."""
    source = Source(encoded)
    if kind == "encoded":
        monkeypatch.setattr(images, "DECODED_BYTES", 0)
    split = open_images("train", lambda name: tmp_path / f"{name}.arrow", lambda name: source, {"train": []}, size)
    return split, source


@pytest.mark.parametrize("kind", ["pixels", "encoded"])
@pytest.mark.parametrize(
    ("encoded", "channels", "passes"),
    [
        (COLOURS, 3, 1),
        (GREYS, 1, 1),
        (GREYS[:2] + COLOURS[2:], 3, 1),  # the first images are looked at before anything is written
        (COLOURS[:2] + GREYS[2:], 3, 1),
        (GREYS[:-1] + COLOURS[-1:], 3, 2),
    ],
)
def test_the_source_is_read_once(tmp_path, monkeypatch, kind, encoded, channels, passes):
    split, source = opened(tmp_path, encoded, kind, monkeypatch)
    assert split.shape == (channels, 6, 5) and source.passes == passes
    x, _ = split.batch(range(N))
    alone = [images.decode_all([data], split.shape, str)[0] for data in encoded]
    np.testing.assert_array_equal(x.permute(0, 2, 3, 1).numpy(), alone)
    pixels = np.stack(alone).reshape(-1, channels) / 255
    assert split.mean == pytest.approx(pixels.mean(0).tolist()) and split.std == pytest.approx(pixels.std(0).tolist())


@pytest.mark.parametrize("kind", ["pixels", "encoded"])
def test_an_image_of_another_size_is_found_wherever_it_stands(tmp_path, monkeypatch, kind):
    other = samples.encode(samples.pixels(1, 8, 8)[0])
    with pytest.raises(UserError, match="several sizes, such as 6×5 and 8×8"):
        opened(tmp_path, [*COLOURS[:-1], other], kind, monkeypatch)
    assert not (tmp_path / "train.arrow").exists()


def test_headers_are_numbered_through(tmp_path):
    source = Source([*COLOURS[:9], b"no image", *COLOURS[10:]])
    with pytest.raises(UserError, match="image 9 does not decode"):
        list(surveyed(source, 0))


def test_what_a_source_raises_reaches_the_caller(tmp_path):
    class Failing(Source):
        def batches(self, first):
            yield COLOURS, np.zeros(N, np.int64)
            raise UserError("the disk is gone")

    with pytest.raises(UserError, match="the disk is gone"):
        list(surveyed(Failing(COLOURS), 0))
