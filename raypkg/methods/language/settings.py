"""Settings of `effray instruct`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from raypkg.core.config import Settings
from raypkg.core.errors import UserError
from raypkg.core.memory import check_memory
from raypkg.core.presets import PUBLISHED, PresetName, departures
from raypkg.core.settings import Count, Epochs, Experiment, Model, Schedule, Select, Share, Train, Training

POOL = "pool"  # names of the tables of rows
TARGET = "target"
FEWEST_STEPS = 10  # of a warm-up epoch, unless it has fewer samples


class LanguageOptions(Model):
    """The language model to fine-tune."""

    name: str = Field("transformers-lm", description="transformers-lm:NAME of the hub, or transformers-lm:FOLDER")


class FineTuning(Training):
    """Training of adapters as LESS has it."""

    epochs: Epochs = Field(4, description="passes over the samples in use")
    optimizer: Literal["sgd", "adamw"] = Field("adamw", description="update rule")
    lr: float = Field(2e-5, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty (SGD) or decoupled decay (AdamW)")
    schedule: Schedule = "linear"
    warmup: float = Field(0.03, ge=0, lt=1, description="share of training with a linearly increasing rate")


class Warmup(FineTuning):
    """Training of the adapters before their gradients are taken (less)."""

    by: Literal["less", "lipt"] = Field(
        "less", description="less = one model, a checkpoint per epoch; lipt = ours: models of shards, merged once"
    )
    fraction: Share = Field(0.05, description="share of the pool, drawn at random")
    models: Count = Field(4, description="models on disjoint shards of that share (lipt)")
    evaluate_every_epochs: int = Field(0, ge=0, description="epochs between evaluations on the held-out samples")


class RowsOptions(Settings):
    """Rows of the samples, by which the rule selects."""

    of: Literal["gradients", "states"] | None = Field(
        None, description="gradients of the adapters or last hidden states (default: the rule's, less: gradients)"
    )
    width: Annotated[int, Field(ge=1, le=1 << 24)] = Field(8192, description="d, numbers of a projected gradient")
    batch_size: Count = Field(32, description="samples passed through the model together")
    per_part: Count = Field(256, description="rows that a resumed run may have to recompute")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="precision of the passes")


class InstructSelect(Select):
    """Selection of the instructions."""

    rule: str = Field("less", description="less, rds_plus, random, or package.module:function on Rows")
    fraction: Share = Field(0.05, description="share of the pool to keep")


class InstructTrain(FineTuning, Train):
    """Fine-tuning on the chosen instructions."""


class InstructSettings(Experiment):
    """Settings of `effray instruct`."""

    plain = True

    preset: PresetName = PUBLISHED
    model: LanguageOptions = LanguageOptions()
    warmup: Warmup = Warmup()
    rows: RowsOptions = RowsOptions()
    select: InstructSelect = InstructSelect()
    train: InstructTrain = InstructTrain()

    @property
    def sees_rows(self) -> bool:
        """Whether the rule selects by rows, which a baseline such as random does not."""
        from raypkg.coresets.rules import coreset

        return coreset[self.select.rule].sees == "rows"

    @property
    def by_gradients(self) -> bool:
        """Whether the rows are gradients, which need a warm-up."""
        of = self.rows.of or ("gradients" if self.select.rule == "less" else "states")
        return self.sees_rows and of == "gradients"

    def warmup_size(self, n: int) -> int:
        """Return the number of warm-up samples, of n."""
        return max(1, round(self.warmup.fraction * n))

    def smallest_batch(self, n: int) -> int:
        """Return the size of the smallest batch of either training, on n samples."""
        from raypkg.coresets.budgets import budget_of

        warmup, sizes = self.warmup, [self.train.batch_size, budget_of(self.select.fraction, n)]
        if self.by_gradients:
            sizes.append(warmup.models if warmup.by == "lipt" else min(warmup.batch_size, self.warmup_size(n)))
        return min(sizes)

    def adaptations(self, n: int) -> dict[str, tuple[Any, str]]:
        """Return smaller batches for a warm-up that would otherwise have few steps."""
        size, published = self.warmup_size(n), self.warmup.batch_size
        fitting = max(1, size // FEWEST_STEPS)
        is_default = published == type(self.warmup).model_fields["batch_size"].default
        if not (self.by_gradients and is_default and fitting < published):
            return {}
        return {"warmup.batch_size": (fitting, f"{published}, as {size} samples are few for it")}

    def check(self, n: int, data: Any) -> None:
        """Refuse, before any work, samples that are no instructions, no target, and settings without effect."""
        from raypkg.coresets.sharded import check_selects_once
        from raypkg.data.kinds import TEXTS

        select, warmup = self.select, self.warmup
        check_selects_once(select, has_rows=True)
        if data.train.kind is not TEXTS:
            raise UserError(f"dataset = {self.dataset.name}: instruct fine-tunes on texts, instructions:PATH")
        if self.sees_rows and select.target is None:
            raise UserError(f"select.rule = {select.rule} needs a target: give --select.target instructions:PATH")
        ours, theirs = (each.options.get("tokenizer") for each in (self.dataset, select.target or self.dataset))
        if select.target is not None and select.target.is_data_set and ours != theirs:
            raise UserError(f"select.target is cut into the tokens of {theirs}, the data set into those of {ours}")
        idle = () if self.by_gradients else ("warmup.", "rows.width")
        for name, value in departures(self).items():
            if name.startswith(idle):
                raise UserError(f"{name} = {value} would do nothing: select.rule = {select.rule} takes no gradients")
        if not self.by_gradients:
            return
        if self.model.options.get("rank") == 0:
            raise UserError("model.options.rank = 0: LESS takes gradients of adapters, give a rank of 1 or more")
        if warmup.by == "lipt" and warmup.models > (size := self.warmup_size(n)):
            raise UserError(f"warmup.models = {warmup.models}: more than the {size} warm-up samples")
        needed = 4 * self.rows.width * (2 * self.rows.batch_size + self.rows.per_part)
        check_memory(f"rows.width = {self.rows.width:,}", needed, "give a smaller one")
