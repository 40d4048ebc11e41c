"""Rules that judge each sample by itself: by its gradient, its prediction, its history in training, its row, or not."""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.special import entr

from raypkg.core.errors import UserError
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.record import Record, Rows
from raypkg.coresets.solvers import draw_in_proportion, largest
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("random", sees="record")
def random(samples: HeadView | Record | Rows, budget: int, *, rng: torch.Generator) -> Coreset:
    """Draw samples uniformly without replacement, fixed or, stronger, redrawn (``select.every_epochs = 1``).

    The redrawn baseline sees more different samples at the same cost: a rule has to beat both.
    """
    order = torch.randperm(len(samples), generator=rng)
    return Coreset.uniform(order[:budget])


@coreset("el2n", source="arXiv:2107.07075")
def el2n(view: HeadView, budget: int, *, others: Sequence[HeadView] = ()) -> Coreset:
    """Keep the largest error norms ‖p − e_y‖, averaged over the models: ten short runs in the paper."""
    errors = torch.stack([each.residual.norm(dim=1) for each in (view, *others)])  # [models, n]
    return Coreset.uniform(largest(errors.mean(dim=0), budget))


@coreset("grand", source="arXiv:2107.07075", published={"options.gradients": "full", "options.pick": "largest"})
def grand(
    view: HeadView,
    budget: int,
    *,
    rng: torch.Generator,
    others: Sequence[HeadView] = (),
    full_norms: Callable[[], Tensor] | None = None,
    pick: Literal["largest", "drawn"] = "largest",
    gradients: Literal["head", "full"] = "head",
) -> Coreset:
    """Keep the largest gradient norms, averaged over the models as in ``el2n``, or draw in proportion to them.

        head  ‖p − e_y‖ · sqrt(‖h‖² + 1), of the last layer        full  ‖∇_θ ℓ‖, of all parameters, as published

    With pick="largest" as published. With "drawn", as LiPT's released code seems to do, sample i is kept with
    probability π_i = min(1, c ‖g_i‖), Σ π_i = k, and weighs k / (n π_i): mean(w · loss) is then the mean loss of all
    samples in expectation. Without ``select.weighted`` every weight is 1.

    Differs from the paper: with "head", the gradient is that of the last layer, at the cost of a forward pass.

    Raises:
        UserError: full gradients of a view without its model.
    """
    if gradients == "head":
        norms = torch.stack([each.norms() for each in (view, *others)]).mean(dim=0)  # [n]
    elif full_norms is not None:
        norms = full_norms()
    else:
        raise UserError("grand option gradients = full: only a selection by a model can compute them")
    if pick == "largest":
        return Coreset.uniform(largest(norms, budget))
    indices, probabilities = draw_in_proportion(norms, budget, rng)
    weights = budget / (len(view) * probabilities)
    return Coreset(indices, weights.float())


@coreset("uncertainty", source="arXiv:1906.11829")
def uncertainty(
    view: HeadView, budget: int, *, measure: Literal["margin", "entropy", "confidence"] = "margin"
) -> Coreset:
    """Keep the samples with the most uncertain predictions, whatever their labels.

    With the probabilities in descending order, p_1 ≥ p_2 ≥ …, the largest

        margin  1 − (p_1 − p_2)        entropy  −Σ_c p_c ln p_c        confidence  1 − p_1

    With two classes all three measures order the samples alike.

    Differs from the paper: the model of the view selects, not a smaller proxy of it.
    """
    p = view.logits.softmax(dim=1)
    others = p.sort(dim=1, descending=True).values[:, 1:]  # p_2, p_3, … [n, C − 1]
    doubt = others.sum(dim=1)  # 1 − p_1, with the digits that a p_1 near 1 has lost
    if measure == "confidence":
        scores = doubt
    elif measure == "margin":
        scores = doubt + others[:, :1].sum(dim=1)
    else:
        log_first = (-doubt).log1p()  # ln p_1
        scores = entr(others).sum(dim=1) - (1 - doubt) * log_first
    return Coreset.uniform(largest(scores, budget))


