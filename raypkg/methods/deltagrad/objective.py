"""A model's loss as a function of all its parameters, one vector w, and its gradients summed over samples, in float64.

Linear models have a closed form; the gradients of others come from autograd.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.settings import Model
from raypkg.data.kinds import IMAGES
from raypkg.data.split import Split
from raypkg.models import build_model
from raypkg.models.classifier import Classifier

BLOCK = 256  # samples at once: what they become in float64 fits the cache
STATEFUL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def to_vector(tensors: Iterable[Tensor]) -> Tensor:
    """Return tensors as one vector on the CPU, a copy."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu()


def assign(model: nn.Module, w: Tensor) -> None:
    """Overwrite a model's parameters with those of a vector, in the order of ``parameters()``."""
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            end = start + parameter.numel()
            parameter.copy_(w[start:end].view_as(parameter))
            start = end


@dataclass(frozen=True)
class Objective:
    """The loss of one model, by its settings: small enough to travel, built where it arrives.

    Attributes:
        model: its settings, as JSON.
        shape: of a sample.
        num_classes: C.
    """

    model: str
    shape: tuple[int, ...]
    num_classes: int

    @classmethod
    def of(cls, model: Model, split: Split) -> "Objective":
        """Return the objective of a model on the samples of a split."""
        return cls(model.model_dump_json(), split.shape, split.num_classes)

    @property
    def linear(self) -> bool:
        """Whether it is logistic regression, which is convex and has a closed form."""
        model = _built(self)
        return isinstance(model, Classifier) and isinstance(model.features, nn.Flatten | nn.Identity)

    def gradient_sum(self, split: Split, w: Tensor, indices: Tensor) -> Tensor:
        """Return Σ ∇loss_i(w) over the indices, float64 [p], block by block."""
        total = torch.zeros_like(w)
        if not len(indices):  # most approximate steps have no samples that came
            return total
        if self.linear:
            gradient = _closed_form(split, w)
        else:
            gradient = _autograd(_built(self), split, w)
        for block in indices.split(BLOCK):
            x, y = split.batch(block)
            total += gradient(x, y)
        return total

    def logits(self, split: Split, w: Tensor, indices: Tensor) -> Tensor:
        """Return the logits at weights w, float64 [n, C]."""
        model = _built(self)
        assign(model, w)
        logits = []
        with torch.inference_mode():
            for block in indices.split(BLOCK):
                x, _ = split.batch(block)
                inputs = split.inputs(x, w.dtype)
                logits.append(model(inputs))
        return torch.cat(logits)


def check_derivation(model: nn.Module, name: str) -> None:
    """Refuse models by which a sample's gradient depends on chance or on the other samples.

    Raises:
        UserError: the model has dropout or batch norm, parameters that are not trained, or a layer fitted to the data.
    """
    if isinstance(model, Classifier) and model.is_prepared:
        raise UserError(
            f"model {name!r} is fitted to the training inputs before it is trained: a deleted sample would stay in that"
        )
    frozen = (name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    if parameter := next(frozen, None):
        raise UserError(f"model {name!r} does not train its {parameter!r}: DeltaGrad's history is of all parameters")
    stateful = (layer for layer in model.modules() if isinstance(layer, STATEFUL))
    if layer := next(stateful, None):
        raise UserError(
            f"model {name!r} has {type(layer).__name__}: DeltaGrad's gradients must be sums over samples, without"
            " dropout or batch norm, as in linear and mlp"
        )


def logistic_gradient(w: Tensor, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return Σ_i ∇ cross-entropy of sample i: [δᵀz, Σδ] with δ = softmax(zWᵀ + b) − e_y and z = (x − shift) · scale.

    The standardisation is folded into the weights, so that stored samples are only converted, never standardised.

    Args:
        w: W [C, D] and then b [C], flattened, float64 [C·(D + 1)].
        x: uint8 or float [n, D].
        y: int64 [n].
        shift: of each column, float64 [D].
        scale: of each column, float64 [D].

    >>> w, y = torch.zeros(6, dtype=torch.float64), torch.tensor([0])
    >>> logistic_gradient(w, torch.tensor([[4, 8]], dtype=torch.uint8), y, torch.zeros(2), torch.ones(2)).tolist()
    [-2.0, -4.0, 2.0, 4.0, -0.5, 0.5]
    """
    width = x.shape[1]
    classes = len(w) // (width + 1)
    weight = w[:-classes].view(classes, -1)  # W [C, D]
    bias = w[-classes:]  # b [C]
    # zWᵀ + b = x (W·scale)ᵀ + (b − (W·scale) shift)
    folded = weight * scale  # [C, D]
    folded_bias = bias - folded @ shift.to(w.dtype)  # [C]
    samples = x.to(w.dtype)  # [n, D]
    logits = torch.addmm(folded_bias, samples, folded.T)  # [n, C]
    delta = logits.softmax(1)
    rows = torch.arange(len(y), device=y.device)
    delta[rows, y] -= 1
    of_bias = delta.sum(0)  # Σδ [C]
    # δᵀz = (δᵀx − Σδ shiftᵀ) · scale
    centred = delta.T @ samples - of_bias[:, None] * shift  # [C, D]
    of_weight = centred * scale
    return torch.cat([of_weight.flatten(), of_bias])


Gradient = Callable[[Tensor, Tensor], Tensor]  # (x, y) → Σ ∇loss_i(w) [p]


def _closed_form(split: Split, w: Tensor) -> Gradient:
    mean = torch.tensor(split.mean, dtype=torch.float64)
    std = torch.tensor(split.std, dtype=torch.float64)
    shift = mean
    scale = 1 / std
    if split.kind is IMAGES:  # stored as bytes, with one mean for each channel of [0, 1]
        _, height, width = split.shape
        shift = (mean * 255).repeat_interleave(height * width)  # [D]
        scale = (scale / 255).repeat_interleave(height * width)  # [D]
    return lambda x, y: logistic_gradient(w, x.flatten(1), y, shift, scale)


def _autograd(model: nn.Module, split: Split, w: Tensor) -> Gradient:
    assign(model, w)
    parameters = list(model.parameters())

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        inputs = split.inputs(x, w.dtype)
        logits = model(inputs)
        loss = F.cross_entropy(logits, y, reduction="sum")
        return to_vector(torch.autograd.grad(loss, parameters))

    return gradient


@cache
def _built(objective: Objective) -> nn.Module:
    """Build the model once a process; its weights are overwritten before each use."""
    settings = Model.model_validate_json(objective.model)
    model = build_model(settings.name, objective.shape, objective.num_classes, seed=0, options=settings.options)
    return model.double().eval()
