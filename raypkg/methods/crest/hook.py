"""CREST as a hook: mini-batch coresets from a pool that lasts as long as a local model of the loss."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from itertools import chain, islice
from math import ceil
from typing import Any

import torch
from torch import Tensor

from raypkg.core.seeds import generator
from raypkg.data.augment import Augmentation, compose
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import Batch, Epoch, ahead, dtype_of, training_batch
from raypkg.engine.run import Hook, Results, Run, hook
from raypkg.engine.shards import Shards
from raypkg.engine.worker import Worker
from raypkg.experiments.samples import Samples
from raypkg.experiments.training import Job

from .choosing import ToScorer, choosing
from .fitting import covered_parameters, fitted_moments, trains_as_it_evaluates
from .minibatch import Chosen
from .pool import Pool, PoolServer
from .quadratic import flat, relative_error
from .region import check_interval
from .results import results_of
from .settings import CrestOptions
from .state import CrestState
from .subset import Subset
from .variance import DRAWS, look_at, warning_of

DEFAULTS = CrestOptions()
log = logging.getLogger(__name__)


class Crest(Hook):
    """Trains on mini-batch coresets (CREST, arXiv:2306.01244).

        while steps are left:
            if ρ > τ:  T1 = ⌈h·‖H̄_0‖ / ‖H̄_l‖⌉,  a new pool of P = b·T1 coresets with the weights w_l, a new model F
            train T1 steps on coresets drawn from the pool
            ρ = |F(w − w_l) − L^r(w)| / L^r(w),  F and L^r on one random subset of the pool

    With τ = 0 no model is trusted, so none is fitted: every step trains on a coreset that its own weights chose.

    Losses of the model are those in evaluation mode. A coreset of the pool is computed when it is drawn, with the
    weights w_l, so that in line none is chosen that is never trained on.

    Differs from the paper: ḡ is estimated from ``model_batches`` coresets of the pool (0 = all, as there), H̄ from
    ``curvature`` of their samples (0 = all); samples are excluded at the first check after T2 steps, and none if fewer
    than 2r would be left. With ``overlap``, an expired pool is used for T1 steps more while the next is chosen, with
    the weights at the check. Differs from its text and follows the released code, each by a setting: ``checked_on``,
    ``smoothing``, ``augmented``, ``settle``, ``exclude_after`` and ``keep_active`` (see the card).

    A coreset's gradient is near that of its random subset only where samples do not depend on each other: with batch
    norm, which takes its statistics from the medoids without their weights, most of the gain is lost (see the card,
    README.md beside this file).

    Args:
        options: τ, h, b and the rest.
        shards: can reach all samples each, and share the choices by rank.
        scorer: brings a model into the form that shards take.
        indices: the training samples, int64 [n].
        size: m, samples in a batch.

    Raises:
        UserError: a random subset would be smaller than a batch, or n smaller than a batch.
    """

    order = 0

    def __init__(self, options: CrestOptions, shards: Shards, scorer: ToScorer, indices: Tensor, size: int):
        self.options = options
        self.indices = indices
        self.steps = -(-len(indices) // size)  # of an epoch: as many as all samples would make
        self.subset_size = options.subset_size(len(indices), size)
        self.state = CrestState.initial(indices, order=options.order, smoothed=options.smoothing != "none")
        self.server = PoolServer(
            shards,
            scorer,
            size=size,
            subset_size=self.subset_size,
            augmented=options.augmented,
            memory=options.memory,
            on_choice=self._note_choice,
        )
        self.awaits_gradient = False  # whether the local model is to be fitted at the first step of its region
        self.actors = ExitStack()  # ends those that choose, if there are any

    def on_epoch(self, run: Run) -> None:
        """Move the local model to where training computes."""
        self.state.region.to(run.worker.device)

    def batches(self, run: Run) -> Epoch:
        """Return the mini-batch coresets of an epoch."""
        return Epoch(self.steps, self._train(run))

    def _train(self, run: Run) -> Iterator[Batch]:
        """Yield an epoch's mini-batch coresets; between two of them, do what is due."""
        augment = compose(run.augment)
        end = run.step + self.steps
        loop = self._chosen_each_step if self.options.tau == 0 else self._chosen_by_region
        yield from loop(run, augment, end)

    def _chosen_each_step(self, run: Run, augment: Augmentation, end: int) -> Iterator[Batch]:
        """Yield a coreset for every step, chosen with the weights that it moves."""
        while run.step < end:
            self._look(run)
            self.state.pool = Pool(self.state.updates + 1, 1, self.state.samples.candidates, weights=None)
            run.worker.share(run.model.buffers())
            drawn = self.server.coresets(run, self.pool, [0])
            yield from self._trained(run, augment, range(run.step, run.step + 1), drawn)
            if run.step % self.options.exclude_every_steps == 0:
                self._log(run)
                self._exclude(run)

    def _chosen_by_region(self, run: Run, augment: Augmentation, end: int) -> Iterator[Batch]:
        """Yield coresets of pools, renewed where the local model of the loss has expired: the paper's loop.

        An epoch may end, and be checkpointed, inside an interval between two checks.
        """
        region = self.state.region
        while run.step < end:
            if region.age == 0 and region.expired:
                self._look(run)
                self._renew(run)
            next_check = run.step + region.interval - region.age
            steps = range(run.step, min(next_check, end))
            draws = self.pool.draw(steps, run.seed)
            drawn = self.server.coresets(run, self.pool, draws)
            self._choose_ahead(run, steps)
            yield from self._trained(run, augment, steps, drawn)
            region.age += len(steps)
            if region.age < region.interval:
                continue
            region.age = 0
            if not region.expired:  # with overlap, an expired pool has been trained on for one interval more
                self._check(run)

    def _trained(self, run: Run, augment: Augmentation, steps: range, drawn: Sequence[Chosen]) -> Iterator[Batch]:
        """Yield the coresets of the steps as batches, loaded ahead, and count which samples were trained on."""
        load = partial(self._load, run, augment)
        batches = ahead(load, zip(steps, drawn, strict=True))
        for batch, chosen in zip(batches, drawn, strict=True):
            yield batch
            self.state.counts[chosen.coreset.indices] += 1

    def _load(self, run: Run, augment: Augmentation, job: tuple[int, Chosen]) -> Batch:
        """Load this worker's slice of the coreset of one step."""
        step, chosen = job
        coreset = chosen.coreset
        rng = generator(run.seed, "crest batch", step)
        order = torch.randperm(len(coreset), generator=rng)  # medoids come central first: workers get slices alike
        shuffled = Coreset(coreset.indices[order], coreset.weights[order])
        if self.options.augmented:
            draws = chosen.draws[order]
        else:
            draws = torch.rand(len(order), augment.draws, generator=rng)
        return training_batch(run.split, shuffled, augment, draws, run.worker, dtype_of(run.model))

    def _look(self, run: Run) -> None:
        """Say what coresets are worth and cost: at the start, and again where training has settled."""
        if run.step == 0:
            self._say(run, *warning_of(run.model))
        looks = self.state.looks
        due = not looks or (len(looks) == 1 and self._settled(run) and run.step > looks[0]["step"])
        if not (self.options.look and due):
            return
        with run.cost.apart(run.bill("look")):
            subsets = [self._fresh_subset(run, "crest look", number) for number in range(DRAWS)]
            chosen = self.server.trial(run, subsets)
            look = look_at(run, subsets, chosen, len(self.indices))
        looks.append(look.row())
        self.state.said.append(look.sentence())
        self._say(run, look.sentence())

    def _say(self, run: Run, *lines: str) -> None:
        if run.worker.rank == 0:
            for line in lines:
                log.warning(line)

    def _settled(self, run: Run) -> bool:
        """Whether the share of training has passed after which ‖H̄_0‖ is taken."""
        return run.step >= self.options.settle * self.steps * run.settings.epochs

    def _renew(self, run: Run) -> None:
        """Replace the expired pool and begin a new region; with overlap, after one interval more on the old pool."""
        state = self.state
        if self.options.overlap and state.pool and not state.coming:
            state.coming = self._new_pool(run)
            return
        chosen_earlier = state.coming is not None
        state.pool = state.coming or self._new_pool(run)
        state.coming = None
        self._begin_region(run, chosen_earlier)

    def _new_pool(self, run: Run) -> Pool:
        """Return an empty pool of P = b·T1 coresets, to be chosen with the present weights."""
        run.worker.share(run.model.buffers())
        weights = deepcopy(run.model.state_dict())  # training continues in place
        return Pool(
            update=self.state.updates + 1,
            size=self.options.b * self.state.region.interval,
            candidates=self.state.samples.candidates,
            weights=weights,
        )

    def _begin_region(self, run: Run, chosen_earlier: bool) -> None:
        """Fit the local model of the loss at the present weights w_l, to coresets of the pool.

        Those that training draws first come first: they are chosen anyway, the others only for the model.
        """
        pool = self.pool
        region = self.state.region
        interval = range(run.step, run.step + region.interval)
        first = dict.fromkeys(pool.draw(interval, run.seed))  # each once, in order
        others = (p for p in range(pool.size) if p not in first)
        members = islice(chain(first, others), self.options.model_batches or None)
        drawn = self.server.coresets(run, pool, first)
        fitted_on = self.server.coresets(run, pool, members)
        region.begin(self._parameters(run), loss=_mean_loss(drawn))
        if len(fitted_on) == 1 and not chosen_earlier and self._training_computes_it(run):
            self.awaits_gradient = True
        else:
            self._fit(run, fitted_on, chosen_earlier)

    def _training_computes_it(self, run: Run) -> bool:
        """Whether the gradient of a region's first step is that of its local model."""
        same_images = self.options.augmented or not run.augment
        return same_images and trains_as_it_evaluates(run.model)

    def on_gradients(self, run: Run) -> None:
        """Fit a new region's local model by the gradient of its first step: the weights are w_l still."""
        if not self.awaits_gradient:
            return
        self.awaits_gradient = False
        parameters = covered_parameters(run.model, self.options)
        gradient = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
        (first,) = self.pool.draw(range(run.step, run.step + 1), run.seed)
        self._fit(run, [self.pool.chosen[first]], known=gradient)

    def _fit(
        self,
        run: Run,
        coresets: Sequence[Chosen],
        chosen_earlier: bool = False,
        known: Tensor | None = None,
    ) -> None:
        """Give the local model its gradient and curvature."""
        region = self.state.region
        with run.cost.apart(run.bill("model")):
            run.worker.share(run.model.buffers())
            moments, loss_now = fitted_moments(
                run,
                region.moments,
                coresets,
                self.options,
                update=self.pool.update,
                augment=self.server.augment(run),
                known=known,
            )
        drift = 0.0
        if chosen_earlier:  # the weights have moved since the pool's losses were computed
            drift = loss_now - _mean_loss(coresets)
        region.fitted(moments, drift)
        if self._settled(run) and not region.first_curvature:
            region.first_curvature = _agreed(run, region.curvature)

    def _choose_ahead(self, run: Run, steps: range) -> None:
        """With overlap, begin to choose what will probably be trained on after these steps."""
        if not self.options.overlap:
            return
        region = self.state.region
        start = steps.stop
        if self.state.coming:  # it takes over where the expired pool's last interval ends
            start = steps.start + region.interval - region.age
        end = self.steps * run.settings.epochs
        following = range(start, min(start + region.interval, end))
        pool = self.state.coming or self.pool
        draws = pool.draw(following, run.seed)
        self.server.begin(run, pool, draws)

    def _check(self, run: Run) -> None:
        """Hold the local model against the loss of a random subset; let it expire; exclude what is learned."""
        options = self.options
        region = self.state.region
        samples = self.state.samples
        subset, loss_before = self._subset_to_check(run)
        losses = self.server.losses(run, subset)
        samples.record(subset.indices, losses, options.exclude_below)
        loss = float(losses.mean())  # L^r(w)
        prediction = region.prediction(self._parameters(run), loss_before)
        error = _agreed(run, relative_error(prediction, loss))  # ρ
        region.expired = error > options.tau
        self._log(run, rho=error, loss=loss, model=prediction)
        self._exclude(run)
        if region.expired:
            steps_left = self.steps * run.settings.epochs - run.step
            curvature = _agreed(run, region.curvature)
            interval = check_interval(options.h, region.first_curvature, curvature)
            region.interval = max(1, min(interval, steps_left))

    def _exclude(self, run: Run) -> None:
        """Exclude what is learned, where that is due."""
        self.state.samples.exclude(
            run.step,
            every=self.options.exclude_every_steps,
            after=self.options.exclude_after,
            least=self._least_active,
        )

    def _subset_to_check(self, run: Run) -> tuple[Subset, float]:
        """Return a random subset and its loss at w_l, which for a fresh one is taken to be that of the coresets."""
        region = self.state.region
        if self.options.checked_on == "fresh":
            return self._fresh_subset(run, "crest check"), region.loss
        rng = generator(run.seed, "crest check", run.step)
        known = sorted(self.pool.chosen)
        drawn = int(torch.randint(len(known), (), generator=rng))
        p = known[drawn]
        loss_when_chosen = float(self.pool.chosen[p].losses.mean())
        return self.server.subset(run, self.pool, p), loss_when_chosen + region.drift

    def _fresh_subset(self, run: Run, purpose: str, *number: int) -> Subset:
        """Draw a random subset of the active samples at this step."""
        rng = generator(run.seed, purpose, run.step, *number)
        indices = self.state.samples.draw(self.subset_size, rng)
        return Subset.drawn(indices, self.server.augment(run), rng)

    @property
    def _least_active(self) -> int:
        """How many samples always stay active."""
        kept = ceil(self.options.keep_active * len(self.indices))
        return max(kept, 2 * self.subset_size)  # so that random subsets stay random

    def _log(self, run: Run, **measured: float) -> None:
        """Add a row to the table of checks, as things are before samples are excluded and T1 changes.

        Without a local model there is nothing to measure, and a row for every exclusion.
        """
        pool = self.pool
        rms, bias = pool.gradient_errors()
        self.state.history.append(
            {
                "step": run.step,
                "update": pool.update,
                **measured,
                "interval": self.state.region.interval,
                "pool": pool.size,
                "chosen": len(pool.chosen),
                "active": int(self.state.samples.active.sum()),
                "coreset_error": float(rms[0]),
                "random_error": float(rms[1]),
                "coreset_bias": float(bias[0]),
                "random_bias": float(bias[1]),
            }
        )

    def _note_choice(self, pool: Pool, subset: Subset, chosen: Chosen) -> None:
        """Keep what a choice tells: losses of its random subset, and which samples were picked."""
        self.state.samples.record(subset.indices, chosen.losses, self.options.exclude_below)
        indices = chosen.coreset.indices
        update = torch.full_like(indices, pool.update)
        rows = torch.stack([update, indices]).int()
        self.state.picked.append(rows)

    @property
    def pool(self) -> Pool:
        """The pool that training draws from."""
        assert self.state.pool is not None  # since the first step
        return self.state.pool

    def _parameters(self, run: Run) -> Tensor:
        return flat(covered_parameters(run.model, self.options))

    def on_epoch_end(self, run: Run) -> None:
        """Join the picks: one tensor is saved faster than thousands."""
        joined = torch.cat(self.state.picked, dim=1)
        self.state.picked = [joined]

    def results(self, run: Run) -> Results:
        """Return the checks and choices, their pictures, and the samples that were trained on as a coreset."""
        return results_of(self.state, self.options, self.indices, run)

    def close(self) -> None:
        """End the actors."""
        self.actors.close()

    def state_dict(self) -> dict[str, Any]:
        """Return all but what ``batches`` can compute again."""
        return self.state.saved()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the saved state, which may lie inside a region."""
        self.state = CrestState.restored(state)


def _mean_loss(coresets: Sequence[Chosen]) -> float:
    return sum(chosen.loss for chosen in coresets) / len(coresets)


def _agreed(run: Run, value: float) -> float:
    """Return rank 0's value, which decides for all workers: another processor may round otherwise."""
    return run.worker.gather(value)[0]


@hook("crest", source="arXiv:2306.01244")
def crest(*, job: Job, worker: Worker, samples: Samples, options: CrestOptions = DEFAULTS) -> Crest:
    """Train on mini-batch coresets, chosen anew when a local model of the loss expires."""
    options.check(job.samples_used(samples), job.training, job.experiment)
    with ExitStack() as actors:  # ended here where the hook cannot be made, otherwise by the hook
        shards, scorer = actors.enter_context(choosing(worker, job, samples, options))
        made = Crest(options, shards, scorer, samples.train_indices, job.training.batch_size)
        made.actors = actors.pop_all()
    return made
