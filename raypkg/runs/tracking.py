"""Tracking of metrics in W&B or TensorBoard; the only importer of them."""

import netrc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from raypkg.core.config import to_toml
from raypkg.core.errors import UserError, shown
from raypkg.core.registry import extra
from raypkg.core.settings import RunSettings, Track

from .folder import RunFolder

if TYPE_CHECKING:
    import wandb

TENSORBOARD = ("tensorboardX", "tensorboard", "track.name = tensorboard")  # package, its extra, who needs it
PATIENCE = 10  # seconds for the first answer of the W&B server, unless WANDB_INIT_TIMEOUT is set


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of metrics under its phase, and its model if there are several."""
    model = row.get("model")
    prefix = row["phase"] if model is None else f"{row['phase']}/model_{model}"
    return {f"{prefix}/{name}": value for name, value in row.items() if isinstance(value, float | int)}


class Wandb:
    """One W&B run per run folder, in the group of its experiment or study; offline without a key."""

    def __init__(self, settings: RunSettings, folder: RunFolder, group: str):
        chosen = wandb_settings(settings.track)
        import wandb

        self._folder = folder
        with _one_line():
            self._run = wandb.init(
                group=group,
                name=folder.name,
                config=settings.model_dump(mode="json"),
                dir=folder.storage.local,
                settings=chosen,
            )

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row of metrics."""
        self._run.log(_numbers(row))

    def finish(self, summary: Mapping[str, Any] | None) -> str:
        """Log the manifest, the plots and the coreset, and close; return a line for the user. None = the run failed."""
        import wandb

        if summary is None:
            self._run.finish(exit_code=1)
            return ""
        self._run.summary.update(dict(summary))
        if local := self._folder.storage.local:  # W&B uploads local files only
            plots = sorted(local.glob("plots/*.png"))
            self._run.log({f"plots/{plot.stem}": wandb.Image(str(plot)) for plot in plots})
            coreset = local / "coreset.parquet"
            if coreset.exists():
                artifact = wandb.Artifact(f"coreset-{self._folder.name}", type="coreset")
                artifact.add_file(str(coreset))
                self._run.log_artifact(artifact)
        directory = Path(self._run.dir).parent
        self._run.finish()
        if directory.name.startswith("offline-"):
            return f"W&B run is offline; send it with: wandb sync {directory}"
        return ""


def wandb_settings(track: Track) -> "wandb.Settings":
    """Return W&B's settings for a run's tracking and the environment; refuse a project or mode that W&B refuses."""
    os.environ.setdefault("WANDB_SILENT", "true")  # its login prints before it reads any settings
    import wandb

    has_key = bool(os.environ.get("WANDB_API_KEY"))
    with suppress(OSError, netrc.NetrcParseError):
        has_key = has_key or netrc.netrc().authenticators("api.wandb.ai") is not None
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    patience: Any = os.environ.get("WANDB_INIT_TIMEOUT") or PATIENCE
    with _one_line():
        return wandb.Settings(project=track.project, mode=mode, silent=True, init_timeout=patience)


@contextmanager
def _one_line() -> Iterator[None]:
    import wandb

    try:
        yield
    except ValidationError as error:
        wrong = error.errors()[0]
        name = f"WANDB_{wrong['loc'][-1]}".upper()
        raise UserError(f"W&B: {name} = {shown(wrong['input'])}: {wrong['msg']}") from None
    except (wandb.errors.Error, OSError) as error:
        reason = str(error).partition("\n")[0]
        offline = "; see `wandb login`, or go without a server by WANDB_MODE=offline"
        hint = offline if isinstance(error, wandb.errors.CommError) else ""
        raise UserError(f"W&B: {reason}{hint}") from None


class TensorBoard:
    """Event files in the run folder, by epoch."""

    def __init__(self, settings: RunSettings, folder: RunFolder, group: str):
        if not folder.storage.local:
            raise UserError(f"track.name = tensorboard: {folder.storage.root} is remote, event files are local")
        self._files = folder.storage.local / "tensorboard"
        self._writer = extra(*TENSORBOARD).SummaryWriter(str(self._files))
        self._writer.add_text("config", f"    {to_toml(settings)}".replace("\n", "\n    "))

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row of metrics."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row.get("epoch", 0))

    def finish(self, summary: Mapping[str, Any] | None) -> str:
        """Log the numbers of the manifest and close; return the command that shows them. None = the run failed."""
        self.log({**(summary or {}), "phase": "summary"})
        self._writer.close()
        return f"TensorBoard: tensorboard --logdir {self._files}"


Tracker = Wandb | TensorBoard
TRACKERS: dict[str, type[Tracker]] = {"wandb": Wandb, "tensorboard": TensorBoard}
