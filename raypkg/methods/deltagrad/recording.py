"""Training that records its history for DeltaGrad, and the first entry of the run's log."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.data import Data
from raypkg.phases.samples import Samples, augmentations, new_model, open_samples
from raypkg.phases.training import MODEL
from raypkg.runs.checkpoints import load_tensors
from raypkg.runs.storage import Storage

from .history import Layout, check_room
from .ledger import Ledger, digest
from .objective import check_derivation
from .recorded_data import record_data, settings_digest
from .vectors import to_vector


def version(storage: Storage, number: int) -> Path:
    """Return the folder of the history that the number-th entry of the log left.

    Raises:
        UserError: the run is not on a local disk, where alone a history can be mapped.
    """
    if storage.local is None:
        raise UserError(f"{storage.root}: a history is memory-mapped, so the run must be in a local folder")
    return storage.local / "versions" / f"{number:05d}"


def layout(settings: Any, data: Data) -> Layout:
    """Return how the history of the settings' model lies on the disk."""
    return Layout(sum(p.numel() for p in new_model(settings, data).parameters()), settings.history.dtype)


def check_derived(settings: Any) -> None:
    """Refuse what DeltaGrad's derivation does not cover.

    Raises:
        UserError: augmentation, another optimiser than plain SGD, dropout, or batch norm.
    """
    data, train = open_samples(settings).data, settings.train
    if augmentations(settings.dataset, data):
        raise UserError(
            f"dataset.augment = {','.join(augmentations(settings.dataset, data))}: DeltaGrad replays exact"
            " gradients, so samples cannot be augmented"
        )
    if train.optimizer != "sgd" or train.momentum:
        raise UserError(
            f"train.optimizer = {train.optimizer}, train.momentum = {train.momentum:g}: DeltaGrad is derived for SGD"
            " without momentum"
        )
    check_derivation(new_model(settings, data), settings.model.name)


def announced(settings: Any, found: Samples, storage: Storage) -> str:
    """Return how large the history will be.

    Raises:
        UserError: the disk has too little room.
    """
    steps = settings.train.epochs * -(-len(found.kept) // settings.train.batch_size)
    return check_room(version(storage, 0), layout(settings, found.data), steps)


def trained_weights(storage: Storage, model: nn.Module) -> Tensor:
    """Return the parameters of a run's model as one vector, float64 [p], in the order of ``model.parameters()``."""
    saved = load_tensors(storage, MODEL)
    return to_vector([saved[name].double() for name, _ in model.named_parameters()])


def begin_log(storage: Storage, settings: Any, record: dict[str, Any], found: Samples) -> None:
    """Write the log's first entry, unless it is there."""
    ledger = Ledger(storage)
    if not ledger.entries:
        model = digest(storage.read(MODEL) or b"")
        ledger.append(
            {
                "kind": "train",
                "samples": len(found.kept),
                "settings": settings_digest(settings),
                "rows": record_data(storage, found),
                "model": model,
                "history": record["history"],
            }
        )
