"""Samples that a selection is for: those it selects from, held-out ones, or the training split of another data set.

A target is seen as the samples to select from are: by the last layer, or, of a language model, by rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.settings import TRAIN, VALID, Select
from raypkg.data import Data, load_data
from raypkg.data.kinds import TEXTS
from raypkg.data.split import Split, aligned
from raypkg.engine.shards import Shard

from .rules import coreset


@dataclass(frozen=True)
class TargetSamples:
    """Samples to select for that are not those to select from; opened on first use, so cheap to send."""

    name: str  # "valid", or of a data set
    options: Mapping[str, Any]  # of the data set
    required: bool  # given by the user; otherwise a class without any is its own target
    own_classes: bool = False  # may have other classes than the samples to select from: subtasks of a language model

    def reached_by(self, shard: Shard) -> Shard:
        """Return the samples that a holder reaches: the held-out ones of its classes, or a whole data set."""
        nothing = shard.indices[:0]
        if self.name == VALID:
            return Shard(Data(shard.train, shard.data.test), shard.valid, nothing, shard.device)
        split = self.split_like(shard.data.train)
        return Shard(Data(split, split), torch.arange(len(split)), nothing, shard.device)

    def split_like(self, train: Split) -> Split:
        """Return the data set with the normalisation of the samples to select from and, if it must, their classes."""
        if train.kind is TEXTS and not self.options.get("tokenizer"):  # it would train one on texts of its own
            raise UserError(f"{self}: its texts must be cut as those of training are: give option tokenizer for both")
        return aligned(self._opened, train, str(self), classes=not self.own_classes)

    def check(self, train: Split, held_out: Tensor | None = None) -> None:
        """Refuse, before any work, samples that are missing or do not suit the training split.

        Without ``held_out``, positions in it, whether any are held out is not checked.
        """
        if self.name != VALID:
            self.split_like(train)
        elif self.required and held_out is not None and not len(held_out):
            raise self.missing()

    def missing(self, label: str | None = None) -> UserError:
        """Return the error that there are no such samples, at all or of a class."""
        if label is None:
            return UserError(f"{self}: no samples are held out, as dataset.validation = 0 says")
        if self.name == VALID:
            return UserError(f"{self}: no sample of class {label!r} is held out, see dataset.validation")
        return UserError(f"{self} has no sample of class {label!r}: add some, or give select.balanced = false")

    def __str__(self) -> str:
        return f"select.target = {self.name}"

    @cached_property
    def _opened(self) -> Split:
        return load_data(self.name, self.options).train


def target_of(settings: Select) -> TargetSamples | None:
    """Return the samples that a selection is for; None = those to select from."""
    chosen = settings.target
    if chosen is None:
        by_default = "valid" in coreset[settings.rule].declares
        return TargetSamples(VALID, {}, required=False) if by_default else None
    if chosen.name == TRAIN:
        return None
    own_classes = coreset[settings.rule].sees == "rows"
    return TargetSamples(chosen.name, chosen.options, required=True, own_classes=own_classes)
