"""The form of every model, ``head(features(x))``, and the conversion of a user's module into it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raypkg.core.errors import UserError
from raypkg.data.kinds import IMAGES, TEXTS, kind_of

INSTEAD = "for rows use 'mlp' or 'linear', for texts 'transformer' or transformers:NAME"
Shape = tuple[int, ...]  # of one sample, (C, H, W), (D,) or (L, V)
Width = Annotated[int, Field(ge=1, le=1 << 20)]  # of a layer; wider ones would overflow the sizes of tensors
Probability = Annotated[float, Field(ge=0, lt=1)]
MeanStd = tuple[tuple[float, ...], tuple[float, ...]]  # of each channel


class Classifier(nn.Module):
    """A linear head on features, so that last-layer gradients are (p − e_y) ⊗ [h; 1]."""

    def __init__(self, features: nn.Module, head: nn.Linear):
        super().__init__()
        self.features = features  # x [b, …] → h [b, D]
        self.head = head  # h [b, D] → logits [b, C]
        # mean and std per channel of the inputs that the first weights were trained with; None if those were drawn
        self.trained_with: MeanStd | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [b, C]."""
        return self.head(self.features(x))

    def prepare(self, x: Tensor) -> None:
        """Set untrained state from normalised training inputs x [n, …], once, before the first step: here, nothing."""

    @property
    def is_prepared(self) -> bool:
        """Whether ``prepare`` sets anything, so that the model depends on inputs beyond its training."""
        return type(self).prepare is not Classifier.prepare


class Answered(NamedTuple):
    """The output of a language model on a batch: it computes the losses itself, labels have no part in them."""

    losses: Tensor  # mean cross-entropy over each sample's answered tokens, float32 or more [b]
    right: Tensor  # True where the first answered token is the most probable one, bool [b]
    tokens: Tensor  # number of answered tokens, int64 [b]


def image_shape(shape: Shape, least: int) -> tuple[int, int, int]:
    """Return (C, H, W), or refuse rows of a table and images with a side below ``least`` pixels."""
    if kind_of(shape) is not IMAGES:
        raise UserError(f"input shape {shape}: this model takes images (C, H, W); {INSTEAD}")
    channels, height, width = shape
    if min(height, width) < least:
        raise UserError(f"input shape {shape}: images for this model need at least {least} × {least} pixels")
    return channels, height, width


def flat_size(shape: Shape) -> int:
    """Return the number of values of a sample, or refuse texts."""
    if kind_of(shape) is TEXTS:
        raise UserError(f"input shape {shape}: this model takes images and rows; {INSTEAD}")
    return math.prod(shape)


def text_shape(shape: Shape) -> tuple[int, int]:
    """Return (L, V), or refuse images and rows."""
    if kind_of(shape) is not TEXTS:
        raise UserError(f"input shape {shape}: this model takes texts (L, V); for images or rows use 'mlp'")
    length, vocabulary = shape
    return length, vocabulary


def classifier(model: nn.Module, what: str) -> Classifier:
    """Return a model as the classifier that ``what`` needs; refuse a language model."""
    if not isinstance(model, Classifier):
        raise UserError(f"{what} needs a classifier, a linear head on features: a language model is none")
    return model


def as_classifier(module: nn.Module) -> Classifier:
    """Split a module at its last ``nn.Linear``, which becomes the head; an ``nn.Identity`` takes its place."""
    path, head = last_linear(module)
    features = nn.Identity() if module is head else module
    if module is not head:
        module.set_submodule(path, nn.Identity())
    split = Classifier(features, head)
    split.trained_with = getattr(module, "trained_with", None)
    return split


def last_linear(module: nn.Module) -> tuple[str, nn.Linear]:
    """Return the last linear layer of a module and its path there."""
    for path, layer in reversed(list(module.named_modules())):
        if isinstance(layer, nn.Linear):
            return path, layer
    raise UserError(f"{type(module).__name__} has no nn.Linear to serve as the head; the last layer must be one")


