import numpy as np
import pytest
from PIL import Image

import samples
from raypkg.core.errors import UserError
from raypkg.data.store.decode import decode, decode_all, read_header


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_formats_come_back_as_they_were(kind, channels):
    image = samples.pixels(1, channels=channels)[0]
    data = samples.encode(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decode(data, (channels, 6, 5)), image)


def test_jpeg_is_near():
    image = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    assert np.abs(decode(samples.encode(image, "JPEG", quality=95), (3, 16, 16)).astype(int) - image).max() <= 3


def test_grey_as_colour_and_colour_as_grey():
    grey, red = samples.pixels(1, channels=1)[0], np.full((6, 5, 3), (255, 0, 0), np.uint8)
    np.testing.assert_array_equal(decode(samples.encode(grey), (3, 6, 5)), np.repeat(grey, 3, 2))
    assert (decode(samples.encode(red), (1, 6, 5)) == 76).all()  # luma 0.299 · 255


def test_sixteen_bits_keep_their_upper_byte(tmp_path):
    Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert read_header(data, str, 0).grey and decode(data, (1, 1, 4))[0, :, 0].tolist() == [0, 0, 1, 255]


def test_another_size_is_cropped_at_its_centre():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255  # the middle square is white
    assert (decode(samples.encode(image), (3, 10, 10)) == 255).all()
    assert (decode(samples.encode(image), (3, 5, 5))[:, 1:-1] == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damaged_images_are_named(kind):
    data = samples.encode(samples.pixels(1, 32, 32)[0], kind)
    with pytest.raises(UserError, match="image 2 does not decode"):
        decode_all([data, data, data[: len(data) // 2]], (3, 32, 32), "image {}".format)
    with pytest.raises(UserError, match="row 3 does not decode: it is damaged or no image"):
        read_header(b"no image", "row {}".format, 3)


def test_a_header():
    assert read_header(samples.encode(samples.pixels(1)[0]), str, 0) == (6, 5, False)


def test_no_images():
    assert decode_all([], (3, 6, 5), str).shape == (0, 6, 5, 3)


def test_an_image_of_too_many_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 14)
    with pytest.raises(UserError, match=r"row 3 is too large to decode: Image size \(30 pixels\) exceeds limit"):
        read_header(samples.encode(samples.pixels(1)[0]), "row {}".format, 3)


def test_what_a_codec_raises_at_a_damaged_image(monkeypatch):
    def broken(image, mode):
        raise RuntimeError("failed to decode image")  # as the AVIF decoder does

    monkeypatch.setattr(Image.Image, "convert", broken)
    with pytest.raises(UserError, match="image 0 does not decode"):
        decode_all([samples.encode(samples.pixels(1)[0])], (3, 6, 5), "image {}".format)
