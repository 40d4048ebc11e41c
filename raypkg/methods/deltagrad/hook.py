"""A hook that records every step's weights and gradient, and who was in its batch: all that DeltaGrad replays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from raypkg.core.seeds import generator
from raypkg.engine.batches import shuffled
from raypkg.engine.run import Hook, Run


class Sink(Protocol):
    """Where a history goes."""

    digests: list[bytes]

    def cut(self, digests: Sequence[bytes]) -> None:
        """Keep the records of these digests and forget what came after."""

    def append(self, rate: float, w: np.ndarray, gradient: np.ndarray) -> None:
        """Add a step."""

    def flush(self) -> None:
        """Wait until everything is written."""


class Historian(Hook):
    """Records η, w_t and the mean loss gradient (without the L2 term) of every step.

    Args:
        sink: where they go; None on workers other than the first, whose gradients are the same.
    """

    def __init__(self, sink: Sink | None):
        self.sink = sink

    def on_epoch(self, run: Run) -> None:
        """Begin a new history with a new training."""
        if self.sink and not run.step:
            self.sink.cut([])

    def on_gradients(self, run: Run) -> None:
        """Hand the step over; it is written while training goes on."""
        if self.sink:
            gradients = [parameter.grad for parameter in run.model.parameters() if parameter.grad is not None]
            rate = run.optimizer.param_groups[0]["lr"]
            self.sink.append(rate, to_vector(run.model.parameters()).numpy(), to_vector(gradients).numpy())

    def on_epoch_end(self, run: Run) -> None:
        """Let the file catch up, so that the checkpoint finds it complete."""
        if self.sink:
            self.sink.flush()

    def state_dict(self) -> dict[str, Any]:
        """Return the digests of what is written, [steps, 16]."""
        digests = b"".join(self.sink.digests) if self.sink else b""
        return {"digests": torch.tensor(bytearray(digests), dtype=torch.uint8).view(-1, 16)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the checkpoint's last step."""
        if self.sink:
            self.sink.cut([digest.tobytes() for digest in state["digests"].numpy()])


def to_vector(tensors: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
    """Return tensors as one vector on the CPU, a copy."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu()


def assign(model: nn.Module, w: Tensor) -> None:
    """Overwrite a model's parameters with those of a vector, in the order of ``parameters()``."""
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(w[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()


@dataclass(frozen=True)
class Membership:
    """Which samples are in which batch, of all that were ever in the training.

    The samples of the first training have the places that the loop gave them; those added later, group by group, are
    drawn a batch for each epoch. A place belongs to its sample for good: added back after a deletion, it returns there.

    Attributes:
        trained: samples of the first training, int64 [n].
        added: groups of later ones.
        batch_size: of the first training.
        seed: names every draw.
    """

    trained: Tensor
    added: tuple[Tensor, ...]
    batch_size: int
    seed: int

    def places(self, epoch: int) -> list[Tensor]:
        """Return everyone with a place in each batch of an epoch, whether or not it is in use."""
        batches = [self.trained[part] for part in shuffled(len(self.trained), self.batch_size, self.seed, epoch)]
        for number, group in enumerate(self.added):
            rng = generator(self.seed, "added", number, epoch)
            drawn = torch.randint(len(batches), (len(group),), generator=rng)
            batches = [torch.cat([batch, group[drawn == place]]) for place, batch in enumerate(batches)]
        return batches
