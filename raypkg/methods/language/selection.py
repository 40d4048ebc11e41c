"""The selection of instructions by their rows."""

from typing import Any

import torch

from raypkg.coresets.budgets import budget_of, select
from raypkg.coresets.record import Record
from raypkg.coresets.rows import Rows
from raypkg.data.coreset import Coreset
from raypkg.engine.costs import Cost
from raypkg.experiments.coreset_files import FILE, load_coreset, save_coreset
from raypkg.experiments.samples import Samples
from raypkg.runs.report import Report

from .rows import samples_of, stored_rows
from .settings import POOL, TARGET, InstructSettings


def select_instructions(settings: InstructSettings, samples: Samples, report: Report) -> Coreset:
    """Select by the rows in the run folder, store the coreset there unless an earlier attempt did, and return it.

    The score of a sample is its largest inner product with a target sample: a cosine, averaged over checkpoints.
    """
    storage = report.folder.storage
    chosen = settings.select
    pool = samples.train_indices

    def work() -> dict[str, Any]:
        common: dict[str, Any] = {"seed": settings.seed, "options": chosen.options, "balanced": chosen.balanced}
        scores = None
        findings = []
        with Cost("select") as cost:
            of: Rows | Record = Record.empty(samples.data.train.y[pool])
            if settings.sees_rows:
                split, indices = samples_of(settings, samples, TARGET)
                target = stored_rows(storage, TARGET, split.y[indices])
                of = stored_rows(storage, POOL)
                common["target"] = target
                scores = torch.cat([products.amax(dim=1) for products in of.similarities(target.values)])
            picked = select(of, budget_of(chosen.fraction, len(pool)), chosen.rule, **common)
            if scores is not None:
                mean, all_mean = scores[picked.indices].mean(), scores.mean()
                findings = [f"similarity to the nearest target sample: {mean:.3f} of the picks, {all_mean:.3f} of all"]
        ascending = picked.indices.argsort()
        coreset = Coreset(picked.indices[ascending], picked.weights[ascending]).at(pool)
        if not chosen.weighted:
            coreset = Coreset.uniform(coreset.indices)
        save_coreset(storage, coreset, samples, settings, chosen.model_dump(), pool, scores)
        return {"costs": [cost.record()], "size": len(coreset), "findings": findings}

    report.phase("select", work, epochs=0)
    return load_coreset(f"{storage.root}/{FILE}", samples, settings.dataset)
