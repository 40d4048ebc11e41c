"""Sparse training in the loop: every ΔT steps some weights are dropped and others grown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.data.split import Split
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.costs import Cost
from raypkg.engine.hooks import Hook, Results, hook
from raypkg.engine.run import Run
from raypkg.experiments.samples import Samples, new_model
from raypkg.experiments.training import Job

from . import drop, growth, initial, plots, redistribution
from .compute import ActiveLinear, Pattern, active_flops, exchange_linear, forward_flops
from .masks import (
    Masks,
    active_counts,
    allot,
    check_density,
    density_of,
    drop_fraction,
    dropped,
    enlarged,
    gradual_density,
    grown,
    prunable,
    shapes_of,
    surplus,
    zero_changed,
)
from .settings import PRUNED_BY, Sparsity

FIRST_MASKS = "first masks"  # the bill of a saliency
DIVERGED = "if the weights are not finite, lower the learning rate"
DENSE = Sparsity()


class Topology(Hook):
    """Drops and grows weights with exact counts; a later hook, `Masked` or `Active`, keeps the others at zero.

        every ΔT steps:  drop f(t) of each layer's active weights, grow as many; new weights and their momentum are 0

    Without growth the masks are static or, from dense ones, weights are pruned gradually. All workers have the same
    masks: they see the same averaged gradient and draw the same random numbers.

    A dropped weight may be grown again in the same change, and then keeps its value: a full layer does not change.

    Differs from RigL: a step that changes the masks also updates the weights, after the change.
    """

    priority = 0

    def __init__(self, settings: Sparsity, steps: int):  # steps of the whole training
        self.settings = settings
        self.density = settings.density or 1.0
        self.every = settings.interval(steps)
        self.tracks_momentum = bool(settings.rules_by_momentum)
        self.masks: Masks = {}  # changed in place: later hooks hold the same tensors
        self.explored: Masks = {}  # weights that were ever active
        self.momentum: dict[str, Tensor] = {}  # of the dense gradient, if a rule needs it
        self.history: list[dict[str, Any]] = []  # a row per layer and change

    @property
    def explored_share(self) -> float:
        """R_s, the share of weights that were ever active (ITOP)."""
        return density_of(self.explored)

    def due(self, step: int) -> bool:
        """Return True if the masks change in a step."""
        changes = self.settings.is_gradual or self.settings.growth is not None
        return changes and step > 0 and step % self.every == 0

    def on_start(self, run: Run) -> None:
        """Draw the first masks."""
        check_density(self.density, shapes_of(run.model))
        indices, chosen = run.coreset.indices, self.settings.sparse_init
        order = torch.randperm(len(indices), generator=generator(run.seed, "first batch"))
        drawn = indices[order[: run.settings.batch_size]]
        rng = generator(run.seed, "mask")
        with run.bill(FIRST_MASKS) as bill:
            masks = first_masks(
                chosen.name, run.model, self.density, run.split, drawn, rng=rng, cost=bill, options=chosen.options
            )
        for name, mask in masks.items():
            self.masks[name] = mask.bool().to(run.worker.device)
        self._agree(run)
        self.explored = {name: mask.clone() for name, mask in self.masks.items()}
        if self.settings.fan_in == "sparse":
            for name, weight in prunable(run.model).items():
                weight.data.copy_(enlarged(weight.data, self.masks[name]))
        self._record(run)

    def on_gradients(self, run: Run) -> None:
        """Follow the dense gradient if a rule needs it, and change the masks by it when that is due."""
        if self.tracks_momentum:
            for name in self.masks:  # m ← βm + g
                gradient = _gradient(run.model.get_parameter(name))
                if name in self.momentum:
                    self.momentum[name].mul_(run.settings.momentum).add_(gradient)
                else:
                    self.momentum[name] = gradient.clone()
        if self.due(run.step):
            self._change(run)

    def _change(self, run: Run) -> None:
        weights = prunable(run.model)
        before = {name: mask.clone() for name, mask in self.masks.items()}
        old_counts = active_counts(before)

        # Drop the share f(t) of each layer or, in gradual pruning, its surplus.
        if self.settings.is_gradual:
            pruning_done = min(1.0, run.progress / PRUNED_BY)
            leaving = surplus(self.masks, gradual_density(self.density, pruning_done))
        else:
            fraction = drop_fraction(self.settings.death_rate, run.progress, self.settings.decay)
            leaving = {name: int(fraction * count) for name, count in old_counts.items()}
        chosen = self.settings.drop
        rule = drop[chosen.name]
        for name, mask in self.masks.items():
            active = weights[name].data[mask]  # [k]
            scores = rule(active, options=chosen.options)
            mask.copy_(dropped(mask, _checked(f"drop rule {rule.name!r}", scores, active, name), leaving[name]))

        if self.settings.growth:
            self._grow(run, weights, old_counts)
        self._agree(run)
        for name, mask in self.masks.items():
            self.explored[name] |= mask
            zero_changed(weights[name], mask, before[name], run.optimizer)
        self._record(run)

    def _grow(self, run: Run, weights: Mapping[str, Tensor], old_counts: Mapping[str, int]) -> None:
        """Grow as many weights as all layers lost: each its own, or its part by the redistribution."""
        counts = active_counts(self.masks)
        arriving = {name: count - counts[name] for name, count in old_counts.items()}
        if self.settings.redistribution:
            rule = redistribution[self.settings.redistribution.name]
            shares = {}
            for name, mask in self.masks.items():
                momentum = self.momentum[name][mask] if name in self.momentum else None  # [k]
                options = self.settings.redistribution.options
                share = rule(weights[name].data[mask], options=options, momentum=momentum)
                if not 0 <= share < math.inf:
                    raise UserError(f"redistribution {rule.name!r} returned {share} for {name}: {DIVERGED}")
                shares[name] = share
            room = {name: mask.numel() - counts[name] for name, mask in self.masks.items()}
            arriving = allot(shares, sum(arriving.values()), room)

        assert self.settings.growth
        rule = growth[self.settings.growth.name]
        for name, count in arriving.items():
            if not count:
                continue
            weight = weights[name]
            scores = rule(
                weight.data,
                options=self.settings.growth.options,
                gradient=_gradient(weight),
                momentum=self.momentum.get(name),
                rng=generator(run.seed, "growth", name, run.step),
            )
            mask = self.masks[name]
            mask.copy_(grown(mask, _checked(f"growth rule {rule.name!r}", scores, weight, name), count))

    def _agree(self, run: Run) -> None:
        """Take the first worker's masks: machines may round the sums behind them differently."""
        run.worker.share([mask.view(torch.uint8) for mask in self.masks.values()])  # every backend can send bytes

    def _record(self, run: Run) -> None:
        active = active_counts(self.masks)
        explored = active_counts(self.explored)
        time = {"step": run.step, "epoch": run.progress * run.settings.epochs, "explored_share": self.explored_share}
        for name, mask in self.masks.items():
            counts = {"active": active[name], "explored": explored[name], "weights": mask.numel()}
            self.history.append({**time, "layer": name, **counts})

    def results(self, run: Run) -> Results:
        """Return the history of the masks with its plot, the density and the explored share."""
        density = density_of(self.masks)
        explored = self.explored_share
        exist = f"{density:.2%} of the weights of linear and convolutional layers exist"
        return Results(
            facts={"density": density, "explored": explored},
            findings=[f"{exist}; {explored:.2%} existed at some time (R_s): see plots/topology.png"],
            tables={"topology": pa.Table.from_pylist(self.history)},
            plots={"topology": partial(plots.topology, self.history)},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return masks, explored weights, momentum and history."""
        return {
            "masks": dict(self.masks),
            "explored": dict(self.explored),
            "momentum": dict(self.momentum),
            "history": list(self.history),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them, the masks in place."""
        for name, mask in self.masks.items():
            mask.copy_(state["masks"][name])
            self.explored[name].copy_(state["explored"][name])
            if name in state["momentum"]:
                self.momentum[name] = state["momentum"][name].to(mask.device)
        self.history = list(state["history"])


class Masked(Hook):
    """Keeps pruned weights at zero by zeroing their gradients: momentum and decay of 0 are 0.

    The arithmetic stays dense: this simulates sparsity and saves no time. Earlier hooks may change the masks in place.
    """

    priority = 100

    def __init__(self, masks: Mapping[str, Tensor]):
        self.masks = masks

    def on_start(self, run: Run) -> None:
        """Set the weights to w ⊙ m."""
        self.masks = {name: mask.to(run.worker.device) for name, mask in self.masks.items()}
        for name, mask in self.masks.items():
            run.model.get_parameter(name).data.mul_(mask)

    def on_gradients(self, run: Run) -> None:
        """Zero the gradients of pruned weights."""
        self.zero(run, self.masks)

    def zero(self, run: Run, names: Iterable[str]) -> None:
        """Zero the gradients of the pruned weights of some parameters."""
        for name in names:
            gradient = run.model.get_parameter(name).grad
            if gradient is not None:  # None: the forward pass does not use the parameter
                gradient.mul_(self.masks[name])


class Active(Masked):
    """Puts sparse linear layers into the model, and keeps their patterns equal to the masks.

    A parameter and its optimiser state have one of two forms:

        steps that change the masks, between epochs:  the dense weight [out, in], with its dense gradient
        any other step:                               the k active weights [k], with their gradient

    With several workers the first form is kept throughout, because DDP lays out its buckets once; only active weights
    get gradients all the same.
    """

    def __init__(self, masks: Mapping[str, Tensor], due: Callable[[int], bool]):  # due: whether a step changes them
        super().__init__(masks)
        self.due = due
        self.layers: dict[str, ActiveLinear] = {}  # by the names of their weights

    def on_start(self, run: Run) -> None:
        """Exchange the layers; their parameters stay."""
        super().on_start(run)
        exchange_linear(run.model, ActiveLinear)
        for name, layer in run.model.named_modules():
            if isinstance(layer, ActiveLinear) and f"{name}.weight" in self.masks:
                self.layers[f"{name}.weight"] = layer

    def on_epoch(self, run: Run) -> None:
        """Adopt the first masks, which a checkpoint may have replaced since ``on_start``."""
        if any(layer.pattern is None for layer in self.layers.values()):
            self._adopt_masks()
        self._prepare(run)

    def on_gradients(self, run: Run) -> None:
        """Zero the gradients of pruned weights that were computed; adopt masks that have changed."""
        if self.due(run.step):
            self.zero(run, self.masks)
            self._adopt_masks()
        else:
            self.zero(run, self.masks.keys() - self.layers.keys())

    def on_step(self, run: Run) -> None:
        """Prepare the next step."""
        self._prepare(run)

    def on_epoch_end(self, run: Run) -> None:
        """Restore the dense weights, as a checkpoint needs them."""
        for layer in self.layers.values():
            layer.convert(run.optimizer, dense=True)

    def _prepare(self, run: Run) -> None:
        due = self.due(run.step)
        for layer in self.layers.values():
            layer.dense_gradient = due
            if due or run.worker.world == 1:
                layer.convert(run.optimizer, dense=due)

    def _adopt_masks(self) -> None:
        for name, layer in self.layers.items():
            layer.pattern = Pattern.of(self.masks[name])


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
        fewer = active_flops(by_weight, masks)
        finding = f"{parameters:,} parameters; a forward pass of one sample takes {flops:,} operations"
        if masks:
            finding = (
                f"{active:,} of {parameters:,} parameters exist; a forward pass of one sample that skips the others"
                f" takes {fewer:,} of {flops:,} operations"
            )
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
    active = options.compute == "sparse"
    enforcing = Active(topology.masks, topology.due) if active else Masked(topology.masks)
    return [topology, enforcing, FootprintReport(model, topology)]


def first_masks(
    name: str,
    model: nn.Module,
    density: float,
    split: Split,
    drawn: Tensor,
    *,
    rng: torch.Generator,
    cost: Cost,
    options: Mapping[str, Any] | None = None,
) -> Masks:
    """Return the first masks by the named rule; if it needs a batch, that is of the samples ``drawn``, at a cost."""
    rule = initial[name]
    batch = None
    if "batch" in rule.declares:
        device = next(model.parameters()).device
        batch = next(plain_batches(split, drawn, device, len(drawn), dtype_of(model)))
        cost.forward += len(drawn)
        cost.backward += len(drawn)
    masks: Masks = rule(model, density, options=options, rng=rng, batch=batch)
    shapes = shapes_of(model)
    if {layer: mask.shape for layer, mask in masks.items()} != shapes:
        raise UserError(f"sparse initialisation {name!r} returned other layers or shapes than {[*shapes]}")
    return masks


def _checked(rule: str, scores: Tensor, weights: Tensor, layer: str) -> Tensor:
    """Return a rule's scores on the device of the weights; NaN means that training diverged."""
    shape = getattr(scores, "shape", None)
    if shape != weights.shape:
        raise UserError(f"{rule} returned shape {shape and [*shape]} for {[*weights.shape]} of {layer}")
    if scores.isnan().any():
        raise UserError(f"{rule} returned NaN for {layer}: {DIVERGED}")
    return scores.to(weights.device)


def _gradient(weight: Tensor) -> Tensor:
    """Return a parameter's gradient; zeros if the forward pass does not use it."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
