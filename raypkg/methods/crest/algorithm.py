"""CREST's loop (arXiv:2306.01244, algorithm 1): a pool of coresets lasts as long as a local model of the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.batches import Worker
from raypkg.coresets.gradients import HeadView, head_view
from raypkg.data.coreset import Coreset
from raypkg.models.classifier import in_mode

from . import quadratic
from .quadratic import BETAS, Derive, MovingMoments, Region, flat, gradient_of
from .selection import ActiveSamples, Chosen, Pool, Subset, choose_minibatches
from .settings import CrestOptions

Losses = Callable[[], Tensor]  # computes the losses of samples by a language model [b]
Compute = Callable[[Losses], tuple[Tensor, Tensor]]  # → these losses [b], factors of their gradients [b, k]
# Samples of a forward pass that chooses for a language model. Fixed, so that losses do not depend on the number of
# workers, and small, so that none of them needs more memory than its share of a step.
CHUNK = 8


class Loop(ABC):
    """A training as CREST sees it: a model, which changes between the steps, and its passes over samples.

    Passes are in evaluation mode. The workers share each of them and call it together.
    """

    model: nn.Module
    seed: int
    steps: int  # of the whole training
    size: int  # m
    at_once: int  # samples of a backward pass
    worker: Worker
    augment: Sequence[str] = ()  # of the samples that CREST sees
    gives_gradients = False  # True: the next step computes the gradient of its coreset anyway, for ``on_gradients``

    @abstractmethod
    def batches(
        self, subset: Subset, part: str, size: int | None = None, *, backward: bool = False
    ) -> Iterator[tuple[Any, Tensor]]:
        """Yield (x, y) of samples on the model's device, and count them for a part of the cost."""

    def losses_of(self, x: Any, y: Tensor) -> Tensor:
        """Return the losses of a language model, [b]."""
        losses: Tensor = self.model(x).losses
        return losses

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context of forward passes."""
        return nullcontext()

    @contextmanager
    def passing(self, part: str) -> Iterator[None]:
        """Make passes for a part of the cost inside the block, all workers with rank 0's buffers."""
        self.worker.share(self.model.buffers())
        with in_mode(self.model, training=False):  # dropout and batch norm would make the model noisy
            yield

    def view(self, model: nn.Module, subset: Subset, part: str) -> HeadView:
        """Return the logits and labels of samples."""
        with self.precision():
            return head_view(model, self.batches(subset, part))

    def choose(self, subsets: Sequence[Subset], weights: Mapping[str, Tensor] | None) -> list[Chosen]:
        """Choose a mini-batch coreset from each random subset, with these weights; None = the present ones."""
        own, mine = subsets[self.worker.rank :: self.worker.world], []
        with self.passing("select"):
            model = self.model
            if weights is not None:
                model = deepcopy(model)
                model.load_state_dict(weights)
            if own:  # one forward pass over all of them
                mine = choose_minibatches(own, self.view(model, Subset.concat(own), "select"), self.size)
            return self.worker.interleaved(mine)

    def value_gradients(self, compute: Compute, subset: Subset) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses [r] of a language model, factors of their gradients [r, k] and the sources, int64 [r].

        ``compute`` returns the first two of a few samples, ``CHUNK`` at a time.
        """
        chunks = torch.arange(len(subset)).split(CHUNK)
        own, mine = chunks[self.worker.rank :: self.worker.world], []
        with self.passing("select"), self.precision():
            for x, y in self.batches(subset[torch.cat(own)], "select", CHUNK) if own else ():
                losses, factors = compute(partial(self.losses_of, x, y))
                mine.append((losses, factors, y.cpu() if y.dim() == 1 else torch.zeros(len(y), dtype=torch.int64)))
            parts = zip(*self.worker.interleaved(mine), strict=True)
        losses, factors, sources = map(torch.cat, parts)
        return losses, factors, sources

    def losses(self, subset: Subset) -> Tensor:
        """Return the losses of samples with the present weights, [r]."""
        own = self._share_of(subset)
        losses = torch.empty(0)
        with self.passing("check"):
            if len(own):
                view = self.view(self.model, own, "check")
                losses = F.cross_entropy(view.logits, view.y, reduction="none")
            return torch.cat(self.worker.gather(losses))

    def derivative(self, derive: Derive, parameters: Sequence[Tensor], samples: Subset, weights: Tensor) -> Tensor:
        """Return a derivative of the mean of w · loss, [p]."""
        device = parameters[0].device
        own_weights = self._share_of(weights).to(device).split(self.at_once)
        total = torch.zeros(sum(parameter.numel() for parameter in parameters), device=device)
        with self.passing("model"):
            batches = self.batches(self._share_of(samples), "model", self.at_once, backward=True)
            for (x, y), w in zip(batches, own_weights, strict=True):
                with self.precision():
                    logits = self.model(x)
                losses = F.cross_entropy(logits.float(), y, reduction="none")  # [b]
                total += derive(losses @ w.float() / len(samples), parameters)  # linear in the loss
            return self.worker.sum(total)

    def _share_of(self, values: Any) -> Any:
        """Return this worker's part of a subset or tensor, as even as possible."""
        return values[torch.arange(len(values)).tensor_split(self.worker.world)[self.worker.rank]]

    def weights(self) -> Mapping[str, Tensor]:
        """Return a copy of the model's state."""
        self.worker.share(self.model.buffers())
        return deepcopy(self.model.state_dict())


