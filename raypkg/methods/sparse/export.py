"""Export of a trained sparse model without its pruned weights."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from raypkg.core.errors import UserError
from raypkg.experiments import export_format
from raypkg.experiments.export import Finished, inputs_of, write_config
from raypkg.runs.folder import MODEL

from .compute import compressed
from .masks import prunable


@export_format("csr")
def export_csr(run: Finished, place: Path) -> str:
    """Write a sparse model's weights in compressed sparse rows, and what builds the model again."""
    state = run.classifier.state_dict()
    names = set(prunable(run.classifier))
    weights = sum(state[name].numel() for name in names)
    active = sum(int(torch.count_nonzero(state[name])) for name in names)
    if active == weights:
        raise UserError(f"run {run.folder.name!r} is dense: no weight is zero, so there is nothing to leave out")
    code = write_config(run, place)
    file = place / MODEL
    save_file(compressed(state, names), file)
    dense = len(run.folder.storage.read(MODEL) or b"")
    size = file.stat().st_size
    saved = f"{active:,} of {weights:,} prunable weights ({active / weights:.2%})"
    return (
        f"```python\n{code}from raypkg.methods.sparse.compute import expanded\n\n"
        f'model.load_state_dict(expanded(load_file("{MODEL}")))\n```\n\n'
        f"The file holds {saved} in {size:,} instead of {dense:,} bytes ({size / dense:.2f} ×). "
        + inputs_of(run.data, normalised=False)
    )
