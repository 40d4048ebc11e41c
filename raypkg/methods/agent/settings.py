"""Settings of AGENT."""

from typing import Annotated

from pydantic import Field

from raypkg.core.config import Settings
from raypkg.core.settings import Count


class Agent(Settings):
    """Adaptive gradient correction."""

    gamma: Annotated[float, Field(gt=0, le=1, description="γ: damps the correction")] = 0.1
    alpha: Annotated[float, Field(ge=0, le=1, description="α: how fast c follows its estimate")] = 0.3
    samples: Annotated[
        Count | None, Field(description="samples of the full gradient, drawn anew each time; all when left out")
    ] = None
    every: Annotated[Count, Field(description="correct one step in so many; 1 = all, as published")] = 1
    snapshot: Annotated[int, Field(ge=0, description="steps between snapshots; 0 = an epoch, as published")] = 0
    memory: Annotated[
        float | None,
        Field(ge=0, description="GiB a worker may use to compute less, with the same result; a quarter of its own"),
    ] = None
