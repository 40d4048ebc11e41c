"""Settings of LiPT."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raypkg.core.errors import UserError
from raypkg.core.presets import FORMER, PUBLISHED, PresetName
from raypkg.core.registry import Lookup
from raypkg.core.settings import MOST_EPOCHS, Count, Epochs, Experiment, Reselect, Share, Train, Training

RESULT = "pretrained.safetensors"  # the pre-trained weights in the run folder


class Pretrain(Training):
    """Pre-training of the model whose gradients select the coreset."""

    former: ClassVar[Mapping[str, Any]] = {"sparsity": False, "density": 0.9, "rounds": False}
    removed: ClassVar[Mapping[str, Any]] = {"shard_fraction": False, "outer_momentum": 0.0}

    method: str = Field(
        "lipt", description="lipt = models of shards, merged, dense = one model on all samples, initial = no training"
    )
    models: Count = Field(10, description="models to merge (lipt)")
    sparsity: str | None = Field(
        "snip", description="where layer-wise densities come from (lipt): snip, erk, uniform, grasp; false = dense"
    )
    density: Share = Field(0.05, description="share of the weights that each model keeps (lipt)")
    merge: str = Field("masked_mean", description="how the models become one (lipt): masked_mean, mean")
    rounds: Count | None = Field(
        1, description="merges, evenly over the epochs (lipt); 1 = once at the end, false = after every epoch"
    )
    joint_epochs: int = Field(
        0, ge=0, le=MOST_EPOCHS, description="epochs on all samples by all workers after the last merge (lipt)"
    )
    randaugment: bool = Field(True, description="RandAugment(n=1, m=5) as well, on images (lipt)")
    epochs: Epochs = Field(5, description="passes of each model over its shard")
    batch_size: Count = Field(32, description="samples a step, of each model")
    evaluate_every_epochs: int = Field(
        5, ge=0, description="epochs between evaluations on the held-out samples (dense)"
    )
    lr: float = Field(
        0.1, gt=0, description="peak learning rate; models that move far between merges do not merge well"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rounds is not None and self.rounds > self.epochs:
            raise UserError(
                f"pretrain.rounds = {self.rounds}: models are merged after whole epochs, and there are {self.epochs}"
            )
        defaults = (type(self).model_fields["density"].default, self.former["density"])
        if self.sparsity is None and self.density not in defaults:
            raise UserError(
                f"pretrain.density = {self.density:g} would do nothing without masks: give pretrain.sparsity as well"
            )
        return self

    @property
    def merge_epochs(self) -> list[int]:
        """The epochs after which the models are merged.

        >>> Pretrain(epochs=5, rounds=2).merge_epochs
        [2, 5]
        """
        rounds = self.rounds or self.epochs
        return [self.epochs * number // rounds for number in range(1, rounds + 1)]

    @property
    def joint(self) -> Self:
        """Training of the merged model by all workers, in batches as large as those of all models together."""
        epochs, batch_size = self.joint_epochs, self.batch_size * self.models
        return self.model_copy(update={"epochs": epochs, "evaluate_every_epochs": epochs, "batch_size": batch_size})

    def shard_size(self, n: int) -> int:
        """Return the size of each model's shard of n samples."""
        return n // self.models

    def critical_samples(self, n: int) -> int:
        """Return the samples backward of one worker, of n, with as many workers as models; joint epochs included.

        >>> Pretrain(models=10, epochs=5, joint_epochs=1).critical_samples(45_000)
        27000
        """
        together = -(-n // self.models)
        return self.epochs * self.shard_size(n) + self.joint_epochs * together


class LiptTrain(Train):
    """Training of the main model on the coreset; pre-training draws its first weights itself."""

    init: Literal["scratch", "merged"] = Field(
        "scratch", description="first weights: drawn anew (or those of train.from), or the pre-trained model's"
    )

    @model_validator(mode="after")
    def _begun_once(self) -> Self:
        if self.init == "merged" and self.from_ is not None:
            raise UserError(f"train.init = merged begins with the pre-trained model: train.from = {self.from_} cannot")
        return self


class LiptSettings(Experiment):
    """Settings of `effray lipt`."""

    former: ClassVar[Mapping[str, Any]] = {"preset": FORMER}

    preset: PresetName = PUBLISHED
    pretrain: Pretrain = Pretrain()
    select: Reselect = Reselect()
    train: LiptTrain = LiptTrain()

    def lookups(self) -> list[Lookup]:
        """Return the chosen pre-training, merge and sparsity."""
        from raypkg.methods.sparse import initial

        from . import merge, pretraining

        lookups = [Lookup(pretraining, self.pretrain.method), Lookup(merge, self.pretrain.merge)]
        if self.pretrain.sparsity is not None:
            lookups.append(Lookup(initial, self.pretrain.sparsity))
        return lookups

    def check(self, n: int, data: Any) -> None:
        """Refuse rules that act during training only, and selections that never come."""
        from raypkg.coresets.sharded import check_schedule, check_selects_once

        check_selects_once(self.select)
        check_schedule(self.select, self.epochs, given=True)

    def smallest_batch(self, n: int) -> int:
        """Return the size of the smallest batch of either training, on n samples."""
        from raypkg.coresets.budgets import budget_of

        budget = budget_of(self.select.fraction, n)
        return min(self.pretrain.batch_size, self.train.batch_size, budget)
