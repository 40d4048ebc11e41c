"""Settings of AGENT."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raypkg.core.config import Settings
from raypkg.core.errors import UserError
from raypkg.core.settings import CacheGiB, Count, Training

FEWEST = 3  # corrected steps between snapshots: two differences, whose covariance is c
DAMPING = {"measured": 1.0, "published": 0.1, "linear": 0.75}  # γ, the latter two of the papers


class AgentOptions(Settings):
    """Adaptive gradient correction."""

    renamed: ClassVar[Mapping[str, str]] = {"every": "every_steps", "snapshot": "snapshot_every_steps"}

    form: Annotated[
        Literal["measured", "published", "linear"],
        Field(description="weight of the correction: by layer from gradients, AGENT's from losses, or α-SVRG's"),
    ] = "measured"
    gamma: Annotated[
        float | None,
        Field(gt=0, le=1, description="γ: damps the correction (default: 1; published 0.1, linear 0.75)"),
    ] = None
    alpha: Annotated[float, Field(ge=0, le=1, description="α: how fast c follows its estimate")] = 0.3
    always: Annotated[
        bool, Field(description="correct even where larger batches would do better, as the other two forms do")
    ] = False
    look_every_epochs: Annotated[
        Count, Field(description="epochs without correction until what it would leave is measured again")
    ] = 4
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

    @property
    def damping(self) -> float:
        """γ of the form."""
        return DAMPING[self.form] if self.gamma is None else self.gamma

    @property
    def stays_on(self) -> bool:
        """Whether it corrects where larger batches would do better, too."""
        return self.always or self.form != "measured"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse settings that would do nothing."""
        if self.form == "linear":
            self._refuse("agent.form = linear follows the time", "alpha")
        if self.form != "measured":
            self._refuse(f"agent.form = {self.form} never switches off", "always", "look_every_epochs")
        if self.always:
            self._refuse("agent.always = true never switches off", "look_every_epochs")
        return self

    def _refuse(self, reason: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise UserError(f"{reason}: agent.{name} would do nothing")

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
        never_known = self.form == "published" and not self.alpha
        if between >= steps or corrected < FEWEST or never_known:
            raise UserError(
                f"agent would correct nothing: of the {between} steps between snapshots, c is estimated from"
                f" {corrected} (at least {FEWEST}), in a training of {steps} steps, with agent.alpha = {self.alpha:g}"
                " (above 0)"
            )
