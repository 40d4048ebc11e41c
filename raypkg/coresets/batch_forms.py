"""The two forms of a user's batches: pairs (x, y), and mappings with "labels", as those of Hugging Face are."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.models.classifier import Tapped

LABELS = "labels"
WEIGHTS = "weights"
INDICES = "indices"


def inputs_and_labels(batch: Any) -> tuple[Any, Tensor]:
    """Return what the model takes of a batch, a tensor or a mapping, and the labels int64 [b].

    Raises:
        UserError: it is neither a pair nor a mapping with labels, or its labels are no integers from 0 up.
    """
    if isinstance(batch, Mapping):
        x, y = _without_labels(batch)
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        x, y = batch
    else:
        raise UserError(f"the data set must return pairs (x, y); a batch is a {type(batch).__name__}")
    if not _are_labels(y):
        shown = type(y).__name__
        if isinstance(y, Tensor):
            shown = f"{y.dtype} {list(y.shape)}"
        raise UserError(f"labels must be integers from 0 up, [b]; a batch has {shown}")
    return x, y.long()


def weighted(x: Any, y: Tensor, weights: Tensor, indices: Tensor) -> Any:
    """Return a batch in its form with its weights: (x, y, w), or a mapping with the positions as well."""
    weights = weights.to(y.device)
    if not isinstance(x, Mapping):
        return x, y, weights
    return {**x, LABELS: y, WEIGHTS: weights, INDICES: indices}


def on_device(x: Any, device: torch.device) -> Any:
    """Return what a model takes on its device."""
    if not isinstance(x, Mapping):
        return x.to(device)
    return {name: value.to(device) for name, value in x.items()}


class TappedByForm(Tapped):
    """Any module seen as ``head(features(x))``, which takes a tensor, or by keywords what is in a mapping."""

    def features(self, x: Any) -> Tensor:
        """Return what reaches the head [b, D]."""
        if isinstance(x, Mapping):
            return Tapped(_ByKeywords(self.module)).features(x)  # type: ignore[arg-type]  # which it passes on
        return super().features(x)


class _ByKeywords(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Mapping[str, Any]) -> Any:
        """Return the logits, which models of Hugging Face return among other things."""
        output = self.module(**x)
        return getattr(output, "logits", output)


def _without_labels(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    if LABELS not in batch:
        raise UserError(f"a batch of the data set has {', '.join(map(str, batch))}: it needs {LABELS!r} as well")
    inputs = {name: value for name, value in batch.items() if name != LABELS}
    return inputs, batch[LABELS]


def _are_labels(y: object) -> bool:
    if not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point():
        return False
    return len(y) == 0 or int(y.min()) >= 0
