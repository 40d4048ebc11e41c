"""Hooks: what a method or a user may do at each point of the training loop, and what a hook leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from raypkg.core.errors import unknown
from raypkg.data.coreset import Coreset

from . import hook as hook  # the registry

if TYPE_CHECKING:
    import pyarrow as pa

    from .batches import Epoch
    from .run import Run


class Selected(NamedTuple):
    """A coreset that a hook selected during training."""

    coreset: Coreset  # positions in the split, with weights
    origin: Mapping[str, Any]  # how it was made, as plain values
    indices: Tensor  # int64 [n], the samples it was selected from
    scores: Tensor | None = None  # float32 [n], their gradient norms, if known


class Results(NamedTuple):
    """The results of a hook, stored in the run folder."""

    facts: Mapping[str, Any] = {}  # plain values for the manifest
    findings: Sequence[str] = ()  # lines for the user
    tables: Mapping[str, pa.Table] = {}  # by file name
    plots: Mapping[str, Callable[[Path], None]] = {}  # by file name, functions that draw a picture to a path
    selected: Selected | None = None  # the coreset of the run


class Hook:
    """The base of all hooks: does nothing; a method overrides what it needs. Its state travels with checkpoints.

    >>> import torch
    >>> from raypkg import Run, Split, fit
    >>> class Clip(Hook):
    ...     def on_gradients(self, run):
    ...         torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    >>> split = Split.from_tensors(torch.arange(12.0).view(6, 2), torch.arange(6) % 2)
    >>> fit(Run.simple(torch.nn.Linear(2, 2), split, hooks=[Clip()], epochs=1)).epoch
    1
    """

    # Hooks act in ascending priority, equal ones as they are listed: readers of the raw gradient first (0), its
    # corrections next (10), a user's own hooks then (50), and last those that keep pruned weights at zero (100).
    priority: ClassVar[int] = 50
    supplies_batches: ClassVar[bool] = False  # True if ``batches`` is overridden; at most one hook of a run does so
    sharded: ClassVar[bool] = False  # True if it works where the workers share the model's parameters (FSDP2)

    def __init_subclass__(cls) -> None:
        cls.supplies_batches = cls.batches is not Hook.batches
        points = [name for name in vars(Hook) if name.startswith("on_")]
        if wrong := next((name for name in vars(cls) if name.startswith("on_") and name not in points), None):
            raise unknown(f"point of the training loop in the hook {cls.__name__}:", wrong, points)

    def on_start(self, run: Run) -> None:
        """Act before training, and before a checkpoint is restored; may change the first weights."""

    def on_epoch(self, run: Run) -> None:
        """Act before an epoch; may replace ``run.coreset``; records its own work with ``run.bill(name)``."""

    def batches(self, run: Run) -> Epoch | None:
        """Return the batches of the next epoch, or None to shuffle the coreset."""
        return None

    def on_gradients(self, run: Run) -> None:
        """Act after the backward pass of ``run.batch``, before gradients are clipped; may edit ``.grad`` in place."""

    def on_step(self, run: Run) -> None:
        """Act after the optimiser's step."""

    def on_epoch_end(self, run: Run) -> None:
        """Act after an epoch's last step, before its checkpoint."""

    def results(self, run: Run) -> Results:
        """Return the results of a finished training; called on rank 0 only."""
        return Results()

    def close(self) -> None:
        """Release files and processes, however training ended."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values that ``load_state_dict`` restores."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a checkpoint's state."""
