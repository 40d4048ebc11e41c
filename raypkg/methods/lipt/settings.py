"""Settings of LiPT."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raypkg.core.errors import UserError
from raypkg.core.registry import Lookup
from raypkg.core.settings import Count, Epochs, Experiment, Reselect, Share, Train, Training


class Pretrain(Training):
    """Pre-training of the model whose gradients select the coreset."""

    method: Annotated[
        str, Field(description="lipt = merged sparse models, dense = one model on all samples, initial = no training")
    ] = "lipt"
    models: Annotated[Count, Field(description="sparse models to merge (lipt)")] = 10
    shard_fraction: Annotated[
        Share | None, Field(description="share of the samples in each model's shard (lipt); 1/models when left out")
    ] = None
    sparsity: Annotated[
        str | None,
        Field(description="where layer-wise densities come from (lipt): snip, erk, uniform, grasp; false = dense"),
    ] = "snip"
    density: Annotated[Share, Field(description="share of the weights that each model keeps (lipt)")] = 0.9
    merge: Annotated[str, Field(description="how the models become one (lipt): masked_mean, mean, greedy")] = (
        "masked_mean"
    )
    randaugment: Annotated[bool, Field(description="RandAugment(n=1, m=5) as well, on images (lipt)")] = True
    epochs: Annotated[Epochs, Field(description="passes of each model over its shard")] = 5
    batch_size: Annotated[Count, Field(description="samples a step")] = 128
    evaluate_every_epochs: Annotated[
        int, Field(ge=0, description="epochs between evaluations on the held-out samples (dense)")
    ] = 5
    lr: Annotated[float, Field(gt=0, description="peak learning rate; models that move far do not merge well")] = 0.02

    def shard_size(self, n: int) -> int:
        """Return how many of n samples each model's shard has.

        Raises:
            UserError: the shards would overlap.
        """
        most = 1 / self.models
        fraction = self.shard_fraction or most
        if fraction > most + 1e-9:
            raise UserError(
                f"pretrain.shard_fraction = {fraction} for {self.models} disjoint shards: at most"
                f" 1/{self.models} = {most:.4g}"
            )
        return int(n * fraction + 1e-9)


class LiptTrain(Train):
    """Training of the main model on the coreset; pre-training draws its first weights itself."""

    init: Annotated[
        Literal["scratch", "merged"],
        Field(description="first weights: drawn anew (or those of train.from), or the pre-trained model's"),
    ] = "scratch"

    @model_validator(mode="after")
    def _begun_once(self) -> Self:
        if self.init == "merged" and self.from_ is not None:
            raise UserError(f"train.init = merged begins with the pre-trained model: train.from = {self.from_} cannot")
        return self


class LiptSettings(Experiment):
    """Settings of `effray lipt`."""

    pretrain: Pretrain = Pretrain()
    select: Reselect = Reselect()
    train: LiptTrain = LiptTrain()

    def lookups(self) -> list[Lookup]:
        """Return what pre-training chooses by its name."""
        from raypkg.methods.sparse.rules import initial

        from .merges import merge
        from .pretrain import pretraining

        lookups = [Lookup(pretraining, self.pretrain.method), Lookup(merge, self.pretrain.merge)]
        if self.pretrain.sparsity is not None:
            lookups.append(Lookup(initial, self.pretrain.sparsity))
        return lookups

    def check(self, n: int) -> None:
        """Refuse methods that act during training only, and selections that never come.

        Raises:
            UserError: what is wrong.
        """
        from raypkg.coresets.reselection import check_schedule, check_selects_once

        check_selects_once(self.select)
        check_schedule(self.select, self.epochs, given=True)

    def smallest_batch(self, n: int) -> int:
        """Return the size of the smallest batch of either training, on n samples."""
        from raypkg.coresets.budgets import budget_of

        budget = budget_of(self.select.fraction, n)
        return min(self.pretrain.batch_size, self.train.batch_size, budget)
