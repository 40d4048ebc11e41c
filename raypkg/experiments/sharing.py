"""First phases taken over from finished runs with the same settings, data and seed, instead of computed again.

What a phase leaves follows from its settings alone, so the result is bit for bit that of computing it. The bill is
copied too: it says what the phase costs, not what it cost this time, and the record names the run that paid it.
"""

from collections.abc import Callable, Iterable, Sequence

from raypkg.core.config import dotted
from raypkg.runs.folder import RunFolder
from raypkg.runs.report import Stage

Donors = Callable[[Stage], Iterable[RunFolder]]


def take_over(folder: RunFolder, stages: Sequence[Stage], donors: Donors) -> None:
    """Take over a run's first phases, as far as other runs have them.

    Args:
        folder: of the run, whose stored settings have the digest of its data.
        stages: of the run.
        donors: gives finished runs that may have a phase in common with this one.
    """
    done = folder.storage.list("phases")
    phases: list[str] = []
    for stage in stages:
        if f"{stage.phase}.json" not in done:
            phases.append(stage.phase)
        if phases and stage.depends_on:
            if not any(_taken(folder, phases, stage, donor) for donor in donors(stage)):
                return
            phases = []


def _taken(folder: RunFolder, phases: Sequence[str], last: Stage, donor: RunFolder) -> bool:
    """Take over phases, if the donor has the same settings for the last of them; say whether it had them whole."""
    ours, theirs = (last.settings_in(dotted(run.config)) for run in (folder, donor))
    return ours == theirs and folder.take_over(phases, donor)
