"""CREST as a hook: mini-batch coresets from a pool that lasts as long as a local model of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.core.settings import Crest as Settings
from raypkg.data.augment import compose
from raypkg.methods.coreset import Coreset
from raypkg.methods.crest.quadratic import (
    BETA1,
    BETA2,
    Moments,
    flat,
    gradient_of,
    hessian_diagonal,
    predicted,
    relative_error,
)
from raypkg.methods.crest.region import interval, remaining

from .batches import Batch, Epoch, ahead, plain_batches, slice_of, training_batch
from .hooks import Hook
from .loop import autocast
from .minibatches import Chosen, Pool, choose, losses_of, random_subset, subset_size
from .selection import Scorer, memory_bound
from .shards import Results, Shards

if TYPE_CHECKING:
    from .loop import Run


STATE = "active highest counts picked history anchor first loss expired interval age step updates drops".split()


class Crest(Hook):
    """Trains on mini-batch coresets (CREST, arXiv:2306.01244).

        while steps are left:
            if ρ > τ:  T1 = h·‖H̄_0‖ / ‖H̄_l‖,  a new pool of P = b·T1 coresets with the weights w_l, a new model F
            train T1 steps on coresets drawn from the pool
            ρ = |F(w − w_l) − L^r(w)| / L^r(w),  L^r on a fresh random subset

    Losses of the model are those in evaluation mode, of samples without augmentation. What a pool holds is computed
    when it is drawn, with the weights w_l, so that no coreset is chosen that is never trained on.

    Differs from the paper: ḡ and H̄ are estimated from ``model_batches`` coresets of the pool (0 = all, as there), and
    L(w_l) from those that are drawn first. With ``overlap``, an expired pool is used for T1 steps more while the next
    is chosen, with the weights at the check.

    Args:
        settings: τ, h, b and the rest.
        shards: can reach all samples each, and share the choices by rank.
        scorer: brings a model into the form that shards take.
        indices: the training samples, int64 [n].
        size: m, samples in a batch.

    Raises:
        UserError: a random subset would be smaller than a batch, or n smaller than a batch.
    """

    def __init__(
        self, settings: Settings, shards: Shards, scorer: Callable[[nn.Module], Scorer], indices: Tensor, size: int
    ):
        self.settings, self.shards, self.scorer, self.size = settings, shards, scorer, size
        self.steps = -(-len(indices) // size)  # of an epoch
        self.subset = subset_size(settings, len(indices), size)
        n = int(indices.max()) + 1
        self.active = torch.zeros(n, dtype=torch.bool).index_fill(0, indices, True)
        self.highest = torch.full((n,), -torch.inf)  # losses recorded since the last drop
        self.counts = torch.zeros(n, dtype=torch.int32)  # steps that trained on a sample
        self.picked: list[Tensor] = []  # (update, sample) of every choice, int32 [2, m]
        self.history: list[dict[str, float]] = []  # of every check
        self.pool: Pool | None = None
        self.coming: Pool | None = None  # chosen while training goes on
        self.anchor = torch.empty(0)  # w_l [p]
        self.moments: Moments | None = None
        self.first = 0.0  # ‖H̄_0‖
        self.loss = 0.0  # L(w_l)
        self.expired = False
        self.interval = 1  # T1
        self.age = self.step = self.updates = self.drops = 0  # steps since the last check, and in all; pools; drops
        self._ahead: tuple[Pool, list[int], Results | None] | None = None  # what is being chosen for a pool

    def batches(self, run: Run) -> Epoch:
        """Return the batches of an epoch: as many as all samples would make."""
        return Epoch(self.steps, self._train(run))

    def _train(self, run: Run) -> Iterator[Batch]:
        """Yield mini-batch coresets; do between two steps what is due."""
        augment, left = compose(run.augment), self.steps

        def load(job: tuple[int, Coreset]) -> Batch:
            draws = torch.rand(len(job[1]), augment.draws, generator=generator(run.seed, "crest augment", job[0]))
            return training_batch(run.split, job[1], augment, draws, run.worker)

        while left:
            pool = self._current(run) if self.age == 0 or self.pool is None else self.pool
            steps = range(self.step, self.step + min(self.interval - self.age, left))
            coresets = [chosen.coreset for chosen in self._chosen(run, pool, pool.draw(steps, run.seed))]
            self._look_ahead(run, range(steps.stop, steps.stop + self.interval))
            for batch, coreset in zip(ahead(load, zip(steps, coresets, strict=True)), coresets, strict=True):
                yield batch
                self.counts[coreset.indices] += 1
            self.step, self.age, left = steps.stop, self.age + len(steps), left - len(steps)
            if self.age == self.interval:
                self.age = 0
                if not self.expired:
                    self._check(run)

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
        self.pool, self.coming, self.expired = pool, None, False
        left = self.steps * run.settings.epochs - self.step
        first = dict.fromkeys(pool.draw(range(self.step, self.step + min(self.interval, left)), run.seed))
        drawn = self._chosen(run, pool, first)
        wanted = dict.fromkeys([*first, *range(pool.size)])
        count = min(self.settings.model_batches or pool.size, pool.size)
        members = self._chosen(run, pool, list(wanted)[:count])
        self.loss = sum(chosen.loss for chosen in drawn) / len(drawn)
        self.anchor = flat(self._parameters(run.model))
        with run.cost.apart(run.bill("model")):
            self.moments = self._fitted(run, [chosen.coreset for chosen in members])
        self.first = self.first or self._curvature()
        return pool

    def _fitted(self, run: Run, coresets: Sequence[Coreset]) -> Moments:
        """Return the moments with gradient and curvature of the mean of w · loss over the coresets."""
        indices, weights = (torch.cat([getattr(c, part) for c in coresets]) for part in ("indices", "weights"))
        gradient = self._derivative(run, gradient_of, indices, weights)
        diagonal = None
        if self.settings.order == 2:
            rng = generator(run.seed, "crest curvature", self.updates)
            few = torch.randperm(len(indices), generator=rng)[: self.settings.curvature or len(indices)]

            def estimate(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
                signs = generator(run.seed, "crest signs", self.updates)  # the same for all parts of the samples
                return hessian_diagonal(loss, parameters, signs)

            diagonal = self._derivative(run, estimate, indices[few], weights[few])
        moments = self.moments
        if moments is None:
            betas = (BETA1, BETA2) if self.settings.smoothing else (0.0, 0.0)
            zero = torch.zeros_like(gradient)
            moments = Moments(zero, None if diagonal is None else zero, betas=betas)
        return moments.updated(gradient, diagonal)

    def _derivative(
        self, run: Run, derivative: Callable[[Tensor, Sequence[Tensor]], Tensor], indices: Tensor, weights: Tensor
    ) -> Tensor:
        """Return a linear derivative of the mean of w · loss over the indices, part by part, over all workers [p]."""
        mine, weights = (slice_of(part, run.worker) for part in (indices, weights.to(run.worker.device)))
        parameters, cost, training = self._parameters(run.model), run.bill("model"), run.model.training
        total = torch.zeros(sum(p.numel() for p in parameters), device=run.worker.device)
        run.model.eval()
        batches = plain_batches(run.split, mine, run.worker.device, self.size)
        for (x, y), w in zip(batches, weights.split(self.size), strict=True):
            with autocast(run.settings.precision, x.device):
                logits = run.model(x)
            losses = F.cross_entropy(logits.float(), y, reduction="none")
            total += derivative(losses @ w / len(indices), parameters)
        run.model.train(training)
        cost.forward += len(mine)
        cost.backward += len(mine)
        return run.worker.sum(total)

    def _check(self, run: Run) -> None:
        """Compare the local model with the loss of a fresh random subset; let it expire, and drop what is learned."""
        pool, moments = self.pool, self.moments
        assert pool is not None and moments is not None
        sample = random_subset(self._candidates, self.subset, generator(run.seed, "crest check", self.step))
        with run.cost.apart(run.bill("check")):
            run.worker.share(run.model.buffers())
            try:
                losses = torch.cat(self.shards.map(losses_of, self.scorer(run.model), sample))
            except UserError as what:
                raise UserError(f"step {self.step}: {what}: lower the learning rate") from None
        if run.worker.rank == 0:
            run.bill("check").forward += len(sample)
        self._record(sample, losses)
        moved = flat(self._parameters(run.model)) - self.anchor
        model, loss = predicted(self.loss, moments.gradient, moments.diagonal, moved), float(losses.mean())
        error = relative_error(model, loss)
        self.expired = error > self.settings.tau
        self._log(pool, model, loss, error)
        self._drop()
        if self.expired:
            self.interval = interval(self.settings.h, self.first, self._curvature())

    def _chosen(self, run: Run, pool: Pool, wanted: Iterable[int]) -> list[Chosen]:
        """Return the wanted coresets of a pool, after computing those that are missing."""
        wanted = list(wanted)
        with run.cost.apart(run.bill("select")):
            if self._ahead and self._ahead[0] is pool:
                self._keep(run, *self._ahead)
                self._ahead = None
            if missing := [p for p in dict.fromkeys(wanted) if p not in pool.chosen]:
                self._keep(run, pool, missing, None)
        return [pool.chosen[p] for p in wanted]

    def _look_ahead(self, run: Run, steps: range) -> None:
        """Begin to choose, where selection overlaps with training, what the next steps will probably train on."""
        pool = self.coming or self.pool
        if self.settings.overlap and pool:
            missing = [p for p in dict.fromkeys(pool.draw(steps, run.seed)) if p not in pool.chosen]
            if missing:
                self._ahead = pool, missing, self._start(self.shards.start, run, pool, missing)

    def _start(self, how: Callable[..., Any], run: Run, pool: Pool, missing: list[int]) -> Any:
        model = deepcopy(run.model)
        model.load_state_dict(pool.weights)
        subsets = [pool.subset(p, self.subset, run.seed) for p in missing]
        return how(choose, self.scorer(model), subsets, self.size, memory_bound(self.settings.memory))

    def _keep(self, run: Run, pool: Pool, missing: list[int], waiting: Results | None) -> None:
        parts = waiting() if waiting else self._start(self.shards.map, run, pool, missing)
        for i, p in enumerate(missing):
            chosen = pool.chosen[p] = parts[i % len(parts)][i // len(parts)]
            subset = pool.subset(p, self.subset, run.seed)
            self._record(subset, chosen.losses)
            self.picked.append(
                torch.stack([torch.full_like(chosen.coreset.indices, pool.update), chosen.coreset.indices]).int()
            )
            if run.worker.rank == 0:
                run.bill("select").forward += len(subset)

    def _record(self, indices: Tensor, losses: Tensor) -> None:
        self.highest[indices] = self.highest[indices].maximum(losses)

    def _drop(self) -> None:
        """Drop from the active samples, every ``drop_every`` steps, those that are learned."""
        if self.step // self.settings.drop_every > self.drops:
            self.drops = self.step // self.settings.drop_every
            if self.settings.alpha > 0:
                self.active = remaining(self.active, self.highest, self.settings.alpha, least=self.size)
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

    def _curvature(self) -> float:
        diagonal = self.moments.diagonal if self.moments else None
        return 0.0 if diagonal is None else float(diagonal.norm())

    def state_dict(self) -> dict[str, Any]:
        """Return all but what ``batches`` can compute again."""
        state = {name: getattr(self, name) for name in STATE}
        pools = {name: pool and pool.state_dict() for name, pool in (("pool", self.pool), ("coming", self.coming))}
        places = {id(self.pool): "pool", id(self.coming): "coming"}
        ahead = self._ahead and id(self._ahead[0]) in places and [places[id(self._ahead[0])], self._ahead[1]]
        return {**state, **pools, "moments": self.moments and vars(self.moments), "ahead": ahead}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the middle of a region."""
        for name in STATE:
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)
        self.pool, self.coming = (state[name] and Pool.restored(state[name]) for name in ("pool", "coming"))
        self.moments = state["moments"] and Moments(**state["moments"])
        if state["ahead"]:
            name, missing = state["ahead"]
            self._ahead = getattr(self, name), missing, None  # to be begun once more
