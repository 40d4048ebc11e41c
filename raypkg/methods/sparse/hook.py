"""Dynamic sparse training as a hook: every ΔT steps some weights go and others come."""

from __future__ import annotations

import math
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
from raypkg.engine.worker import Worker
from raypkg.methods.agent.hook import Correction
from raypkg.phases.samples import Samples, new_model
from raypkg.phases.training import Job

from . import plots
from .flops import active_flops, forward_flops
from .masks import Masks, allot, density_of, enlarged, prunable, shapes_of
from .rules import drop, growth, initial, momentum_rules, redistribution
from .settings import PRUNED_BY, SparseSettings, Sparsity
from .topology import drop_fraction, dropped, gradual_density, grown

_DIVERGED = "where the weights are not finite, lower the learning rate"


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

    def __init__(self, settings: Sparsity, steps: int):
        assert settings.density is not None  # without one there is nothing to change
        self.settings, self.density, self.gradual = settings, settings.density, settings.is_gradual
        self.follows = bool(momentum_rules(settings))
        self.every = settings.interval(steps)
        self.masks: Masks = {}
        self.explored: Masks = {}  # weights that ever were active
        self.momentum: dict[str, Tensor] = {}  # of the dense gradient, where a rule asks for it
        self.history: list[dict[str, Any]] = []  # a row for each layer and change

    @property
    def explored_share(self) -> float:
        """R_s, the share of weights that ever were active (ITOP)."""
        return density_of(self.explored)

    def on_start(self, run: Run) -> None:
        """Draw the first masks.

        Raises:
            UserError: there are no such weights, or the density leaves fewer than there are layers.
        """
        rule, density = initial[self.settings.sparse_init.name], self.density
        options, rng = self.settings.sparse_init.options, generator(run.seed, "mask")
        shapes = shapes_of(run.model)
        if not shapes:
            raise UserError(f"density = {density:g}: the model trains no weights of linear or convolutional layers")
        sizes = [shape.numel() for shape in shapes.values()]
        if round(density * sum(sizes)) < len(sizes):
            raise UserError(
                f"density = {density:g} of {sum(sizes):,} weights leaves {round(density * sum(sizes))} for {len(sizes)}"
                " layers: each needs one at least"
            )
        with run.bill("first masks"):
            needed = {"batch": self._first_batch(run)} if "batch" in rule.declares else {}
            masks = rule(run.model, density, options=options, rng=rng, **needed)
        if {name: mask.shape for name, mask in masks.items()} != shapes:
            raise UserError(f"sparse initialisation {rule.name!r} returned other layers or shapes than {[*shapes]}")
        for name, mask in masks.items():
            self.masks[name] = mask.bool().to(run.worker.device)
        self._agree(run)
        self.explored = {name: mask.clone() for name, mask in self.masks.items()}
        if self.settings.fan_in == "sparse":
            for name, weight in prunable(run.model).items():
                weight.data.copy_(enlarged(weight.data, self.masks[name]))
        self._note(run)

    def on_gradients(self, run: Run) -> None:
        """Change the masks where it is due, by the raw gradient."""
        if self.follows:
            for name in self.masks:
                self._follow(name, run)
        if self.due(run.step):
            self._change(run)

    def due(self, step: int) -> bool:
        """Say whether the masks change in a step."""
        return (self.gradual or self.settings.growth is not None) and step > 0 and step % self.every == 0

    def results(self, run: Run) -> Results:
        """Return the history of the masks, with its picture, and how much of the weights there is."""
        density = density_of(self.masks)
        explored = self.explored_share
        return Results(
            facts={"density": density, "explored": explored},
            findings=[f"{density:.2%} of the weights exist, {explored:.2%} ever did: see plots/topology.png"],
            tables={"topology": pa.Table.from_pylist(self.history)},
            plots={"topology": partial(plots.topology, self.history)},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return masks, what was explored, momentum and history."""
        return {name: dict(getattr(self, name)) for name in ("masks", "explored", "momentum")} | {
            "history": list(self.history)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them; the masks in place, as others hold them."""
        for name, mask in self.masks.items():
            mask.copy_(state["masks"][name])
            self.explored[name].copy_(state["explored"][name])
            if name in state["momentum"]:
                self.momentum[name] = state["momentum"][name].to(mask.device)
        self.history = list(state["history"])

    def _change(self, run: Run) -> None:
        weights, existed = prunable(run.model), {name: mask.clone() for name, mask in self.masks.items()}
        rule, leaving = drop[self.settings.drop.name], self._leaving(run)
        for name, mask in self.masks.items():
            active = weights[name].data[mask]
            scores = _scores(f"drop rule {rule.name!r}", rule(active, options=self.settings.drop.options), active, name)
            mask.copy_(dropped(mask, scores, leaving[name]))
        for name, count in self._arriving(weights, existed).items():
            if count:
                scores = self._growth_scores(run, name, weights[name])
                self.masks[name].copy_(grown(self.masks[name], scores, count))
        self._agree(run)
        for name, mask in self.masks.items():
            self.explored[name] |= mask
            _settle(run, weights[name], mask, existed[name])
        self._note(run)

    def _leaving(self, run: Run) -> dict[str, int]:
        """Return how many weights each layer drops: the share f(t), or, pruning gradually, what is too many."""
        active = {name: int(mask.sum()) for name, mask in self.masks.items()}
        if not self.gradual:
            fraction = drop_fraction(self.settings.death_rate, run.progress, self.settings.decay)
            return {name: int(fraction * count) for name, count in active.items()}
        density = gradual_density(self.density, min(1.0, run.progress / PRUNED_BY))
        size = {name: mask.numel() for name, mask in self.masks.items()}
        target = allot({name: float(n) for name, n in size.items()}, round(density * sum(size.values())), size)
        return {name: max(0, count - max(1, target[name])) for name, count in active.items()}

    def _arriving(self, weights: Mapping[str, Tensor], existed: Masks) -> dict[str, int]:
        """Return how many weights each layer grows: what it lost, its share of what all lost, or none."""
        lost = {name: int(existed[name].sum()) - int(mask.sum()) for name, mask in self.masks.items()}
        if self.gradual:
            return dict.fromkeys(lost, 0)
        if self.settings.redistribution is None:
            return lost
        rule, shares = redistribution[self.settings.redistribution.name], {}
        for name, mask in self.masks.items():
            share = rule(
                weights[name].data[mask],
                options=self.settings.redistribution.options,
                momentum=self.momentum[name][mask] if name in self.momentum else None,
            )
            if not (isinstance(share, int | float) and 0 <= share < math.inf):
                raise UserError(f"redistribution {rule.name!r} returned {share} for {name}, not a share: {_DIVERGED}")
            shares[name] = float(share)
        room = {name: int((~mask).sum()) for name, mask in self.masks.items()}
        return allot(shares, sum(lost.values()), room)

    def _growth_scores(self, run: Run, name: str, weight: Tensor) -> Tensor:
        assert self.settings.growth  # otherwise nothing arrives
        rule = growth[self.settings.growth.name]
        scores = rule(
            weight.data,
            options=self.settings.growth.options,
            gradient=_gradient(weight),
            momentum=self.momentum.get(name),
            rng=generator(run.seed, "growth", name, run.step),
        )
        return _scores(f"growth rule {rule.name!r}", scores, weight, name)

    def _follow(self, name: str, run: Run) -> None:
        gradient = _gradient(run.model.get_parameter(name))
        if name in self.momentum:
            self.momentum[name].mul_(run.settings.momentum).add_(gradient)
        else:
            self.momentum[name] = gradient.clone()

    def _first_batch(self, run: Run) -> tuple[Tensor, Tensor]:
        size, indices = run.settings.batch_size, run.coreset.indices
        some = indices[torch.randperm(len(indices), generator=generator(run.seed, "first batch"))[:size]]
        bill = run.bill("first masks")
        bill.forward += len(some)
        bill.backward += len(some)
        return next(plain_batches(run.split, some, run.worker.device, len(some), dtype_of(run.model)))

    def _agree(self, run: Run) -> None:
        """Take the first worker's masks: they follow from sums that machines may round differently."""
        run.worker.share(mask.view(torch.uint8) for mask in self.masks.values())

    def _note(self, run: Run) -> None:
        explored_share = self.explored_share
        self.history += [
            {
                "step": run.step,
                "epoch": run.progress * run.settings.epochs,
                "explored_share": explored_share,
                "layer": name,
                "active": int(mask.sum()),
                "explored": int(self.explored[name].sum()),
                "weights": mask.numel(),
            }
            for name, mask in self.masks.items()
        ]


def _gradient(weight: Tensor) -> Tensor:
    """Return the gradient of a parameter; of one that the forward pass does not use, zeros."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _scores(rule: str, scores: object, like: Tensor, layer: str) -> Tensor:
    """Return what a rule scored, if it is a number for each weight; ∞ is one.

    Raises:
        UserError: it is not.
    """
    if not isinstance(scores, Tensor) or scores.shape != like.shape:
        found = list(scores.shape) if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise UserError(f"{rule} returned {found} for {list(like.shape)} of {layer}")
    if scores.isnan().any():
        raise UserError(f"{rule} returned NaN for {layer}: {_DIVERGED}")
    return scores.to(like.device)


def _settle(run: Run, weight: Tensor, mask: Tensor, existed: Tensor) -> None:
    """Zero what left and what is new: the weight, and what the optimiser remembers of it.

    The squares of Adam are the layer's mean where weights are new: from zero, their first steps would be far too long.
    """
    stays = mask & existed
    weight.data.mul_(stays)
    for name, value in run.optimizer.state.get(weight, {}).items():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.mul_(stays)
            if name == "exp_avg_sq" and stays.any():
                value[mask & ~existed] = value[stays].mean()


class Footprint(Hook):
    """Tells how many weights there are, and what a forward pass takes, with and without those that do not exist.

    Args:
        model: as it was built, with all its layers.
        topology: whose masks; None = all weights exist.
    """

    def __init__(self, model: nn.Module, topology: Topology | None):
        self.model = model
        self.topology = topology

    def results(self, run: Run) -> Results:
        """Return parameters and operations, all and active ones."""
        masks = self.topology.masks if self.topology else {}
        flops = forward_flops(self.model, run.split.shape)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        pruned = sum(int((~mask).sum()) for mask in masks.values())
        facts = {
            "parameters": parameters,
            "active_parameters": parameters - pruned,
            "flops": sum(flops.values()),
            "active_flops": active_flops(flops, masks),
        }
        finding = (
            f"{facts['active_parameters']:,} of {parameters:,} parameters exist; a forward pass of one sample needs"
            f" {facts['active_flops']:,} of {facts['flops']:,} operations"
        )
        return Results(facts=facts, findings=[finding])


@hook("sparse", source="arXiv:2301.03573")
def sparse(*, job: Job, worker: Worker, samples: Samples) -> list[Hook]:
    """Train under masks that change, with AGENT's correction where it is chosen."""
    from .masked import Active, Masked

    settings = job.experiment
    if not isinstance(settings, SparseSettings):
        raise UserError("hook sparse takes its settings from `effray sparse`: use that command")
    hooks: list[Hook] = []
    topology = None
    if settings.density is not None:
        size = len(samples.kept) if job.coreset is None else len(job.coreset)
        steps = job.training.epochs * -(-size // job.training.batch_size)
        topology = Topology(settings, steps)
        hooks.append(topology)
    if settings.agent:
        hooks.append(Correction(settings.agent))
    if topology:
        hooks.append(Active(topology) if settings.compute == "sparse" else Masked(topology.masks))
    hooks.append(Footprint(new_model(settings, samples.data), topology))
    return hooks
