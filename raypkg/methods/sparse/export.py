"""Export of a trained sparse model without its pruned weights."""

import copy
import statistics
import time

import torch
from rich.box import SIMPLE
from rich.table import Table

from raypkg.core.errors import UserError
from raypkg.core.settings import Experiment
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.worker import threads
from raypkg.experiments import export_format
from raypkg.experiments.samples import open_samples
from raypkg.experiments.trained import restored_model
from raypkg.experiments.training import MODEL
from raypkg.models.classifier import classifier
from raypkg.runs.checkpoints import save_tensors
from raypkg.runs.folder import RunFolder

from .compute import compressed, exchange_linear, only_active
from .masks import prunable

EXPORTED = "model.csr.safetensors"
BATCH = 128  # samples of a timed forward pass
ROUNDS = 9  # timings of each model


@export_format("csr")
def export_csr(folder: RunFolder, settings: Experiment) -> Table:
    """Write a finished run's model in compressed sparse rows; return a table of the savings."""
    storage = folder.storage
    data = open_samples(settings).data
    model = classifier(restored_model(folder, settings, data), "effray export").eval()
    state = model.state_dict()
    names = set(prunable(model))
    if all(state[name].all() for name in names):
        raise UserError(f"run {folder.name!r} is dense: no weight is zero, so there is nothing to leave out")
    save_tensors(storage, EXPORTED, compressed(state, names))

    sparse_model = exchange_linear(copy.deepcopy(model), only_active)
    indices = torch.arange(min(BATCH, len(data.test)))
    x, _ = next(plain_batches(data.test, indices, torch.device("cpu"), dtype=dtype_of(model)))
    models = (model, sparse_model)
    times: tuple[list[float], ...] = ([], [])
    with threads(1), torch.inference_mode():
        outputs = [each(x) for each in models]
        for _ in range(ROUNDS):  # in turn, so that a noisy machine disturbs both alike
            for each, seconds in zip(models, times, strict=True):
                start = time.perf_counter()
                each(x)
                seconds.append(time.perf_counter() - start)

    weights = sum(state[name].numel() for name in names)
    active = sum(int(torch.count_nonzero(state[name])) for name in names)
    dense_bytes = len(storage.read(MODEL) or b"")
    sparse_bytes = len(storage.read(EXPORTED) or b"")
    dense_ms, sparse_ms = (1e3 * statistics.median(seconds) for seconds in times)
    difference = (outputs[1] - outputs[0]).abs().max().item()
    table = Table("", "dense", "csr", "", box=SIMPLE, show_edge=False, pad_edge=False)
    table.add_row("weights", f"{weights:,}", f"{active:,}", f"{active / weights:.2%}")
    table.add_row("bytes", f"{dense_bytes:,}", f"{sparse_bytes:,}", f"{sparse_bytes / dense_bytes:.2f} ×")
    table.add_row(
        f"ms for {len(x)} samples, one thread", f"{dense_ms:.3f}", f"{sparse_ms:.3f}", f"{sparse_ms / dense_ms:.2f} ×"
    )
    table.add_row("largest difference of logits", "", f"{difference:.1e}", "")
    return table
