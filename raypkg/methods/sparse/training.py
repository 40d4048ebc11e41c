"""Sparse training in any loop: masks that change during training, attached to the optimiser by its step hooks."""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NoReturn
from weakref import WeakSet

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from raypkg.core.config import Named, validate
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import Count, Share
from raypkg.coresets.batches import check_state, ranks_here
from raypkg.models.classifier import unwrapped

from .compute import compressed
from .masks import (
    Masks,
    active_counts,
    allot,
    density_of,
    drop_fraction,
    dropped,
    enlarged,
    grown,
    prunable,
    shapes_of,
    surplus,
    zero_changed,
)
from .settings import PRUNED_BY, REGISTRIES, Initial, Sparsity

Batch = tuple[Tensor, Tensor]  # x, y
Rule = str | Mapping[str, Any] | Named | None  # a name, or {"name": …, "options": {…}}
_attached: WeakSet[Any] = WeakSet()  # layers, and their optimisers


class Arguments(Sparsity):
    """The arguments of `SparseTraining`, by their names."""

    density: Share
    total_steps: Count
    sparse_init: Annotated[Initial, Field(alias="distribution")] = Initial()
    update_every_steps: Annotated[Count | None, Field(alias="update_every")] = None

    def interval(self, steps: int) -> int:
        """Return ΔT, by default the published one."""
        return self.update_every_steps or self.published_interval(steps)


