"""Settings of recorded trainings, and of the replays that answer requests."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raypkg.core.config import Settings, load_settings
from raypkg.core.errors import UserError
from raypkg.core.presets import FORMER, PUBLISHED, PresetName
from raypkg.core.settings import Cluster, Dataset, Epochs, Experiment, Model, Precision, Scale, Schedule, Share, Train

BURN_IN = 20  # j0 of the released example
SETTLED = 0.1  # relative error that ends j0 in trainings of fewer than 3·j0 steps
# Settings of training for which replays support a single value.
REPLAYED = {
    "decay": "all", "clip": None, "label_smoothing": 0.0, "keep": "last", "average": None, "evaluate_views": "plain"
}  # fmt: skip


class PlainDataset(Dataset):
    """The data set, without augmentation."""

    former: ClassVar[Mapping[str, Any]] = {"scale": "standard"}

    scale: Scale = "unit"
    augment: tuple[str, ...] | None = Field((), description="must be empty: gradients are replayed")


class LinearModel(Model):
    """The model."""

    name: str = Field("linear", description="linear, mlp or package.module:function; no dropout, no batch norm")


class PlainTrain(Train):
    """The recorded training: SGD without momentum, in double precision."""

    epochs: Epochs = Field(20, description="passes over the samples")
    batch_size: int = Field(16384, ge=1, description="samples per step; large ones keep the history small")
    momentum: float = Field(0.0, ge=0, lt=1, description="0: the derivation covers no other")
    weight_decay: float = Field(1e-4, ge=0, description="λ of the L2 penalty λ/2 ‖w‖²")
    schedule: Schedule = "multistep"
    milestones: tuple[Share, ...] = Field((0.5,), description="shares of training at which multistep drops the rate")
    lr_drop: float = Field(0.5, gt=0, le=1, description="factor of the rate at each milestone")
    precision: Precision = Field("float64", description="of training; replays are in float64")

    @model_validator(mode="after")
    def _plain_sgd(self) -> Self:
        for name, replayed in {"optimizer": "sgd", "momentum": 0.0, **REPLAYED}.items():
            value = getattr(self, name)
            if value != replayed:
                raise UserError(
                    f"train.{name} = {value}: DeltaGrad is derived for SGD without momentum, w ← w − η (g + λw), with g"
                    " of the plain loss, to the last step"
                )
        return self


class HistorySettings(Settings):
    """The record of the training."""

    dtype: Literal["float64", "float32"] = Field(
        "float64", description="float32 halves the file and limits the accuracy of replays"
    )


class ReplaySettings(Settings):
    """Replays of the training with other samples."""

    removed: ClassVar[Mapping[str, Any]] = {"tolerance": False}

    period: int = Field(5, ge=1, description="T0: every T0-th step is exact; 1 = all")
    burn_in: int | None = Field(
        None, ge=1, description="j0: exact steps at the start (default: 20, at most a third of the steps)"
    )
    settled: float | None = Field(
        None, gt=0, description="relative error of a predicted gradient that ends j0 (default: off; 0.1 if j0 is cut)"
    )
    pairs: int = Field(2, ge=1, description="m: pairs in the approximation of the Hessian")

    def beginning(self, steps: int) -> tuple[int, float | None]:
        """Return j0 of a training of ``steps`` steps, and the relative error that ends it early."""
        if self.burn_in or steps >= 3 * BURN_IN:
            return self.burn_in or BURN_IN, self.settled
        return max(1, steps // 3), self.settled or SETTLED


class DeltaGradSettings(Experiment):
    """Settings of `effray deltagrad train`."""

    former: ClassVar[Mapping[str, Any]] = {"preset": FORMER}

    preset: PresetName = PUBLISHED
    dataset: PlainDataset = PlainDataset()
    model: LinearModel = LinearModel()
    train: PlainTrain = PlainTrain()
    history: HistorySettings = HistorySettings()
    replay: ReplaySettings = ReplaySettings()

    def steps(self, n: int) -> int:
        """Return the steps of the training on n samples."""
        return self.train.epochs * self.train.steps_per_epoch(n)

    def adaptations(self, n: int) -> dict[str, tuple[Any, str]]:
        """Return j0, at most a third of the steps, and the error that ends it early if it is cut."""
        steps = self.steps(n)
        burn_in, settled = self.replay.beginning(steps)
        if burn_in in (BURN_IN, self.replay.burn_in):
            return {}
        reason = f"as there are {steps} steps"
        return {
            "replay.burn_in": (burn_in, f"{BURN_IN}, {reason}"),
            "replay.settled": (settled, f"false, {reason}"),
        }

    @model_validator(mode="after")
    def _replayed_as_recorded(self) -> Self:
        if self.hooks:
            raise UserError(f"hooks = {self.hooks[0].name}: DeltaGrad replays plain SGD, without hooks")
        return self

    def check(self, n: int, data: Any) -> None:
        """Refuse a training that cannot be replayed, with augmentation, dropout, batch norm or data read by blocks."""
        from .hook import check_replayable

        self.dataset.refuse_streamed("DeltaGrad")
        check_replayable(self, data)


class Holders(Cluster):
    """The processes that compute the gradients of a replay."""

    workers: int | None = Field(
        0, ge=0, description="Ray actors that hold the data and compute gradients; 0 = this process"
    )


class RequestSettings(Settings):
    """Settings of a request to a recorded run; the run's own are the defaults of ``replay``."""

    renamed: ClassVar[Mapping[str, str]] = {"workers": "cluster.workers", "threads": "cluster.cpus_per_worker"}

    replay: ReplaySettings = ReplaySettings()
    cluster: Holders = Holders()

    @classmethod
    def over(cls, recorded: ReplaySettings, values: Mapping[str, Any]) -> Self:
        """Return a request's settings: ``values``, by dotted names, over those of the run."""
        replay = recorded.model_dump()
        if "replay.burn_in" in values:  # a given j0 does not end early
            del replay["settled"]
        return load_settings(cls, {"replay": replay}, values)
