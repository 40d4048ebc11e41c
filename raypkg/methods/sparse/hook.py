"""Sparse training in a run: `SparseTraining` with bills, checkpoints and plots, and sparse layers."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.data.split import Split
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.run import Hook, Results, Run, hook
from raypkg.engine.worker import Cost
from raypkg.experiments.samples import Samples, new_model
from raypkg.experiments.training import Job
from raypkg.models.operations import forward_flops
from raypkg.runs.plots import BLUE, GREY, ORANGE, Rows, column, cut, line_ends, page, short

from . import initial
from .compute import ActiveLinear, Pattern
from .masks import Masks, active_counts
from .settings import Sparsity
from .training import SparseTraining

FIRST_MASKS = "first masks"  # the bill of a saliency
DENSE = Sparsity()


class Topology(Hook):
    """Drives a run's `SparseTraining`: changes the masks by the raw gradient, and records each change.

    A later hook, `Enforced` or `Active`, keeps pruned weights at zero, after corrections and before clipping.
    """

    priority = 0
    sparse: SparseTraining  # made at the start
    masks: Masks  # its masks, changed in place

    def __init__(self, settings: Sparsity, steps: int):  # steps of the whole training
        self.settings = settings
        self.steps = steps
        self.history: list[dict[str, Any]] = []  # a row per layer and change

    def on_start(self, run: Run) -> None:
        """Draw the first masks."""
        settings = self.settings
        order = torch.randperm(len(run.coreset.indices), generator=generator(run.seed, "first batch"))
        drawn = run.coreset.indices[order[: run.settings.batch_size]]
        with run.bill(FIRST_MASKS) as bill:
            self.sparse = SparseTraining(
                run.model,
                run.optimizer,
                **settings.model_dump(exclude={"sparse_init", "update_every_steps", "compute"}),
                distribution=settings.sparse_init,
                update_every=settings.interval(self.steps),
                total_steps=self.steps,
                batch=first_batch(settings.sparse_init.name, run.model, run.split, drawn, bill),
                seed=run.seed,
            )
        self.sparse.detach()  # the hooks of a run act between correction and clipping
        self.masks = self.sparse.masks
        self._record(run)

    def on_gradients(self, run: Run) -> None:
        """Change the masks if that is due."""
        self.sparse.step = run.step
        if self.sparse.update(run.progress):
            self._record(run)

    def _record(self, run: Run) -> None:
        active = active_counts(self.masks)
        explored = active_counts(self.sparse.ever)
        time = {"step": run.step, "epoch": run.progress * run.settings.epochs, "explored_share": self.sparse.explored}
        for name, mask in self.masks.items():
            counts = {"active": active[name], "explored": explored[name], "weights": mask.numel()}
            self.history.append({**time, "layer": name, **counts})

    def results(self, run: Run) -> Results:
        """Return the history of the masks with its plot, the density and the explored share."""
        density, explored = self.sparse.density, self.sparse.explored
        exist = f"{density:.2%} of the weights of linear and convolutional layers exist"
        return Results(
            facts={"density": density, "explored": explored},
            findings=[f"{exist}; {explored:.2%} existed at some time (R_s): see plots/topology.png"],
            tables={"topology": pa.Table.from_pylist(self.history)},
            plots={"topology": partial(draw, self.history)},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the training, and the history."""
        return {**self.sparse.state_dict(), "history": list(self.history)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.sparse.load_state_dict(state)
        self.history = list(state["history"])


def draw(changes: Rows, path: str | Path) -> None:
    """Draw each layer's first and last density, and the shares of active and of ever active weights over time.

    The rows are those of `Topology.history`, one per change and layer.
    """
    layers = list(dict.fromkeys(row["layer"] for row in changes))
    names = [cut(layer.removesuffix(".weight"), 30) for layer in layers]
    weights = column(changes[: len(layers)], "weights")  # [layers]
    active = column(changes, "active").reshape(-1, len(layers))  # [changes, layers]
    of_layers = 100 * active / weights
    density = 100 * active.sum(axis=1) / weights.sum()  # [changes]
    by_change = changes[:: len(layers)]
    epoch = column(by_change, "epoch")
    explored = 100 * column(by_change, "explored_share")

    with page(path) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))

        lines = range(len(layers))
        left.plot(of_layers[0], lines, "o", label="at first", color=GREY, fillstyle="none", markersize=10)
        left.plot(of_layers[-1], lines, "o", label="at last", color=BLUE)
        left.set_title(f"{density[-1] / 100:.2%} of {short(weights.sum())} weights exist")
        left.set_xlabel("density, %")
        left.set_xlim(left=0)
        left.set_yticks(lines, names, fontsize=min(10, 240 / len(names)))
        left.set_ylim(max(len(names), 6) - 0.5, -0.5)
        left.legend(loc="lower right")

        right.step(epoch, explored, where="post", color=BLUE)
        right.step(epoch, density, where="post", color=ORANGE)
        line_ends(right, epoch[-1], {"ever existed, R_s": (explored[-1], BLUE), "exist": (density[-1], ORANGE)})
        right.set_title(f"{explored[-1] / 100:.1%} ever existed")
        right.set_xlabel("epoch")
        right.set_ylabel("% of the weights")
        right.set_ylim(0, 105)


