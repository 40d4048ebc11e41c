"""Settings shared by experiments: a class per part, a field per option, with its help text."""

from collections.abc import Mapping
from math import ceil
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from .config import Named, Settings
from .errors import UserError
from .registry import Lookup

Share = Annotated[float, Field(gt=0, le=1)]
Schedule = Annotated[
    Literal["cosine", "linear", "multistep", "constant"], Field(description="shape of the learning rate over training")
]
Scale = Annotated[
    Literal["standard", "unit", "none"],
    Field(description="numbers of a sample: standardised, in [0, 1], or as they are; texts have none"),
]
Precision = Literal["auto", "float32", "bfloat16", "float64"]
Count = Annotated[int, Field(ge=1)]
MOST_EPOCHS = 1_000_000  # each is a row of metrics, in memory and in every checkpoint
Epochs = Annotated[int, Field(ge=1, le=MOST_EPOCHS)]
Threads = Annotated[int, Field(ge=1, le=1024)]  # OpenMP crashes at 100,000
RulePreset = Annotated[Literal["published"] | None, Field(description="the rule as published; other options win")]
TRAIN = "train"  # target of a selection: the training samples
VALID = "valid"  # target of a selection: the held-out samples
WINDOW = 64  # blocks
APART = ("cluster", "track")  # parts without influence on a run's result


def whole_steps(epochs: float, per_epoch: int) -> int:
    """Return the steps of so many epochs, which may end within one: rounded up, except for errors of floats.

    >>> whole_steps(2.4, 10), whole_steps(2.41, 10), whole_steps(3 * 0.1, 10)
    (24, 25, 3)
    """
    return ceil(round(epochs * per_epoch, 6))


class Dataset(Named):
    """The training data."""

    name: str = Field(
        "digits",
        description="digits, cifar10, parquet:PATH, text:PATH, table:PATH, instructions:PATH or module:function",
    )
    validation: float = Field(0.1, ge=0, lt=1, description="share of the training set held out, by seed")
    augment: tuple[str, ...] | None = Field(
        None, description="crop, crop:2:reflect, flip, altflip, randaugment or module:function (default: the data's)"
    )
    only: str | None = Field(None, description="a coreset.parquet: train on its samples only, unweighted")
    noise: float = Field(0.0, ge=0, lt=1, description="share of the training labels that become another class")
    imbalance: Share = Field(1.0, description="long tail: class sizes fall geometrically to this share of the largest")
    scale: Scale = "standard"
    repeat: int = Field(1, ge=1, le=1000, description="copies of each training sample")
    seed: int | None = Field(None, ge=0, description="of the draws of noise and imbalance (default: the run's)")
    streamed: str | None = Field(None, min_length=1, description="folder or URI of stores that are read by blocks")
    window: int = Field(WINDOW, ge=1, description="blocks of 8 MiB of a streamed set that batches are drawn from")
    digest: str | None = Field(None, description="checksum of the samples, stored by a run; other samples are refused")

    @property
    def is_drawn(self) -> bool:
        """Whether training samples or labels are drawn by a seed."""
        return self.noise > 0 or self.imbalance < 1

    def refuse_streamed(self, reader: str) -> None:
        """Refuse streamed samples for a reader that needs any sample at any time."""
        if self.streamed is not None:
            raise UserError(f"dataset.streamed: {reader} draws from all samples at any time: omit it")

    @model_validator(mode="after")
    def _check_unused(self) -> Self:
        if self.seed is not None and not self.is_drawn:
            raise UserError(f"dataset.seed = {self.seed}: there is no dataset.noise or dataset.imbalance to draw")
        if self.streamed is None and self.window != WINDOW:
            raise UserError(f"dataset.window = {self.window}: it has no effect without dataset.streamed")
        return self

    def _leave_out(self, values: dict[str, Any]) -> None:
        """Leave out defaults of settings that earlier versions did not have: digests of settings stay the same."""
        later = ("noise", "imbalance", "repeat", "seed", "streamed", "window", "scale")
        own, common = type(self).model_fields, Dataset.model_fields
        for name in later:
            # Readers of any run know only the common defaults, so where a subclass has its own, the value is stored.
            if own[name].default == common[name].default == values.get(name):
                values.pop(name, None)


