"""Data audit: the training samples of a finished run, ranked by their harm. No torch at import."""

from typing import ClassVar, Literal

from pydantic import Field

from raypkg.core.settings import Count, RunSettings
from raypkg.experiments import experiment
from raypkg.experiments.phases import outlook
from raypkg.experiments.samples import Samples
from raypkg.runs.report import Report, Stage

TABLE = "audit.parquet"


class AuditSettings(RunSettings):
    """Settings of `effray audit`; data set and seed are those of the run."""

    argument: ClassVar[str] = "model_from"

    model_from: str = Field("", description="run to audit")
    by: Literal["loss", "self", "influence"] = Field(
        "loss",
        description="score that ranks: loss or self-influence, which find wrong labels; influence on the held-out loss",
    )
    on: Literal["valid", "test"] = Field(
        "valid", description="held-out samples; test = the test set, which measures nothing afterwards"
    )
    damping: float | None = Field(None, gt=0, description="λ of the Hessian (default: the run's weight decay)")
    listed: Count = Field(30, description="worst samples on the page")


@outlook("audit")
def stages(settings: AuditSettings) -> list[Stage]:
    """Return the one phase of an audit."""
    return [Stage("audit", files=(TABLE,))]


@experiment("audit", source="arXiv:1703.04730")
def run(settings: AuditSettings, *, samples: Samples, report: Report) -> None:
    """Rank a run's training samples by their harm, such as wrong labels, by influence functions of its last layer.

    RUN is a finished run that trained a classifier. `effray report` lists the worst samples with their text or picture;
    `effray deltagrad delete RUN --from-audit N` removes the N worst.

    Example:
        effray deltagrad train --name audited --dataset.noise 0.2 && effray audit audited
    """
    from raypkg.experiments.summary import finish

    from .run import audit, open_audited

    audited = open_audited(settings, samples, report.folder)
    report.phase("audit", lambda: audit(settings, audited, report.folder.storage), epochs=0)
    finish(report, settings, audited.samples)
