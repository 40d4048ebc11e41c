"""The parts that experiments are set from; one class per part, one field per option, `--help` text beside it."""

from typing import Annotated, Any, Literal

from pydantic import Field

from .config import Named, Settings

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
APART = ("cluster", "track")  # parts that say where a run happens and who hears of it, and do not alter its result


class Dataset(Named):
    """What to train on."""

    name: Annotated[str, Field(description="digits, cifar10, parquet:PATH, folder:PATH or package.module:function")] = (
        "digits"
    )
    validation: Annotated[float, Field(ge=0, lt=1, description="share of the training set held out, by seed")] = 0.1
    augment: Annotated[
        tuple[str, ...] | None, Field(description="crop, flip, randaugment; the data set's own when left out")
    ] = None
    only: Annotated[
        str | None, Field(description="a coreset.parquet: train on its samples alone, without their weights")
    ] = None


class Model(Named):
    """What to train."""

    name: Annotated[str, Field(description="resnet20, wrn-16-8, torchvision:NAME or package.module:function")] = (
        "resnet8"
    )


class Training(Settings):
    """One training run: length, batches, optimiser and schedule."""

    epochs: Annotated[Count, Field(description="passes over the samples in use")] = 40
    batch_size: Annotated[Count, Field(description="samples a step, over all workers")] = 128
    optimizer: Annotated[Literal["sgd", "adamw"], Field(description="update rule")] = "sgd"
    lr: Annotated[float, Field(gt=0, description="peak learning rate")] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1, description="of SGD; beta1 of AdamW")] = 0.9
    nesterov: Annotated[bool, Field(description="Nesterov's form of momentum (SGD)")] = True
    weight_decay: Annotated[float, Field(ge=0, description="L2 penalty (SGD) or decoupled decay (AdamW)")] = 5e-4
    schedule: Annotated[
        Literal["cosine", "multistep", "constant"], Field(description="shape of the learning rate over training")
    ] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1, description="share of training with a linearly rising rate")] = 0.0
    milestones: Annotated[
        tuple[Share, ...], Field(description="shares of training at which multistep drops the rate")
    ] = (0.5, 0.75)
    drop: Annotated[float, Field(gt=0, le=1, description="factor of the rate at each milestone")] = 0.1
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float64"],
        Field(description="of matrix products; auto = bfloat16 where the processor computes in it"),
    ] = "auto"
    evaluate_every: Annotated[
        int, Field(ge=0, description="epochs between looks at the held-out samples; 0 = none")
    ] = 5
    compile: Annotated[bool, Field(description="compile the model (minutes at first, faster steps)")] = False


class Train(Training):
    """Training of the main model."""

    sync_bn: Annotated[bool, Field(description="batch statistics over all workers (GPU only)")] = False


class Pretrain(Training):
    """Pre-training of the model whose gradients select the coreset."""

    method: Annotated[
        Literal["lipt", "dense", "none"],
        Field(description="lipt = merged sparse models, dense = one model on all samples, none = initial weights"),
    ] = "lipt"
    models: Annotated[Count, Field(description="sparse models to merge (lipt)")] = 10
    shard_fraction: Annotated[
        Share | None, Field(description="share of the samples in each model's shard (lipt); 1/models when left out")
    ] = None
    sparsity: Annotated[
        Literal["snip", "erk", "none"], Field(description="where the layer-wise densities come from (lipt)")
    ] = "snip"
    density: Annotated[Share, Field(description="share of the weights that each model keeps (lipt)")] = 0.9
    merge: Annotated[
        Literal["masked_mean", "mean", "greedy"], Field(description="how the models become one (lipt)")
    ] = "masked_mean"
    randaugment: Annotated[bool, Field(description="RandAugment(n=1, m=5) as well, on images (lipt)")] = True
    epochs: Annotated[Count, Field(description="passes of each model over its shard")] = 5
    batch_size: Annotated[Count, Field(description="samples a step")] = 128
    evaluate_every: Annotated[int, Field(ge=0, description="epochs between looks at the held-out samples (dense)")] = 5
    lr: Annotated[float, Field(gt=0, description="peak learning rate; models that move far do not merge well")] = 0.02


class Select(Settings):
    """Selection of the coreset."""

    method: Annotated[str, Field(description="see `effray methods`, or package.module:function")] = "gradmatch"
    fraction: Annotated[Share, Field(description="share of the training samples to keep")] = 0.1
    balanced: Annotated[bool, Field(description="class by class, in proportion to the classes")] = True
    weighted: Annotated[bool, Field(description="train with the method's sample weights")] = False
    memory: Annotated[
        float | None, Field(ge=0, description="GiB a worker may use to save time; a quarter of its own when left out")
    ] = None
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own options")


class Reselect(Select):
    """Selection that may be repeated during training."""

    every: Annotated[
        int, Field(ge=0, description="epochs between selections during training, by its model; 0 = select once")
    ] = 0
    warm: Annotated[int, Field(ge=0, description="first epochs, on all samples")] = 0

    def due(self, epoch: int) -> bool:
        """Say whether an epoch, counted from 0, begins with a selection.

        >>> [epoch for epoch in range(10) if Reselect(warm=2, every=3).due(epoch)]
        [2, 5, 8]
        """
        age = epoch - self.warm
        return age == 0 or (age > 0 and self.every > 0 and age % self.every == 0)


