import pytest
import torch

from raypkg.core.errors import UserError
from raypkg.data.split import Split

IMAGES = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).view(2, 3, 2, 2)
ROWS = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
Y = torch.tensor([0, 1])


def test_images_by_hand():
    split = Split.from_tensors(IMAGES, Y, classes=("a", "b", "c"), augment=["crop"])
    assert split.shape == (3, 2, 2) and split.num_classes == 3 and split.augment == ("crop",)
    assert split.batch([1])[0].equal(IMAGES[1:])
    assert split.mean == pytest.approx([7.5 / 255, 11.5 / 255, 15.5 / 255])  # (0+1+2+3+12+13+14+15) / 8 = 7.5


def test_rows_by_hand():
    split = Split.from_tensors(ROWS.double(), Y)
    assert split.mean == (2.0, 2.0) and split.std == (1.0, 1.0)  # a constant column counts as deviation 1
    assert split.batch([1])[0].equal(ROWS[1:])


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (IMAGES.float(), Y, r"x is float32 \[2, 3, 2, 2\], needed is uint8 \[n, C, H, W\] or float \[n, D\]"),
        (IMAGES[0], Y, "x is uint8"),
        (ROWS.long(), Y, "x is int64"),
        (ROWS, Y.float(), r"y is float32 \[2\], needed are integers \[2\]"),
        (ROWS, Y[:1], r"y is int64 \[1\], needed"),
        (ROWS, Y[:, None], "y is"),
        (ROWS, Y.bool(), "y is bool"),
        (ROWS[:0], Y[:0], r"x is empty: \[0, 2\]"),
        (torch.tensor([[0.0, 1], [torch.nan, 0]]), Y, "row 1 of x holds NaN or infinity"),
        (torch.tensor([[torch.inf, 1], [0, 0]]), Y, "row 0 of x holds NaN or infinity"),
        (ROWS, torch.tensor([0, 2]), "labels run from 0 to 2 but none is 1"),
        (ROWS, torch.tensor([-1, 0]), "labels run from -1 to 0 but none is 1"),
    ],
)
def test_what_is_refused(x, y, message):
    with pytest.raises(UserError, match=message):
        Split.from_tensors(x, y)


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_outside_the_named_classes(label):
    with pytest.raises(UserError, match=rf"sample 1 has label {label}, allowed is 0 … 1"):
        Split.from_tensors(ROWS, torch.tensor([0, label]), classes=("a", "b"))
