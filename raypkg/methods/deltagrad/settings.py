"""Settings of DeltaGrad."""

from typing import Annotated, Literal

from pydantic import Field

from raypkg.core.config import Settings
from raypkg.core.settings import Dataset, Experiment, Model, Train


class PlainDataset(Dataset):
    """What to train on, as it is."""

    augment: Annotated[tuple[str, ...] | None, Field(description="none: gradients are replayed")] = ()


class LinearModel(Model):
    """What to train."""

    name: Annotated[str, Field(description="linear, mlp or package.module:function; no dropout, no batch norm")] = (
        "linear"
    )


class PlainTrain(Train):
    """The training that is recorded: SGD without momentum, in double precision."""

    epochs: Annotated[int, Field(ge=1, description="passes over the samples")] = 32
    batch_size: Annotated[int, Field(ge=1, description="samples a step; large batches keep the history small")] = 16384
    momentum: Annotated[float, Field(ge=0, lt=1, description="0: the derivation covers no other")] = 0.0
    weight_decay: Annotated[float, Field(ge=0, description="λ of the L2 penalty λ/2 ‖w‖²")] = 0.005
    schedule: Annotated[
        Literal["cosine", "multistep", "constant"], Field(description="shape of the learning rate over training")
    ] = "constant"
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float64"], Field(description="of training; replays are in float64")
    ] = "float64"


class HistorySettings(Settings):
    """What is kept of training."""

    dtype: Annotated[
        Literal["float64", "float32"], Field(description="float32 halves the file and limits how near replays come")
    ] = "float64"


class ReplaySettings(Settings):
    """How training is replayed with other samples."""

    period: Annotated[int, Field(ge=1, description="T0: every so many steps one is exact; 1 = all")] = 5
    burn_in: Annotated[int, Field(ge=1, description="j0: exact steps at first")] = 10
    pairs: Annotated[int, Field(ge=1, description="m: pairs that the Hessian is approximated from")] = 2
    tolerance: Annotated[
        float | None,
        Field(gt=0, description="distance from the retrained weights to stay below, by estimate, instead of T0 and j0"),
    ] = None


class DeltaGradSettings(Experiment):
    """Settings of `effray deltagrad train`."""

    dataset: PlainDataset = PlainDataset()
    model: LinearModel = LinearModel()
    train: PlainTrain = PlainTrain()
    history: HistorySettings = HistorySettings()
    replay: ReplaySettings = ReplaySettings()

    def check(self, n: int) -> None:
        """Refuse a training that cannot be replayed.

        Raises:
            UserError: what is wrong.
        """
        from .recording import check_derived

        check_derived(self)
