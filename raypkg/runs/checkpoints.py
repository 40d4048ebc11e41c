"""Checkpoints of tensors and plain values, without pickled code, and models as safetensors.

They are files of the run folder and not Ray Train checkpoints: a run whose driver was killed, with another number of
workers or without Ray, resumes from them, and each is written atomically.
"""

import io
import logging
import pickle
from typing import Any

import torch
from torch import Tensor

from raypkg.core.errors import UserError, redacted

from .storage import Storage

log = logging.getLogger(__name__)
NOT_PLAIN = (
    "a hook's state_dict() holds something that is neither a tensor nor a plain value, so no checkpoint could be"
    " restored: convert it, as with float(x)"
)


class StoredCheckpoints:
    """The last ``keep`` states of one phase, as ``epoch_00012.pt``: a corrupt newest one leaves another."""

    def __init__(self, storage: Storage, keep: int = 2):
        self.storage = storage
        self.keep = keep
        self._proved = False

    def load(self) -> dict[str, Any] | None:
        """Return the newest readable state, or None."""
        states = (load_state(self.storage, name) for name in reversed(self._names()))
        return next((state for state in states if state is not None), None)

    def save(self, epoch: int, state: dict[str, Any]) -> None:
        """Write a state, then delete all but the newest ``keep``."""
        name = f"epoch_{epoch:05d}.pt"
        save_state(self.storage, name, state)
        if not self._proved:  # read the first one back: an unreadable one would be discovered too late
            if load_state(self.storage, name) is None:
                raise UserError(NOT_PLAIN)
            self._proved = True
        for name in self._names()[: -self.keep]:
            self.storage.delete(name)

    def _names(self) -> list[str]:
        """Return the files in the order of their epochs; from 100,000 on, names have more digits."""
        return sorted(self.storage.list(), key=lambda name: (len(name), name))


def save_state(storage: Storage, name: str, state: dict[str, Any]) -> None:
    """Write tensors and plain values as one file; refuse other values."""
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
    except (pickle.PicklingError, AttributeError, TypeError):
        raise UserError(NOT_PLAIN) from None
    storage.write(name, buffer.getvalue())


def load_state(storage: Storage, name: str) -> dict[str, Any] | None:
    """Return a state written by ``save_state``, or None if it is missing or (with a warning) corrupt."""
    content = storage.read(name)
    if content is None:
        return None
    try:
        return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises many kinds on a damaged file
        log.warning("checkpoint %s/%s is unreadable and skipped: %s", redacted(storage.root), name, error)
        return None


def save_tensors(storage: Storage, name: str, parameters: dict[str, Tensor]) -> None:
    """Write a model's state as safetensors."""
    from safetensors.torch import save

    storage.write(name, save({key: value.contiguous() for key, value in parameters.items()}))


def load_tensors(storage: Storage, name: str) -> dict[str, Tensor]:
    """Return a model's state from safetensors; refuse a missing or corrupt file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = storage.read(name)
    if content is None:
        raise UserError(f"{storage.root} has no {name}: the phase that makes it is not finished")
    try:
        return load(content)
    except SafetensorError as error:
        raise UserError(f"{storage.root}/{name} is corrupt: {error}") from None