class Model(Named):
    """The model to train."""

    name: str = Field(
        "resnet8",
        description="resnet20, transformer, torchvision:NAME, transformers:NAME, transformers-lm:NAME (LoRA: --set"
        " model.options.rank=8) or package.module:function",
    )


class Training(Settings):
    """One training run: length, batches, optimiser and schedule."""

    renamed: ClassVar[Mapping[str, str]] = {"drop": "lr_drop", "evaluate_every": "evaluate_every_epochs"}

    epochs: Epochs = Field(40, description="passes over the samples in use")
    batch_size: Count = Field(128, description="samples a step, over all workers")
    micro_batch: Count | None = Field(None, description="samples in one pass of a worker's model (default: the step's)")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="update rule")
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD; beta1 of AdamW")
    nesterov: bool = Field(True, description="Nesterov's form of momentum (SGD)")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty (SGD) or decoupled decay (AdamW)")
    decay: Literal["all", "matrices"] = Field("all", description="decayed parameters; matrices = no norms, no biases")
    clip: float | None = Field(None, gt=0, description="gradient clipping norm (default: off)")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    schedule: Schedule = "cosine"
    warmup: float = Field(0.0, ge=0, lt=1, description="share of training with a linearly increasing rate")
    milestones: tuple[Share, ...] = Field((0.5, 0.75), description="shares of training where multistep drops the rate")
    lr_drop: float = Field(0.1, gt=0, le=1, description="factor of the rate at each milestone")
    precision: Precision = Field("auto", description="of matrix products; auto = bfloat16 if the processor supports it")
    evaluate_every_epochs: int = Field(5, ge=0, description="epochs between evaluations on held-out samples; 0 = none")
    compile: bool = Field(False, description="compile the model: takes a minute or more, gains little on a CPU")
    checkpointing: bool = Field(False, description="recompute each block's activations backward: less memory, slower")
    tf32: bool = Field(False, description="float32 products of a GPU in TensorFloat-32 (precision float32)")
    deterministic: bool = Field(False, description="only operations that give the same bits in every run, also on GPUs")

    @model_validator(mode="after")
    def _check_arithmetic(self) -> Self:
        if self.checkpointing and self.compile:
            raise UserError("checkpointing does not go with compile: the compiler itself chooses what to recompute")
        if self.tf32 and self.precision != "float32":
            raise UserError(f"tf32 = true does nothing with precision = {self.precision}: it is for float32")
        return self

    def steps_per_epoch(self, n: int) -> int:
        """Return the steps of an epoch on n samples.

        >>> Training(batch_size=128).steps_per_epoch(1000)
        8
        """
        return -(-n // self.batch_size)

    @property
    def at_once(self) -> int:
        """Largest number of samples in one pass through the model on a worker."""
        return min(self.batch_size, self.micro_batch or self.batch_size)


class Train(Training):
    """Training of the main model."""

    from_: str | None = Field(None, alias="from", description="initial weights: a finished run or FILE.safetensors")
    keep: Literal["last", "best"] = Field("last", description="model that is kept; best = of the best held-out figure")
    best_by: Literal["accuracy", "valid_loss", "metric"] | None = Field(
        None, description="figure of keep = best (default: accuracy; language models: valid_loss)"
    )
    patience: Count | None = Field(None, description="evaluations without a better one that end training (keep = best)")
    loss: str | None = Field(
        None, description="module:function(logits [b, C], labels [b]) -> losses [b] to train (default: cross-entropy)"
    )
    metric: str | None = Field(
        None, description="module:function(logits [n, C], labels [n]) -> further figure of evaluations, higher = better"
    )
    average: float | None = Field(None, gt=0, lt=1, description="decay per step of averaged weights, which are kept")
    evaluate_views: Literal["plain", "mirrored", "shifted"] = Field(
        "plain",
        description="images that evaluation averages over: mirrored = and mirrored; shifted = and moved by a pixel",
    )
    sync_bn: bool = Field(False, description="batch statistics over all workers (GPU only)")

    @model_validator(mode="after")
    def _check_unused(self) -> Self:
        for name in ("best_by", "patience"):
            if self.keep == "last" and getattr(self, name) is not None:
                raise UserError(f"train.{name} = {getattr(self, name)} does nothing without train.keep = best")
        if self.best_by == "metric" and self.metric is None:
            raise UserError("train.best_by = metric: there is no train.metric")
        if self.loss is not None and self.label_smoothing:
            raise UserError(f"train.label_smoothing = {self.label_smoothing:g} does nothing with a train.loss")
        if self.sync_bn and self.micro_batch is not None:
            reason = "workers may have unequal numbers of parts"
            raise UserError(f"train.sync_bn = true excludes train.micro_batch: {reason}")
        return self


class Target(Named):
    """Samples that a selection is for."""

    name: str = Field(description="train, valid (held out) or a data set: table:few.csv (default of glister: valid)")

    @property
    def is_data_set(self) -> bool:
        """Whether it is another data set than the run's."""
        return self.name not in (TRAIN, VALID)


class Select(Settings):
    """Selection of the coreset."""

    renamed: ClassVar[Mapping[str, str]] = {"method": "rule"}

    rule: str = Field("gradmatch", description="see `effray methods`, or package.module:function")
    fraction: Share = Field(0.1, description="share of the training samples to keep")
    balanced: bool = Field(True, description="class by class, in proportion to the classes")
    weighted: bool = Field(False, description="train with the rule's sample weights")
    memory: float | None = Field(None, ge=0, description="GiB of distances that craig caches (default: 1/4 of all)")
    target: Target | None = None
    options: dict[str, Any] = Field(default_factory=dict, description="the rule's own options")


class Reselect(Select):
    """Selection of the coreset, once or repeatedly during training."""

    renamed: ClassVar[Mapping[str, str]] = {**Select.renamed, "every": "every_epochs", "warm": "warm_epochs"}

    every_epochs: int = Field(0, ge=0, description="epochs between selections by the trained model; 0 = select once")
    warm_epochs: int = Field(0, ge=0, description="first epochs on all samples")

    def due(self, epoch: int) -> bool:
        """Return True if an epoch, counted from 0, begins with a selection.

        >>> [epoch for epoch in range(10) if Reselect(warm_epochs=2, every_epochs=3).due(epoch)]
        [2, 5, 8]
        """
        age = epoch - self.warm_epochs
        if age <= 0 or not self.every_epochs:
            return age == 0
        return age % self.every_epochs == 0


class Cluster(Settings):
    """Workers and their resources."""

    workers: int | None = Field(
        None, ge=0, description="Ray workers; 0 = this process, without Ray (default: up to 8; 0 for a small plan)"
    )
    cpus_per_worker: Threads | None = Field(None, description="CPUs of each worker (default: 1, or a GPU's share)")
    gpus_per_worker: float | None = Field(None, ge=0, description="GPUs of each worker (default: 1 if there are any)")
    max_failures: int = Field(3, ge=0, description="restarts of the workers after one is lost")
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp", description="ddp = a copy of the model on each worker; fsdp = shared (FSDP2, models of transformers)"
    )
    address: str | None = Field(None, description="of a running Ray cluster (default: found or started)")

    @property
    def cpus_without_gpu(self) -> int:
        """CPUs of a worker without a GPU."""
        return self.cpus_per_worker or 1


