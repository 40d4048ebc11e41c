"""CREST: trains on mini-batch coresets within a budget, beside the baselines at the same budget."""

from typing import Annotated, Literal

from pydantic import Field

from raypkg.core.errors import UserError
from raypkg.core.settings import CrestSelect, Experiment, Reselect, Share, Train
from raypkg.runs.report import Report

from . import experiment


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
        from raypkg.phases.crest import check

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
            check(self, within, n)


@experiment("crest", source="arXiv:2306.01244")
def run(settings: CrestSettings, *, report: Report) -> None:
    """Train on mini-batch coresets, chosen anew when a local model of the loss expires, within a budget.

    The learning rate runs through its whole schedule within the budget. Baselines at the same budget: --selection.

    Example:
        effray crest --dataset digits --budget 0.25
    """
    from raypkg.phases.coresets import origin, save_coreset
    from raypkg.phases.crest import draw_regions, train_crest
    from raypkg.phases.samples import samples
    from raypkg.phases.summary import finish
    from raypkg.phases.train import MODEL, Job, train_model, train_on_cluster

    found, storage, epochs = samples(settings.dataset, settings.seed), report.folder.storage, settings.train.epochs
    settings.check(len(found.kept))
    compressed = settings.train.model_copy(update={"epochs": settings.within})
    match settings.selection:
        case "crest" | "random":
            job = Job(settings, compressed, storage, "train", found.everyone, MODEL)
        case "none":
            job = Job(settings, settings.train, storage, "train", found.everyone, MODEL, last=settings.within)
        case method:
            select = Reselect(
                method=method, fraction=settings.budget, weighted=True, every=settings.every or max(1, epochs // 10)
            )
            job = Job(settings, settings.train, storage, "train", None, MODEL, select=select)
    if settings.selection in ("random", "none"):
        save_coreset(storage, found.everyone, found.data.train, origin(settings))
    train_on_cluster(job, report, train_crest if settings.selection == "crest" else train_model)
    if settings.selection == "crest":
        draw_regions(storage, settings.select)
    finish(report.folder, settings, found, epochs=epochs)
