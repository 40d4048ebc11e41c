"""CREST as a hook: mini-batch coresets from a pool that lasts as long as a local model of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.gradients import evaluating
from raypkg.coresets.recorder import Recorder
from raypkg.coresets.sharded import Scorer
from raypkg.data.augment import compose
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import Batch, Epoch, ahead, dtype_of, plain_batches, slice_of, training_batch
from raypkg.engine.costs import Cost
from raypkg.engine.loop import autocast
from raypkg.engine.run import Hook, Results, Run, Selected, hook
from raypkg.engine.shards import Pending, Shards
from raypkg.engine.worker import Worker, memory_bound
from raypkg.phases.samples import Samples
from raypkg.phases.training import Job

from . import plots
from .choosing import choosing
from .pool import Chosen, Pool, choose, random_subset, subset_losses
from .quadratic import BETA1, BETA2, MovingMoments, flat, gradient_of, hessian_diagonal, predicted, relative_error
from .region import check_interval, remaining
from .settings import CrestOptions

CHECKS, PICKED, STEPS = "crest", "minibatches", "steps"  # tables
STATE = "active highest counts picked history anchor first loss expired interval age step updates drops".split()


class Crest(Hook):
    """Trains on mini-batch coresets (CREST, arXiv:2306.01244).

        while steps are left:
            if ρ > τ:  T1 = h·‖H̄_0‖ / ‖H̄_l‖,  a new pool of P = b·T1 coresets with the weights w_l, a new model F
            train T1 steps on coresets drawn from the pool
            ρ = |F(w − w_l) − L^r(w)| / L^r(w),  L^r on a fresh random subset

    Losses of the model are those in evaluation mode, of samples without augmentation. A coreset of the pool is computed
    when it is drawn, with the weights w_l, so that in line none is chosen that is never trained on.

    Differs from the paper: ḡ is estimated from ``model_batches`` coresets of the pool (0 = all, as there), H̄ from
    ``curvature`` of their samples (0 = all), L(w_l) from the coresets that are drawn first; samples are dropped at the
    first check after T2 steps, and none if fewer than 2r would be left. With ``overlap``, an expired pool is used for
    T1 steps more while the next is chosen, with the weights at the check.

    A coreset's gradient is near that of its random subset only where samples do not depend on each other: with batch
    norm, which takes its statistics from the medoids without their weights, most of the gain is lost (see README).

    Args:
        settings: τ, h, b and the rest.
        shards: can reach all samples each, and share the choices by rank.
        scorer: brings a model into the form that shards take.
        indices: the training samples, int64 [n].
        size: m, samples in a batch.

    Raises:
        UserError: a random subset would be smaller than a batch, or n smaller than a batch.
    """

    supplies_batches = True

    def __init__(
        self, settings: CrestOptions, shards: Shards, scorer: Callable[[nn.Module], Scorer], indices: Tensor, size: int
    ):
        self.settings, self.shards, self.scorer, self.size = settings, shards, scorer, size
        self.indices = indices
        self._holding = ExitStack()  # of actors
        self.steps = -(-len(indices) // size)  # of an epoch
        self.subset = settings.subset_size(len(indices), size)
        n = int(indices.max()) + 1
        self.active = torch.zeros(n, dtype=torch.bool).index_fill(0, indices, True)
        self.highest = torch.full((n,), -torch.inf)  # losses recorded since the last drop
        self.counts = torch.zeros(n, dtype=torch.int32)  # steps that trained on a sample
        self.picked: list[Tensor] = []  # (update, sample) of every choice, int32 [2, m]
        self.history: list[dict[str, float]] = []  # of every check
        self.pool: Pool | None = None
        self.coming: Pool | None = None  # chosen while training goes on
        self.anchor = torch.empty(0)  # w_l [p]
        self.moments: MovingMoments | None = None
        self.first = 0.0  # ‖H̄_0‖
        self.loss = 0.0  # L(w_l)
        self.expired = False
        self.interval = 1  # T1
        self.age = self.step = self.updates = self.drops = 0  # steps since the last check, and in all; pools; drops
        self._pending: tuple[Pool, dict[int, Tensor], Pending | None] | None = None  # what is being chosen

    def batches(self, run: Run) -> Epoch:
        """Return the batches of an epoch: as many as all samples would make."""
        return Epoch(self.steps, self._train(run))

    def _train(self, run: Run) -> Iterator[Batch]:
        """Yield mini-batch coresets; do between two steps what is due."""
        augment, left = compose(run.augment), self.steps

        def load(job: tuple[int, Coreset]) -> Batch:
            step, coreset = job
            rng = generator(run.seed, "crest batch", step)
            order = torch.randperm(len(coreset), generator=rng)  # medoids come central first: workers get slices alike
            shuffled = Coreset(coreset.indices[order], coreset.weights[order])
            draws = torch.rand(len(order), augment.draws, generator=rng)
            return training_batch(run.split, shuffled, augment, draws, run.worker, dtype_of(run.model))

        self.anchor = self.anchor.to(run.worker.device)
        self.moments = self.moments and self.moments.to(run.worker.device)
        while left:
            pool = self._current(run) if self.age == 0 or self.pool is None else self.pool
            steps = range(self.step, self.step + min(self.interval - self.age, left))
            coresets = [chosen.coreset for chosen in self._chosen(run, pool, pool.draw(steps, run.seed))]
            self._look_ahead(run, steps)
            for batch, coreset in zip(ahead(load, zip(steps, coresets, strict=True)), coresets, strict=True):
                yield batch
                self.counts[coreset.indices] += 1
            self.step, self.age, left = steps.stop, self.age + len(steps), left - len(steps)
            if self.age == self.interval:
                self.age = 0
                if not self.expired:
                    self._check(run)

    def on_epoch_end(self, run: Run) -> None:
        """Join what was picked: one tensor is kept faster than thousands."""
        self.picked = [torch.cat(self.picked, dim=1)]

    def _current(self, run: Run) -> Pool:
        """Return the pool to train on: a new one, with a new model of the loss, where the old one has expired."""
        if self.pool is None or (self.expired and not self.settings.overlap):
            return self._renewed(run, self._new_pool(run))
        if self.expired and self.coming:
            return self._renewed(run, self.coming)
        if self.expired:
            self.coming = self._new_pool(run)
        return self.pool

    def _new_pool(self, run: Run) -> Pool:
        run.worker.share(run.model.buffers())
        weights = {name: value.detach().clone() for name, value in run.model.state_dict().items()}
        self.updates += 1
        return Pool(self.updates, self.settings.b * self.interval, self._candidates, weights)

    def _renewed(self, run: Run, pool: Pool) -> Pool:
        """Begin a region: fit the local model of the loss at the present weights."""
        stale = pool is self.coming
        self.pool, self.coming, self.expired = pool, None, False
        first = dict.fromkeys(pool.draw(range(self.step, self.step + self.interval), run.seed))
        drawn = self._chosen(run, pool, first)
        others = (p for p in range(pool.size) if p not in first)
        members = self._chosen(run, pool, islice(chain(first, others), self.settings.model_batches or None))
        self.loss = _mean_loss(drawn)
        self.anchor = flat(self._parameters(run.model))
        with run.cost.apart(run.bill("model")):
            run.worker.share(run.model.buffers())
            self.moments, loss = self._fitted(run, [chosen.coreset for chosen in members])
        if stale:  # the losses of the choice are those of a check ago
            self.loss += loss - _mean_loss(members)
        self.first = self.first or self._curvature(run)
        return pool

    def _fitted(self, run: Run, coresets: Sequence[Coreset]) -> tuple[MovingMoments, float]:
        """Return the moments with gradient and curvature of the mean of w · loss over the coresets, and that mean."""
        indices, weights = (torch.cat([getattr(c, part) for c in coresets]) for part in ("indices", "weights"))
        gradient, loss = self._derivative(run, gradient_of, indices, weights)
        diagonal = None
        if self.settings.order == 2:
            rng = generator(run.seed, "crest curvature", self.updates)
            few = torch.randperm(len(indices), generator=rng)[: self.settings.curvature or len(indices)]

            def estimate(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
                signs = generator(run.seed, "crest signs", self.updates)  # the same for all parts of the samples
                return hessian_diagonal(loss, parameters, signs)

            diagonal, _ = self._derivative(run, estimate, indices[few], weights[few])
        moments = self.moments
        if moments is None:
            betas = (BETA1, BETA2) if self.settings.smoothing else (0.0, 0.0)
            zero = torch.zeros_like(gradient)
            moments = MovingMoments(zero, None if diagonal is None else zero, betas=betas)
        return moments.updated(gradient, diagonal), loss

    def _derivative(
        self, run: Run, derivative: Callable[[Tensor, Sequence[Tensor]], Tensor], indices: Tensor, weights: Tensor
    ) -> tuple[Tensor, float]:
        """Return a linear derivative of the mean of w · loss over the indices [p], and that mean, over all workers."""
        mine, weights = (slice_of(part, run.worker) for part in (indices, weights.to(run.worker.device)))
        parameters, cost = self._parameters(run.model), run.bill("model")
        total = torch.zeros(1 + sum(p.numel() for p in parameters), device=run.worker.device)
        batches = plain_batches(run.split, mine, run.worker.device, self.size, dtype_of(run.model))
        with evaluating(run.model):
            for (x, y), w in zip(batches, weights.split(self.size), strict=True):
                with autocast(run.settings.precision, x.device):
                    logits = run.model(x)
                loss = F.cross_entropy(logits.float(), y, reduction="none") @ w.float() / len(indices)
                total += torch.cat([loss.detach()[None], derivative(loss, parameters)])
        cost.forward += len(mine)
        cost.backward += len(mine)
        cost.sent += total.nbytes * (run.worker.world > 1)
        total = run.worker.sum(total)
        if not total.isfinite().all():
            raise UserError(
                f"step {self.step}: the derivatives of CREST's model are not finite: lower the learning rate"
            )
        return total[1:], float(total[0])

    def _check(self, run: Run) -> None:
        """Compare the local model with the loss of a fresh random subset; let it expire, and drop what is learned."""
        pool, moments = self.pool, self.moments
        assert pool is not None and moments is not None
        sample = random_subset(self._candidates, self.subset, generator(run.seed, "crest check", self.step))
        with run.cost.apart(run.bill("check")):
            run.worker.share(run.model.buffers())
            losses = torch.cat(self.shards.map(subset_losses, self.scorer(run.model), sample))
        if run.worker.rank == 0:
            run.bill("check").forward += len(sample)
        self._record(sample, losses)
        moved = flat(self._parameters(run.model)) - self.anchor
        model, loss = predicted(self.loss, moments.gradient, moments.diagonal, moved), float(losses.mean())
        error = run.worker.gather(relative_error(model, loss))[0]  # one decides: another processor may round otherwise
        self.expired = error > self.settings.tau
        self._log(pool, model, loss, error)
        self._drop()
        if self.expired:
            left = self.steps * run.settings.epochs - self.step
            self.interval = max(1, min(check_interval(self.settings.h, self.first, self._curvature(run)), left))

    def _chosen(self, run: Run, pool: Pool, wanted: Iterable[int]) -> list[Chosen]:
        """Return the wanted coresets of a pool, after computing those that are missing."""
        wanted = list(wanted)
        with run.cost.apart(run.bill("select")):
            if self._pending and self._pending[0] is pool:
                self._keep(run, *self._pending)
                self._pending = None
            if missing := self._missing(run, pool, wanted):
                self._keep(run, pool, missing, None)
        return [pool.chosen[p] for p in wanted]

    def _missing(self, run: Run, pool: Pool, wanted: Iterable[int]) -> dict[int, Tensor]:
        """Return the random subsets of those coresets that are not computed yet."""
        return {p: pool.subset(p, self.subset, run.seed) for p in dict.fromkeys(wanted) if p not in pool.chosen}

    def _look_ahead(self, run: Run, steps: range) -> None:
        """Begin to choose, where selection overlaps with training, what will probably be trained on after the steps."""
        pool, end = self.coming or self.pool, self.steps * run.settings.epochs
        if not self.settings.overlap or pool is None or (self._pending and self._pending[0] is pool):
            return
        start = self.step + self.interval - self.age if self.coming else steps.stop
        following = range(start, min(start + self.interval, end))
        if missing := self._missing(run, pool, pool.draw(following, run.seed)):
            self._pending = pool, missing, self._start(self.shards.start, run, pool, missing)

    def _start(self, how: Callable[..., Any], run: Run, pool: Pool, missing: Mapping[int, Tensor]) -> Any:
        model = deepcopy(run.model)
        model.load_state_dict(pool.weights)
        return how(choose, self.scorer(model), list(missing.values()), self.size, memory_bound(self.settings.memory))

    def _keep(self, run: Run, pool: Pool, missing: Mapping[int, Tensor], waiting: Pending | None) -> None:
        parts = waiting() if waiting else self._start(self.shards.map, run, pool, missing)
        for i, (p, subset) in enumerate(missing.items()):
            chosen = pool.chosen[p] = parts[i % len(parts)][0][i // len(parts)]
            self._record(subset, chosen.losses)
            indices = chosen.coreset.indices
            self.picked.append(torch.stack([torch.full_like(indices, pool.update), indices]).int())
        if run.worker.rank == 0:
            bill, cost = run.bill("select"), Cost.joined("select", [cost for _, cost in parts])
            bill.forward += cost.forward
            bill.total_seconds += cost.total_seconds if waiting else 0.0  # of those who chose meanwhile

    def _record(self, indices: Tensor, losses: Tensor) -> None:
        self.highest[indices] = self.highest[indices].maximum(losses)

    def _drop(self) -> None:
        """Drop from the active samples, every ``exclude_every_steps`` steps, those that are learned."""
        if self.step // self.settings.exclude_every_steps > self.drops:
            self.drops = self.step // self.settings.exclude_every_steps
            if self.settings.exclude_below > 0:
                self.active = remaining(self.active, self.highest, self.settings.exclude_below, least=2 * self.subset)
            self.highest.fill_(-torch.inf)

    def _log(self, pool: Pool, model: float, loss: float, error: float) -> None:
        errors = torch.stack([chosen.errors for chosen in pool.chosen.values()])  # [·, 2, C]
        rms, bias = errors.square().sum(dim=2).mean(dim=0).sqrt(), errors.mean(dim=0).norm(dim=1)
        self.history.append(
            {
                "step": self.step,
                "update": pool.update,
                "rho": error,
                "loss": loss,
                "model": model,
                "interval": self.interval,
                "pool": pool.size,
                "chosen": len(pool.chosen),
                "active": int(self.active.sum()),
                "coreset_error": float(rms[0]),
                "random_error": float(rms[1]),
                "coreset_bias": float(bias[0]),
                "random_bias": float(bias[1]),
            }
        )

    @property
    def _candidates(self) -> Tensor:
        return self.active.nonzero()[:, 0]

    def _parameters(self, model: Any) -> list[Tensor]:
        module = model.head if self.settings.parameters == "head" else model
        return [parameter for parameter in module.parameters() if parameter.requires_grad]

    def _curvature(self, run: Run) -> float:
        diagonal = self.moments.diagonal if self.moments else None
        return 0.0 if diagonal is None else run.worker.gather(float(diagonal.norm()))[0]

    def results(self, run: Run) -> Results:
        """Return the checks and choices, their pictures, and the samples that were trained on as a coreset."""
        picked: Tensor = torch.cat(self.picked, dim=1)  # [2, ·]
        steps = self.counts[self.indices]
        used = self.counts.nonzero()[:, 0]
        weights = self.counts[used] / self.counts[used].float().mean()
        origin = {"method": "crest", **self.settings.model_dump()}
        difficulty = _difficulty(picked, run)
        return Results(
            facts={"pools": self.updates},
            findings=[f"CREST chose {self.updates} pools of mini-batch coresets: see plots/regions.png"],
            tables={
                CHECKS: pa.Table.from_pylist(self.history),
                PICKED: pa.table({"update": picked[0].numpy(), "index": picked[1].numpy()}),
                STEPS: pa.table({"index": self.indices.numpy(), "steps": steps.numpy()}),
            },
            plots={
                "regions": partial(plots.regions, self.history, self.settings.tau),
                "minibatches": partial(plots.minibatches, difficulty, steps.numpy()),
            },
            selected=Selected(Coreset(used, weights), origin, self.indices),
        )

    def close(self) -> None:
        """End the actors."""
        self._holding.close()

    def state_dict(self) -> dict[str, Any]:
        """Return all but what ``batches`` can compute again."""
        state = {name: getattr(self, name) for name in STATE}
        pools = {name: pool and pool.state_dict() for name, pool in (("pool", self.pool), ("coming", self.coming))}
        places = {id(self.pool): "pool", id(self.coming): "coming"}
        pending = None
        if self._pending and id(self._pending[0]) in places:
            pending = [places[id(self._pending[0])], self._pending[1]]
        return {**state, **pools, "moments": self.moments and vars(self.moments), "pending": pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the middle of a region."""
        for name in STATE:
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)
        self.pool, self.coming = (state[name] and Pool.restored(state[name]) for name in ("pool", "coming"))
        self.moments = state["moments"] and MovingMoments(**state["moments"])
        if state["pending"]:
            name, missing = state["pending"]
            self._pending = getattr(self, name), missing, None  # to be begun once more


