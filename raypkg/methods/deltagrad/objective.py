"""Sums of loss gradients over samples, in float64: in closed form for linear models, by autograd for others."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.settings import Model
from raypkg.data.augment import normalize
from raypkg.data.split import Split
from raypkg.engine.shards import Shard, Shards
from raypkg.models import build_model
from raypkg.models.classifier import Classifier

from .logistic import logistic_gradient
from .vectors import assign, to_vector

ROWS = 256  # samples at once: what they become in float64 fits the cache
STATEFUL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


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
        return is_linear(_built(self))

    def gradient_sum(self, split: Split, w: Tensor, indices: Tensor) -> Tensor:
        """Return Σ ∇loss_i(w) over the indices, float64 [p], block by block."""
        total = torch.zeros_like(w)
        if not len(indices):  # most approximate steps have no samples that came
            return total
        gradient = _logistic(split, w) if self.linear else _automatic(_built(self), split, w)
        for block in indices.split(ROWS):
            total += gradient(*split.batch(block))
        return total

    def logits(self, split: Split, w: Tensor, indices: Tensor) -> Tensor:
        """Return the logits at weights w, float64 [n, C]."""
        model = _built(self)
        assign(model, w)
        with torch.inference_mode():
            blocks = (split.batch(block)[0] for block in indices.split(ROWS))
            return torch.cat([model(normalize(x, split.mean, split.std, w.dtype)) for x in blocks])


def is_linear(model: nn.Module) -> bool:
    """Say whether a model is a linear layer on its inputs."""
    return isinstance(model, Classifier) and isinstance(model.features, nn.Flatten | nn.Identity)


def check_derivation(model: nn.Module, name: str) -> None:
    """Refuse layers by which a sample's gradient depends on chance or on the other samples.

    Raises:
        UserError: the model has dropout or batch norm, or parameters that are not trained.
    """
    if frozen := [name for name, parameter in model.named_parameters() if not parameter.requires_grad]:
        raise UserError(f"model {name!r} does not train its {frozen[0]!r}: DeltaGrad's history is of all parameters")
    for layer in model.modules():
        if isinstance(layer, STATEFUL):
            raise UserError(
                f"model {name!r} has {type(layer).__name__}: DeltaGrad's gradients must be sums over samples, without"
                " dropout or batch norm, as in linear and mlp"
            )


@cache
def _built(objective: Objective) -> nn.Module:
    settings = Model.model_validate_json(objective.model)
    model = build_model(settings.name, objective.shape, objective.num_classes, seed=0, options=settings.options)
    return model.double().eval()  # its weights are overwritten


Gradient = Callable[[Tensor, Tensor], Tensor]  # (x, y) → Σ ∇loss_i(w) [p]


def _logistic(split: Split, w: Tensor) -> Gradient:
    shift, scale = (torch.tensor(part, dtype=torch.float64) for part in (split.mean, split.std))
    scale, size = 1 / scale, 1
    if len(split.shape) == 3:  # channels of bytes
        shift, scale, size = shift * 255, scale / 255, split.shape[1] * split.shape[2]
    shift, scale = shift.repeat_interleave(size), scale.repeat_interleave(size)  # [D]
    return lambda x, y: logistic_gradient(w, x.flatten(1), y, shift, scale)


def _automatic(model: nn.Module, split: Split, w: Tensor) -> Gradient:
    assign(model, w)

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        logits = model(normalize(x, split.mean, split.std, w.dtype))
        return to_vector(torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), list(model.parameters())))

    return gradient


@dataclass(frozen=True)
class ShardedGradient:
    """Σ ∇loss_i(w), the samples' gradients computed where they are held and added in the order of the shards.

    Few samples are computed here: asking the holders takes longer.

    Attributes:
        objective: the loss.
        split: all samples.
        shards: hold them, in contiguous ranges.
    """

    objective: Objective
    split: Split
    shards: Shards
    few: int = 2048

    def __call__(self, w: Tensor, indices: Tensor) -> Tensor:
        """Return the sum over the indices, float64 [p]."""
        if len(indices) <= self.few:
            return self.objective.gradient_sum(self.split, w, indices)
        parts = self.shards.map(_shard_gradient, self.objective, w, indices)
        return torch.stack(parts).sum(0)


def _shard_gradient(shard: Shard, objective: Objective, w: Any, indices: Any) -> Tensor:
    mine = (indices >= shard.indices[0]) & (indices <= shard.indices[-1])
    return objective.gradient_sum(shard.data.train, w, indices[mine])
