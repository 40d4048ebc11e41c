"""Planned phases of a run, their operations and memory, and phases taken over from other runs. No torch at import.

An experiment with more than one training declares its phases: ``@outlook(name)`` on ``stages(settings)`` in its
``experiment.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import TYPE_CHECKING, TypeVar

from raypkg.core.config import changed, dotted
from raypkg.core.registry import Registry
from raypkg.core.settings import Experiment, Model, RunSettings, Select, Training
from raypkg.runs.folder import CORESET, MODEL, RunFolder
from raypkg.runs.report import Stage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from raypkg.data.split import Split

    from .samples import Samples

R = TypeVar("R", bound=RunSettings)
BOUND = 3 * 10**11  # operations; one process takes 10 to 20 s for as many, which Ray needs to start and end workers
Donors = Callable[[Stage], Iterable[RunFolder]]
outlook = Registry("outlook", "raypkg.methods.*.experiment")


def stages_of(experiment: str, settings: RunSettings) -> list[Stage]:
    """Return the planned phases of an experiment's run in their order."""
    if experiment in outlook:
        return outlook[experiment](settings)
    if experiment == "embed":  # its rows of metrics are parts, whose number depends on the data
        return [Stage("embed", files=("train.parquet", "test.parquet"))]
    return [main_stage(settings) if isinstance(settings, Experiment) else selection_stage()]


def selection_stage() -> Stage:
    """Return a selection by a trained model."""
    return Stage("select", files=(CORESET,))


def main_stage(settings: Experiment, share: float | None = None) -> Stage:
    """Return the main training, on the coreset that the settings give or select, or on a ``share`` of the samples."""
    select = getattr(settings, "select", None)
    given = getattr(settings, "coreset", None)
    if share is None and isinstance(select, Select):
        share = select.fraction

    def size(n: int) -> int:
        if given is not None and not getattr(select, "every_epochs", 0):
            from .coreset_files import read_coreset

            return len(read_coreset(given))
        if share is None:
            return n
        from raypkg.coresets.budgets import budget_of

        return budget_of(share, n)

    has_coreset = share is not None or given is not None
    return Stage(
        "train",
        settings.epochs,
        batch_size=settings.train.batch_size,  # type: ignore[attr-defined]  # declared by each experiment
        size=size,
        whole=min(settings.epochs, getattr(select, "warm_epochs", 0)),
        files=(MODEL, "model_record.parquet", *[CORESET] * has_coreset),
    )


def in_whole_batches(stage: Stage) -> Stage:
    """Return a training whose batches are chosen one by one, all of full size."""
    batch = stage.batch_size
    return stage._replace(size=lambda n: -(-n // batch) * batch)


def take_over(folder: RunFolder, stages: Sequence[Stage], donors: Donors) -> None:
    """Copy a run's first phases from finished runs with the same settings, data and seed, as far as there are any.

    A phase follows from its settings alone, so the copy equals a computation bit for bit. The bill is copied too: it
    states what the phase costs, and the record names the run that computed it.
    """
    done = folder.storage.list("phases")
    phases: list[str] = []
    for stage in stages:
        if f"{stage.phase}.json" not in done:
            phases.append(stage.phase)
        if not (phases and stage.depends_on):
            continue
        ours = stage.settings_in(dotted(folder.config))
        alike = (donor for donor in donors(stage) if stage.settings_in(dotted(donor.config)) == ours)
        if not any(folder.take_over(phases, donor) for donor in alike):
            return
        phases = []


def operations(chosen: Model, samples: Samples, stages: Sequence[Stage]) -> int:
    """Return a registered model's operations in planned phases.

    They are 3 forward passes a sample backward, and one a sample of a selection. A forward pass uses each weight once
    at least, as a module may multiply by its own. Texts are as long as the longest of a few hundred.
    """
    from raypkg.data.kinds import TEXTS
    from raypkg.models import outline
    from raypkg.models.operations import forward_flops

    from .samples import LOOK, LOOKED_AT

    split = samples.data.train
    shape = split.shape
    model = outline(chosen.name, shape, split.num_classes, chosen.options)
    if split.kind is TEXTS:
        x, _ = split.batch(split.spread(LOOK, blocks=LOOKED_AT))
        shape = (x.shape[2], *shape[1:])
    weights = sum(each.numel() for each in model.parameters())
    forward = max(2 * weights, sum(forward_flops(model, shape).values()))
    n = len(samples.train_indices)
    return forward * sum(3 * stage.backward(n) if stage.rows else n for stage in stages)


def with_workers(settings: R, samples: Samples, stages: Sequence[Stage], root: str) -> tuple[R, str]:
    """Choose no Ray workers for a small plan, where their number is open and Ray would start for this run alone.

    A count decides, never a measurement. Returns the settings, and a line about the choice.
    """
    from raypkg.cluster.session import is_apart
    from raypkg.models import model
    from raypkg.runs.catalog import locate

    from .trained import settings_of_trained

    cluster = settings.cluster
    if cluster.workers is not None or not is_apart(cluster):
        return settings, ""
    chosen = settings.model if isinstance(settings, Experiment) else None
    if isinstance(settings, Select) and (runs := getattr(settings, "model_from", "")):
        chosen = settings_of_trained(locate(root, runs.partition(",")[0], having=MODEL)).model
    starts = "Ray starts on this machine, which takes some 20 s; --cluster.workers 0 computes in this process"
    if chosen is None or chosen.name not in model:
        return settings, starts
    count = operations(chosen, samples, stages)
    if count >= BOUND:
        return settings, starts
    alone = changed(settings, {"cluster.workers": 0})
    return alone, f"cluster.workers = 0, this process: {count:.1e} operations, and Ray's start pays from {BOUND:.0e} on"


def step_memory(model: nn.Module, split: Split, batch: int, training: Training) -> dict[str, int]:
    """Return the bytes that a training step needs on a worker, by their purpose, without using them."""
    import torch

    dtype = torch.float64 if training.precision == "float64" else torch.float32
    parameters = list(model.parameters())
    weights = sum(each.numel() for each in parameters) * dtype.itemsize
    trained = sum(each.numel() for each in parameters if each.requires_grad) * dtype.itemsize
    copies = 2 if training.optimizer == "adamw" else int(training.momentum > 0)  # numbers of the optimiser for each
    needed = {"parameters": weights, "gradients": trained, "optimiser": copies * trained}
    if getattr(training, "average", None):
        needed["average"] = trained

    # A forward pass on the meta device neither computes nor allocates, but keeps the same tensors for the backward
    # pass. Each storage counts once; its address is 0 there, so its object in C++ identifies it.
    def key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    one = split.kind.example(1, split.shape)
    x = one.new_empty(batch, *one.shape[1:], dtype=dtype if one.is_floating_point() else one.dtype, device="meta")
    twin = deepcopy(model).to("meta", dtype).train()
    own = {key(each) for each in [*twin.parameters(), *twin.buffers()]}
    kept = {key(x): x.untyped_storage()}

    def keep(tensor: Tensor) -> Tensor:
        if key(tensor) not in own:
            kept[key(tensor)] = tensor.untyped_storage()
        return tensor

    with suppress(Exception):  # a user's model may look at values, which do not exist here
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            twin(x)
        needed["activations of a batch"] = sum(storage.nbytes() for storage in kept.values())
    return needed
