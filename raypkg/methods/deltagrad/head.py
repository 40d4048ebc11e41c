"""The record of a linear head that is trained in a loop of one's own, from which samples can be deleted afterwards."""

import math
import os
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.data.opening import normalisation
from raypkg.data.split import Split
from raypkg.experiments.samples import Samples
from raypkg.runs.checkpoints import save_tensors
from raypkg.runs.folder import MODEL

from .estimator import DeltaGrad, new_folder, row_numbers
from .history import HistoryWriter, Layout, RecordedStep, history_folder
from .objective import Objective, to_vector
from .run import begin_journal

CLOSE = 1e-3  # relative distance of a recorded gradient, possibly of float32, from the computed one


class HeadRecord:
    """Record every step of a linear head's training in a loop of one's own (DeltaGrad, arXiv:2006.14755).

    The recorder attaches to the optimizer by PyTorch's step hooks. The loop names the samples of each step by
    ``batch(ids)``, and ``finish(X, y)`` returns a `DeltaGrad` that can delete them. Additions are refused: the loop's
    batches have no place for them. The rate may change from step to step, and a GradScaler may skip steps.

    Args:
        head: with bias, [D] → [C], float32 or float64; the loop trains it by the mean cross-entropy of fixed inputs.
        optimizer: SGD without momentum of the head's two parameters; its weight decay is λ.
        history: new local folder for the record, as of `DeltaGrad`; None = a temporary one.

    Raises:
        UserError: another layer, optimizer or set of parameters; at a step: no ``batch(ids)`` since the last one.

    >>> x, y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    >>> head = nn.Linear(4, 3)
    >>> optimizer = torch.optim.SGD(head.parameters(), lr=0.5, weight_decay=0.01)
    >>> recorder = record(head, optimizer)
    >>> for ids in torch.arange(60).split(20) * 8:
    ...     recorder.batch(ids)
    ...     nn.functional.cross_entropy(head(x[ids]), y[ids]).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> model = recorder.finish(x, y, period=2).delete([3, 14])
    >>> model.verify() < 0.1
    True
    """

    def __init__(
        self, head: nn.Linear, optimizer: torch.optim.Optimizer, history: str | os.PathLike[str] | None = None
    ):
        group, *others = optimizer.param_groups
        parameters = [id(parameter) for parameter in group["params"]]
        is_linear = isinstance(head, nn.Linear) and head.weight.dtype in (torch.float32, torch.float64)
        if others or not is_linear or parameters != [id(head.weight), id(head.bias)]:
            wanted = "an nn.Linear with bias in float32 or float64, and an optimizer of its weight and bias only"
            raise UserError(f"record takes {wanted}")
        if not isinstance(optimizer, torch.optim.SGD) or group["momentum"] or group["maximize"]:
            given = f"{type(optimizer).__name__} with momentum {group.get('momentum', 0):g}"
            raise UserError(f"record takes SGD without momentum, from which DeltaGrad is derived, not {given}")
        self.head = head
        self.decay = group["weight_decay"]
        self.batches: list[Tensor] = []  # ids of each step, int64
        self._coming: list[Tensor] = []  # ids of the coming step
        self._ends: list[RecordedStep] = []  # the first and the last step
        self._is_finished = False
        self._history = history
        self._folder = new_folder(history)
        self._writer = HistoryWriter(history_folder(self._folder.storage, 0), Layout.of(head, "float64"))
        weakref.finalize(self, self._writer.close)  # of a loop that never finishes
        self._writer.start()
        self._hook = optimizer.register_step_pre_hook(self._on_step)

    def batch(self, ids: Any) -> None:
        """Name the samples of a backward pass before it, by row numbers [b]; parts of a step's batch add up."""
        gradients = [w.grad for w in self.head.parameters() if w.grad is not None]
        if not (gradients and 0 < to_vector(gradients).norm() < math.inf):
            self._coming = []  # of a step that GradScaler skipped: its gradients are gone, or infinite
        self._coming.append(torch.from_numpy(row_numbers(ids)))

    def _on_step(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        if getattr(optimizer, "found_inf", None):  # GradScaler leaves it to a fused optimizer to skip a step
            return
        (group,) = optimizer.param_groups
        gradients = [w.grad for w in (self.head.weight, self.head.bias) if w.grad is not None]
        if not self._coming or len(gradients) < 2:
            raise UserError("a step without batch(ids) before it, or without gradients: DeltaGrad cannot replay it")
        if group["weight_decay"] != self.decay:
            raise UserError(f"weight_decay was {self.decay} and is {group['weight_decay']}: DeltaGrad replays one λ")
        scale = getattr(optimizer, "grad_scale", None)  # by which a fused optimizer will divide
        gradient = to_vector(gradients) / (1.0 if scale is None else float(scale))
        step = RecordedStep(float(group["lr"]), to_vector(self.head.parameters()), gradient)
        self._writer.append(*step)
        self._ends = [*self._ends[:1], step]
        self.batches.append(torch.cat(self._coming))
        self._coming = []

    def finish(self, X: Any, y: Any, **replay: Any) -> DeltaGrad:
        """Detach from the optimizer, and return the trained head as an estimator that can delete samples.

        Args:
            X: inputs of the head by row number, [n, D].
            y: labels 0 … C − 1, [n].
            replay: ``period``, ``burn_in`` or ``pairs`` of `DeltaGrad`.

        Raises:
            UserError: the recorded gradients are not those of these samples' mean cross-entropy; recording continues.
        """
        if self._is_finished or not self.batches:
            raise UserError("finish: no step was recorded, or the model has been returned before")
        classes = np.arange(self.head.out_features)
        split = Split.from_tensors(X, y, [str(number) for number in classes])
        named = torch.cat(self.batches)
        unknown = named[(named < 0) | (named >= len(split))]
        if len(unknown):
            raise UserError(f"batch: id {int(unknown[0])} is no row of X, which are 0 … {len(split) - 1}")
        mean, std = normalisation(split, "none")
        split = replace(split, mean=mean, std=std)
        model = DeltaGrad(weight_decay=self.decay, scale="none", history=self._history).set_params(**replay)
        settings = model._settings()

        # The first and the last step show whether rows, labels and loss are those of the loop.
        objective = Objective.of(settings.model, split)
        for number, step in ((0, self._ends[0]), (len(self.batches) - 1, self._ends[-1])):
            ids = self.batches[number]
            expected = objective.gradient_sum(split, step.w.double(), ids) / len(ids)
            if not (step.gradient - expected).norm() <= CLOSE * expected.norm():
                raise UserError(f"the gradient of step {number} is not that of the mean cross-entropy of its samples")

        self._is_finished = True
        self._hook.remove()
        sealed = self._writer.seal(to_vector(self.head.parameters()))
        storage = self._folder.storage
        save_tensors(storage, MODEL, {f"head.{name}": w.double() for name, w in self.head.state_dict().items()})
        begin_journal(self._folder, settings, Samples.all_of(split), sealed, classes, self.batches)
        return model._open(self._folder)


record = HeadRecord
