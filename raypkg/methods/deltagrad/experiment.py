"""DeltaGrad: training whose every step is recorded, so that samples can be deleted and added without training again."""

from functools import partial

from raypkg.cluster.workers import Workers
from raypkg.core.config import Named
from raypkg.experiments import experiment
from raypkg.experiments.samples import Samples
from raypkg.runs.folder import RunFolder
from raypkg.runs.report import Report

from .settings import DeltaGradSettings, RequestSettings


@experiment("deltagrad", source="arXiv:2006.14755")
def run(settings: DeltaGradSettings, *, samples: Samples, report: Report, workers: Workers) -> None:
    """Train and record every step; `delete` and `add` then update the model in a fraction of the time of retraining.

    The history takes 2 · steps · parameters numbers: made for convex heads, small networks and large batches.

    Example:
        effray deltagrad train --dataset digits
    """
    from raypkg.experiments.samples import new_model
    from raypkg.experiments.summary import finish
    from raypkg.experiments.training import Job, train_on_cluster

    from .history import Layout, check_room, history_folder
    from .run import begin_journal

    settings.check(len(samples.train_indices), samples.data)
    storage = report.folder.storage
    layout = Layout.of(new_model(settings, samples.data), settings.history.dtype)
    steps = settings.steps(len(samples.train_indices))
    check_room(history_folder(storage, 0), layout, steps)
    report.say(f"history: {layout.describe(steps)}")
    job = Job(settings, settings.train, storage, hooks=(Named(name="deltagrad"),))
    record = train_on_cluster(job, samples, report, workers)
    begin_journal(report.folder, settings, samples, record["history"])
    finish(report, settings, samples, epochs=settings.train.epochs)


def _measured(folder: RunFolder, *, share: float = 0.0, requests: int = 1) -> dict[str, float]:
    """Answer one request or several, except those that an earlier attempt answered, then retrain and compare.

    One request deletes a ``share`` of the samples, several delete one sample each. The ratio is that of one retraining
    per request to all answers; the relative distance is over the retrained norm.
    """
    import torch

    from raypkg.core.seeds import generator

    from .answer import answer, verify
    from .requests import Request, change_of, id_at
    from .run import open_recorded

    with open_recorded(folder) as run:
        settings = RequestSettings.over(run.settings.replay, {})
        training = run.samples.train_indices
        order = torch.randperm(len(training), generator=generator(run.settings.seed, "deletions"))
        sizes = [max(1, round(share * len(training)))] * requests
        for chosen in order[: sum(sizes)].split(sizes):
            positions = training[chosen].tolist()
            if run.active[positions].all():
                ids = [id_at(run.split, position) for position in positions]
                change = change_of(run, [Request("delete", ids)])
                answer(run, change, settings)
        verdict = verify(run, settings.cluster)
        answers = [entry for entry in run.journal.entries if entry["kind"] == "change"]

    seconds = sum(entry["seconds"] for entry in answers)
    return {
        "answer_seconds": seconds,
        "retraining_seconds": verdict.seconds,
        "ratio": len(answers) * verdict.seconds / seconds,
        "distance": verdict.distance,
        "relative_distance": verdict.distance / verdict.norm,
        "exact_share": sum(entry["exact"] for entry in answers) / sum(entry["steps"] for entry in answers),
    }


# Follow-ups of a run in a table of `effray compare`: one request, or each answered from the record of the one before
delete_some = partial(_measured, share=1e-3)
delete_a_hundredth = partial(_measured, share=1e-2)
delete_one_after_another = partial(_measured, requests=10)
delete_a_hundred = partial(_measured, requests=100)