class Masked(Hook):
    """Keeps the weights outside of static masks at zero by zeroing their gradients: momentum and decay of 0 are 0."""

    priority = 100

    def __init__(self, masks: Mapping[str, Tensor]):
        self.masks = dict(masks)

    def on_start(self, run: Run) -> None:
        """Set the weights to w ⊙ m."""
        for name, mask in self.masks.items():
            self.masks[name] = mask.to(run.worker.device)
            run.model.get_parameter(name).data.mul_(self.masks[name])

    def on_gradients(self, run: Run) -> None:
        """Zero the gradients of pruned weights."""
        for name, mask in self.masks.items():
            gradient = run.model.get_parameter(name).grad
            if gradient is not None:  # None: the forward pass does not use the parameter
                gradient.mul_(mask)


class Enforced(Hook):
    """Zeroes the gradients of pruned weights. The arithmetic stays dense: this saves no time."""

    priority = 100

    def __init__(self, topology: Topology):
        self.topology = topology

    def on_gradients(self, run: Run) -> None:
        """Zero the gradients of pruned weights."""
        self.topology.sparse.mask_gradients()


class Active(Enforced):
    """Puts sparse linear layers into the model, and keeps their patterns equal to the masks.

    A parameter and its optimiser state have one of two forms:

        steps that change the masks, between epochs:  the dense weight [out, in], with its dense gradient
        any other step:                               the k active weights [k], with their gradient

    With several workers the first form is kept throughout, because DDP lays out its buckets once; only active weights
    get gradients all the same.
    """

    def __init__(self, topology: Topology):
        super().__init__(topology)
        self.layers: dict[str, ActiveLinear] = {}  # by the names of their weights

    def on_start(self, run: Run) -> None:
        """Exchange the layers; their parameters stay."""
        for path, module in [*run.model.named_modules()]:
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    layer, weight = ActiveLinear(child), f"{path}.{name}.weight".lstrip(".")
                    setattr(module, name, layer)
                    if weight in self.topology.masks:
                        self.layers[weight] = layer

    def on_epoch(self, run: Run) -> None:
        """Adopt the first masks, which a checkpoint may have replaced since ``on_start``."""
        if any(layer.pattern is None for layer in self.layers.values()):
            self._adopt_masks()
        self._prepare(run)

    def on_gradients(self, run: Run) -> None:
        """Zero the gradients of pruned weights that were computed; adopt masks that have changed."""
        sparse = self.topology.sparse
        if sparse.due(run.step):
            sparse.mask_gradients()
            self._adopt_masks()
        else:
            sparse.mask_gradients(sparse.masks.keys() - self.layers.keys())

    def on_step(self, run: Run) -> None:
        """Prepare the next step."""
        self._prepare(run)

    def on_epoch_end(self, run: Run) -> None:
        """Restore the dense weights, as a checkpoint needs them."""
        for layer in self.layers.values():
            layer.convert(run.optimizer, dense=True)

    def _prepare(self, run: Run) -> None:
        due = self.topology.sparse.due(run.step)
        for layer in self.layers.values():
            layer.dense_gradient = due
            if due or run.worker.world == 1:
                layer.convert(run.optimizer, dense=due)

    def _adopt_masks(self) -> None:
        for name, layer in self.layers.items():
            layer.pattern = Pattern.of(self.topology.masks[name])


class FootprintReport(Hook):
    """Reports parameters and operations of a model as it was built, in total and without pruned weights."""

    def __init__(self, model: nn.Module, topology: Topology | None):
        self.model = model
        self.topology = topology

    def results(self, run: Run) -> Results:
        """Return parameters, biases and norms included, and operations of the forward pass of one sample."""
        masks = self.topology.masks if self.topology else {}
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        active = parameters - sum(int((~mask).sum()) for mask in masks.values())
        by_weight = forward_flops(self.model, run.split.shape)
        flops = sum(by_weight.values())
        shares = {name: count / masks[name].numel() for name, count in active_counts(masks).items()}
        fewer = round(sum(count * shares.get(name, 1.0) for name, count in by_weight.items()))
        finding = f"{parameters:,} parameters; a forward pass of one sample takes {flops:,} operations"
        if masks:
            exist = f"{active:,} of {parameters:,} parameters exist; a forward pass of one sample that skips the others"
            finding = f"{exist} takes {fewer:,} of {flops:,} operations"
        facts = {"parameters": parameters, "active_parameters": active, "flops": flops, "active_flops": fewer}
        return Results(facts=facts, findings=[finding])


@hook("sparse", source="arXiv:1707.04780, arXiv:1911.11134")
def sparse(*, job: Job, samples: Samples, options: Sparsity = DENSE) -> list[Hook]:
    """Train under masks that change (SET, RigL, ITOP), and report what the model takes."""
    model = new_model(job.experiment, samples.data)
    if options.density is None:
        return [FootprintReport(model, None)]
    steps = job.training.epochs * job.training.steps_per_epoch(job.samples_used(samples))
    topology = Topology(options, steps)
    enforcing = Active(topology) if options.compute == "sparse" else Enforced(topology)
    return [topology, enforcing, FootprintReport(model, topology)]


def first_batch(rule: str, model: nn.Module, split: Split, drawn: Tensor, cost: Cost) -> tuple[Tensor, Tensor] | None:
    """Return the samples ``drawn`` if the named rule of the first masks needs a batch, at the cost of one gradient."""
    if "batch" not in initial[rule].declares:
        return None
    from raypkg.models.language import LanguageModel  # with the loader of checkpoints, which few runs need

    if isinstance(model, LanguageModel):
        others = ", ".join(name for name in initial.names if "batch" not in initial[name].declares)
        raise UserError(f"first masks by {rule} need a classifier: for a language model give one of {others}")
    cost.forward += len(drawn)
    cost.backward += len(drawn)
    device = next(model.parameters()).device
    return next(plain_batches(split, drawn, device, len(drawn), dtype_of(model)))
