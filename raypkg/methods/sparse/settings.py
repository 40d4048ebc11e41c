"""Settings of sparse training, and their contradictions."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raypkg.core.config import Named, Settings
from raypkg.core.errors import UserError
from raypkg.core.presets import FORMER, PUBLISHED, PresetName
from raypkg.core.registry import Lookup
from raypkg.core.settings import Count, Epochs, Experiment, Schedule, Share, Train, Training
from raypkg.methods.agent.settings import AgentOptions
from raypkg.methods.crest.settings import CrestOptions

from . import drop, growth, initial, redistribution

REGISTRIES = {"sparse_init": initial, "drop": drop, "growth": growth, "redistribution": redistribution}
PRUNED_BY = 0.75  # share of training after which gradual pruning has ended
INTERVALS = 40  # per training, where the interval is not the published one
PUBLISHED_INTERVALS = {"random": 1500, "gradient": 4000}  # ΔT of ITOP for SET and RigL
PUBLISHED_STEPS = 97_750  # 250 epochs of CIFAR-10 in batches of 128


class Initial(Named):
    """Rule of the first masks."""

    name: str = Field(
        "erk", description="first masks: erk, uniform, snip, grasp; dense and no growth = gradual pruning"
    )


class Growth(Named):
    """Rule of the weights to grow."""

    name: str = Field("gradient", description="gradient (RigL), random (SET), momentum; false = the masks stay")


class Drop(Named):
    """Rule of the weights to drop."""

    name: str = Field("magnitude", description="magnitude, set (closest to zero on both sides)")


class Redistribution(Named):
    """Rule of the layers that grow."""

    name: str = Field(description="which layers grow: momentum (default: those that dropped)")


class Sparsity(Settings):
    """Dynamic sparse training (SET, RigL, ITOP)."""

    former: ClassVar[Mapping[str, Any]] = {"density": False, "growth": "random"}
    removed: ClassVar[Mapping[str, Any]] = {"decay": "cosine"}

    density: Share | None = Field(0.05, description="share of the weights that exist; false = all: a dense model")
    growth: Growth | None = Growth()
    drop: Drop = Drop()
    redistribution: Redistribution | None = None
    sparse_init: Initial = Initial()
    fan_in: Literal["dense", "sparse"] = Field(
        "dense", description="sparse = first weights suit the inputs that exist (for networks without batch norm)"
    )
    update_every_steps: Count | None = Field(
        None, description="ΔT: steps between changes of the masks (default: 4000, in short training a share of it)"
    )
    death_rate: float = Field(
        0.5, gt=0, lt=1, description="f0: share of a layer's active weights to drop at the first change"
    )
    compute: Literal["masked", "sparse"] = Field(
        "masked", description="sparse = linear layers multiply only the weights that exist; masked = all of them"
    )

    @model_validator(mode="after")
    def _changes(self) -> Self:
        if self.growth and self.sparse_init.name == "dense":
            first = f"{type(self).model_fields['sparse_init'].alias or 'sparse_init'} = dense"
            raise UserError(f"{first} with growth = {self.growth.name} would stay dense: give growth = false")
        return self

    @property
    def is_gradual(self) -> bool:
        """Whether weights are only dropped, from a dense model to its density: gradual pruning."""
        return self.density is not None and self.growth is None and self.sparse_init.name == "dense"

    def interval(self, steps: int) -> int:
        """Return ΔT, the steps between changes of the masks, for training of ``steps`` steps."""
        return self.update_every_steps or max(1, steps // INTERVALS)

    def published_interval(self, steps: int) -> int:
        """Return ΔT as the published share of ``steps`` steps, at most the published ΔT; a fortieth without growth."""
        if self.growth is None:
            return max(1, steps // INTERVALS)
        published = PUBLISHED_INTERVALS.get(self.growth.name, PUBLISHED_INTERVALS["gradient"])
        return max(1, min(published, published * steps // PUBLISHED_STEPS))

    def check_steps(self, steps: int) -> None:
        """Refuse intervals that training of ``steps`` steps does not reach."""
        every = self.interval(steps)
        chosen = f"{type(self).model_fields['update_every_steps'].alias or 'update_every_steps'} = {every}"
        if self.density is not None and self.growth and every >= steps:
            raise UserError(f"{chosen} is not below the {steps} steps of training: masks would never change")
        # The last weights go at the first change of the masks after pruning has ended: there must be one.
        last_change = -(-math.ceil(PRUNED_BY * steps) // every) * every
        if self.is_gradual and last_change >= steps:
            raise UserError(f"{chosen}: of {steps} steps, none in the last quarter would end gradual pruning")

    def lookups(self) -> list[Lookup]:
        """Return the chosen rules."""
        if self.density is None:
            return []
        rules = [(registry, getattr(self, name)) for name, registry in REGISTRIES.items()]
        return [Lookup(registry, rule.name, rule.options) for registry, rule in rules if rule]

    @property
    def rules_by_momentum(self) -> list[str]:
        """The settings whose rules need the dense gradient of every step, which imports those rules."""
        chosen = ((name, getattr(self, name)) for name in ("growth", "redistribution"))
        return [name for name, rule in chosen if rule and "momentum" in REGISTRIES[name][rule.name].declares]


class SparseTrain(Train):
    """Training of the sparse model."""

    schedule: Schedule = "multistep"


class SparseSettings(Sparsity, Experiment):
    """Settings of `effray sparse`."""

    former: ClassVar[Mapping[str, Any]] = {**Sparsity.former, "preset": FORMER}
    renamed: ClassVar[Mapping[str, str]] = {
        "batches": "crest",
        "correction": "agent",
        "select": "crest",
        "update_every": "update_every_steps",
    }

    preset: PresetName = PUBLISHED
    multiplier: Epochs = Field(1, description="multiplies train.epochs (extended training, ITOP)")
    agent: AgentOptions | None = Field(None, description="correct gradients by a snapshot of the model (AGENT)")
    crest: CrestOptions | None = Field(
        None, description="train on mini-batch coresets (CREST) instead of shuffled batches"
    )
    coreset: str | None = Field(None, description="a coreset.parquet to train on")
    train: SparseTrain = SparseTrain()

    @property
    def epochs(self) -> int:
        """Epochs of the extended training."""
        return self.train.epochs * self.multiplier

    @property
    def extended(self) -> Training:
        """The extended training."""
        return self.train.model_copy(update={"epochs": self.epochs})

    @property
    def hooks_used(self) -> tuple[Named, ...]:
        """The hooks of the combined methods, with their options."""
        sparsity = {name: getattr(self, name) for name in Sparsity.model_fields}
        parts = {"crest": self.crest, "sparse": Sparsity(**sparsity), "agent": self.agent}
        return tuple(Named(name=name, options=part.model_dump()) for name, part in parts.items() if part)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        grows = self.growth is not None
        from_dense = self.sparse_init.name == "dense"
        if self.density is None:
            self._refuse("density = false", *(name for name in Sparsity.model_fields if name != "density"))
        if not grows:
            self._refuse("growth = false", "death_rate", "redistribution")
        if not grows and not from_dense:
            self._refuse("growth = false keeps the masks", "update_every_steps", "drop")
        if from_dense:
            self._refuse("sparse_init = dense begins with all inputs", "fan_in")
        if grows and self.density == 1:
            raise UserError("density = 1 leaves no room to grow: leave --density out, or give less")
        if self.is_gradual and self.train.keep == "best":
            raise UserError("train.keep = best may be denser than where gradual pruning ends: give --train.keep last")
        if self.density is not None and self.train.average is not None:
            raise UserError(f"train.average = {self.train.average}: masks change, so the average would be denser")
        if self.crest and self.coreset is not None:
            raise UserError("crest chooses from all samples: --coreset would do nothing")
        # Weights change their number; AGENT and CREST differentiate others, or twice.
        others = {"train.compile = true": self.train.compile, "agent": self.agent, "crest": self.crest}
        if self.compute == "sparse" and any(others.values()):
            raise UserError(f"compute = sparse does not go with {', '.join(name for name in others if others[name])}")
        return self

    def _refuse(self, reason: str, *names: str) -> None:
        """Refuse settings that are not at their defaults, where they would have no effect."""
        for name in names:
            value = getattr(self, name)
            # In a dense model, no growth is no contradiction; stored ones have the growth that was the default.
            allowed = [type(self).model_fields[name].default]
            if name == "growth":
                allowed += [None, Growth(name=self.former["growth"])]
            if value not in allowed:
                raise UserError(f"{reason}: {name} would do nothing")

    def adaptations(self, n: int) -> dict[str, tuple[Any, str]]:
        """Return ΔT as the published share of the steps, if training is shorter than the published one."""
        if self.density is None or self.growth is None or self.update_every_steps is not None:
            return {}
        steps = self.extended.epochs * self.extended.steps_per_epoch(n)
        published = PUBLISHED_INTERVALS.get(self.growth.name, PUBLISHED_INTERVALS["gradient"])
        interval = self.published_interval(steps)
        return {"update_every_steps": (interval, f"{published}, as there are {steps} steps, not {PUBLISHED_STEPS}")}

    def check(self, n: int, data: Any) -> None:
        """Refuse rules that contradict each other, and intervals that training on n samples does not reach."""
        steps = self.extended.epochs * self.extended.steps_per_epoch(n)
        self.check_steps(steps)
        if self.compute == "sparse":
            for name in self.rules_by_momentum:
                rule = getattr(self, name).name
                raise UserError(f"compute = sparse has no dense gradient at every step, which {name} = {rule} needs")
        if self.agent:
            self.agent.check(n, self.extended)
        if self.crest:
            self.crest.check(n, self.extended, self)
