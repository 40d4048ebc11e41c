"""Settings of CREST."""

from collections.abc import Mapping
from math import ceil
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raypkg.core.config import Settings
from raypkg.core.errors import UserError
from raypkg.core.presets import FORMER, PUBLISHED, PresetName, departures, presets_of
from raypkg.core.settings import Count, Epochs, Experiment, Schedule, Share, Train, Training

BATCHES = 4  # in a random subset of "4m" and by default
SUBSET = 0.01  # r/n in the paper
OF_THE_MODEL = (  # options of the local model, without effect at τ = 0
    "h", "b", "checked_on", "order", "smoothing", "model_batches", "curvature",
)  # fmt: skip


class CrestOptions(Settings):
    """Mini-batch coresets and the local model that renews them."""

    renamed: ClassVar[Mapping[str, str]] = {"drop_every": "exclude_every_steps", "alpha": "exclude_below"}
    removed: ClassVar[Mapping[str, Any]] = {
        "look": ..., "augmented": True, "parameters": "all", "overlap": False, "actors": 0, "memory": False,
    }  # fmt: skip
    former: ClassVar[Mapping[str, Any]] = {
        "tau": 0.0, "subset": "4m", "checked_on": "pool", "exclude_after": 5, "keep_active": 0.8,
        "smoothing": "coreset", "settle": 0.05, "model_batches": 1, "curvature": False,
    }  # fmt: skip

    choose: Literal["logits", "colm"] = Field(
        "logits", description="medoids of logit gradients, or colm: as CoLM chooses for language models"
    )
    gradient: Literal["estimate", "exact"] = Field(
        "estimate", description="gradient of the last value projection (colm): by one zeroth-order step, or exact"
    )
    tau: float = Field(0.05, ge=0, description="τ: error that expires the local model; 0 = none, every step selects")
    h: float = Field(1.0, gt=0, description="multiplies ‖H̄_0‖/‖H̄‖ to give T1, the steps between checks")
    b: Count = Field(5, description="mini-batch coresets in a pool per step between checks")
    subset: Share | Literal["2m", "4m"] | None = Field(
        None, description="r/n: share of the samples in a random subset; 2m, 4m = batches (default: 0.01 or 4m)"
    )
    checked_on: Literal["pool", "fresh"] = Field(
        "fresh", description="samples of a check: a subset of the pool, whose loss at w_l is known, or a fresh one"
    )
    exclude_every_steps: Count = Field(20, description="T2: steps between exclusions of learned samples")
    exclude_below: float = Field(0.1, ge=0, description="α: a loss up to α counts as learned; 0 = exclude none")
    exclude_after: int = Field(
        0, ge=0, description="losses up to α in a row that exclude a sample; 0 = all within T2 steps"
    )
    keep_active: float = Field(0.0, ge=0, le=1, description="share of the samples that always stay active")
    order: int = Field(2, ge=1, le=2, description="order of the local model; 1 = without curvature")
    smoothing: Literal["coreset", "pool", "none"] = Field(
        "pool", description="moving averages of gradient and curvature, per coreset or per pool; none = latest only"
    )
    settle: float = Field(
        0.0, ge=0, lt=1, description="share of training after which ‖H̄_0‖ is measured; 0 = at the first weights"
    )
    model_batches: int = Field(
        0, ge=0, description="mini-batch coresets to which the local model is fitted; 0 = the whole pool"
    )
    curvature: int | None = Field(
        0, ge=0, description="samples that give the curvature; 0 = all, false = a quarter of a batch"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse options of another choice, and those of the local model if there is none."""
        if self.choose == "colm" and self.tau:
            raise UserError(f"crest.choose = colm: crest.tau = {self.tau:g} must be 0, as every step chooses")
        if self.choose == "logits" and self.gradient != "estimate":
            raise UserError(f"crest.choose = logits: crest.gradient = {self.gradient} would do nothing")
        for name in OF_THE_MODEL:
            value = getattr(self, name)
            default = type(self).model_fields[name].default
            if self.tau == 0 and value not in (default, self.former.get(name, default) or None):
                raise UserError(
                    f"crest.tau = 0, without a local model: crest.{name} = {value} would do nothing; the paper has 0.05"
                )
        return self

    def subset_size(self, n: int, batch: int) -> int:
        """Return r, the size of a random subset of n samples; batches that it or n cannot hold are refused.

        >>> CrestOptions().subset_size(100_000, 128), CrestOptions(subset="4m").subset_size(100_000, 128)
        (1000, 512)
        """
        if batch > n:
            raise UserError(f"train.batch_size = {batch}: there are only {n} samples to choose from")
        if self.subset is None:
            return min(n, max(BATCHES * batch, round(SUBSET * n)))
        if isinstance(self.subset, str):
            return min(n, int(self.subset[0]) * batch)
        size = max(1, round(self.subset * n))
        if size < batch:
            raise UserError(
                f"crest.subset = {self.subset:g} of {n} samples is {size}, fewer than the {batch} of train.batch_size"
            )
        return size

    def check(self, n: int, training: Training, experiment: Experiment) -> None:
        """Refuse what n training samples or the loss do not allow."""
        self.subset_size(n, training.batch_size)
        if training.label_smoothing:
            raise UserError(
                f"train.label_smoothing = {training.label_smoothing:g}: CREST chooses by gradients of plain"
                " cross-entropy and models that loss, so its coresets would not be of what is trained"
            )
        experiment.dataset.refuse_streamed("CREST")


class CrestTrain(Train):
    """The full training."""

    epochs: Epochs = Field(40, description="epochs of full training; the budget is a share of them")
    schedule: Schedule = "multistep"
    warmup: float = Field(0.1, ge=0, lt=1, description="share of training with a linearly rising rate")
    milestones: tuple[Share, ...] = Field(
        (0.6, 0.85), description="shares of training at which multistep drops the rate"
    )
    nesterov: bool = Field(False, description="Nesterov's form of momentum (SGD)")


class CrestSettings(Experiment):
    """Settings of `effray crest`."""

    renamed: ClassVar[Mapping[str, str]] = {"select": "crest", "every": "every_epochs"}
    former: ClassVar[Mapping[str, Any]] = {"preset": FORMER}

    preset: PresetName = PUBLISHED
    selection: Literal["crest", "random", "cut", "craig", "gradmatch", "glister"] = Field(
        "crest", description="crest; random batches; cut = full schedule, cut short; or a coreset of the budget's size"
    )
    budget: Share = Field(0.1, description="share of the steps of full training; CREST's local model is extra")
    every_epochs: int | None = Field(
        None, ge=1, description="epochs between selections (craig, gradmatch, glister; default: 1)"
    )
    crest: CrestOptions = CrestOptions()
    train: CrestTrain = CrestTrain()

    @property
    def by_batches(self) -> bool:
        """Whether the budget is spent on batches of all samples, not on a coreset of its size."""
        return self.selection in ("crest", "random", "cut")

    @property
    def within(self) -> float:
        """Epochs of the budget, which may end within one; shares such as 0.333 are rounded to whole epochs."""
        exact = self.budget * self.train.epochs
        whole = round(exact)
        return whole if whole and abs(exact - whole) <= 0.01 else exact

    @property
    def epochs(self) -> int:
        """Epochs to train: those of the budget, or all of them if each is on a coreset of the budget's size."""
        return ceil(self.within) if self.by_batches else self.train.epochs

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse settings of another selection."""
        selection, epochs = self.selection, self.train.epochs
        if selection != "crest":
            # What the paper states for a data set may stay: a comparison on one's own copy has it in all rows.
            stated = presets_of(type(self))[PUBLISHED].on.values()
            for name, value in departures(self).items():
                if name.startswith("crest.") and all(on.get(name) != value for on in stated):
                    raise UserError(f"selection = {selection}: {name} = {value} belongs to crest and would do nothing")
        if self.by_batches and self.every_epochs is not None:
            raise UserError(f"selection = {selection}: every_epochs = {self.every_epochs} would do nothing")
        if not self.by_batches and (self.budget == 1 or (self.every_epochs or 1) > epochs):
            raise UserError(
                f"selection = {selection}: budget = {self.budget:g} must be below 1 and every_epochs ="
                f" {self.every_epochs} at most the {epochs} epochs"
            )
        return self

    def adaptations(self, n: int) -> dict[str, tuple[Any, str]]:
        """Return four batches as random subset if a hundredth of n samples is less."""
        fewest = min(n, BATCHES * self.train.batch_size)
        if self.selection != "crest" or self.crest.subset is not None or SUBSET * n >= fewest:
            return {}
        return {"crest.subset": ("4m", f"{SUBSET:g}, as {fewest} samples are four batches")}

    def check(self, n: int, data: Any) -> None:
        """Refuse what n training samples do not allow."""
        if self.selection == "crest":
            self.crest.check(n, self.train, self)
