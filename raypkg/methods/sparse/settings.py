"""Settings of sparse training."""

from typing import Annotated, Literal

from pydantic import Field

from raypkg.core.config import Named, Settings
from raypkg.core.errors import UserError
from raypkg.core.settings import Count, Experiment, Share, Train
from raypkg.methods.agent.settings import Agent
from raypkg.methods.crest.settings import CrestSelect


class Initial(Named):
    """Which weights exist at first."""

    name: Annotated[
        str, Field(description="first masks: erk, uniform, snip, grasp; dense and no growth = gradual pruning")
    ] = "erk"


class Growth(Named):
    """Which weights come."""

    name: Annotated[str, Field(description="random (SET), gradient (RigL), momentum; none = the masks stay")] = "random"


class Drop(Named):
    """Which weights go."""

    name: Annotated[str, Field(description="magnitude, set (closest to zero on both sides), threshold")] = "magnitude"


class Redistribution(Named):
    """Which layers grow."""

    name: Annotated[
        str,
        Field(description="where weights come: magnitude, nonzeros, momentum; none = where they went"),
    ] = "none"


class Sparsity(Settings):
    """Dynamic sparse training (SET, RigL, ITOP)."""

    density: Annotated[Share | None, Field(description="share of the weights that exist; dense when left out")] = None
    growth: Growth = Growth()
    drop: Drop = Drop()
    redistribution: Redistribution = Redistribution()
    sparse_init: Initial = Initial()
    fan_in: Annotated[
        Literal["dense", "sparse"],
        Field(description="sparse = first weights suit the inputs that exist: without batch norm, at few per cent"),
    ] = "dense"
    update_every: Annotated[
        Count | None, Field(description="ΔT: steps between changes of the masks; a fortieth of training when left out")
    ] = None
    death_rate: Annotated[
        float, Field(gt=0, lt=1, description="f0: share of a layer's active weights to drop, at first")
    ] = 0.5
    decay: Annotated[Literal["cosine", "linear"], Field(description="how that share falls to 0")] = "cosine"


class SparseTrain(Train):
    """Training of the sparse model."""

    schedule: Annotated[
        Literal["cosine", "multistep", "constant"], Field(description="shape of the learning rate over training")
    ] = "multistep"


class SparseSettings(Sparsity, Experiment):
    """Settings of `effray sparse`."""

    compute: Annotated[
        Literal["masked", "sparse"],
        Field(description="sparse = linear layers multiply the weights that exist only; masked = all, some of them 0"),
    ] = "masked"
    multiplier: Annotated[Count, Field(description="so many times the epochs (extended training, ITOP)")] = 1
    correction: Annotated[
        Literal["none", "agent"], Field(description="agent = adaptive gradient correction by a snapshot")
    ] = "none"
    agent: Agent = Agent()
    batches: Annotated[
        Literal["shuffled", "crest"], Field(description="crest = mini-batch coresets, as select.* says")
    ] = "shuffled"
    select: CrestSelect = CrestSelect()
    coreset: Annotated[str | None, Field(description="a coreset.parquet to train on")] = None
    train: SparseTrain = SparseTrain()

    @property
    def epochs(self) -> int:
        """Those of the extended training."""
        return self.train.epochs * self.multiplier

    @property
    def actors(self) -> int:
        """Those that select."""
        return self.select.actors

    def check(self, n: int) -> None:
        """Refuse intervals that training does not reach, and settings of what is not chosen.

        Raises:
            UserError: what is wrong.
        """
        from .run import check_sparse

        defaults, grows, starts = SparseSettings(), self.growth.name != "none", self.sparse_init.name
        if starts == "dense" and grows:
            raise UserError(
                f"sparse_init = dense with growth = {self.growth.name} would stay dense: give --growth none"
            )
        moving = ("death_rate", "decay", "redistribution")
        for name, chosen, part in (
            ("density is left out", self.density is not None, (*Sparsity.model_fields, "compute")),
            ("growth = none", grows, moving),
            ("growth = none keeps the masks", grows or starts == "dense", ("update_every", "drop")),
            ("sparse_init = dense begins with all inputs", starts != "dense", ("fan_in",)),
            ("correction = none", self.correction == "agent", ("agent",)),
            ("batches = shuffled", self.batches == "crest", ("select",)),
        ):
            for setting in part:
                if not chosen and getattr(self, setting) != getattr(defaults, setting):
                    raise UserError(f"{name}: {setting} would do nothing")
        if self.batches == "crest" and self.coreset is not None:
            raise UserError("batches = crest chooses from all samples: --coreset would do nothing")
        check_sparse(self, n)
