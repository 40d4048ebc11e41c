"""Made-up views of a trained head: most samples are easy, some are hard, so that residuals are heavy-tailed."""

from functools import cache

import torch
from torch import Tensor

from raypkg.core.seeds import generator
from raypkg.coresets.gradients import HeadView


@cache
def _head(num_classes: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    means = torch.randn(num_classes, width, generator=generator(0, "means"))  # [C, D]
    weight = means.relu() * (20 / width)
    return means, weight, -0.5 * (weight * means.relu()).sum(dim=1)


def of_class(label: int, n: int, num_classes: int, width: int) -> HeadView:
    """n samples of one class: ReLU(class mean + noise of a log-normal size), seen by a head that knows the means."""
    rng, (means, weight, bias) = generator(0, "samples", label), _head(num_classes, width)
    noise = torch.randn(n, 1, generator=rng).mul(0.7).exp() * torch.randn(n, width, generator=rng)
    features = (means[label] + noise).relu_()  # [n, D]
    return HeadView(features @ weight.T + bias, features, torch.full((n,), label))
