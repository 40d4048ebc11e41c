"""Rules that select instructions by rows, those of the pool most like those of a target."""

import torch

from raypkg.coresets.rows import Rows
from raypkg.coresets.solvers import largest
from raypkg.data.coreset import Coreset

from . import coreset


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