class SparseTraining:
    """Trains a share of a model's weights, and changes which: RigL, SET, ITOP, sparse momentum, gradual pruning.

        every ΔT steps:  drop f(p) of each layer's active weights, grow as many; new weights and their momentum are 0
        every step:      gradients of pruned weights become 0, and with them momentum, decay and the weights

    f(p) = f0/2 · (1 + cos πp) at the share p of training, as in RigL (arXiv:1911.11134). Counts are exact. Masks
    apply to linear and convolutional layers and to attention's projections.

    No line of the loop changes: the optimiser's own step hooks act after all micro-batches, after DDP's exchange of
    gradients and after `torch.compile`. With a `GradScaler`, skipped steps do not count. A loop that clips gradients
    calls ``mask_gradients()`` before it, after unscaling and `GradientCorrection`, so that the norm is that of active
    weights. Weights grow on the raw gradient. Ranks of a process group take rank 0's masks. The arithmetic stays dense.
    Steps beyond ``total_steps`` keep the masks; steps after ``finalize`` are dense training.

    Make it with the model on its device. To resume, load the states of model, optimiser and this object in this order;
    if those of model and optimiser were loaded before it was made, give ``resumes=True``. A loop that resumes without
    this object trains densely, which nothing can detect.

    Differs from RigL: a step that changes the masks also updates the weights, after the change. Without growth, masks
    are static or, with the distribution ``dense``, weights are pruned gradually.

    Args:
        model: its weights are masked in place; wrappers of DDP and `torch.compile` may be around it.
        optimizer: has all weights that are masked.
        density: share of the weights that exist, 0 < density ≤ 1.
        distribution: first masks: erk, uniform, snip, grasp, dense.
        growth: gradient (RigL), random (SET), momentum; None = the masks stay.
        drop: magnitude, set. Rules are names, ``package.module:function``, or mappings with "options", too.
        redistribution: which layers grow: momentum; None = those that dropped.
        total_steps: steps of the optimiser in the whole training.
        update_every: ΔT in steps; default: the same share of training as published, at most 4000 (random: 1500).
        death_rate: f0, share of a layer's active weights to drop at the first change.
        fan_in: sparse = first weights suit the inputs that exist, for networks without batch norm.
        batch: x, y int64 [b] for the first masks, if snip or grasp chooses them.
        seed: of masks and random growth; the same on all ranks.
        resumes: leave the weights, which a checkpoint has set already; ``load_state_dict`` must follow.

    Raises:
        UserError: an invalid value, a model without prunable layers or with sharded weights (FSDP), an optimiser that
            lacks a weight, a second attachment, also by a shared layer, a copy. In a step that changes the masks,
            before anything changes: a gradient that is not finite, or pruned weights that are not zero, as after an
            optimiser that mixes the updates of weights (Muon, L-BFGS).

    >>> model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> sparse = SparseTraining(model, optimizer, density=0.1, total_steps=20, update_every=5)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     nn.functional.cross_entropy(model(torch.randn(8, 20)), torch.arange(8) % 2).backward()
    ...     optimizer.step()
    >>> round(sparse.density, 3), sparse.explored > sparse.density
    (0.1, True)
    >>> sparse.finalize()
    >>> sum(int(layer.weight.count_nonzero()) for layer in (model[0], model[2]))
    66
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        density: float = 0.05,
        *,
        total_steps: int,
        distribution: Rule = "erk",
        growth: Rule = "gradient",
        drop: Rule = "magnitude",
        redistribution: Rule = None,
        update_every: int | None = None,
        death_rate: float = 0.5,
        fan_in: str = "dense",
        batch: Batch | None = None,
        seed: int = 0,
        resumes: bool = False,
    ):
        chosen = {"density": density, "growth": growth, "drop": drop, "redistribution": redistribution}
        chosen |= {"distribution": distribution, "update_every": update_every, "total_steps": total_steps}
        chosen |= {"death_rate": death_rate, "fan_in": fan_in}
        self.settings = settings = validate(Arguments, chosen)
        for lookup in settings.lookups():
            lookup.registry[lookup.name].options(lookup.options)
        self.total_steps = settings.total_steps
        self.every = settings.interval(self.total_steps)
        settings.check_steps(self.total_steps)
        self.model = unwrapped(model)
        # Accelerate wraps optimisers, whose hooks are those of the inner one.
        self.optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.weights = prunable(self.model)
        total, layers = sum(weight.numel() for weight in self.weights.values()), len(self.weights)
        active = round(settings.density * total)
        if active < max(1, layers):
            trained = f"the model trains {total:,} weights of {layers} linear and convolutional layers"
            raise UserError(f"density = {settings.density:g}: {trained}, {active} would exist: at least one each")
        optimised = {id(weight) for group in self.optimizer.param_groups for weight in group["params"]}
        for name, weight in self.weights.items():
            if id(weight) not in optimised:
                raise UserError(f"the optimiser does not have {name} of the model: give it this model's parameters")
            if type(weight.data) is not Tensor:
                kind = type(weight.data).__name__
                raise UserError(f"{name} is a {kind}: SparseTraining needs whole weights, as DDP has them, not FSDP")
        self._parts = {self.optimizer, *(self.model.get_submodule(name.rpartition(".")[0]) for name in self.weights)}
        if not self._parts.isdisjoint(_attached):
            raise UserError("the optimiser or a layer of the model has a SparseTraining already: finalize() ends that")

        self.seed = seed
        self.step = 0  # steps of the optimiser so far
        self.tracks_momentum = bool(settings.rules_by_momentum)
        self.momentum: dict[str, Tensor] = {}  # of the dense gradient, if a rule needs it
        rule = settings.sparse_init
        rng = generator(seed, "mask")
        masks = first_masks(rule.name, self.model, settings.density, rng=rng, batch=batch, **rule.options)
        # By the names of the weights, changed in place.
        self.masks = {name: mask.bool().to(self.weights[name].device) for name, mask in masks.items()}
        self._agree(self.masks)
        self.ever = {name: mask.clone() for name, mask in self.masks.items()}  # weights that were ever active
        for name, weight in self.weights.items() if not resumes else ():
            if settings.fan_in == "sparse":
                weight.data.copy_(enlarged(weight.data, self.masks[name]))
            zero_changed(weight, self.masks[name], self.masks[name], self.optimizer)
        self._commit(self.masks)
        self._updated = False  # for the coming step of the optimiser
        before = self.optimizer.register_step_pre_hook(self._before_step)
        after = self.optimizer.register_step_post_hook(self._after_step)
        self._handles = (before, after)
        _attached.update(self._parts)

    @property
    def density(self) -> float:
        """The share of the weights that exist."""
        return density_of(self.masks)

    @property
    def explored(self) -> float:
        """R_s, the share of the weights that existed at some time (ITOP)."""
        return density_of(self.ever)

    def due(self, step: int) -> bool:
        """Return True if the masks change in a step."""
        changes = self.settings.is_gradual or self.settings.growth is not None
        return changes and step > 0 and step % self.every == 0

    def update(self, progress: float | None = None) -> bool:
        """Change the masks by the dense gradients if that is due; return True if they changed.

        The optimiser's step and ``mask_gradients`` call it once for each step. Gradients that are not finite change
        nothing: either a `GradScaler` skips the step, or the step raises an error. ``progress`` replaces the share of
        steps that is done.
        """
        due = self.due(self.step)
        gradients: dict[str, Tensor] = {}
        if due or self.tracks_momentum:
            if self._infinite():
                return False
            # Unscaled and without AGENT's correction; zeros where the forward pass has no use for a weight.
            scale = getattr(self.optimizer, "grad_scale", None)  # while a fused optimiser steps under a GradScaler
            for name, weight in self.weights.items():
                raw: Tensor | None = getattr(weight, "raw_grad", None)  # from GradientCorrection
                if raw is None:
                    raw = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    raw = raw if scale is None else raw / scale
                gradients[name] = raw
        if due or self.step < 2:
            for name, weight in self.weights.items():
                mask = self.masks[name]
                if weight.shape != mask.shape:  # sparse layers of a run hold active weights only
                    continue
                is_masked = (weight.data * self._factors[name] == weight.data).all()  # a quick check
                if not is_masked and (weight.data[~mask].abs() > 0).any():
                    mixes = f"{type(self.optimizer).__name__} mixes the updates of weights, as Muon and L-BFGS do"
                    raise UserError(f"pruned weights of {name} are not zero: they were set from elsewhere, or {mixes}")
        if self.tracks_momentum:
            group = self.optimizer.param_groups[0]
            beta = group["momentum"] if "momentum" in group else group.get("betas", (0.9,))[0]
            for name, gradient in gradients.items():  # m ← βm + g
                self.momentum[name] = beta * self.momentum.get(name, 0.0) + gradient
        if due:
            done = self.step / self.total_steps if progress is None else progress
            self._change(gradients, min(1.0, done))
        self._updated = True
        return due

    def mask_gradients(self, names: Iterable[str] | None = None) -> None:
        """Zero the gradients of pruned weights, of the named ones only or of all, after ``update``."""
        if not self._updated:
            self.update()
        for name in self.weights if names is None else names:
            gradient = self.weights[name].grad
            if gradient is not None:  # None: the forward pass does not use the weight
                gradient.mul_(self._factors[name])

    def compressed(self) -> dict[str, Tensor]:
        """Return the model's tensors with the masked ones in compressed sparse rows.

        `raypkg.methods.sparse.compute.expanded` makes them dense again; `safetensors` and `torch.save` write them.
        """
        return compressed(self.model.state_dict(), set(self.masks))

    def detach(self) -> None:
        """Remove the hooks from the optimiser, whose loop then calls ``update`` and ``mask_gradients`` itself."""
        for handle in self._handles:
            handle.remove()
        _attached.difference_update(self._parts)

    def __reduce__(self) -> NoReturn:
        raise UserError("SparseTraining cannot be copied or pickled, as it acts on one optimiser: use its state_dict()")

    def finalize(self) -> None:
        """Detach at the end of training; pruned weights are zero, until further steps train them."""
        for name, weight in self.weights.items():
            weight.data.mul_(self.masks[name])
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return masks, momentum and step, at any step of an epoch, as tensors and plain values."""
        return {
            "masks": dict(self.masks),
            "explored": dict(self.ever),
            "momentum": dict(self.momentum),
            "step": self.step,
            "nonzero": self._nonzero(self.masks),
            "settings": {"density": self.settings.density},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state, after that of the model.

        Raises:
            UserError: the state is of another object, model or density, or was stored with other weights of the model.
        """
        check_state("SparseTraining", state, ("masks", "explored", "momentum"), {"density": self.settings.density})
        shapes = {name: mask.shape for name, mask in state["masks"].items()}
        if others := sorted(dict(shapes.items() ^ shapes_of(self.model).items())):
            raise UserError(f"the state is of another model: {others[0]} is missing in one or has another shape")
        masks = {name: mask.to(self.masks[name].device) for name, mask in state["masks"].items()}
        found = self._nonzero(masks)
        if found != state.get("nonzero", found):  # earlier versions stored neither this nor the step
            differ = f"of the weights in these masks {found:,} are not zero, not {state['nonzero']:,}"
            raise UserError(f"{differ}: make SparseTraining first, then load the model's state, then this one")
        self._commit(masks)
        for name, mask in state["explored"].items():
            self.ever[name].copy_(mask)
        self.momentum = {name: value.to(self.masks[name].device) for name, value in state["momentum"].items()}
        self.step = state.get("step", 0)
        self._updated = False

    def _nonzero(self, masks: Masks) -> int:
        return sum(int(self.weights[name].data[mask].count_nonzero()) for name, mask in masks.items())

    # Steps of the optimiser

    def _before_step(
        self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure: Callable[[], Any] | None = arguments[1] if len(arguments) > 1 else keywords.get("closure")
        if closure is None:
            self._prepare()
            return None

        def prepared() -> Any:  # the closure computes the gradients, as in Lightning
            loss = closure()
            self._prepare()
            return loss

        return arguments[:1], {**keywords, "closure": prepared}

    def _prepare(self) -> None:
        if self._is_skipped():
            return
        if not self._updated:
            self.update()
            if not self._updated:
                name = self._infinite()
                raise UserError(f"step {self.step}: the gradient of {name} is not finite: lower the learning rate")
        self.mask_gradients()

    def _after_step(self, *_: Any) -> None:
        if self._is_skipped():
            return
        self.step += 1
        self._updated = False
        for weight in self.weights.values():
            vars(weight).pop("raw_grad", None)

    def _is_skipped(self) -> bool:
        """Return True in a step of a fused optimiser that changes no weight, as a `GradScaler` found an overflow."""
        found = getattr(self.optimizer, "found_inf", None)
        return found is not None and bool(found)

    def _infinite(self) -> str | None:
        """Return the name of a parameter whose gradient has an infinite value or NaN, or None."""
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad  # a finite sum has finite terms, and takes a small part of the time
            if gradient is not None and not gradient.sum().isfinite() and not gradient.isfinite().all():
                return name
        return None

    # Changes of the masks

    def _change(self, gradients: Mapping[str, Tensor], progress: float) -> None:
        settings, before = self.settings, self.masks
        old_counts = active_counts(before)

        # Drop the share f(p) of each layer or, in gradual pruning, its surplus over the density d + (1 − d)·(1 − p)³ at
        # the share p of pruning (arXiv:1710.01878).
        if settings.is_gradual:
            pruning_done = min(1.0, progress / PRUNED_BY)
            leaving = surplus(before, settings.density + (1 - settings.density) * (1 - pruning_done) ** 3)
        else:
            fraction = drop_fraction(settings.death_rate, progress)
            # Rounding of the progress must not turn 8 weights into 7.999….
            leaving = {name: int(fraction * count + 1e-9) for name, count in old_counts.items()}
        rule = REGISTRIES["drop"][settings.drop.name]
        masks = {}
        for name, mask in before.items():
            active = self.weights[name].data[mask]  # [k]
            scores = rule(active, options=settings.drop.options)
            masks[name] = dropped(mask, _checked(f"drop rule {rule.name!r}", scores, active, name), leaving[name])

        # Grow as many weights as all layers lost: each its own, or its part by the redistribution.
        if settings.growth:
            counts = active_counts(masks)
            arriving = {name: count - counts[name] for name, count in old_counts.items()}
            if settings.redistribution:
                rule = REGISTRIES["redistribution"][settings.redistribution.name]
                shares = {}
                for name, mask in masks.items():
                    momentum = self.momentum[name][mask] if name in self.momentum else None  # [k]
                    active = self.weights[name].data[mask]
                    shares[name] = rule(active, options=settings.redistribution.options, momentum=momentum)
                room = {name: mask.numel() - counts[name] for name, mask in masks.items()}
                arriving = allot(shares, sum(arriving.values()), room)
            rule = REGISTRIES["growth"][settings.growth.name]
            for name, count in arriving.items():
                if count:
                    weight = self.weights[name]
                    inputs = {"gradient": gradients[name], "momentum": self.momentum.get(name)}
                    rng = generator(self.seed, "growth", name, self.step)
                    scores = rule(weight.data, options=settings.growth.options, rng=rng, **inputs)
                    scores = _checked(f"growth rule {rule.name!r}", scores, weight, name)
                    masks[name] = grown(masks[name], scores, count)

        self._agree(masks)
        for name, mask in masks.items():
            self.ever[name] |= mask
            zero_changed(self.weights[name], mask, before[name], self.optimizer)
        self._commit(masks)

    def _agree(self, masks: Masks) -> None:
        """Take rank 0's masks: machines may round the sums behind them differently."""
        ranks_here().share(mask.view(torch.uint8) for mask in masks.values())  # every backend can send bytes

    def _commit(self, masks: Masks) -> None:
        for name, mask in masks.items():
            self.masks[name].copy_(mask)
        # A product with a mask of the gradient's type is several times faster on a CPU than with a bool one.
        self._factors = {name: mask.to(self.weights[name].dtype) for name, mask in self.masks.items()}


def first_masks(
    name: str, model: nn.Module, density: float, /, *, rng: torch.Generator, batch: Batch | None = None, **options: Any
) -> Masks:
    """Return the first masks by the named rule; some rules need a batch x, y."""
    rule = REGISTRIES["sparse_init"][name]
    if batch is None and "batch" in rule.declares:
        raise UserError(f"sparse initialisation {name!r} scores weights on a batch: give batch=(x, y)")
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
    if scores.sum().isnan() and scores.isnan().any():  # the sum takes a small part of the time
        raise UserError(f"{rule} returned NaN for {layer}: lower the learning rate, if weights are not finite")
    return scores.to(weights.device)
