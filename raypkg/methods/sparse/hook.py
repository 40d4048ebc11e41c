"""Dynamic sparse training as a hook: every ΔT steps some weights go and others come."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.run import Hook, Results, Run, hook
from raypkg.experiments.samples import Samples, new_model
from raypkg.experiments.training import Job

from . import plots
from .flops import footprint
from .masked import Active, Masked
from .masks import Masks, active_counts, allot, check_density, density_of, enlarged, prunable, shapes_of
from .rules import checked_scores, checked_share, drop, growth, initial, redistribution, uses_momentum
from .settings import PRUNED_BY, Sparsity
from .topology import drop_fraction, dropped, gradual_density, grown, surplus, zero_changed

FIRST_MASKS = "first masks"  # their bill

DENSE = Sparsity()


class Topology(Hook):
    """Drops and grows weights with exact counts; `Masked`, after it, keeps those that do not exist at zero.

        every ΔT steps:  drop f(t) of each layer's active weights, grow as many; new weights and their momentum are 0

    Without growth the masks stay, or, from dense ones, weights are pruned gradually. All workers hold the same masks:
    they see the same averaged gradient and draw the same random numbers.

    What was dropped may be grown again at once, and then was never gone: a layer that is full does not change.

    Differs from RigL: the step at which masks change is a step of the optimiser, too, after the change.

    Args:
        settings: density, rules and schedule.
        steps: of the whole training.
    """

    order = 0

    def __init__(self, settings: Sparsity, steps: int):
        assert settings.density is not None  # without one there is nothing to change
        self.settings = settings
        self.density = settings.density
        self.every = settings.interval(steps)
        self.tracks_momentum = uses_momentum(growth, settings.growth) or uses_momentum(
            redistribution, settings.redistribution
        )
        self.masks: Masks = {}  # changed in place: later hooks hold the same tensors
        self.explored: Masks = {}  # weights that ever were active
        self.momentum: dict[str, Tensor] = {}  # of the dense gradient, where a rule asks for it
        self.history: list[dict[str, Any]] = []  # a row for each layer and change

    @property
    def explored_share(self) -> float:
        """R_s, the share of weights that ever were active (ITOP)."""
        return density_of(self.explored)

    def due(self, step: int) -> bool:
        """Say whether the masks change in a step."""
        changes = self.settings.is_gradual or self.settings.growth is not None
        return changes and step > 0 and step % self.every == 0

    def on_start(self, run: Run) -> None:
        """Draw the first masks.

        Raises:
            UserError: there are no such weights, or the density leaves fewer than there are layers.
        """
        shapes = shapes_of(run.model)
        check_density(self.density, shapes)
        with run.bill(FIRST_MASKS):
            masks = self._first_masks(run)
        if {name: mask.shape for name, mask in masks.items()} != shapes:
            rule = self.settings.sparse_init.name
            raise UserError(f"sparse initialisation {rule!r} returned other layers or shapes than {[*shapes]}")
        for name, mask in masks.items():
            self.masks[name] = mask.bool().to(run.worker.device)
        self._agree(run)
        self.explored = {name: mask.clone() for name, mask in self.masks.items()}
        if self.settings.fan_in == "sparse":
            for name, weight in prunable(run.model).items():
                weight.data.copy_(enlarged(weight.data, self.masks[name]))
        self._record(run)

    def on_gradients(self, run: Run) -> None:
        """Change the masks where it is due, by the raw gradient."""
        if self.tracks_momentum:
            self._update_momentum(run)
        if self.due(run.step):
            self._change(run)

    def results(self, run: Run) -> Results:
        """Return the history of the masks, with its picture, and how much of the weights there is."""
        density = density_of(self.masks)
        explored = self.explored_share
        finding = (
            f"{density:.2%} of the weights of linear and convolutional layers exist; {explored:.2%} existed at some"
            " time (R_s): see plots/topology.png"
        )
        return Results(
            facts={"density": density, "explored": explored},
            findings=[finding],
            tables={"topology": pa.Table.from_pylist(self.history)},
            plots={"topology": partial(plots.topology, self.history)},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return masks, what was explored, momentum and history."""
        return {
            "masks": dict(self.masks),
            "explored": dict(self.explored),
            "momentum": dict(self.momentum),
            "history": list(self.history),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them; the masks in place, as other hooks hold them."""
        for name, mask in self.masks.items():
            mask.copy_(state["masks"][name])
            self.explored[name].copy_(state["explored"][name])
            if name in state["momentum"]:
                self.momentum[name] = state["momentum"][name].to(mask.device)
        self.history = list(state["history"])

    def _first_masks(self, run: Run) -> Masks:
        chosen = self.settings.sparse_init
        rule = initial[chosen.name]
        supplied: dict[str, Any] = {"rng": generator(run.seed, "mask")}
        if "batch" in rule.declares:
            supplied["batch"] = _first_batch(run)
        masks: Masks = rule(run.model, self.density, options=chosen.options, **supplied)
        return masks

    def _update_momentum(self, run: Run) -> None:
        """Add the step's dense gradient to its momentum, m ← βm + g."""
        for name in self.masks:
            gradient = _gradient(run.model.get_parameter(name))
            if name in self.momentum:
                self.momentum[name].mul_(run.settings.momentum).add_(gradient)
            else:
                self.momentum[name] = gradient.clone()

    def _change(self, run: Run) -> None:
        """Drop, grow, and zero what left and what is new."""
        weights = prunable(run.model)
        before = {name: mask.clone() for name, mask in self.masks.items()}
        self._drop(run, weights)
        if not self.settings.is_gradual:
            self._grow(run, weights, before)
        self._agree(run)
        for name, mask in self.masks.items():
            self.explored[name] |= mask
            zero_changed(weights[name], mask, before[name], run.optimizer)
        self._record(run)

    def _drop(self, run: Run, weights: Mapping[str, Tensor]) -> None:
        chosen = self.settings.drop
        rule = drop[chosen.name]
        leaving = self._leaving(run)
        for name, mask in self.masks.items():
            active = weights[name].data[mask]  # [k]
            scores = rule(active, options=chosen.options)
            scores = checked_scores(f"drop rule {rule.name!r}", scores, active, name)
            mask.copy_(dropped(mask, scores, leaving[name]))

    def _leaving(self, run: Run) -> dict[str, int]:
        """Return how many weights each layer drops: the share f(t), or, pruning gradually, what is too many."""
        if self.settings.is_gradual:
            pruning_done = min(1.0, run.progress / PRUNED_BY)
            return surplus(self.masks, gradual_density(self.density, pruning_done))
        fraction = drop_fraction(self.settings.death_rate, run.progress, self.settings.decay)
        counts = active_counts(self.masks)
        return {name: int(fraction * count) for name, count in counts.items()}

    def _grow(self, run: Run, weights: Mapping[str, Tensor], before: Masks) -> None:
        assert self.settings.growth  # without it masks change by gradual pruning only
        chosen = self.settings.growth
        rule = growth[chosen.name]
        for name, count in self._arriving(weights, before).items():
            if not count:
                continue
            weight = weights[name]
            scores = rule(
                weight.data,
                options=chosen.options,
                gradient=_gradient(weight),
                momentum=self.momentum.get(name),
                rng=generator(run.seed, "growth", name, run.step),
            )
            scores = checked_scores(f"growth rule {rule.name!r}", scores, weight, name)
            mask = self.masks[name]
            mask.copy_(grown(mask, scores, count))

    def _arriving(self, weights: Mapping[str, Tensor], before: Masks) -> dict[str, int]:
        """Return how many weights each layer grows: what it lost, or its share of what all lost."""
        counts = active_counts(self.masks)
        lost = {}
        for name, count in active_counts(before).items():
            lost[name] = count - counts[name]
        chosen = self.settings.redistribution
        if chosen is None:
            return lost
        rule = redistribution[chosen.name]
        shares = {}
        room = {}
        for name, mask in self.masks.items():
            momentum = self.momentum[name][mask] if name in self.momentum else None  # [k]
            share = rule(weights[name].data[mask], options=chosen.options, momentum=momentum)
            shares[name] = checked_share(f"redistribution {rule.name!r}", share, name)
            room[name] = mask.numel() - counts[name]
        return allot(shares, sum(lost.values()), room)

    def _agree(self, run: Run) -> None:
        """Take the first worker's masks: they follow from sums that machines may round differently."""
        as_bytes = [mask.view(torch.uint8) for mask in self.masks.values()]  # which every backend sends
        run.worker.share(as_bytes)

    def _record(self, run: Run) -> None:
        explored_share = self.explored_share
        active = active_counts(self.masks)
        explored = active_counts(self.explored)
        for name, mask in self.masks.items():
            self.history.append(
                {
                    "step": run.step,
                    "epoch": run.progress * run.settings.epochs,
                    "explored_share": explored_share,
                    "layer": name,
                    "active": active[name],
                    "explored": explored[name],
                    "weights": mask.numel(),
                }
            )


class FootprintReport(Hook):
    """Tells what the model takes, with and without the weights that do not exist.

    Args:
        model: as it was built, with dense layers.
        topology: whose masks; None = all weights exist.
    """

    def __init__(self, model: nn.Module, topology: Topology | None):
        self.model = model
        self.topology = topology

    def results(self, run: Run) -> Results:
        """Return parameters and operations, all and active ones."""
        masks = self.topology.masks if self.topology else {}
        takes = footprint(self.model, run.split.shape, masks)
        finding = f"{takes.parameters:,} parameters; a forward pass of one sample takes {takes.flops:,} operations"
        if masks:
            finding = (
                f"{takes.active_parameters:,} of {takes.parameters:,} parameters exist; a forward pass of one sample"
                f" that skips the others takes {takes.active_flops:,} of {takes.flops:,} operations"
            )
        return Results(facts=takes._asdict(), findings=[finding])


def _first_batch(run: Run) -> tuple[Tensor, Tensor]:
    """Draw a batch for the first masks, and bill its gradient."""
    indices = run.coreset.indices
    order = torch.randperm(len(indices), generator=generator(run.seed, "first batch"))
    drawn = indices[order[: run.settings.batch_size]]
    bill = run.bill(FIRST_MASKS)
    size = len(drawn)
    bill.forward += size
    bill.backward += size
    return next(plain_batches(run.split, drawn, run.worker.device, size, dtype_of(run.model)))


def _gradient(weight: Tensor) -> Tensor:
    """Return the gradient of a parameter; of one that the forward pass does not use, zeros."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


@hook("sparse", source="arXiv:1707.04780, arXiv:1911.11134")
def sparse(*, job: Job, samples: Samples, options: Sparsity = DENSE) -> list[Hook]:
    """Train under masks that change (SET, RigL, ITOP), and report what the model takes."""
    model = new_model(job.experiment, samples.data)
    if options.density is None:
        return [FootprintReport(model, None)]
    steps = job.training.epochs * job.training.steps_per_epoch(job.samples_used(samples))
    topology = Topology(options, steps)
    active = options.compute == "sparse"
    held = Active(topology.masks, topology.due) if active else Masked(topology.masks)
    return [topology, held, FootprintReport(model, topology)]
