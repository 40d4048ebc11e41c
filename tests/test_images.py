"""Encoded images: headers, decoding, and a store built in a single pass over its source."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

import samples
from raypkg.core.errors import UserError
from raypkg.data.store import images
from raypkg.data.store.images import decode, decode_all, jpeg_header, open_images, read_header, surveyed
from raypkg.engine.worker import threads
from reference import decoded_in_full, image_header

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
        (GREYS[:2] + COLOURS[2:], 3, 1),  # the first batch is surveyed before anything is written
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


# Headers and decoding

EXIF = Image.Exif()
EXIF[274] = 6  # turned on its side, which is ignored
EXIF[270] = "a long description " * 200
JPEGS = [
    {},
    {"progressive": True},
    {"optimize": True, "quality": 20},
    {"subsampling": 0, "quality": 100},
    {"exif": EXIF.tobytes()},
    {"icc_profile": b"profile" * 12_000},  # of two segments
    {"comment": b"\xff\xc0 is no frame here"},
    {"restart_marker_rows": 1},
]


def photograph(height, width, channels=3, seed=0, detail=8):
    """Return an image with details of this many pixels, and some grain."""
    coarse = samples.pixels(1, height // detail + 1, width // detail + 1, seed=seed)[0]
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = np.random.default_rng(seed).normal(0, 5, smooth.shape)
    return (smooth + grain).clip(0, 255).astype(np.uint8)[..., :channels]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_formats_come_back_as_they_were(kind, channels):
    image = samples.pixels(1, channels=channels)[0]
    data = samples.encode(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decode(data, (channels, 6, 5)), image)


@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
def test_a_jpeg_decoded_at_reduced_size_is_near_the_whole(divisor):
    side = 64
    image = photograph(side * divisor + 7, side * divisor + 90, detail=8 * divisor)
    data = samples.encode(image, "JPEG", quality=90)
    whole = decoded_in_full(data, side).astype(int)
    error = np.abs(decode(data, (3, side, side)) - whole)
    assert error.mean() <= 5  # of 255; moved by a pixel it is 10
    assert error.any() == (divisor > 1)  # not the same where it is a part


def test_a_jpeg_a_little_too_large_is_decoded_in_full():
    data = samples.encode(photograph(127, 200), "JPEG", quality=90)
    np.testing.assert_array_equal(decode(data, (3, 64, 64)), decoded_in_full(data, 64))


@pytest.mark.parametrize("options", JPEGS, ids=lambda options: next(iter(options), "plain"))
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sides", [(1, 1), (7, 130), (64, 64)])
def test_a_jpeg_header_equals_that_of_pillow(monkeypatch, options, channels, sides):
    data = samples.encode(photograph(*sides, channels), "JPEG", **options)
    expected = image_header(data)
    monkeypatch.setattr(Image, "open", None)  # it is read without
    assert read_header(data, str, 0) == expected


@pytest.mark.parametrize("options", JPEGS, ids=lambda options: next(iter(options), "plain"))
@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_of_the_right_size_has_pillows_pixels(monkeypatch, options, channels):
    whole = samples.encode(photograph(16, 24, channels), "JPEG", **options)
    rng = np.random.default_rng(0)
    damaged = [whole[:-1], whole[: len(whole) // 2], whole + b"more"]
    for place in rng.integers(2, len(whole), 30):
        damaged.append(whole[:place] + bytes([rng.integers(256)]) + whole[place + 1 :])

    def pixels(data, shape):
        try:
            return decode(data, shape).tolist()
        except images.DAMAGED:
            return None

    found = [pixels(data, (c, 16, 24)) for data in (whole, *damaged) for c in (1, 3)]
    monkeypatch.setattr(images, "jpeg_header", lambda data: None)
    assert found == [pixels(data, (c, 16, 24)) for data in (whole, *damaged) for c in (1, 3)]


def test_unusual_jpeg_files_are_left_to_pillow(monkeypatch):
    file = io.BytesIO()
    Image.fromarray(photograph(16, 24)).convert("CMYK").save(file, "JPEG")
    assert jpeg_header(file.getvalue()) is None
    assert read_header(file.getvalue(), str, 0) == (16, 24, False)
    data = samples.encode(photograph(16, 24), "JPEG")
    start_of_pixels = data.index(b"\xff\xda")
    for end in range(start_of_pixels):
        assert jpeg_header(data[:end]) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 14)
    for content in (data, samples.encode(samples.pixels(1)[0])):
        with pytest.raises(UserError, match=r"row 3 is too large to decode: Image size \(\d+ pixels\) exceeds limit"):
            read_header(content, "row {}".format, 3)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_threads_change_nothing(count):
    assert decode_all([], (3, 6, 5), str).shape == (0, 6, 5, 3)
    images = [samples.encode(photograph(20 + i, 30, seed=i), "JPEG") for i in range(23)]
    one_by_one = np.stack([decode(data, (3, 16, 16)) for data in images])
    with threads(count):
        np.testing.assert_array_equal(decode_all(images, (3, 16, 16), str), one_by_one)
        images[5] = images[20] = b"no image"
        with pytest.raises(UserError, match="image 5 does not decode"):  # the first
            decode_all(images, (3, 16, 16), "image {}".format)


def sixteen_bits():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16)).save(file, "PNG")
    return file.getvalue()


GREY, RED = samples.pixels(1, channels=1)[0], np.full((6, 5, 3), (255, 0, 0), np.uint8)
WHITE_MIDDLE = samples.encode(np.repeat(np.repeat([[[0], [255], [0]]], 10, 1), 10, 0).astype(np.uint8).repeat(3, 2))


@pytest.mark.parametrize(
    ("data", "shape", "expected"),
    [
        (samples.encode(GREY), (3, 6, 5), np.repeat(GREY, 3, 2)),
        (samples.encode(RED), (1, 6, 5), 76),  # luma 0.299 · 255
        (sixteen_bits(), (1, 1, 4), [[[0], [0], [1], [255]]]),  # the upper byte
        (WHITE_MIDDLE, (3, 10, 10), 255),  # cropped at the centre
    ],
)
def test_images_of_another_form_by_hand(data, shape, expected):
    assert read_header(data, str, 0)[2] == (data not in (samples.encode(RED), WHITE_MIDDLE))
    np.testing.assert_array_equal(decode(data, shape), np.broadcast_to(expected, (*shape[1:], shape[0])))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damaged_images_are_named_with_their_numbers_across_batches(monkeypatch, kind):
    data = samples.encode(samples.pixels(1, 32, 32)[0], kind)
    with pytest.raises(UserError, match="image 2 does not decode: it is damaged or no image"):
        decode_all([data, data, data[: len(data) // 2]], (3, 32, 32), "image {}".format)
    with pytest.raises(UserError, match="image 9 does not decode: it is damaged or no image"):
        list(surveyed(Source([*COLOURS[:9], b"no image", *COLOURS[10:]]), 0))

    def broken(image):
        raise RuntimeError("failed to decode image")  # as the AVIF decoder does

    monkeypatch.setattr(ImageFile.ImageFile, "load", broken)
    with pytest.raises(UserError, match="image 0 does not decode"):
        decode_all(COLOURS[:1], (3, 6, 5), "image {}".format)
