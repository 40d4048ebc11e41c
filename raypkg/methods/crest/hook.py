"""CREST as a hook: mini-batch coresets from a pool that lasts as long as a local model of the loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raypkg.core.seeds import generator
from raypkg.core.settings import whole_steps
from raypkg.coresets.record import Recorder
from raypkg.data.augment import compose
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import Batch, Epoch, ahead, dtype_of, training_batch
from raypkg.engine.hooks import Hook, Results, Selected, hook
from raypkg.engine.run import Run
from raypkg.engine.shards import Shards
from raypkg.engine.worker import Worker
from raypkg.experiments.samples import Samples
from raypkg.experiments.training import Job

from . import plots
from .parallel import Chooser, ToScorer, augment_of, choosers, fit_moments
from .quadratic import Region, check_interval, covered_parameters, flat, relative_error, trains_as_it_evaluates
from .selection import ActiveSamples, Chosen, Pool, Subset
from .settings import CrestOptions

DEFAULTS = CrestOptions()
BATCH_NORM = (
    "CREST loses most of its gain with batch norm, whose statistics of medoids are not those of the data: use group"
    " norm or frozen statistics (for the built-in resnets --set model.options.norm=group, or =frozen)"
)
log = logging.getLogger(__name__)


@dataclass(eq=False)
class CrestState:
    """Everything that a checkpoint holds of CREST."""

    samples: ActiveSamples
    region: Region
    counts: Tensor  # steps that trained on each sample, int32 [n]
    pool: Pool  # source of the training batches; update 0 before the first step
    coming: Pool | None = None  # the next pool, chosen while training continues on the expired one
    picked: list[Tensor] = field(default_factory=list)  # (update, sample) of every choice, each int32 [2, ·]
    history: list[dict[str, float]] = field(default_factory=list)  # a row per check

    @property
    def updates(self) -> int:
        """The number of pools so far."""
        return (self.coming or self.pool).update


class Crest(Hook):
    """Training on mini-batch coresets (CREST, arXiv:2306.01244).

        while steps are left:
            if ρ > τ:  T1 = ⌈h·‖H̄_0‖ / ‖H̄‖⌉;  a new pool of P = b·T1 coresets with the weights w_l;  a new model F
            train T1 steps on coresets drawn from the pool
            ρ = |F(w − w_l) − L^r(w)| / L^r(w),  F and L^r on one random subset of the pool

    With τ = 0, no local model is fitted: every step trains on a coreset chosen with its own weights. Losses of the
    local model are in evaluation mode. In line, a coreset of the pool is computed when drawn, with the weights w_l.

    Differs from the paper: ḡ is estimated from ``model_batches`` coresets (0 = the pool, as in the paper), H̄ from
    ``curvature`` of their samples (0 = all). Samples are excluded at the first check after T2 steps, none if fewer than
    2r would stay. With ``overlap``, an expired pool is used for T1 more steps while the next is chosen. By default the
    released code is followed, not the text, each by a setting: ``checked_on``, ``smoothing``, ``augmented``,
    ``settle``, ``exclude_after`` and ``keep_active``.

    It trains on batches of ``size`` = m out of the samples ``indices``, int64 [n]; a random subset must hold a batch.
    Each shard has all samples and chooses a share; ``scorer`` brings a model into the form that shards take.
    """

    priority = 0

    def __init__(self, options: CrestOptions, shards: Shards, scorer: ToScorer, indices: Tensor, size: int):
        self.options = options
        self.indices = indices
        self.steps = -(-len(indices) // size)  # per epoch, as on all samples
        self.subset_size = options.subset_size(len(indices), size)
        # Two random subsets at least stay active, so that subsets remain random.
        self.least_active = max(ceil(options.keep_active * len(indices)), 2 * self.subset_size)
        samples = ActiveSamples.all_of(indices)
        region = Region.unfitted(options.order, smoothed=options.smoothing != "none")
        counts = torch.zeros(len(samples.active), dtype=torch.int32)
        self.state = CrestState(samples, region, counts, Pool(0, 0, samples.candidates, weights=None))
        self.chooser = Chooser(shards, scorer, options, size, self.subset_size, on_choice=self._note_choice)
        self.awaits_gradient = False  # the first step of a new region will give the gradient of its local model
        self.closing = ExitStack()  # ends the actors

    def on_epoch(self, run: Run) -> None:
        """Move a local model to the device of the training: a checkpoint restores it on the CPU."""
        region, device = self.state.region, run.worker.device
        first, second = region.moments.first, region.moments.second
        second = None if second is None else second.to(device)
        region.moments = replace(region.moments, first=first.to(device), second=second)
        region.anchor = region.anchor.to(device)

    def batches(self, run: Run) -> Epoch:
        """Return the mini-batch coresets of an epoch."""
        if run.step == 0 and run.worker.rank == 0:
            for line in _warnings(run.model):
                log.warning(line)
        loop = self._chosen_by_step if self.options.tau == 0 else self._chosen_by_region
        return Epoch(self.steps, loop(run, min(run.step + self.steps, self._last_step(run))))

    def _chosen_by_step(self, run: Run, end: int) -> Iterator[Batch]:
        """Yield a coreset for every step, chosen with the weights of that step."""
        state = self.state
        while run.step < end:
            state.pool = Pool(state.updates + 1, 1, state.samples.candidates, weights=None)
            run.worker.share(run.model.buffers())
            yield from self._trained(run, range(run.step, run.step + 1), [0])
            if run.step % self.options.exclude_every_steps == 0:
                self._log(run)
                state.samples.exclude(run.step, self.options, least=self.least_active)

    def _chosen_by_region(self, run: Run, end: int) -> Iterator[Batch]:
        """Yield coresets of pools, renewed when the local model has expired; an epoch may end between two checks."""
        region = self.state.region
        while run.step < end:
            if region.age == 0 and region.expired:
                self._renew(run)
            next_check = run.step + region.interval - region.age
            steps = range(run.step, min(next_check, end))
            yield from self._trained(run, steps, self.state.pool.draw(steps, run.seed))
            region.age += len(steps)
            if region.age == region.interval:
                region.age = 0
                # With overlap, an expired pool has served one interval more: nothing is left to check.
                if not region.expired:
                    self._check(run)

    def _trained(self, run: Run, steps: range, draws: Sequence[int]) -> Iterator[Batch]:
        """Yield the drawn coresets of the pool as batches, loaded ahead, and count the samples."""
        drawn = self.chooser.coresets(run, self.state.pool, draws)
        if self.options.overlap:
            # Start choosing the coresets that training will probably draw after these steps.
            state, region = self.state, self.state.region
            start = steps.stop
            if state.coming:  # it takes over after the last interval of the expired pool
                start = steps.start + region.interval - region.age
            end = self._last_step(run)
            pool = state.coming or state.pool
            self.chooser.begin(run, pool, pool.draw(range(start, min(start + region.interval, end)), run.seed))
        augment = compose(run.augment)

        def load(job: tuple[int, Chosen]) -> Batch:
            step, chosen = job
            rng = generator(run.seed, "crest batch", step)
            # The most central medoids come first: shuffled, they spread over the workers' slices.
            order = torch.randperm(len(chosen.coreset), generator=rng)
            coreset = Coreset(chosen.coreset.indices[order], chosen.coreset.weights[order])
            if self.options.augmented:
                uniforms = chosen.draws[order]
            else:
                uniforms = torch.rand(len(order), augment.draws, generator=rng)
            return training_batch(run.split, coreset, augment, uniforms, run.worker, dtype_of(run.model))

        batches = ahead(load, zip(steps, drawn, strict=True))
        for batch, chosen in zip(batches, drawn, strict=True):
            yield batch
            self.state.counts[chosen.coreset.indices] += 1

    def _renew(self, run: Run) -> None:
        """Replace the expired pool, and fit the local model of the loss at the present weights w_l to its coresets.

        With overlap, the expired pool serves one more interval before.
        """
        state, region = self.state, self.state.region
        chosen_earlier = state.coming is not None
        if state.coming is None:
            run.worker.share(run.model.buffers())
            state.coming = Pool(
                update=state.updates + 1,
                size=self.options.b * region.interval,  # P = b·T1
                candidates=state.samples.candidates,
                weights=deepcopy(run.model.state_dict()),  # training continues in place
            )
            if self.options.overlap and state.pool.update:
                return
        state.pool, state.coming = state.coming, None
        pool = state.pool
        interval = range(run.step, run.step + region.interval)
        # Coresets that training draws come first: they are chosen anyway, the others only for the local model.
        first = dict.fromkeys(pool.draw(interval, run.seed))
        others = (p for p in range(pool.size) if p not in first)
        members = islice(chain(first, others), self.options.model_batches or None)
        drawn = self.chooser.coresets(run, pool, first)
        fitted_on = self.chooser.coresets(run, pool, members)
        region.anchor = flat(self._covered(run))
        region.loss = _mean_loss(drawn)
        region.expired = False
        same_images = self.options.augmented or not run.augment
        if len(fitted_on) == 1 and not chosen_earlier and same_images and trains_as_it_evaluates(run.model):
            self.awaits_gradient = True  # training computes it anyway, at the next step
        else:
            self._fit(run, fitted_on, chosen_earlier)

    def on_gradients(self, run: Run) -> None:
        """Fit the local model of a new region to the gradient of its first step, whose weights are still w_l."""
        if not self.awaits_gradient:
            return
        self.awaits_gradient = False
        gradient = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in self._covered(run))
        (first,) = self.state.pool.draw(range(run.step, run.step + 1), run.seed)
        self._fit(run, [self.state.pool.chosen[first]], known=gradient)

    def _fit(
        self, run: Run, coresets: Sequence[Chosen], chosen_earlier: bool = False, known: Tensor | None = None
    ) -> None:
        """Update ḡ and H̄ of the local model, and ‖H̄_0‖ once training has settled."""
        region = self.state.region
        with run.cost.apart(run.bill("model")):
            run.worker.share(run.model.buffers())
            update = self.state.pool.update
            region.moments, loss_now = fit_moments(
                run, region.moments, coresets, self.options, update=update, known=known
            )
        # If the pool was chosen earlier, the weights have moved since its losses were computed.
        region.drift = loss_now - _mean_loss(coresets) if chosen_earlier else 0.0
        region.loss += region.drift
        if self._settled(run) and not region.first_curvature:
            region.first_curvature = run.worker.first(region.curvature)

    def _check(self, run: Run) -> None:
        """Compare the local model with the loss of a random subset; expire it if ρ > τ; exclude learned samples."""
        options, pool, region = self.options, self.state.pool, self.state.region
        if options.checked_on == "fresh":
            subset = self._fresh_subset(run, "crest check")
            loss_before = region.loss  # at w_l, of the coresets
        else:
            rng = generator(run.seed, "crest check", run.step)
            known = sorted(pool.chosen)
            p = known[int(torch.randint(len(known), (), generator=rng))]
            subset = self.chooser.subset(run, pool, p)
            loss_before = float(pool.chosen[p].losses.mean()) + region.drift
        losses = self.chooser.losses(run, subset)
        self.state.samples.record(subset.indices, losses, options.exclude_below)
        loss = float(losses.mean())  # L^r(w)
        prediction = region.prediction(flat(self._covered(run)), loss_before)  # F(w − w_l)
        # Rank 0 decides for all workers: other processors may round differently.
        rho = run.worker.first(relative_error(prediction, loss))
        region.expired = rho > options.tau
        self._log(run, rho=rho, loss=loss, model=prediction)
        self.state.samples.exclude(run.step, options, least=self.least_active)
        if region.expired:
            interval = check_interval(options.h, region.first_curvature, run.worker.first(region.curvature))
            steps_left = self._last_step(run) - run.step
            # At the end of training T1 falls short of its formula: coresets for steps that never come would be chosen.
            region.interval = max(1, min(interval, steps_left))

    def _last_step(self, run: Run) -> int:
        return whole_steps(run.length or run.settings.epochs, self.steps)

    def _settled(self, run: Run) -> bool:
        return run.step >= self.options.settle * self.steps * (run.length or run.settings.epochs)

    def _fresh_subset(self, run: Run, purpose: str, *number: int) -> Subset:
        """Draw a random subset of the active samples at this step."""
        rng = generator(run.seed, purpose, run.step, *number)
        return Subset.random(self.state.samples.candidates, self.subset_size, augment_of(run, self.options), rng)

    def _log(self, run: Run, **measured: float) -> None:
        """Add a row to the table of checks, before samples are excluded and T1 changes."""
        state, pool = self.state, self.state.pool
        active = int(state.samples.active.sum())
        sizes = {"interval": state.region.interval, "pool": pool.size, "chosen": len(pool.chosen), "active": active}
        state.history.append({"step": run.step, "update": pool.update, **measured, **sizes})

    def _note_choice(self, pool: Pool, subset: Subset, chosen: Chosen) -> None:
        """Record the losses of a random subset and the samples that were picked."""
        self.state.samples.record(subset.indices, chosen.losses, self.options.exclude_below)
        indices = chosen.coreset.indices
        self.state.picked.append(torch.stack([torch.full_like(indices, pool.update), indices]).int())

    def _covered(self, run: Run) -> list[Tensor]:
        return covered_parameters(run.model, self.options.parameters)

    def on_epoch_end(self, run: Run) -> None:
        """Join the picks: one tensor is saved faster than thousands."""
        self.state.picked = [torch.cat(self.state.picked, dim=1)]

    def results(self, run: Run) -> Results:
        """Return checks and choices with their plots, and the trained samples as a coreset."""
        state = self.state
        (picked,) = (rows.numpy() for rows in state.picked)  # [2, ·]
        steps = state.counts[self.indices].numpy()
        recorder = next(hook for hook in run.hooks if isinstance(hook, Recorder))
        difficulty = plots.difficulty_of_picks(picked, recorder.record.forgotten.numpy())  # type: ignore[union-attr]
        tables = {
            "crest": pa.Table.from_pylist(state.history),
            "minibatches": pa.table({"update": picked[0], "index": picked[1]}),
            "steps": pa.table({"index": self.indices.numpy(), "steps": steps}),
        }
        pictures: dict[str, Callable[[Path], None]] = {"minibatches": partial(plots.minibatches, difficulty, steps)}
        if self.options.tau:
            found = f"CREST chose {state.updates} pools of mini-batch coresets: see plots/regions.png"
            pictures["regions"] = partial(plots.checks, state.history, self.options.tau)
        else:
            found = f"CREST chose a mini-batch coreset for each of {state.updates} steps: see plots/minibatches.png"
        used = state.counts.nonzero()[:, 0]
        times = state.counts[used]
        trained_on = Coreset(used, times / times.float().mean())
        return Results(
            facts={"pools": state.updates},
            findings=[found, *_warnings(run.model)],
            tables=tables,
            plots=pictures,
            selected=Selected(trained_on, {"method": "crest", **self.options.model_dump()}, self.indices),
        )

    def close(self) -> None:
        """End the actors."""
        self.closing.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, which may lie inside a region, as tensors and plain values."""
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        values = deepcopy(dict(state))  # losses and counts change in place
        for name in ("looks", "said"):  # of earlier versions
            values.pop(name, None)
        values["samples"] = ActiveSamples(**values["samples"])
        values["region"] = Region.restored(values["region"])
        values["pool"] = Pool.restored(values["pool"])
        values["coming"] = values["coming"] and Pool.restored(values["coming"])
        self.state = CrestState(**values)


def _warnings(model: nn.Module) -> list[str]:
    """Return a line if batch norm is active, so a sample's gradient depends on the others of its batch."""
    active = any(isinstance(module, _BatchNorm) and module.training for module in model.modules())
    return [BATCH_NORM] if active else []


def _mean_loss(coresets: Sequence[Chosen]) -> float:
    return sum(chosen.loss for chosen in coresets) / len(coresets)


@hook("crest", source="arXiv:2306.01244")
def crest(*, job: Job, worker: Worker, samples: Samples, options: CrestOptions = DEFAULTS) -> Crest:
    """Train on mini-batch coresets, renewed at every step or when a local model of the loss expires."""
    options.check(job.samples_used(samples), job.training, job.experiment)
    with ExitStack() as opened:
        shards, scorer = opened.enter_context(choosers(worker, job, samples, options))
        made = Crest(options, shards, scorer, samples.train_indices, job.training.batch_size)
        made.closing = opened.pop_all()
    return made
