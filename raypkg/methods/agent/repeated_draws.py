"""Drawing again what a step drew: the snapshot's pass over a batch has the dropout masks of the model's.

Without that the gradients of the two would differ by noise of their own, which the correction would add to the step.
"""

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raypkg.core.errors import UserError


class RepeatedDraws:
    """Remembers where torch's generators stood when a model began its latest pass over a batch.

    Args:
        model: trained, perhaps within DDP: each worker draws, and draws again, by itself.
        device: of the model.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.device = device
        self._x: Tensor | None = None
        self._states: list[Tensor] = []
        self._handle: RemovableHandle = model.register_forward_pre_hook(self._note)

    def repeat(self, x: Tensor) -> None:
        """Set the global generators to where they stood when the model was given ``x``.

        Raises:
            UserError: its latest pass was over something else.
        """
        if not self._is_of(x):
            raise UserError("agent: the model draws at random, as dropout does, and its pass was not over this batch")
        set_states(self._states, self.device)

    def close(self) -> None:
        """Stop watching the model."""
        self._handle.remove()

    def _is_of(self, x: Tensor) -> bool:
        """Say whether samples are of the batch that was noted, which goes through the model whole or in parts."""
        return self._x is not None and x.untyped_storage().data_ptr() == self._x.untyped_storage().data_ptr()

    def _note(self, model: nn.Module, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        if not model.training or self._is_of(x):  # the step's first pass is what is repeated; others may look again
            return
        self._x = x
        self._states = states_of(self.device)


def states_of(device: torch.device) -> list[Tensor]:
    """Return the states of the global generators that layers on a device draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_states(states: list[Tensor], device: torch.device) -> None:
    """Set the global generators to states of ``states_of``."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
