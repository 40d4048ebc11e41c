"""Settings of AGENT."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raypkg.core.config import Settings
from raypkg.core.errors import UserError
from raypkg.core.settings import CacheGiB, Count, Training

FEWEST = 3  # corrected steps between snapshots of the measured form: two differences, whose covariance is c
DAMPING = {"measured": 1.0, "published": 0.1, "linear": 0.75}  # γ; the latter two as in the papers


class AgentOptions(Settings):
    """Adaptive gradient correction."""

    former: ClassVar[Mapping[str, Any]] = {"form": "measured"}
    renamed: ClassVar[Mapping[str, str]] = {"every": "every_steps", "snapshot": "snapshot_every_steps"}

    form: Annotated[
        Literal["measured", "published", "linear"],
        Field(
            description="weight c: measured per layer from gradients, as published from losses, or linear as in α-SVRG"
        ),
    ] = "published"
    gamma: Annotated[
        float | None, Field(gt=0, le=1, description="γ: damps the correction (default: 0.1; measured 1, linear 0.75)")
    ] = None
    alpha: Annotated[float, Field(ge=0, le=1, description="α: share of the newest estimate in c")] = 0.3
    always: Annotated[
        bool, Field(description="correct even if larger batches would be better, as the other forms do")
    ] = False
    look_every_epochs: Annotated[
        Count, Field(description="epochs without correction until the next look at its effect")
    ] = 4
    samples: Annotated[
        Count | None, Field(description="samples of the full gradient, drawn anew each time (default: all)")
    ] = None
    every_steps: Annotated[Count, Field(description="correct every n-th step; 1 = all, as published")] = 1
    snapshot_every_steps: Annotated[
        int, Field(ge=0, description="steps between snapshots; 0 = one per epoch, as published")
    ] = 0
    memory: CacheGiB = None

    @property
    def damping(self) -> float:
        """γ of the form."""
        return DAMPING[self.form] if self.gamma is None else self.gamma

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse settings that would do nothing."""
        idle = {}
        if self.form == "linear":
            idle["alpha"] = "agent.form = linear follows the time"
        if self.form != "measured":
            idle |= dict.fromkeys(["always", "look_every_epochs"], f"agent.form = {self.form} never switches off")
        elif self.always:
            idle["look_every_epochs"] = "agent.always = true never switches off"
        for name, reason in idle.items():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise UserError(f"{reason}: agent.{name} would do nothing")
        return self

    def check(self, n: int, training: Training) -> None:
        """Refuse settings by which a training on n samples would correct nothing."""
        batch = training.batch_size
        per_epoch = training.steps_per_epoch(n)
        steps = training.epochs * per_epoch
        if self.samples and not batch <= self.samples < n:
            allowed = f"at least a batch, train.batch_size = {batch}, and fewer than all {n}, the default"
            raise UserError(f"agent.samples = {self.samples}: {allowed}")
        between = self.snapshot_every_steps or per_epoch
        corrected = between // self.every_steps
        fewest = FEWEST if self.form == "measured" else 1
        problem = ""
        if between >= steps:
            problem = f"{between} steps between snapshots, in a training of {steps} steps, leave one snapshot"
        elif corrected < fewest:
            problem = f"of the {between} steps between snapshots {corrected} would be corrected (at least {fewest})"
        elif self.form == "published" and per_epoch < 2:
            problem = f"the published c is a covariance over the batches of an epoch: {per_epoch} (at least 2)"
        elif self.form == "published" and not self.alpha:
            problem = "c stays 0 with agent.alpha = 0 (above 0)"
        if problem:
            raise UserError(f"agent would correct nothing: {problem}")