@dataclass(eq=False)
class CrestState:
    """Everything that a checkpoint holds of CREST."""

    samples: ActiveSamples
    region: Region
    pool: Pool  # source of the training batches; update 0 before the first step, then the number of pools so far
    history: list[dict[str, float]] = field(default_factory=list)  # a row per check


class CrestAlgorithm:
    """The choice of mini-batch coresets for the steps of a training.

        while steps are left:
            if ρ > τ:  T1 = ⌈h·‖H̄_0‖ / ‖H̄‖⌉;  a new pool of P = b·T1 coresets with the weights w_l;  a new model F
            train T1 steps on coresets drawn from the pool
            ρ = |F(w − w_l) − L^r(w)| / L^r(w),  L^r on r random samples

    With τ = 0, no local model is fitted: every step trains on a coreset chosen with its own weights. Losses of the
    local model are in evaluation mode.

    Differs from the paper: samples are excluded at the first check after T2 steps, none if fewer than 2r would stay.
    With ``model_batches`` above 0, ḡ and H̄ are estimated from so many coresets, and another is computed when drawn,
    with the weights w_l. Where the released code differs from the text there is a setting: ``checked_on``,
    ``smoothing``, ``settle``, ``exclude_after`` and ``keep_active``.

    It chooses m = ``size`` out of the samples ``indices``, int64 [n]; a random subset must hold a batch. ``on_choice``
    receives each new coreset and its pool, in the order of the draws.
    """

    def __init__(
        self,
        options: CrestOptions,
        loop: Loop,
        indices: Tensor,
        size: int,
        on_choice: Callable[[Pool, Chosen], None] = lambda pool, chosen: None,
    ):
        self.options = options
        self.loop = loop
        self.size = size
        self.on_choice = on_choice
        self.subset_size = options.subset_size(len(indices), size)
        # Two random subsets at least stay active, so that subsets remain random.
        self.least_active = max(ceil(options.keep_active * len(indices)), 2 * self.subset_size)
        samples = ActiveSamples.all_of(indices)
        zero = torch.zeros(())  # takes the shape of the first gradient
        betas = BETAS if options.smoothing != "none" else (0.0, 0.0)
        moments = MovingMoments(zero, zero if options.order == 2 else None, betas=betas)
        region = Region(moments, anchor=torch.empty(0))
        self.state = CrestState(samples, region, Pool(0, 0, samples.candidates, weights=None))
        self.step = 0
        self.awaits_gradient = False  # ``on_gradients`` will fit the local model of a new region

    def intervals(self, end: int) -> Iterator[tuple[range, list[Chosen]]]:
        """Yield steps before ``end`` and their coresets, up to the next check at a time.

        Train on each, and call ``trained`` after it, before requesting the next ones.
        """
        region = self.state.region
        while True:
            if region.age == region.interval:
                region.age = 0
                self._check()
            if self.step >= end:
                return
            if region.age == 0 and region.expired:
                self._renew()
            # An end between two checks leaves the interval to be continued.
            steps = range(self.step, min(self.step + region.interval - region.age, end))
            pool = self.state.pool
            yield steps, self._coresets(pool, pool.draw(steps, self.loop.seed))

    def trained(self) -> None:
        """Count a step."""
        self.step += 1
        self.state.region.age += 1

    def _coresets(self, pool: Pool, wanted: Iterable[int]) -> list[Chosen]:
        """Return coresets of a pool, after choosing missing ones and recording the losses of their random subsets."""
        wanted = list(wanted)
        if missing := [p for p in dict.fromkeys(wanted) if p not in pool.chosen]:
            subsets = [self._subset(pool, p) for p in missing]
            for p, subset, chosen in zip(missing, subsets, self._chosen(pool, subsets), strict=True):
                pool.chosen[p] = chosen
                self.state.samples.record(subset.indices, chosen.losses, self.options.exclude_below)
                self.on_choice(pool, chosen)
        return [pool.chosen[p] for p in wanted]

    def _chosen(self, pool: Pool, subsets: Sequence[Subset]) -> list[Chosen]:
        return self.loop.choose(subsets, pool.weights)

    def _subset(self, pool: Pool, p: int) -> Subset:
        """Return the random subset V_p of a pool, the same at every call."""
        rng = generator(self.loop.seed, "crest subset", pool.update, p)
        return Subset.random(pool.candidates, self.subset_size, self.loop.augment, rng)

    def _renew(self) -> None:
        """Replace the expired pool by one chosen with the present weights w_l, and fit the local model of the loss."""
        state, region, options = self.state, self.state.region, self.options
        size, weights = 1, None
        if options.tau:
            size = options.b * region.interval  # P = b·T1
            if options.model_batches:  # coresets are chosen later, and training continues in place
                weights = self.loop.weights()
        pool = Pool(state.pool.update + 1, size, state.samples.candidates, weights)
        # Coresets that training draws come first: they are chosen anyway, the others only for the local model.
        first = dict.fromkeys(pool.draw(range(self.step, self.step + region.interval), self.loop.seed))
        drawn = self._coresets(pool, first)
        if options.tau:
            others = (p for p in range(pool.size) if p not in first)
            fitted_on = self._coresets(pool, islice(chain(first, others), options.model_batches or None))
            if len(fitted_on) == 1 and self.loop.gives_gradients:
                self.awaits_gradient = True  # training computes it anyway, at the next step
            else:
                self._fit(fitted_on, pool.update)
            region.anchor = flat(self._covered)  # w_l
            region.loss = sum(chosen.loss for chosen in drawn) / len(drawn)
            region.expired = False
        state.pool = pool

    def on_gradients(self) -> None:
        """Fit the local model of a new region, if it awaits that, to the gradients of its first step, at w_l."""
        if not self.awaits_gradient:
            return
        self.awaits_gradient = False
        gradient = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in self._covered)
        pool = self.state.pool
        (first,) = pool.draw(range(self.step, self.step + 1), self.loop.seed)
        self._fit([pool.chosen[first]], pool.update, gradient)

    def _fit(self, coresets: Sequence[Chosen], update: int, known: Tensor | None = None) -> None:
        """Update ḡ and H̄ with the derivatives of the mean of w · loss over coresets.

        Each coreset updates them, or all together (``options.smoothing``). ``update`` is l, the number of the pool.
        ``known`` is the gradient if training has just computed it for the only coreset.
        """
        region, options = self.state.region, self.options
        moments = region.moments
        groups = [[coreset] for coreset in coresets] if options.smoothing == "coreset" else [coresets]
        for number, group in enumerate(groups):
            samples = Subset.concat([chosen.samples for chosen in group])
            weights = torch.cat([chosen.coreset.weights for chosen in group])
            gradient = self._derivative(gradient_of, samples, weights) if known is None else known
            diagonal = None
            if options.order == 2:
                # A double backward pass is the most expensive part of CREST, so some of the samples give the curvature.
                count = max(1, self.size // 4) if options.curvature is None else options.curvature
                rng = generator(self.loop.seed, "crest curvature", update, number)
                some = torch.randperm(len(samples), generator=rng)[: count or None]

                # All batches draw the same signs z: z ⊙ Hz is linear in H, so estimates add up to that of the sum.
                signs = partial(generator, self.loop.seed, "crest signs", update, number)
                estimate = partial(quadratic.hessian_diagonal, draw=signs)
                try:
                    with sdpa_kernel(SDPBackend.MATH):  # fused kernels of attention have no second derivative
                        diagonal = self._derivative(estimate, samples[some], weights[some])
                except RuntimeError as error:
                    if "derivative for" not in str(error):
                        raise
                    raise UserError(f"CREST's curvature cannot be computed: {error}; set order = 1") from None
            moments = moments.updated(gradient, diagonal)

        region.moments = moments
        if self.step >= options.settle * self.loop.steps and not region.first_curvature:
            region.first_curvature = self.loop.worker.first(region.curvature)  # ‖H̄_0‖

    def _derivative(self, derive: Derive, samples: Subset, weights: Tensor) -> Tensor:
        """Return a derivative of the mean of w · loss, [p]."""
        total = self.loop.derivative(derive, self._covered, samples, weights)
        if not total.isfinite().all():
            raise UserError(
                f"step {self.step}: the derivatives of CREST's model are not finite: lower the learning rate"
            )
        return total

    def _check(self) -> None:
        """Compare the local model with the loss of a random subset; expire it if ρ > τ; exclude learned samples."""
        options, pool, region, samples = self.options, self.state.pool, self.state.region, self.state.samples
        if options.tau == 0:  # no local model: only samples are excluded
            if self.step % options.exclude_every_steps == 0:
                self._log()
                samples.exclude(self.step, options, least=self.least_active)
            return

        rng = generator(self.loop.seed, "crest check", self.step)
        if options.checked_on == "fresh":
            subset = Subset.random(samples.candidates, self.subset_size, self.loop.augment, rng)
            loss_before = region.loss  # at w_l, of the coresets
        else:
            known = sorted(pool.chosen)
            p = known[int(torch.randint(len(known), (), generator=rng))]
            subset = self._subset(pool, p)
            loss_before = float(pool.chosen[p].losses.mean())
        losses = self.loop.losses(subset)
        samples.record(subset.indices, losses, options.exclude_below)
        loss = float(losses.mean())  # L^r(w)
        prediction = region.prediction(flat(self._covered), loss_before)  # F(w − w_l)
        rho = self.loop.worker.first(quadratic.relative_error(prediction, loss))
        region.expired = rho > options.tau
        self._log(rho=rho, loss=loss, model=prediction)
        samples.exclude(self.step, options, least=self.least_active)
        if region.expired:
            curvature = self.loop.worker.first(region.curvature)
            interval = quadratic.check_interval(options.h, region.first_curvature, curvature)
            # At the end of training T1 falls short of its formula: coresets for steps that never come would be chosen.
            region.interval = max(1, min(interval, self.loop.steps - self.step))

    def _log(self, **measured: float) -> None:
        """Add a row to the table of checks, before samples are excluded and T1 changes."""
        state, pool = self.state, self.state.pool
        active = int(state.samples.active.sum())
        sizes = {"interval": state.region.interval, "pool": pool.size, "chosen": len(pool.chosen), "active": active}
        state.history.append({"step": self.step, "update": pool.update, **measured, **sizes})

    @property
    def _covered(self) -> list[Tensor]:
        return [parameter for parameter in self.loop.model.parameters() if parameter.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """Return the state, which may lie inside a region, as tensors and plain values."""
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        values = deepcopy(dict(state))  # losses and counts change in place
        for part, former in ((values, "coming"), (values["region"], "drift"), (values["pool"], "awaited")):
            part.pop(former, None)  # of earlier versions
        region, pool = values["region"], values["pool"]
        region["moments"] = MovingMoments(**region["moments"])
        for chosen in pool["chosen"].values():
            chosen["coreset"] = Coreset(**chosen["coreset"])
        pool["chosen"] = {p: Chosen(**chosen) for p, chosen in pool["chosen"].items()}
        samples = ActiveSamples(**values["samples"])
        self.state = CrestState(samples, Region(**region), Pool(**pool), values["history"])