class Tapped(nn.Module):
    """A module as ``head(features(x))`` without changing it: the input of its last ``nn.Linear`` is read off."""

    def __init__(self, module: nn.Module):
        super().__init__()
        _, head = last_linear(module)
        self.module = module
        self.head = head

    def logits(self, x: Tensor) -> Any:
        """Return the output of the module."""
        return self.module(x)

    def features(self, x: Tensor) -> Tensor:
        """Return the input of the head [b, D]."""
        seen: list[Tensor] = []
        tap = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.logits(x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # PyTorch's, of another shape or type
            raise UserError(f"{type(self.module).__name__} cannot take the samples: {error}") from error
        finally:
            tap.remove()
        if len(seen) == 1 and seen[0].dim() == 2 and isinstance(logits, Tensor):
            expected = self.head(seen[0])
            if expected.shape == logits.shape and torch.allclose(expected, logits.to(expected), equal_nan=True):
                return seen[0]
        raise UserError(f"{type(self.module).__name__} must end in its last nn.Linear, used once, on inputs [b, D]")


def checked(module: nn.Module, name: str, shape: tuple[int, ...], num_classes: int) -> Classifier:
    """Return the module as a ``Classifier``, after a probe shows that it maps [b, *shape] to [b, D] to [b, C]."""
    if not isinstance(module, nn.Module):
        returned = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
        raise UserError(f"model {name!r} returned {returned}, not an nn.Module")
    if num_classes < 2:
        raise UserError(f"num_classes = {num_classes}: a classifier needs at least 2")
    paths: dict[nn.Parameter, str] = {}
    for path, parameter in module.named_parameters(remove_duplicate=False):
        if parameter in paths:
            shared = f"{paths[parameter]} and {path} are one parameter, which is stored and masked by name"
            raise UserError(f"model {name!r}: {shared}: give each layer its own")
        paths[parameter] = path
    # Known moments replace those of the training set in the normalisation of inputs.
    stated = getattr(module, "trained_with", None)
    if stated is not None:
        try:
            moments = torch.tensor(stated, dtype=torch.float64)  # [2, channels]
        except (TypeError, ValueError):  # of unequal lengths, or no numbers
            moments = torch.empty(0)
        if moments.shape != (2, shape[0]) or not moments.isfinite().all() or not moments[1].gt(0).all():
            allowed = f"the means and the stds of {shape[0]} channels, all finite and the latter above 0"
            raise UserError(f"model {name!r}: trained_with = {stated} must be {allowed}")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise UserError(f"model {name!r} has no parameter to train: it has none at all, or all of them are frozen")
    module.eval()  # the probe must not move batch-norm statistics
    x = kind_of(shape).example(2, shape)
    logits = probe(module, name, x, num_classes)
    if isinstance(module, Classifier):
        return module.train()
    split = as_classifier(module)
    probe(split.features, f"{name}, up to its last nn.Linear", x, split.head.in_features)
    again = probe(split, name, x, num_classes)
    if not torch.allclose(again, logits):
        raise UserError(f"model {name!r}: its last nn.Linear is not its last operation, so it cannot be the head")
    return split.train()


@torch.no_grad()
def probe(module: nn.Module, name: str, x: Tensor, width: int, *, exact: bool = True) -> Tensor:
    """Return a module's finite output [b, width] for x [b, …], or a wider one if not ``exact``; refuse any other."""
    try:
        out = module(x)
    except Exception as error:  # whatever the user's own code raises
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"model {name!r} cannot take inputs of shape {tuple(x.shape[1:])}: {reason}") from error
    is_matrix = isinstance(out, Tensor) and out.dim() == 2 and len(out) == len(x)
    if not is_matrix or out.shape[1] < width or (exact and out.shape[1] > width):
        returned = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise UserError(f"model {name!r} maps inputs {tuple(x.shape)} to {returned}, not to {(len(x), width)}")
    if not out.isfinite().all():
        raise UserError(f"model {name!r} maps inputs of shape {tuple(x.shape[1:])} to NaN or infinity")
    return out


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module within the wrappers of DDP and of `torch.compile`, with which it shares its parameters."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a model into training or evaluation mode inside the block; restore all modes and, of training, buffers.

    Layers that a model in training keeps in evaluation mode, such as frozen batch norms, stay so.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if training else []
    if not (training and model.training):
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, before in buffers:
            buffer.copy_(before)
