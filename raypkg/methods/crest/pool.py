"""The pool of mini-batch coresets that training draws from, and the server that chooses them when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raypkg.core.seeds import generator
from raypkg.data.coreset import Coreset
from raypkg.engine.costs import Cost
from raypkg.engine.run import Run
from raypkg.engine.shards import Pending, Shards
from raypkg.engine.worker import memory_bound

from .active import random_subset
from .choosing import ToScorer, choose, subset_losses
from .minibatch import Chosen
from .subset import Subset


@dataclass(eq=False)
class Pool:
    """Mini-batch coresets, each computed when it is first drawn, with the weights of one moment.

    Attributes:
        update: l, which pool this is, from 1.
        size: P.
        candidates: the active samples, of which random subsets are drawn.
        weights: state of the model that chooses; None = as it is when a coreset is drawn.
        chosen: p → the coreset, for those computed so far.
        awaited: which are being computed in the background.
    """

    update: int
    size: int
    candidates: Tensor
    weights: Mapping[str, Tensor] | None
    chosen: dict[int, Chosen] = field(default_factory=dict)
    awaited: list[int] = field(default_factory=list)

    def subset(self, p: int, count: int, augment: Sequence[str], seed: int) -> Subset:
        """Draw the random subset V_p, the same whenever it is asked for."""
        rng = generator(seed, "crest subset", self.update, p)
        indices = random_subset(self.candidates, count, rng)
        return Subset.drawn(indices, augment, rng)

    def draw(self, steps: range, seed: int) -> list[int]:
        """Draw which coreset each of the steps trains on."""
        # One generator for each step: its draw does not depend on where an interval or a resumed training begins.
        generators = (generator(seed, "crest draw", step) for step in steps)
        return [int(torch.randint(self.size, (), generator=rng)) for rng in generators]

    def gradient_errors(self) -> tuple[Tensor, Tensor]:
        """Return how far mean gradients of mini-batches are from their random subsets': root mean square, and bias.

        Returns:
            Two tensors [2]: of the coresets, and of random batches of their size.
        """
        errors = torch.stack([chosen.errors for chosen in self.chosen.values()])  # [·, 2, C]
        squares = errors.square().sum(dim=2)  # [·, 2]
        bias = errors.mean(dim=0).norm(dim=1)
        return squares.mean(dim=0).sqrt(), bias

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Pool:
        """Return the pool of a checkpoint, which holds its fields."""
        chosen = {}
        for p, fields in saved["chosen"].items():
            coreset = Coreset(**fields["coreset"])
            chosen[p] = Chosen(**{**fields, "coreset": coreset})
        return cls(**{**saved, "chosen": chosen})


OnChoice = Callable[[Pool, Subset, Chosen], None]  # told of each new coreset, with its random subset


class PoolServer:
    """Chooses the coresets of a pool: in line, when they are drawn, or ahead, while training continues.

    All workers call it together and get the same coresets.

    Args:
        shards: can reach all samples each, and share the choices by rank.
        scorer: brings a model into the form that shards take.
        size: m, samples in a mini-batch.
        subset_size: r, samples in a random subset.
        augmented: whether selection sees samples as they are trained on.
        memory: GiB for caching; None = a quarter of a worker's.
        on_choice: called with each coreset, in the order of the draws.
    """

    def __init__(
        self,
        shards: Shards,
        scorer: ToScorer,
        *,
        size: int,
        subset_size: int,
        augmented: bool,
        memory: float | None,
        on_choice: OnChoice,
    ):
        self.shards = shards
        self.scorer = scorer
        self.size = size
        self.subset_size = subset_size
        self.augmented = augmented
        self.memory = memory
        self.on_choice = on_choice
        self._background: Pending | None = None  # computes what a pool awaits; one pool at a time does

    def coresets(self, run: Run, pool: Pool, wanted: Iterable[int]) -> list[Chosen]:
        """Return the wanted coresets of a pool, after computing those that are missing."""
        wanted = list(wanted)
        with run.cost.apart(run.bill("select")):
            self._collect(run, pool)
            if missing := self._missing(pool, wanted):
                task = self._task(run, pool, missing)
                choices = self.shards.map(choose, *task)
                self._keep(run, pool, missing, choices)
        return [pool.chosen[p] for p in wanted]

    def subset(self, run: Run, pool: Pool, p: int) -> Subset:
        """Return the random subset V_p of a pool."""
        return pool.subset(p, self.subset_size, self.augment(run), run.seed)

    def augment(self, run: Run) -> Sequence[str]:
        """Return the augmentations of samples that are selected from."""
        return run.augment if self.augmented else ()

    def begin(self, run: Run, pool: Pool, wanted: Iterable[int]) -> None:
        """Begin to choose coresets of a pool in the background, unless it awaits some already."""
        if pool.awaited:
            return
        pool.awaited = self._missing(pool, wanted)
        if pool.awaited:
            task = self._task(run, pool, pool.awaited)
            self._background = self.shards.start(choose, *task)

    def losses(self, run: Run, subset: Subset) -> Tensor:
        """Return the losses of a random subset with the present weights, [r]."""
        with run.cost.apart(run.bill("check")):
            run.worker.share(run.model.buffers())
            scorer = self.scorer(run.model)
            slices = self.shards.map(subset_losses, scorer, subset, self.augment(run))
        if run.worker.rank == 0:
            run.bill("check").forward += len(subset)
        return torch.cat(slices)

    def trial(self, run: Run, subsets: Sequence[Subset]) -> list[Chosen]:
        """Return the coresets of random subsets with the present weights, for a look at what they are worth."""
        run.worker.share(run.model.buffers())
        scorer = self.scorer(run.model)
        choices = self.shards.map(choose, scorer, subsets, self.augment(run), self.size, memory_bound(self.memory))
        if run.worker.rank == 0:
            run.bill("look").forward += sum(len(subset) for subset in subsets)
        return _in_order(choices, len(subsets))

    def _collect(self, run: Run, pool: Pool) -> None:
        """Wait for what the pool awaits."""
        awaited = pool.awaited
        if not awaited:
            return
        background = self._background
        self._background = None
        pool.awaited = []
        if not background:  # it ended with the process from whose checkpoint training resumed
            task = self._task(run, pool, awaited)
            choices = self.shards.map(choose, *task)
            self._keep(run, pool, awaited, choices)
            return
        choices = background()
        self._keep(run, pool, awaited, choices)
        if run.worker.rank == 0:  # what is chosen in line is timed here; this was timed by those who chose
            costs = [cost for _, cost in choices]
            run.bill("select").total_seconds += sum(cost.total_seconds for cost in costs)

    def _missing(self, pool: Pool, wanted: Iterable[int]) -> list[int]:
        """Return those coresets that are not computed yet, each once."""
        return [p for p in dict.fromkeys(wanted) if p not in pool.chosen]

    def _task(self, run: Run, pool: Pool, wanted: Iterable[int]) -> tuple[Any, ...]:
        """Return the arguments of ``choose``: the model, or a copy of it with the weights of the pool's moment."""
        subsets = [self.subset(run, pool, p) for p in wanted]
        model = run.model
        if pool.weights is not None:
            model = deepcopy(run.model)
            model.load_state_dict(pool.weights)
        memory = memory_bound(self.memory)
        return self.scorer(model), subsets, self.augment(run), self.size, memory

    def _keep(
        self,
        run: Run,
        pool: Pool,
        wanted: Sequence[int],
        choices: Sequence[tuple[Sequence[Chosen], Cost]],
    ) -> None:
        """Put what the holders chose into the pool."""
        for p, chosen in zip(wanted, _in_order(choices, len(wanted)), strict=True):
            pool.chosen[p] = chosen
            self.on_choice(pool, self.subset(run, pool, p), chosen)
        if run.worker.rank == 0:  # the bill is summed over the workers, and all of them keep all choices
            costs = [cost for _, cost in choices]
            run.bill("select").forward += sum(cost.forward for cost in costs)


def _in_order(choices: Sequence[tuple[Sequence[Chosen], Cost]], count: int) -> list[Chosen]:
    """Return what the holders chose in the order of the subsets: the one of rank r chose for every ``world``-th."""
    coresets = []
    for number in range(count):
        turn, holder = divmod(number, len(choices))
        of_holder, _ = choices[holder]
        coresets.append(of_holder[turn])
    return coresets
