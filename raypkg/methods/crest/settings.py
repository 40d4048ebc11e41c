"""Settings of CREST."""

from typing import Annotated, Literal

from pydantic import Field

from raypkg.core.config import Settings
from raypkg.core.errors import UserError
from raypkg.core.settings import Count, Experiment, Share, Train


class CrestSelect(Settings):
    """Mini-batch coresets, and how long they are trusted (CREST)."""

    tau: Annotated[float, Field(gt=0, description="τ: error of the local model at which it has expired")] = 0.05
    h: Annotated[float, Field(gt=0, description="steps between checks, over ‖H̄_0‖/‖H̄_t‖")] = 1.0
    b: Annotated[Count, Field(description="mini-batch coresets of a pool, over the steps between checks")] = 5
    subset: Annotated[
        Share | None,
        Field(description="r/n: share of the samples in a random subset; 0.01, or two batches, when left out"),
    ] = None
    drop_every: Annotated[Count, Field(description="T2: steps between looks for learned samples")] = 20
    alpha: Annotated[float, Field(ge=0, description="α: losses up to which a sample is learned; 0 = drop none")] = 0.1
    order: Annotated[int, Field(ge=1, le=2, description="of the local model: 2 = with curvature, 1 = without")] = 2
    smoothing: Annotated[bool, Field(description="smooth gradient and curvature over updates")] = True
    model_batches: Annotated[
        int, Field(ge=0, description="mini-batch coresets that the local model is made from; 0 = the whole pool")
    ] = 1
    curvature: Annotated[
        int, Field(ge=0, description="samples of those whose curvature is looked at, the dearest part; 0 = all")
    ] = 32
    parameters: Annotated[
        Literal["all", "head"], Field(description="what the local model looks at; head = last layer, for large nets")
    ] = "all"
    overlap: Annotated[
        bool, Field(description="select while training goes on, by the weights of one check before, on another core")
    ] = False
    actors: Annotated[
        int, Field(ge=0, description="Ray actors of one CPU each that select; 0 = the training workers do")
    ] = 0
    memory: Annotated[
        float | None, Field(ge=0, description="GiB a worker may use to save time; a quarter of its own when left out")
    ] = None


class CrestTrain(Train):
    """The full training, of which the budget is a share."""

    epochs: Annotated[int, Field(ge=1, description="of full training; the budget is a share of them")] = 40
    schedule: Annotated[
        Literal["cosine", "multistep", "constant"], Field(description="shape of the learning rate, over the budget")
    ] = "multistep"
    warmup: Annotated[float, Field(ge=0, lt=1, description="share of training with a linearly rising rate")] = 0.1
    milestones: Annotated[
        tuple[Share, ...], Field(description="shares of training at which multistep drops the rate")
    ] = (0.6, 0.85)
    nesterov: Annotated[bool, Field(description="Nesterov's form of momentum (SGD)")] = False


class CrestSettings(Experiment):
    """Settings of `effray crest`."""

    selection: Annotated[
        Literal["crest", "random", "none", "craig", "gradmatch", "glister"],
        Field(description="crest; random batches; none = full schedule cut short; or a coreset of the budget's size"),
    ] = "crest"
    budget: Annotated[
        Share, Field(description="share of full training's steps; CREST's model of the loss is extra")
    ] = 0.1
    every: Annotated[
        int | None, Field(ge=1, description="epochs between selections (craig, gradmatch, glister); a tenth of all")
    ] = None
    select: CrestSelect = CrestSelect()
    train: CrestTrain = CrestTrain()

    @property
    def within(self) -> int:
        """Epochs of the budget."""
        return round(self.budget * self.train.epochs)

    @property
    def epochs(self) -> int:
        """Those of the budget, but for coresets of its size: every epoch on fewer samples."""
        return self.within if self.selection in ("crest", "random", "none") else self.train.epochs

    @property
    def actors(self) -> int:
        """Those that select."""
        return self.select.actors

    def check(self, n: int) -> None:
        """Refuse a budget that is not whole epochs or too short, and settings of another selection.

        Raises:
            UserError: what is wrong.
        """
        from .run import check_crest

        epochs, within = self.train.epochs, self.within
        if within < 1 or abs(self.budget * epochs - within) > 0.01:
            near = f"{max(1, within) / epochs:.3g}"
            raise UserError(
                f"budget = {self.budget:g} of {epochs} epochs is {self.budget * epochs:g} epochs: it must be whole,"
                f" such as --budget {near}"
            )
        if self.selection != "crest" and self.select != CrestSelect():
            raise UserError(f"selection = {self.selection}: select.* belongs to crest and would do nothing")
        if self.selection in ("crest", "random", "none"):
            if self.every is not None:
                raise UserError(f"selection = {self.selection}: every = {self.every} would do nothing")
        elif self.budget == 1 or (self.every or 1) > epochs:
            raise UserError(
                f"selection = {self.selection}: budget = {self.budget:g} must be below 1 and every = {self.every} at"
                f" most the {epochs} epochs"
            )
        if self.selection in ("crest", "random"):
            check_crest(self, within, n)
