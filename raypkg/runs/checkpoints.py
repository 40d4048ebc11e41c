"""Checkpoints: tensors and plain values, the newest complete one wins, no pickle is ever run.

They are files of the run folder and not Ray Train checkpoints: a killed driver, another number of workers and a run
without Ray all resume from them, and a rename makes each of them atomic.
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
    """The last states of one phase, as ``epoch_00012.pt``; older ones are deleted.

    Args:
        storage: the phase's own folder.
        keep: how many to keep, so that a corrupt newest one leaves another.
    """

    def __init__(self, storage: Storage, keep: int = 2):
        self.storage = storage
        self.keep = keep
        self._proved = False

    def load(self) -> dict[str, Any] | None:
        """Return the newest readable state, or None."""
        for name in reversed(self._names()):
            state = load_state(self.storage, name)
            if state is not None:
                return state
        return None

    def save(self, epoch: int, state: dict[str, Any]) -> None:
        """Write a state, then delete those beyond the newest ``keep``."""
        name = f"epoch_{epoch:05d}.pt"
        save_state(self.storage, name, state)
        if not self._proved:
            self._prove(name)
        for name in self._names()[: -self.keep]:
            self.storage.delete(name)

    def _names(self) -> list[str]:
        """Return the files in the order of their epochs: those from 100,000 on have more digits than names pad to."""
        return sorted(self.storage.list(), key=lambda name: (len(name), name))

    def _prove(self, name: str) -> None:
        """Read the first checkpoint back: one that cannot be read would be found too late."""
        if load_state(self.storage, name) is None:
            raise UserError(NOT_PLAIN)
        self._proved = True


def save_state(storage: Storage, name: str, state: dict[str, Any]) -> None:
    """Write tensors and plain values as one file.

    Raises:
        UserError: there are other values among them, which cannot be stored at all.
    """
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
    except (pickle.PicklingError, AttributeError, TypeError):
        raise UserError(NOT_PLAIN) from None
    storage.write(name, buffer.getvalue())


def load_state(storage: Storage, name: str) -> dict[str, Any] | None:
    """Return what ``save_state`` wrote, or None when it is missing or (with a warning) corrupt."""
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
    """Return a model's state from safetensors.

    Raises:
        UserError: there is no such file, or it is not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = storage.read(name)
    if content is None:
        raise UserError(f"{storage.root} has no {name}: the phase that makes it is not finished")
    try:
        return load(content)
    except SafetensorError as error:
        raise UserError(f"{storage.root}/{name} is corrupt: {error}") from None
