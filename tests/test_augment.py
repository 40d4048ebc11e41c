import math

import pytest
import torch
from torchvision.transforms.v2 import functional as transforms

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.data.augment import AUGMENTATIONS, OPERATIONS, compose
from raypkg.data.coreset import Coreset
from raypkg.data.kinds import IMAGES, ROWS
from raypkg.data.split import Split
from raypkg.engine.batches import Batches
from raypkg.engine.worker import Worker

M = 5 / 30


def images(n=40, channels=3, height=32, width=32):
    x = torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator(0, "images"))
    return x.contiguous(memory_format=torch.channels_last)


def smooth(n=6):
    """Return images whose neighbouring pixels are alike, so that rounding a position changes little."""
    line = torch.linspace(0, 200, 32)
    plane = torch.stack([line[:, None].expand(32, 32), line[None, :].expand(32, 32), 40 + line.outer(line) / 250])
    return (plane + 5 * torch.arange(n)[:, None, None, None]).byte()


def uniforms(n, draws):
    return torch.rand(n, draws, generator=generator(0, "uniforms"))


SHAPES = [(3, 32, 32), (1, 28, 28), (3, 64, 64), (1, 8, 8), (4, 12, 20), (3, 5, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["crop", "crop:2", "crop:2:reflect", "crop:4:reflect"])
def test_crop_is_its_slow_twin(shape, name):
    """The slow twin: pad one image and slice it."""
    x, u = images(40, *shape), uniforms(40, 2)
    u[:3] = torch.tensor([0.0, 0.5, 1 - 2**-24])[:, None]  # the first corner, the centre and the last corner
    border = int(name[5]) if ":" in name else max(1, shape[2] // 8)
    mode = "reflect" if name.endswith("reflect") else "constant"
    padded = torch.nn.functional.pad(x.float(), (border,) * 4, mode).byte()
    corners = [[math.floor(value * (2 * border + 1)) for value in row] for row in u.tolist()]
    twin = [each[:, i : i + shape[1], j : j + shape[2]] for each, (i, j) in zip(padded, corners, strict=True)]
    assert compose([name])(x, u).equal(torch.stack(twin))


def test_alternating_flips_show_both_sides_in_two_epochs_for_any_number_of_workers():
    x = images(20, 3, 8, 8)
    split = Split.from_tensors(x, torch.arange(20) % 2)
    coreset = Coreset.uniform(torch.arange(3, 20))

    def sides(epoch, rank=0, world=1):
        """Return the samples of an epoch and whether each is mirrored."""
        worker = Worker(rank, world)
        seen = list(Batches(split, coreset, 5, seed=1, augment=["altflip"], worker=worker).epoch(epoch))
        order = torch.cat([batch.indices for batch in seen])
        shown = torch.cat([batch.x for batch in seen])
        mirrored = split.inputs(x[order].flip(3))
        return {i: torch.equal(one, other) for i, one, other in zip(order.tolist(), shown, mirrored, strict=True)}

    first, second, third = sides(0), sides(1), sides(2)
    assert first == third == sides(0, 0, 2) | sides(0, 1, 2)
    assert second == {i: not mirrored for i, mirrored in first.items()}
    assert len(first) == 17 and 0 < sum(first.values()) < 17


@pytest.mark.parametrize("shape", SHAPES)
def test_flip_is_its_slow_twin(shape):
    x, u = images(40, *shape), uniforms(40, 1)
    twin = [torch.flip(image, (2,)) if row < 0.5 else image for image, row in zip(x, u, strict=True)]
    assert compose(["flip"])(x, u).equal(torch.stack(twin))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("names", [["crop"], ["flip"], ["randaugment"], ["crop", "flip", "randaugment"]])
def test_a_slice_is_augmented_as_in_the_whole_batch(shape, names):
    augment = compose(names)
    x, u = images(24, *shape), uniforms(24, augment.draws)
    before, whole = x.clone(), augment(x, u)
    assert whole.shape == x.shape and whole.dtype == torch.uint8 and x.equal(before)
    assert whole.is_contiguous(memory_format=torch.channels_last)
    for part in (slice(0, 1), slice(1, 9), slice(9, 24)):
        assert augment(x[part], u[part]).equal(whole[part])
    assert augment(x[:0], u[:0]).shape == (0, *shape)


def test_augmentations_take_their_columns_in_order():
    x, u = images(), uniforms(40, 3)
    assert compose(["crop", "flip"])(x, u).equal(compose(["flip"])(compose(["crop"])(x, u[:, :2]), u[:, 2:]))


def test_none_unknown_and_unsuited_names():
    nothing, rows = compose([]), torch.rand(4, 3)
    assert nothing.draws == 0 and nothing(rows, torch.rand(4, 0)) is rows
    for name, x, problem in (
        ("crops", rows, "unknown augmentation 'crops', did you mean 'crop'"),
        ("crop", rows, r"samples of shape \[3\] are no images: leave out crop"),
        ("crop:9:reflect", images(4, 1, 8, 8), "crop:9:reflect: images of 8 pixels reflect at most 7"),
    ):
        with pytest.raises(UserError, match=problem):
            compose([name])(x, uniforms(4, 2))


def test_randaugment_applies_to_each_image_what_it_drew():
    x, u = smooth(60), uniforms(60, 2)
    result = AUGMENTATIONS["randaugment"](x, u)
    for image, out, (kind, sign) in zip(x, result, u.tolist(), strict=True):
        operation = [*OPERATIONS.values()][int(kind * 14)]
        assert out.equal(operation(image[None], M, torch.tensor([-1.0 if sign < 0.5 else 1.0]))[0])


F = 0.9 * M  # a factor's distance from 1
TWINS = {
    "identity": lambda x, s: x,
    "autocontrast": lambda x, s: transforms.autocontrast(x),
    "equalize": lambda x, s: transforms.equalize(x),
    "solarize": lambda x, s: transforms.solarize(x, 255 * (1 - M)),
    "posterize": lambda x, s: transforms.posterize(x, 8 - round(4 * M)),
    "brightness": lambda x, s: transforms.adjust_brightness(x, 1 + s * F),
    "contrast": lambda x, s: transforms.adjust_contrast(x, 1 + s * F),
    "color": lambda x, s: transforms.adjust_saturation(x, 1 + s * F),
    "sharpness": lambda x, s: transforms.adjust_sharpness(x, 1 + s * F),
    "rotate": lambda x, s: transforms.rotate(x, s * 30 * M),
    "shear_x": lambda x, s: moved(x, shear=[s * math.degrees(math.atan(0.3 * M)), 0]),
    "shear_y": lambda x, s: moved(x, shear=[0, s * math.degrees(math.atan(0.3 * M))]),
    "translate_x": lambda x, s: moved(x, translate=[int(s * 2), 0]),  # ⌊150/331 · 32 · m⌋ = 2 pixels
    "translate_y": lambda x, s: moved(x, translate=[0, int(s * 2)]),
}


def moved(x, translate=(0, 0), shear=(0.0, 0.0)):
    return transforms.affine(x, angle=0.0, translate=list(translate), scale=1.0, shear=list(shear))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("x", [images(6), smooth()], ids=["noise", "smooth"])
def test_an_operation_equals_that_of_torchvision(name, sign, x):
    got = OPERATIONS[name](x, M, torch.full((len(x),), sign)).int()
    expected = torch.stack([TWINS[name](image, sign) for image in x]).int()
    assert ((got - expected).abs() <= 1).float().mean() > 0.99  # blends round differently, nearest pixels may tie


def test_training_can_use_statistics_cached_in_inference():
    rows = torch.tensor([[1.0, 2.0]])
    mean, std = (2.0, 4.5), (1.0, 0.25)  # of no other test: they are cached
    with torch.inference_mode():
        ROWS.inputs(rows, mean, std, torch.float32)
    given = rows.clone().requires_grad_()
    ROWS.inputs(given, mean, std, torch.float32).sum().backward()
    assert given.grad.tolist() == [[1, 4]] and rows.tolist() == [[1, 2]]


@pytest.mark.parametrize("shape", SHAPES)
def test_normalised_images_are_their_plain_form(shape):
    x, mean, std = images(7, *shape), torch.rand(shape[0]), torch.rand(shape[0]) + 0.1
    plain = (x / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    got = IMAGES.inputs(x, mean.tolist(), std.tolist(), torch.float32)
    assert got.dtype == torch.float32 and got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, plain)
