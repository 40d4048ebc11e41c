import pytest
import torch
from torch import nn

from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment
from raypkg.data import load_data
from raypkg.experiments.samples import new_model
from raypkg.methods.deltagrad.objective import check_derivation
from raypkg.models import build_model
from raypkg.models.airbench import RATE, RIDGE, Shifted, Whitened, dirac


def images(n=40, side=9):
    """Smooth images, whose pixels go together, as those of photographs do."""
    drawn = torch.randn(n, 3, side + 2, side + 2, generator=torch.Generator().manual_seed(0))
    return nn.functional.avg_pool2d(drawn, 3, stride=1)


def test_whitened_patches_have_the_covariance_one():
    x = images()
    whitened = Whitened(3)
    whitened.fit(x)
    y = whitened(x).detach().double()  # [n, 24, H − 1, W − 1]
    assert torch.allclose(y[:, 12:], -y[:, :12], atol=1e-6)
    rows = y[:, :12].transpose(0, 1).flatten(1)  # [12, patches]
    covariance = rows @ rows.T / rows.shape[1]
    patches = nn.functional.unfold(x, 2).transpose(1, 2).flatten(0, 1).double()
    variances = torch.linalg.svdvals(patches).flip(0) ** 2 / len(patches)  # another way to them, ascending as well
    expected = torch.diag(variances / (variances + RIDGE))
    assert torch.allclose(covariance, expected, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_biases_learn_as_if_their_rate_were_so_many_times_the_others(norm):
    shifted = Shifted(8, norm)
    plain = nn.BatchNorm2d(8) if norm == "batch" else nn.GroupNorm(8, 8)
    x = torch.randn(16, 8, 5, 5)
    target = torch.randn(16, 8, 5, 5)
    for layer, rate in ((shifted, 0.1), (plain, 0.1 * RATE)):
        optimizer = torch.optim.SGD([layer.bias], rate, momentum=0.9, nesterov=True, weight_decay=0.01 / rate)
        for _ in range(4):
            optimizer.zero_grad()
            (layer(x) - target).square().mean().backward()
            optimizer.step()
    assert torch.allclose(RATE**0.5 * shifted.bias, plain.bias, atol=1e-5)
    assert plain.bias.abs().min() > 1e-3


def test_convolutions_hand_their_inputs_on_at_first():
    convolution = dirac(3, 8)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(convolution(x)[:, :3], x) and not torch.equal(convolution(x)[:, 3:6], x)


def test_a_new_model_has_looked_at_the_training_images():
    settings = Experiment(model={"name": "airbench", "options": {"width": 8}})
    data = load_data("digits")
    first, again = (new_model(settings, data) for _ in range(2))
    untouched = build_model("airbench", data.train.shape, data.train.num_classes, seed=0, options={"width": 8})
    filters = first.features[0].filters
    assert torch.equal(filters, again.features[0].filters)
    assert not torch.allclose(filters, untouched.features[0].filters)
    rows = torch.linspace(0, len(data.train) - 1, 512).long()
    x, _ = data.train.batch(rows)
    expected = Whitened(1)
    expected.fit(data.train.inputs(x))
    assert torch.equal(filters, expected.filters)
    assert torch.equal(first.head.weight, untouched.head.weight)  # what is drawn stays as it was


def test_with_group_norm_samples_do_not_see_each_other_but_deltagrad_refuses_what_is_fitted_to_them():
    net = build_model("airbench", (3, 16, 16), 4, seed=0, options={"norm": "group", "width": 8})
    x = images(n=6, side=16)
    assert torch.allclose(net(x), torch.cat([net(one[None]) for one in x]), atol=1e-6)
    with pytest.raises(UserError, match=r"'airbench' is fitted to the training inputs.*deleted samples would stay"):
        check_derivation(net, "airbench")
    check_derivation(build_model("lenet5", (3, 32, 32), 4, seed=0), "lenet5")
