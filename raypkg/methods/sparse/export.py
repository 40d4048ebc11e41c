"""Exporting a trained sparse model without the weights that do not exist."""

import copy
import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment
from raypkg.data import Data
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.worker import threads
from raypkg.experiments.samples import open_samples
from raypkg.experiments.trained import restored_model
from raypkg.experiments.training import MODEL
from raypkg.runs.checkpoints import save_tensors
from raypkg.runs.folder import RunFolder

from .active_linear import of_active
from .csr import compressed, exchange_linear
from .masks import prunable

EXPORTED = "model.csr.safetensors"
BATCH = 128  # samples of a timed forward pass
ROUNDS = 9  # timings of each model


class Exported(NamedTuple):
    """What an export made of a model.

    Attributes:
        weights: of linear and convolutional layers.
        active: those that are not zero.
        dense_bytes: of the dense file.
        bytes: of the exported one.
        dense_seconds: of the forward pass of a batch of test samples on one thread, the median of several.
        seconds: with sparse linear layers.
        difference: largest one between the logits of the two.
        batch: samples of the forward pass.
    """

    weights: int
    active: int
    dense_bytes: int
    bytes: int
    dense_seconds: float
    seconds: float
    difference: float
    batch: int


def export_sparse(folder: RunFolder, settings: Experiment) -> Exported:
    """Write a finished run's model in compressed sparse rows, and measure what that saves.

    Args:
        folder: of the run.
        settings: of the run.

    Raises:
        UserError: the run is not finished, its model's code has changed since, or no weight is zero.
    """
    storage = folder.storage
    data = open_samples(settings).data
    model = restored_model(folder, settings, data).eval()
    state = model.state_dict()
    names = set(prunable(model))
    if all(state[name].all() for name in names):
        raise UserError(f"run {folder.name!r} is dense: no weight is zero, so there is nothing to leave out")
    save_tensors(storage, EXPORTED, compressed(state, names))
    x = _test_batch(model, data)
    sparse_model = exchange_linear(copy.deepcopy(model), of_active)
    (dense_seconds, seconds), difference = _timed([model, sparse_model], x)
    return Exported(
        weights=sum(state[name].numel() for name in names),
        active=sum(int(torch.count_nonzero(state[name])) for name in names),
        dense_bytes=len(storage.read(MODEL) or b""),
        bytes=len(storage.read(EXPORTED) or b""),
        dense_seconds=dense_seconds,
        seconds=seconds,
        difference=difference,
        batch=len(x),
    )


def _test_batch(model: nn.Module, data: Data) -> Tensor:
    """Return the first test samples, as the model takes them."""
    indices = torch.arange(min(BATCH, len(data.test)))
    x, _ = next(plain_batches(data.test, indices, torch.device("cpu"), dtype=dtype_of(model)))
    return x


@torch.inference_mode()
def _timed(models: list[nn.Module], x: Tensor) -> tuple[list[float], float]:
    """Return each model's median seconds, taking turns on one thread, and by how much their outputs differ at most."""
    times: list[list[float]] = [[] for _ in models]  # taking turns, a noisy machine disturbs all alike
    with threads(1):
        outputs = [model(x) for model in models]
        for _ in range(ROUNDS):
            for model, seconds in zip(models, times, strict=True):
                start = time.perf_counter()
                model(x)
                seconds.append(time.perf_counter() - start)
    medians = [statistics.median(seconds) for seconds in times]
    return medians, (outputs[-1] - outputs[0]).abs().max().item()
