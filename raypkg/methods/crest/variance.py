"""How far the gradients of random batches and of mini-batch coresets are from the data's, as training computes them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raypkg.core.seeds import seeded
from raypkg.data.augment import compose
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import Batch, dtype_of, training_batch
from raypkg.engine.loop import autocast, losses_of
from raypkg.engine.run import Run
from raypkg.engine.worker import Worker

from .look import Look, Spread, error_of_coresets
from .minibatch import Chosen
from .quadratic import gradient_of
from .subset import Subset

DRAWS = 30  # random subsets of a look
WHOLE = 5  # of so many, all samples go backward for one: it is they that cost


@dataclass(frozen=True, eq=False)
class Spreads:
    """The gradients of one worker, or of all.

    Attributes:
        random: of m random samples.
        coresets: of mini-batch coresets.
        differences: of each coreset from the random samples of the same subset.
        whole: of all r samples.
    """

    random: Spread
    coresets: Spread
    differences: Spread
    whole: Spread

    def summed(self, worker: Worker) -> Spreads:
        """Return the sums over all workers."""
        mine = (self.random, self.coresets, self.differences, self.whole)
        totals = worker.sum(torch.stack([each.total for each in mine]))
        numbers = worker.sum(torch.tensor([[each.squares, each.count] for each in mine], dtype=torch.float64))
        pairs = zip(totals, numbers.tolist(), strict=True)
        return Spreads(*(Spread(total, squares, int(count)) for total, (squares, count) in pairs))


def look_at(run: Run, subsets: Sequence[Subset], chosen: Sequence[Chosen], n: int) -> Look:
    """Measure the gradients of random batches, of coresets and of whole subsets, over all workers together.

    They are those of training: with dropout, and with batch norm's statistics of each batch. The model, its statistics
    and the global generators stay as they are.

    Args:
        run: at the present weights; the work goes on the bill ``look``.
        subsets: random, in random order.
        chosen: the mini-batch coreset of each.
        n: samples to choose from.
    """
    size = len(chosen[0].coreset)
    model = deepcopy(run.model)  # batch norm takes note of what goes through it
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    like = torch.zeros(sum(parameter.numel() for parameter in parameters), device=run.worker.device)
    spreads = Spreads(*(Spread.none_yet(like) for _ in range(4)))
    own = range(run.worker.rank, len(subsets), run.worker.world)
    with seeded(run.seed, "crest look", run.step, run.worker.rank):
        for number in own:
            subset = subsets[number]
            of_random = _gradient(run, model, parameters, subset[:size])
            of_coreset = _gradient(run, model, parameters, chosen[number].samples, chosen[number].coreset.weights)
            spreads.random.add(of_random)
            spreads.coresets.add(of_coreset)
            spreads.differences.add(of_coreset - of_random)
            if number % WHOLE == 0:
                spreads.whole.add(_gradient(run, model, parameters, subset))
    found = spreads.summed(run.worker)
    backward = 2 * size * found.random.count + len(subsets[0]) * found.whole.count
    cost = run.bill("look")
    if run.worker.rank == 0:  # the bill is summed over the workers
        cost.forward += backward
        cost.backward += backward
    return Look(
        step=run.step,
        size=size,
        subset=len(subsets[0]),
        n=n,
        random=found.random.variance,
        coreset=error_of_coresets(found.coresets, found.differences),
        whole=found.whole.variance,
        forward=sum(len(subset) for subset in subsets),
        backward=backward,
    )


def _gradient(
    run: Run, model: nn.Module, parameters: Sequence[Tensor], samples: Subset, weights: Tensor | None = None
) -> Tensor:
    """Return the gradient of the mean of w · loss over some samples as a training step computes it, [p]."""
    batch = _loaded(run, samples, weights)
    total = torch.zeros((), device=run.worker.device)
    for part in batch.parts(run.settings.micro_batch):
        with autocast(run.settings.precision, part.x.device):
            logits = model(part.x)
        loss = losses_of(logits, part.y) @ part.weights / batch.total
        total = total + gradient_of(loss, parameters)
    return total


def _loaded(run: Run, samples: Subset, weights: Tensor | None) -> Batch:
    if weights is None:
        weights = torch.ones(len(samples))
    alone = Worker(device=run.worker.device)  # a draw goes to one worker
    augment = compose(run.augment)
    draws = samples.draws
    if draws.shape[1] != augment.draws:  # they were chosen among unaugmented ones
        draws = torch.rand(len(samples), augment.draws)
    coreset = Coreset(samples.indices, weights)
    return training_batch(run.split, coreset, augment, draws, alone, dtype_of(run.model))


def warning_of(model: nn.Module) -> list[str]:
    """Return a line about batch norm that is not frozen: a sample's gradient depends on the others of its batch."""
    if not any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
        return []
    return [
        "CREST loses most of its gain to batch norm, whose statistics of medoids are not those of the data: use group"
        " norm or frozen statistics (for the built-in resnets --set model.options.norm=group, or =frozen)"
    ]
