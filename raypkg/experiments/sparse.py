"""Sparse training: SET, RigL and ITOP, static masks, gradual pruning, with or without AGENT's gradient correction."""

from typing import Annotated, Literal

from pydantic import Field

from raypkg.core.errors import UserError
from raypkg.core.settings import Agent, Count, CrestSelect, Experiment, Sparsity, Train
from raypkg.runs.report import Report

from . import experiment


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
        from raypkg.phases.sparse import check

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
        check(self, n)


@experiment("sparse", source="arXiv:2301.03573")
def run(settings: SparseSettings, *, report: Report) -> None:
    """Train a model of which few weights exist at a time, those that matter changing as training goes on.

    Masks are applied to dense arithmetic, which saves nothing: linear layers compute with what exists by --compute
    sparse, and `effray export --format csr` leaves out the rest.

    Example:
        effray sparse --dataset digits --model mlp --density 0.1 --growth gradient --correction agent
    """
    from raypkg.phases.coresets import FILE, given_coreset, origin, save_coreset
    from raypkg.phases.samples import samples
    from raypkg.phases.sparse import draw_sparse, train_sparse
    from raypkg.phases.summary import finish
    from raypkg.phases.train import MODEL, Job, train_on_cluster

    found, storage = samples(settings.dataset, settings.seed), report.folder.storage
    if settings.coreset is not None:
        coreset = given_coreset(settings, settings.coreset, found, storage, FILE)
    else:
        coreset = found.everyone
        save_coreset(storage, coreset, found.data.train, origin(settings))
    settings.check(len(coreset))
    training = settings.train.model_copy(update={"epochs": settings.epochs})
    train_on_cluster(Job(settings, training, storage, "train", coreset, MODEL), report, train_sparse)
    draw_sparse(storage)
    finish(report.folder, settings, found, epochs=settings.epochs)
