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
    from raypkg.phases.sparse import check, draw_sparse, train_sparse
    from raypkg.phases.summary import finish
    from raypkg.phases.train import MODEL, Job, train_on_cluster

    found, storage = samples(settings.dataset, settings.seed), report.folder.storage
    if settings.coreset is not None:
        coreset = given_coreset(settings, settings.coreset, found, storage, FILE)
    else:
        coreset = found.everyone
        save_coreset(storage, coreset, found.data.train, origin(settings))
    check_combination(settings)
    check(settings, len(coreset))
    epochs = settings.train.epochs * settings.multiplier
    training = settings.train.model_copy(update={"epochs": epochs})
    train_on_cluster(Job(settings, training, storage, "train", coreset, MODEL), report, train_sparse)
    draw_sparse(storage)
    finish(report.folder, settings, found, epochs=epochs)


def check_combination(settings: SparseSettings) -> None:
    """Refuse settings that would do nothing.

    Raises:
        UserError: settings of masks without a density, of a correction or batches that are not chosen.
    """
    defaults, grows, starts = SparseSettings(), settings.growth.name != "none", settings.sparse_init.name
    if starts == "dense" and grows:
        raise UserError(
            f"sparse_init = dense with growth = {settings.growth.name} would stay dense: give --growth none"
        )
    moving = ("death_rate", "decay", "redistribution")
    for name, chosen, part in (
        ("density is left out", settings.density is not None, (*Sparsity.model_fields, "compute")),
        ("growth = none", grows, moving),
        ("growth = none keeps the masks", grows or starts == "dense", ("update_every", "drop")),
        ("correction = none", settings.correction == "agent", ("agent",)),
        ("batches = shuffled", settings.batches == "crest", ("select",)),
    ):
        for setting in part:
            if not chosen and getattr(settings, setting) != getattr(defaults, setting):
                raise UserError(f"{name}: {setting} would do nothing")
    if settings.batches == "crest" and settings.coreset is not None:
        raise UserError("batches = crest chooses from all samples: --coreset would do nothing")