class Track(Settings):
    """Tracking of metrics in addition to the run folder."""

    removed: ClassVar[Mapping[str, Any]] = {"name": "mlflow"}

    name: Literal["wandb", "tensorboard"] | None = Field(None, description="wandb, offline without key; tensorboard")
    project: str = Field("effray", min_length=1, description="W&B project")
    profile: bool = Field(False, description="trace steps of the second epoch: trace.json.gz, for ui.perfetto.dev")


class RunSettings(Settings):
    """Settings of every experiment."""

    argument: ClassVar[str] = ""  # the setting that its command takes as an argument
    plain: ClassVar[bool] = False  # whether it trains by the loop alone: as train.loss and cluster.strategy = fsdp need
    apart: ClassVar[tuple[str, ...]] = ("dataset.digest",)  # settings not taken from the run in ``model_from``

    seed: int = Field(0, ge=0, description="of all randomness")
    dataset: Dataset = Dataset()
    cluster: Cluster = Cluster()
    track: Track = Track()

    @model_validator(mode="after")
    def _check_training(self) -> Self:
        """Refuse a trace without its epoch, and shared parameters without effect or that would never meet."""
        cluster, epochs = self.cluster, getattr(self, "epochs", 0)
        if self.track.profile and epochs < 2:
            raise UserError(f"track.profile traces the second epoch of training: there are {epochs} epochs")
        if cluster.strategy == "ddp":
            return self
        train, model = getattr(self, "train", None), getattr(self, "model", Model()).name
        problem = ""
        if not self.plain:
            problem = "is for effray train and instruct"
        elif model.partition(":")[0] not in ("transformers", "transformers-lm"):
            problem = f"is for models of transformers, not {model}"
        elif cluster.workers in (0, 1):
            problem = f"does nothing with cluster.workers = {cluster.workers}"
        elif idle := next((name for name in ("micro_batch", "compile", "average") if getattr(train, name)), None):
            problem = f"does not go with train.{idle}"
        if problem:
            raise UserError(f"cluster.strategy = fsdp {problem}")
        return self

    def lookups(self) -> list[Lookup]:
        """Return the names in a method's own settings that stand for entries of registries."""
        return []