@coreset("forgetting", source="arXiv:1812.05159", sees="record")
def forgetting(record: Record, budget: int, *, rng: torch.Generator) -> Coreset:
    """Keep the samples that were forgotten most often, those never classified rightly first; ties are drawn at random.

    A sample is forgotten when it is classified rightly at one step and wrongly at its next. Samples that were not
    trained on come last.

    Raises:
        UserError: no hits were recorded, or no sample has been trained on.
    """
    trained = record.losses.isfinite()
    if record.forgotten is None or not trained.any():
        raise UserError("forgetting needs the record of a training that saw these samples: there is none")
    scores = record.forgotten.where(trained, -1)
    order = torch.randperm(len(record), generator=rng)  # ``largest`` orders equal scores by position
    picked = largest(scores[order], budget)
    return Coreset.uniform(order[picked])


@coreset("infobatch", source="arXiv:2303.04947", sees="record", sizes_itself=True)
def infobatch(
    record: Record,
    *,
    rng: torch.Generator,
    progress: float = 0.0,
    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    until: Annotated[float, Field(ge=0, le=1)] = 0.875,
) -> Coreset:
    """Drop each sample whose loss is below the mean with probability r, and weigh those that stay by 1 / (1 − r).

    Σ w_i ∇ℓ_i over the coreset is then Σ ∇ℓ_i over all samples in expectation. A sample without a loss stays. Meant to
    act at every epoch.

    Args:
        record: losses of each sample's latest step.
        rng: of this epoch.
        progress: share of the training that is done.
        ratio: r.
        until: progress δ from which all samples stay, so that training ends on the unpruned data.
    """
    everyone = torch.arange(len(record))
    known = record.losses.isfinite()
    if progress >= until or not known.any():
        return Coreset.uniform(everyone)
    mean = record.losses[known].double().mean()
    learned = record.losses < mean  # [n]
    lucky = torch.rand(len(record), generator=rng) >= ratio
    stays = ~learned | lucky
    weights = torch.where(learned, 1 / (1 - ratio), 1.0)
    return Coreset(everyone[stays], weights[stays])


@coreset("rds_plus", source="arXiv:2503.01807", sees="rows", by_class=False)
def rds_plus(rows: Rows, budget: int, *, target: Rows | None = None) -> Coreset:
    """Let the target's samples take turns, each taking its most similar sample that is not yet taken.

    With several tasks these take turns, each going by its best score: max over its samples v of <r_i, r_v>. Ties go to
    the lowest index. The paper's rows are position-weighted means of the last hidden states, of length 1.
    """
    aim = rows if target is None else target
    tasks = aim.by_task
    scores = rows.similarity(aim)  # [n, V]
    if len(tasks) > 1:
        scores = torch.stack([scores[:, task].amax(dim=1) for task in tasks], dim=1)  # [n, tasks]
    # Of its ranking, a queue never needs more than the first ``budget``: all before its pick are taken.
    queues = [iter(column.argsort(descending=True, stable=True)[:budget].numpy()) for column in scores.T]
    picks: dict[int, None] = {}  # in order
    while len(picks) < budget:
        turn = len(picks) % len(queues)
        picks[int(next(i for i in queues[turn] if i not in picks))] = None
    return Coreset.uniform(torch.tensor([*picks]))


@coreset("less", source="arXiv:2402.04333", sees="rows", by_class=False)
def less(rows: Rows, budget: int, *, target: Rows | None = None) -> Coreset:
    """Keep the samples with the largest influence, max over the tasks of the mean <r_i, r_v> over a task's samples v.

    With rows Σ_t ⊕ sqrt(η_t) g_t / ‖g_t‖ over T checkpoints, the inner product is Σ_t η_t cos(g_t, g'_t). Ties go to
    the lowest index.
    """
    aim = rows if target is None else target
    means = torch.stack([aim.values[task].float().mean(dim=0) for task in aim.by_task])  # [tasks, d]
    scores = torch.cat([products.amax(dim=1) for products in rows.similarities(means)])
    return Coreset.uniform(largest(scores, budget))
