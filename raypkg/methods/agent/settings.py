"""Settings of AGENT."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raypkg.core.config import Settings
from raypkg.core.errors import UserError
from raypkg.core.settings import Training

FEWEST = {"measured": 3, "published": 2, "linear": 1}  # steps of an epoch: c is a covariance over differences, batches
DAMPING = {"measured": 1.0, "published": 0.1, "linear": 0.75}  # γ; the latter two as in the papers


class AgentOptions(Settings):
    """Adaptive gradient correction."""

    former: ClassVar[Mapping[str, Any]] = {"form": "measured"}
    removed: ClassVar[Mapping[str, Any]] = {
        "look_every_epochs": 4, "samples": False, "every_steps": 1, "every": 1, "snapshot_every_steps": 0,
        "snapshot": 0, "memory": False,
    }  # fmt: skip

    form: Literal["measured", "published", "linear"] = Field(
        "published",
        description="weight c: measured per layer from gradients, as published from losses, or linear as in α-SVRG",
    )
    gamma: float | None = Field(
        None, gt=0, le=1, description="γ: damps the correction (default: 0.1; measured 1, linear 0.75)"
    )
    alpha: float = Field(0.3, ge=0, le=1, description="α: share of the newest estimate in c")
    always: bool = Field(False, description="correct even if larger batches would be better, as the other forms do")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.form == "linear" and self.alpha != type(self).model_fields["alpha"].default:
            raise UserError("agent.form = linear follows the time: agent.alpha would do nothing")
        if self.form != "measured" and self.always:
            raise UserError(f"agent.form = {self.form} never switches off: agent.always would do nothing")
        if self.form == "published" and not self.alpha:
            raise UserError("agent.alpha = 0 with form = published would correct nothing: c stays 0, as it starts")
        return self

    def check(self, n: int, training: Training) -> None:
        """Refuse settings by which a training on n samples would correct nothing."""
        per_epoch = training.steps_per_epoch(n)
        problem = ""
        if training.epochs < 2:
            problem = "a training of one epoch has one snapshot"
        elif per_epoch < FEWEST[self.form]:
            problem = f"an epoch has {per_epoch} steps (at least {FEWEST[self.form]} with form = {self.form})"
        if problem:
            raise UserError(f"agent would correct nothing: {problem}")
