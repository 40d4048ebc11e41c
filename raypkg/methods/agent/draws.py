"""The draws of a model in its passes over batches, such as dropout masks, repeated at the snapshot."""

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import seeded
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.run import Run


class RepeatedDraws:
    """The states of torch's generators before a model's latest pass over a batch, to repeat its dropout masks.

    With other masks, the two gradients would differ by noise of their own, which the correction would add to the step.
    Each worker draws by itself, and repeats its own draws.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.device = device
        self.x: Tensor | None = None
        self.states: list[Tensor] = []
        self.handle = model.register_forward_pre_hook(self.note)

    def repeat(self, x: Tensor) -> None:
        """Set the global generators to their states when the model received the batch ``x``."""
        if not self._is_of(x):
            raise UserError("agent: the model draws at random, as dropout does, and its pass was not over this batch")
        torch.set_rng_state(self.states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.states[1], self.device)

    def note(self, model: nn.Module, inputs: tuple[Tensor]) -> None:
        """Note the states before the first pass over a batch; another hook may pass it again."""
        (x,) = inputs
        if model.training and not self._is_of(x):
            self.x = x
            self.states = _generator_states(self.device)

    def _is_of(self, x: Tensor) -> bool:
        """Return True if samples are in the noted batch, which goes through the model whole or in parts."""
        return self.x is not None and x.untyped_storage().data_ptr() == self.x.untyped_storage().data_ptr()


def _generator_states(device: torch.device) -> list[Tensor]:
    """Return the states of the global generators from which layers on a device draw."""
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


@torch.no_grad()
def draws_at_random(model: nn.Module, run: Run) -> bool:
    """Return True if a pass of the model draws from torch's generators; it moves the model's running statistics.

    A trial finds more than a list of layers would: dropout within attention, and a user's model that draws. Draws from
    other generators, whose states cannot be restored, are refused.
    """
    indices = run.coreset.indices[:8]
    x, _ = next(plain_batches(run.split, indices, run.worker.device, len(indices), dtype_of(model)))
    model.train()
    outputs = []
    for _ in range(2):
        with seeded(run.seed, "probe"):
            before = _generator_states(run.worker.device)
            outputs.append(model(x))
            after = _generator_states(run.worker.device)
    if not torch.allclose(outputs[0], outputs[1], equal_nan=True):
        problem = "agent: the model gives one batch two outputs with torch's generators set back"
        raise UserError(f"{problem}: its draws are of another kind, and it would differ from its snapshot by noise")
    return not all(map(torch.equal, before, after))