def _mean_loss(coresets: Sequence[Chosen]) -> float:
    return sum(chosen.loss for chosen in coresets) / len(coresets)


def _difficulty(picked: Tensor, run: Run) -> np.ndarray:
    """Return how often the picks of each pool were forgotten by the end, on average; NaN where it picked none."""
    recorder = next(hook for hook in run.hooks if isinstance(hook, Recorder))
    times = recorder.record.forgotten
    assert times is not None  # a recorder counts them
    forgotten = times.numpy()[picked[1].numpy()]  # ∞ = never learned
    updates = picked[0].numpy() - 1
    known = np.isfinite(forgotten)
    sums = np.bincount(updates[known], forgotten[known], updates.max() + 1)
    counts = np.bincount(updates[known], None, updates.max() + 1)
    with np.errstate(invalid="ignore"):
        return sums / counts  # [pools]


@hook("crest", source="arXiv:2306.01244")
def crest(*, job: Job, worker: Worker, samples: Samples) -> Crest:
    """Train on mini-batch coresets, chosen anew when a local model of the loss expires."""
    options = getattr(job.experiment, "crest", None) or CrestOptions()
    with ExitStack() as holding:
        shards, scorer = holding.enter_context(choosing(worker, job, samples, options))
        made = Crest(options, shards, scorer, samples.kept, job.training.batch_size)
        made._holding = holding.pop_all()
    return made