class CrestSelect(Settings):
    """Mini-batch coresets, and how long they are trusted (CREST)."""

    tau: Annotated[float, Field(gt=0, description="τ: error of the local model at which it has expired")] = 0.05
    h: Annotated[float, Field(gt=0, description="steps between checks, over ‖H̄_0‖/‖H̄_t‖")] = 1.0
    b: Annotated[Count, Field(description="mini-batch coresets of a pool, over the steps between checks")] = 5
    subset: Annotated[
        Share | None,
        Field(description="r/n: share of the samples in a random subset; 0.01, or two batches, when left out"),
    ] = None
    drop_every: Annotated[Count, Field(description="T2: steps between looks for learned samples")] = 20
    alpha: Annotated[float, Field(ge=0, description="α: losses up to which a sample is learned; 0 = drop none")] = 0.1
    order: Annotated[int, Field(ge=1, le=2, description="of the local model: 2 = with curvature, 1 = without")] = 2
    smoothing: Annotated[bool, Field(description="smooth gradient and curvature over updates")] = True
    model_batches: Annotated[
        int, Field(ge=0, description="mini-batch coresets that the local model is made from; 0 = the whole pool")
    ] = 1
    curvature: Annotated[
        int, Field(ge=0, description="samples of those whose curvature is looked at, the dearest part; 0 = all")
    ] = 32
    parameters: Annotated[
        Literal["all", "head"], Field(description="what the local model looks at; head = last layer, for large nets")
    ] = "all"
    overlap: Annotated[
        bool, Field(description="select while training goes on, by the weights of one check before, on another core")
    ] = False
    actors: Annotated[
        int, Field(ge=0, description="Ray actors of one CPU each that select; 0 = the training workers do")
    ] = 0
    memory: Annotated[
        float | None, Field(ge=0, description="GiB a worker may use to save time; a quarter of its own when left out")
    ] = None


class Initial(Named):
    """Which weights exist at first."""

    name: Annotated[
        str, Field(description="first masks: erk, uniform, snip, grasp; dense and no growth = gradual pruning")
    ] = "erk"


class Growth(Named):
    """Which weights come."""

    name: Annotated[str, Field(description="random (SET), gradient (RigL), momentum; none = the masks stay")] = "random"


class Drop(Named):
    """Which weights go."""

    name: Annotated[str, Field(description="magnitude, set (closest to zero on both sides), threshold")] = "magnitude"


class Redistribution(Named):
    """Which layers grow."""

    name: Annotated[
        str,
        Field(description="where weights come: magnitude, nonzeros, momentum; none = where they went"),
    ] = "none"


class Sparsity(Settings):
    """Dynamic sparse training (SET, RigL, ITOP)."""

    density: Annotated[Share | None, Field(description="share of the weights that exist; dense when left out")] = None
    growth: Growth = Growth()
    drop: Drop = Drop()
    redistribution: Redistribution = Redistribution()
    sparse_init: Initial = Initial()
    fan_in: Annotated[
        Literal["dense", "sparse"],
        Field(description="sparse = first weights suit the inputs that exist: without batch norm, at few per cent"),
    ] = "dense"
    update_every: Annotated[
        Count | None, Field(description="ΔT: steps between changes of the masks; a fortieth of training when left out")
    ] = None
    death_rate: Annotated[
        float, Field(gt=0, lt=1, description="f0: share of a layer's active weights to drop, at first")
    ] = 0.5
    decay: Annotated[Literal["cosine", "linear"], Field(description="how that share falls to 0")] = "cosine"


class Agent(Settings):
    """Adaptive gradient correction."""

    gamma: Annotated[float, Field(gt=0, le=1, description="γ: damps the correction")] = 0.1
    alpha: Annotated[float, Field(ge=0, le=1, description="α: how fast c follows its estimate")] = 0.3
    samples: Annotated[
        Count | None, Field(description="samples of the full gradient, drawn anew each time; all when left out")
    ] = None
    every: Annotated[Count, Field(description="correct one step in so many; 1 = all, as published")] = 1
    snapshot: Annotated[int, Field(ge=0, description="steps between snapshots; 0 = an epoch, as published")] = 0
    memory: Annotated[
        float | None,
        Field(ge=0, description="GiB a worker may use to compute less, with the same result; a quarter of its own"),
    ] = None


class Cluster(Settings):
    """Where it runs."""

    workers: Annotated[
        int | None,
        Field(ge=0, description="Ray workers; 0 = this process, on its CPU, without Ray; left out = up to 8"),
    ] = None
    cpus_per_worker: Annotated[Count, Field(description="threads of each worker")] = 1
    gpus_per_worker: Annotated[
        float | None, Field(ge=0, description="GPUs of each worker; left out = 1 where the cluster has any")
    ] = None
    max_failures: Annotated[int, Field(ge=0, description="how often a phase restarts after a lost worker")] = 3
    address: Annotated[str | None, Field(description="of a running Ray cluster; left out = found or started")] = None


class Track(Settings):
    """Where metrics go besides the run folder."""

    name: Annotated[Literal["none", "wandb"], Field(description="wandb logs offline when there is no key")] = "none"
    project: Annotated[str, Field(description="W&B project")] = "effray"


class Source(Settings):
    """What every experiment has."""

    seed: Annotated[int, Field(ge=0, description="all randomness follows from it")] = 0
    dataset: Dataset = Dataset()
    cluster: Cluster = Cluster()
    track: Track = Track()


class Experiment(Source):
    """What every experiment that trains has, ``train`` besides: each its own."""

    model: Model = Model()

    @property
    def epochs(self) -> int:
        """Epochs that the main training runs for."""
        epochs: int = self.train.epochs  # type: ignore[attr-defined]  # declared where the experiment is
        return epochs

    @property
    def actors(self) -> int:
        """Ray actors of one CPU each that a run starts beside its workers."""
        return 0

    def check(self, n: int) -> None:
        """Refuse, before any work, what n training samples do not allow, and settings that would do nothing.

        Raises:
            UserError: what is wrong.
        """
