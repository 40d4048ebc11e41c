"""The training loss as a function of one parameter vector w, and its gradients summed over samples, in float64.

Logistic regression has a closed form; gradients of other models come from autograd.
"""

import math
from collections.abc import Iterable
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

BLOCK = 256  # samples at once: in float64 they fit the cache
STATEFUL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def to_vector(tensors: Iterable[Tensor]) -> Tensor:
    """Return a copy of tensors as one vector on the CPU."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu()


def assign(model: nn.Module, w: Tensor) -> None:
    """Overwrite a model's parameters with a vector, in the order of ``parameters()``."""
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            end = start + parameter.numel()
            parameter.copy_(w[start:end].view_as(parameter))
            start = end


@dataclass(frozen=True)
class Objective:
    """The loss of one model; small enough to send, as the model is built where it arrives."""

    model: str  # its settings, as JSON
    shape: tuple[int, ...]  # of a sample
    num_classes: int  # C

    @classmethod
    def of(cls, model: Model, split: Split) -> "Objective":
        """Return the objective of a model on the samples of a split."""
        return cls(model.model_dump_json(), split.shape, split.num_classes)

    @property
    def linear(self) -> bool:
        """Whether the model is logistic regression, which is convex and has a closed form."""
        model = _built(self)
        return isinstance(model, Classifier) and isinstance(model.features, nn.Flatten | nn.Identity)

    def gradient_sum(self, split: Split, w: Tensor, indices: Tensor) -> Tensor:
        """Return Σ ∇loss_i(w) over the indices, float64 [p]."""
        total = torch.zeros_like(w)
        if not len(indices):  # no sample was added to the batch: true of most steps
            return total
        if self.linear:
            # Of every column of the flattened samples as they are stored, float64 [D].
            shift = torch.tensor(split.mean, dtype=torch.float64)
            scale = 1 / torch.tensor(split.std, dtype=torch.float64)
            if split.kind is IMAGES:  # stored as bytes; their mean and deviation are those of each channel in [0, 1]
                pixels = math.prod(split.shape[1:])
                shift = (shift * 255).repeat_interleave(pixels)
                scale = (scale / 255).repeat_interleave(pixels)
            for block in indices.split(BLOCK):
                x, y = split.batch(block)
                total += logistic_gradient(w, x.flatten(1), y, shift, scale)
            return total

        model = _built(self)
        assign(model, w)
        parameters = list(model.parameters())
        for block in indices.split(BLOCK):
            x, y = split.batch(block)
            loss = F.cross_entropy(model(split.inputs(x, w.dtype)), y, reduction="sum")
            total += to_vector(torch.autograd.grad(loss, parameters))
        return total

    def logits(self, split: Split, w: Tensor, indices: Tensor) -> Tensor:
        """Return the logits at weights w, float64 [n, C]."""
        model = _built(self)
        assign(model, w)
        logits = []
        with torch.inference_mode():
            for block in indices.split(BLOCK):
                x, _ = split.batch(block)
                logits.append(model(split.inputs(x, w.dtype)))
        return torch.cat(logits)


def check_derivation(model: nn.Module, name: str) -> None:
    """Refuse models with dropout, batch norm, frozen parameters, or a layer fitted to the data."""
    problems = []
    if isinstance(model, Classifier) and model.is_prepared:
        problems.append("is fitted to the training inputs before training: deleted samples would stay part of it")
    problems += [f"does not train its {name!r}" for name, value in model.named_parameters() if not value.requires_grad]
    problems += [f"has {type(layer).__name__}" for layer in model.modules() if isinstance(layer, STATEFUL)]
    if problems:
        needed = "DeltaGrad records all parameters, and gradients that are sums over samples, as in linear and mlp"
        raise UserError(f"model {name!r} {problems[0]}: {needed}")


def logistic_gradient(w: Tensor, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return Σ_i ∇ cross-entropy of sample i: [δᵀz, Σδ] with δ = softmax(zWᵀ + b) − e_y and z = (x − shift) · scale.

    w is W [C, D] and then b [C], flattened, float64; x uint8 or float [n, D]; y int64 [n]; shift and scale float64 [D].

    >>> w, y = torch.zeros(6, dtype=torch.float64), torch.tensor([0])
    >>> logistic_gradient(w, torch.tensor([[4, 8]], dtype=torch.uint8), y, torch.zeros(2), torch.ones(2)).tolist()
    [-2.0, -4.0, 2.0, 4.0, -0.5, 0.5]
    """
    classes = len(w) // (x.shape[1] + 1)
    weight = w[:-classes].view(classes, -1)  # W [C, D]
    bias = w[-classes:]  # b [C]

    # The standardisation is folded into the weights, so that samples are only converted:
    # zWᵀ + b = x (W·scale)ᵀ + (b − (W·scale) shift)
    folded = weight * scale  # [C, D]
    folded_bias = bias - folded @ shift.to(w.dtype)  # [C]
    samples = x.to(w.dtype)  # [n, D]
    delta = torch.addmm(folded_bias, samples, folded.T).softmax(1)  # [n, C]
    rows = torch.arange(len(y), device=y.device)
    delta[rows, y] -= 1

    # δᵀz = (δᵀx − Σδ shiftᵀ) · scale
    of_bias = delta.sum(0)  # Σδ [C]
    centred = delta.T @ samples - of_bias[:, None] * shift  # [C, D]
    of_weight = centred * scale
    return torch.cat([of_weight.flatten(), of_bias])


@cache
def _built(objective: Objective) -> nn.Module:
    """Build the model once per process; its weights are overwritten before each use."""
    settings = Model.model_validate_json(objective.model)
    model = build_model(settings.name, objective.shape, objective.num_classes, seed=0, options=settings.options)
    return model.double().eval()
