"""CREST as a hook: mini-batch coresets from a pool that lasts as long as a local model of the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from raypkg.core.seeds import generator
from raypkg.coresets.recorder import Recorder
from raypkg.data.augment import Augmentation, compose
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import Batch, Epoch, ahead, dtype_of, training_batch
from raypkg.engine.run import Hook, Results, Run, Selected, hook
from raypkg.engine.shards import Shards
from raypkg.engine.worker import Worker
from raypkg.phases.samples import Samples
from raypkg.phases.training import Job

from . import plots
from .choosing import ToScorer, choosing
from .fitting import covered_parameters, fitted_moments
from .minibatch import Chosen
from .pool import Pool, PoolServer
from .quadratic import flat, relative_error
from .region import check_interval
from .settings import CrestOptions
from .state import CrestState

DEFAULTS = CrestOptions()


class Crest(Hook):
    """Trains on mini-batch coresets (CREST, arXiv:2306.01244).

        while steps are left:
            if ρ > τ:  T1 = h·‖H̄_0‖ / ‖H̄_l‖,  a new pool of P = b·T1 coresets with the weights w_l, a new model F
            train T1 steps on coresets drawn from the pool
            ρ = |F(w − w_l) − L^r(w)| / L^r(w),  L^r on a fresh random subset

    Losses of the model are those in evaluation mode, of samples without augmentation. A coreset of the pool is computed
    when it is drawn, with the weights w_l, so that in line none is chosen that is never trained on.

    Differs from the paper: ḡ is estimated from ``model_batches`` coresets of the pool (0 = all, as there), H̄ from
    ``curvature`` of their samples (0 = all), L(w_l) from the coresets that are drawn first; samples are excluded at the
    first check after T2 steps, and none if fewer than 2r would be left. With ``overlap``, an expired pool is used for
    T1 steps more while the next is chosen, with the weights at the check.

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
        self.state = CrestState.initial(indices, order=options.order, smoothing=options.smoothing)
        self.server = PoolServer(
            shards,
            scorer,
            size=size,
            subset_size=self.subset_size,
            memory=options.memory,
            on_choice=self._note_choice,
        )
        self.actors = ExitStack()  # ends those that choose, if there are any

    def on_epoch(self, run: Run) -> None:
        """Move the local model to where training computes."""
        self.state.region.to(run.worker.device)

    def batches(self, run: Run) -> Epoch:
        """Return the mini-batch coresets of an epoch."""
        return Epoch(self.steps, self._train(run))

    def _train(self, run: Run) -> Iterator[Batch]:
        """Yield an epoch's mini-batch coresets; between two of them, do what the paper's loop has due."""
        region = self.state.region
        augment = compose(run.augment)
        end = run.step + self.steps  # an epoch may end, and be checkpointed, inside an interval
        while run.step < end:
            if region.age == 0 and region.expired:
                self._renew(run)
            next_check = run.step + region.interval - region.age
            steps = range(run.step, min(next_check, end))
            draws = self.pool.draw(steps, run.seed)
            drawn = self.server.coresets(run, self.pool, draws)
            coresets = [chosen.coreset for chosen in drawn]
            self._choose_ahead(run, steps)
            yield from self._trained(run, augment, steps, coresets)
            region.age += len(steps)
            if region.age < region.interval:
                continue
            region.age = 0
            if not region.expired:  # with overlap, an expired pool has been trained on for one interval more
                self._check(run)

    def _trained(self, run: Run, augment: Augmentation, steps: range, coresets: Sequence[Coreset]) -> Iterator[Batch]:
        """Yield the coresets of the steps as batches, loaded ahead, and count which samples were trained on."""
        load = partial(_load, run, augment)
        batches = ahead(load, zip(steps, coresets, strict=True))
        for batch, coreset in zip(batches, coresets, strict=True):
            yield batch
            self.state.counts[coreset.indices] += 1

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
        anchor = self._parameters(run)
        with run.cost.apart(run.bill("model")):
            run.worker.share(run.model.buffers())
            coresets = [chosen.coreset for chosen in fitted_on]
            moments, loss_now = fitted_moments(
                run,
                region.moments,
                coresets,
                self.options,
                update=pool.update,
            )
        loss = _mean_loss(drawn)
        if chosen_earlier:  # the weights have moved since the pool's losses were computed: add what that changed
            loss += loss_now - _mean_loss(fitted_on)
        region.begin(anchor, loss, moments)
        region.first_curvature = region.first_curvature or _agreed(run, region.curvature)

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
        """Hold the local model against the loss of a fresh random subset; let it expire; exclude what is learned."""
        options = self.options
        region = self.state.region
        samples = self.state.samples
        rng = generator(run.seed, "crest check", run.step)
        subset = samples.draw(self.subset_size, rng)
        losses = self.server.losses(run, subset)
        samples.record(subset, losses)
        loss = float(losses.mean())  # L^r(w)
        prediction = region.prediction(self._parameters(run))
        error = _agreed(run, relative_error(prediction, loss))  # ρ
        region.expired = error > options.tau
        self._log(run, rho=error, loss=loss, model=prediction)
        samples.exclude(
            run.step,
            every=options.exclude_every_steps,
            alpha=options.exclude_below,
            least=2 * self.subset_size,  # so that random subsets stay random
        )
        if region.expired:
            steps_left = self.steps * run.settings.epochs - run.step
            curvature = _agreed(run, region.curvature)
            interval = check_interval(options.h, region.first_curvature, curvature)
            region.interval = max(1, min(interval, steps_left))

    def _log(self, run: Run, **measured: float) -> None:
        """Add a row to the table of checks, as things are before samples are excluded and T1 changes."""
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

    def _note_choice(self, pool: Pool, subset: Tensor, chosen: Chosen) -> None:
        """Keep what a choice tells: losses of its random subset, and which samples were picked."""
        self.state.samples.record(subset, chosen.losses)
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
        state = self.state
        (picked,) = [rows.numpy() for rows in state.picked]  # [2, ·], joined at the end of the last epoch
        steps = state.counts[self.indices].numpy()
        recorder = next(hook for hook in run.hooks if isinstance(hook, Recorder))
        forgotten = recorder.record.forgotten
        assert forgotten is not None  # a recorder counts it
        difficulty = plots.difficulty_of_picks(picked, forgotten.numpy())
        return Results(
            facts={"pools": state.updates},
            findings=[f"CREST chose {state.updates} pools of mini-batch coresets: see plots/regions.png"],
            tables={
                "crest": pa.Table.from_pylist(state.history),
                "minibatches": pa.table({"update": picked[0], "index": picked[1]}),
                "steps": pa.table({"index": self.indices.numpy(), "steps": steps}),
            },
            plots={
                "regions": partial(plots.regions, state.history, self.options.tau),
                "minibatches": partial(plots.minibatches, difficulty, steps),
            },
            selected=self._selected(),
        )

    def _selected(self) -> Selected:
        """Return the samples that were trained on, weighted by how often."""
        used = self.state.counts.nonzero()[:, 0]
        times = self.state.counts[used]
        coreset = Coreset(used, times / times.float().mean())
        origin = {"method": "crest", **self.options.model_dump()}
        return Selected(coreset, origin, self.indices)

    def close(self) -> None:
        """End the actors."""
        self.actors.close()

    def state_dict(self) -> dict[str, Any]:
        """Return all but what ``batches`` can compute again."""
        return self.state.saved()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the saved state, which may lie inside a region."""
        self.state = CrestState.restored(state)


def _load(run: Run, augment: Augmentation, job: tuple[int, Coreset]) -> Batch:
    """Load this worker's slice of the coreset of one step."""
    step, coreset = job
    rng = generator(run.seed, "crest batch", step)
    order = torch.randperm(len(coreset), generator=rng)  # medoids come central first: workers get slices alike
    shuffled = Coreset(coreset.indices[order], coreset.weights[order])
    draws = torch.rand(len(order), augment.draws, generator=rng)
    dtype = dtype_of(run.model)
    return training_batch(run.split, shuffled, augment, draws, run.worker, dtype)


def _mean_loss(coresets: Sequence[Chosen]) -> float:
    return sum(chosen.loss for chosen in coresets) / len(coresets)


def _agreed(run: Run, value: float) -> float:
    """Return rank 0's value, which decides for all workers: another processor may round otherwise."""
    return run.worker.gather(value)[0]


@hook("crest", source="arXiv:2306.01244")
def crest(*, job: Job, worker: Worker, samples: Samples, options: CrestOptions = DEFAULTS) -> Crest:
    """Train on mini-batch coresets, chosen anew when a local model of the loss expires."""
    options.check(job.samples_used(samples), job.training, job.experiment.cluster)
    with ExitStack() as actors:  # ended here where the hook cannot be made, otherwise by the hook
        shards, scorer = actors.enter_context(choosing(worker, job, samples, options))
        made = Crest(options, shards, scorer, samples.kept, job.training.batch_size)
        made.actors = actors.pop_all()
    return made