class Experiment(RunSettings):
    """Settings of every experiment that trains; each adds its own ``train``."""

    model: Model = Model()
    hooks: tuple[Named, ...] = Field((), description="additional hooks, such as my_code:Ema; see `effray methods`")
    adapted: tuple[str, ...] = Field((), description="settings that were adapted to the data, stored by a run")

    @property
    def epochs(self) -> int:
        """Epochs of the main training."""
        epochs: int = self.train.epochs  # type: ignore[attr-defined]  # declared by each experiment
        return epochs

    @model_validator(mode="after")
    def _check_train(self) -> Self:
        """Refuse to keep the best epoch if none is evaluated, and another loss where a method needs cross-entropy."""
        train, select = getattr(self, "train", None), getattr(self, "select", None)
        if not isinstance(train, Train):
            return self
        every = train.evaluate_every_epochs
        if train.keep == "best" and not self.dataset.validation:
            raise UserError("train.keep = best is by held-out samples: dataset.validation = 0 holds out none")
        if train.keep == "best" and not 0 < every <= self.epochs:
            setting = f"train.evaluate_every_epochs = {every}"
            raise UserError(f"train.keep = best: {setting} of {self.epochs} epochs evaluates none")
        readers = [named.name for named in self.hooks if ":" not in named.name]
        if select and select.rule != "random":
            readers.append(select.rule)
        if not self.plain:
            readers.append("the method")
        if train.loss is not None and readers:
            raise UserError(f"train.loss = {train.loss}: {readers[0]} goes by the cross-entropy")
        return self

    def adaptations(self, n: int) -> dict[str, tuple[Any, str]]:
        """Return the settings that the published method leaves to n training samples: value, and what it replaces."""
        return {}

    def _leave_out(self, values: dict[str, Any]) -> None:
        super()._leave_out(values)
        if not self.adapted:
            values.pop("adapted", None)

    def check(self, n: int, data: Any) -> None:
        """Refuse, before any work, what n training samples of the data do not allow, and settings without effect."""
