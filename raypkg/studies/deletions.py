"""What follows a recorded training in a comparison: samples are deleted, and the answer is compared with retraining."""

from collections.abc import Sequence

import torch

from raypkg.core.seeds import generator
from raypkg.methods.deltagrad.answer import answer
from raypkg.methods.deltagrad.ids import id_at
from raypkg.methods.deltagrad.queues import Request
from raypkg.methods.deltagrad.recorded_run import RecordedRun, open_recorded
from raypkg.methods.deltagrad.requests import change_of
from raypkg.methods.deltagrad.settings import RequestSettings
from raypkg.methods.deltagrad.verify import compare_with_retraining
from raypkg.runs.folder import RunFolder

SHARE = 1e-3  # of the samples, deleted at once
REQUESTS = 10  # of one sample each


def delete_some(folder: RunFolder) -> dict[str, float]:
    """Delete a thousandth of the samples, drawn by the run's seed, in one request."""
    with open_recorded(folder) as run:
        kept = len(run.samples.train_indices)
        return _measured(run, [_drawn(run, max(1, round(SHARE * kept)))])


def delete_one_after_another(folder: RunFolder) -> dict[str, float]:
    """Delete ten samples, drawn by the run's seed, in as many requests, each answered from the record of the last."""
    with open_recorded(folder) as run:
        return _measured(run, [[each] for each in _drawn(run, REQUESTS)])


def _drawn(run: RecordedRun, count: int) -> list[int]:
    """Return the positions of distinct training samples."""
    kept = run.samples.train_indices
    order = torch.randperm(len(kept), generator=generator(run.settings.seed, "deletions"))
    return kept[order[:count]].tolist()


def _measured(run: RecordedRun, groups: Sequence[Sequence[int]]) -> dict[str, float]:
    """Answer the requests that no earlier attempt has answered, train again, and return what both took.

    Returns:
        ``answer_seconds`` of all requests and ``retraining_seconds`` of one, their ``ratio`` for as many trainings as
        requests, ``distance`` to the retrained weights, ``relative_distance`` over their norm, ``exact_share`` of the
        steps.
    """
    settings = RequestSettings.over(run.settings.replay, {})
    for positions in groups:
        if run.active[positions].all():
            ids = [id_at(run.split, position) for position in positions]
            change = change_of(run, [Request("delete", ids)])
            answer(run, change, settings, lambda steps, total: steps)
    verdict = compare_with_retraining(run, settings.cluster, lambda steps, total: steps)
    entries = [entry for entry in run.ledger.entries if entry["kind"] == "change"]
    seconds = sum(entry["seconds"] for entry in entries)
    return {
        "answer_seconds": seconds,
        "retraining_seconds": verdict.seconds,
        "ratio": len(entries) * verdict.seconds / seconds,
        "distance": verdict.distance,
        "relative_distance": verdict.distance / verdict.norm,
        "exact_share": sum(entry["exact"] for entry in entries) / sum(entry["steps"] for entry in entries),
    }
