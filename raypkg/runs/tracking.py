"""Metrics to places besides the run folder; the only importer of wandb."""

import netrc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import ValidationError

from raypkg.core.errors import UserError, shown
from raypkg.core.settings import RunSettings, Track

from .folder import RunFolder

if TYPE_CHECKING:
    import wandb

PATIENCE = 10  # seconds for the first answer of the W&B server, unless WANDB_INIT_TIMEOUT says otherwise


class Tracker(Protocol):
    """Receives what the run folder receives."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Take a row of metrics."""

    def finish(self, summary: Mapping[str, Any]) -> str:
        """Take the manifest and close; return a line for the user, or an empty one."""

    def abandon(self) -> None:
        """Close after a failure."""


class Nowhere:
    """Tracks nothing."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Do nothing."""

    def finish(self, summary: Mapping[str, Any]) -> str:
        """Do nothing."""
        return ""

    def abandon(self) -> None:
        """Do nothing."""


class Wandb:
    """One W&B run per run folder; offline when there is neither a key nor a WANDB_MODE.

    Args:
        settings: become the run's config.
        folder: gives the run its name; its plots and coreset are logged at the end.
        group: the experiment's name, or the sweep's.

    Raises:
        UserError: W&B refuses the settings or the key, or its server does not answer.
    """

    def __init__(self, settings: RunSettings, folder: RunFolder, group: str):
        chosen = wandb_settings(settings.track)
        import wandb

        self._folder = folder
        with _told_by_wandb():
            self._run = wandb.init(
                group=group,
                name=folder.name,
                config=settings.model_dump(mode="json"),
                dir=folder.storage.local,
                settings=chosen,
            )

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the row's numbers under its phase (and model)."""
        prefix = row["phase"]
        if row.get("model") is not None:
            prefix += f"/model_{row['model']}"
        numbers = {name: value for name, value in row.items() if isinstance(value, float | int)}
        self._run.log({f"{prefix}/{name}": value for name, value in numbers.items()})

    def finish(self, summary: Mapping[str, Any]) -> str:
        """Log the manifest, the plots and the coreset, and close."""
        self._run.summary.update(dict(summary))
        local = self._folder.storage.local
        if local:  # W&B uploads files by their path
            self._log_plots(local)
            self._log_coreset(local / "coreset.parquet")
        directory = Path(self._run.dir).parent
        self._run.finish()
        if directory.name.startswith("offline-"):
            return f"W&B run is offline; send it with: wandb sync {directory}"
        return ""

    def _log_plots(self, local: Path) -> None:
        import wandb

        plots = sorted(local.glob("plots/*.png"))
        self._run.log({f"plots/{plot.stem}": wandb.Image(str(plot)) for plot in plots})

    def _log_coreset(self, file: Path) -> None:
        import wandb

        if not file.exists():
            return
        artifact = wandb.Artifact(f"coreset-{self._folder.name}", type="coreset")
        artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def abandon(self) -> None:
        """Close as failed, so that nothing is written any more."""
        self._run.finish(exit_code=1)


class Listened:
    """A tracker that passes its rows on to a listener, such as the sweep that a run is a trial of.

    Args:
        tracker: gets everything first.
        listen: gets the rows; where it ends the run by ``SystemExit``, the tracker is closed as after a finished run.
    """

    def __init__(self, tracker: Tracker, listen: Callable[[Mapping[str, Any]], None]):
        self._tracker = tracker
        self._listen = listen

    def log(self, row: Mapping[str, Any]) -> None:
        """Pass a row to both."""
        self._tracker.log(row)
        try:
            self._listen(row)
        except SystemExit:
            self._tracker.finish({})
            self._tracker = Nowhere()  # whoever cleans up after the exit must not close it again
            raise

    def finish(self, summary: Mapping[str, Any]) -> str:
        """Close the tracker."""
        return self._tracker.finish(summary)

    def abandon(self) -> None:
        """Close the tracker after a failure."""
        self._tracker.abandon()


def wandb_settings(track: Track) -> "wandb.Settings":
    """Return what W&B is told of a run's tracking and of WANDB_MODE.

    Raises:
        UserError: W&B does not allow the project or the mode.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # its login speaks before it is told of any settings
    import wandb

    mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    patience: Any = os.environ.get("WANDB_INIT_TIMEOUT") or PATIENCE
    with _told_by_wandb():
        return wandb.Settings(project=track.project, mode=mode, silent=True, init_timeout=patience)


@contextmanager
def _told_by_wandb() -> Iterator[None]:
    """Pass on in one line why W&B refuses."""
    import wandb

    try:
        yield
    except ValidationError as error:
        wrong = error.errors()[0]
        name = f"WANDB_{wrong['loc'][-1]}".upper()
        raise UserError(f"W&B: {name} = {shown(wrong['input'])}: {wrong['msg']}") from None
    except (wandb.errors.Error, OSError) as error:
        reason = str(error).partition("\n")[0]
        connects = isinstance(error, wandb.errors.CommError)
        hint = "; see `wandb login`, or go without a server by WANDB_MODE=offline" if connects else ""
        raise UserError(f"W&B: {reason}{hint}") from None


TRACKERS = {"wandb": Wandb}
CHECKS = {"wandb": wandb_settings}


def check_tracker(settings: RunSettings) -> None:
    """Refuse, before there is a run, what the tracker would not take.

    Raises:
        UserError: what is wrong.
    """
    track = settings.track
    if track.name is not None:
        CHECKS[track.name](track)


def tracker(settings: RunSettings, folder: RunFolder, group: str) -> Tracker:
    """Return the tracker that the settings name."""
    name = settings.track.name
    if name is None:
        return Nowhere()
    return TRACKERS[name](settings, folder, group)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
