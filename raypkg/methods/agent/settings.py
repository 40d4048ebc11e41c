"""Settings of AGENT."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from raypkg.core.config import Settings
from raypkg.core.errors import UserError
from raypkg.core.settings import CacheGiB, Count, Training

FEWEST = 3  # corrected steps between snapshots: two differences of losses, whose covariance is c


class AgentOptions(Settings):
    """Adaptive gradient correction."""

    renamed: ClassVar[Mapping[str, str]] = {"every": "every_steps", "snapshot": "snapshot_every_steps"}

    gamma: Annotated[float, Field(gt=0, le=1, description="γ: damps the correction")] = 0.1
    alpha: Annotated[float, Field(ge=0, le=1, description="α: how fast c follows its estimate")] = 0.3
    samples: Annotated[
        Count | None, Field(description="samples of the full gradient, drawn anew each time (default: all)")
    ] = None
    every_steps: Annotated[
        Count, Field(description="steps from one corrected step to the next; 1 = all are corrected, as published")
    ] = 1
    snapshot_every_steps: Annotated[
        int, Field(ge=0, description="steps between snapshots; 0 = one an epoch, as published")
    ] = 0
    memory: CacheGiB = None

    def check(self, n: int, training: Training) -> None:
        """Refuse a correction that would correct nothing.

        Args:
            n: training samples.
            training: of which it corrects the gradients.

        Raises:
            UserError: what is wrong.
        """
        batch = training.batch_size
        per_epoch = training.steps_per_epoch(n)
        steps = training.epochs * per_epoch
        if self.samples and not batch <= self.samples < n:
            raise UserError(
                f"agent.samples = {self.samples}: at least a batch, train.batch_size = {batch}, and fewer than all {n},"
                " which are taken when it is left out"
            )
        between = self.snapshot_every_steps or per_epoch
        corrected = between // self.every_steps
        if between >= steps or corrected < FEWEST or not self.alpha:
            raise UserError(
                f"agent would correct nothing: of the {between} steps between snapshots, c is estimated from"
                f" {corrected} (at least {FEWEST}), in a training of {steps} steps, with agent.alpha = {self.alpha:g}"
                " (above 0)"
            )
