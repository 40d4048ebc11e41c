"""CREST in a loop of one's own: a loader that chooses mini-batch coresets by itself (arXiv:2306.01244)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from raypkg.core.config import load_settings
from raypkg.core.errors import UserError, as_arguments
from raypkg.core.presets import PUBLISHED, with_preset
from raypkg.core.seeds import derive, generator
from raypkg.coresets.batches import (
    LABELS,
    TappedByForm,
    Worker,
    as_dataset,
    check_count,
    check_state,
    in_form_of,
    load_batches,
    on_device,
    ranks_here,
    some_labels,
)
from raypkg.coresets.per_sample import sample_losses
from raypkg.models.language import LanguageModel

from .algorithm import CrestAlgorithm, Loop
from .colm import Colm, check_kind
from .selection import Subset
from .settings import CrestOptions, CrestSettings


class CrestLoader:
    """Yields (x, y, w), mini-batch coresets of m = ``batch_size`` samples, chosen by the model as training needs them.

    Minimise mean(w · loss). Each pass is an epoch of ⌈n / m⌉ batches. When the next batch is requested, the loader
    checks its local model of the loss, chooses a new pool and fits the model to it, as they are due: ``CrestAlgorithm``
    has the formulas. All of that uses the model in evaluation mode, with the weights of the moment, in this process; it
    sees the samples as the data set returns them, random augmentation included.

    With ``preset="colm"`` it chooses for a language model, ``build_model("transformers-lm:NAME", …)``: x is int64
    [b, 2, l] of tokens and segments, y the source of each sample, w is 1, and ``model(x).losses`` are the losses. Or
    for a causal model of transformers: samples are mappings with "input_ids" and "labels" of tokens, all of one source,
    and the losses are ``raypkg.language.sample_losses(model, batch)``.

    Args:
        dataset: returns pairs (x, y) by index, y an integer, and has a length; or tensors (x, y). Samples may also be
            mappings with "labels" (or "label"), as in Hugging Face's data sets: a batch is then a mapping with
            "labels", "weights" and "indices", and the model takes the others by keywords.
        model: ends in an ``nn.Linear``; the module itself, not wrapped by DDP or ``torch.compile``.
        batch_size: m, samples of a coreset.
        epochs: of the whole training; or give ``steps``.
        steps: of the whole training, all in one pass.
        preset: of `effray crest`, such as "published" or "each-step"; ``options`` have priority over it.
        collate_fn: joins samples to a batch, as in a ``DataLoader``, in their order.
        seed: of all draws.
        options: ``crest.*`` of `effray crest`: choose ("colm"), gradient, tau (τ; 0 = every step chooses), h, b,
            subset (r/n, "2m" or "4m"), checked_on, exclude_every_steps (T2), exclude_below (α), exclude_after,
            keep_active, order, smoothing, settle, model_batches, curvature.

    Raises:
        UserError: unknown preset or option, a value out of range, fewer samples than a batch, samples without labels, a
            model without a linear head, a language model without "colm" or another model with it, a data set that
            changed its length, several processes. The model and its modes are left as they were.

    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> loader = CrestLoader((x, torch.arange(100) % 2), nn.Linear(4, 2), batch_size=10, epochs=1)
    >>> batches = [(list(x.shape), float(w.sum())) for x, y, w in loader]
    >>> len(batches), batches[0]
    (10, ([10, 4], 10.0))
    >>> loader.report()["cost"]["train"]
    {'forward': 100, 'backward': 100}
    """

    @as_arguments("crest", "train")
    def __init__(
        self,
        dataset: Any,
        model: nn.Module,
        batch_size: int,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        preset: str = PUBLISHED,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        seed: int = 0,
        **options: Any,
    ):
        if (epochs is None) == (steps is None):
            raise UserError("CrestLoader needs the length of the training: give either epochs or steps")
        length = {"steps": steps} if epochs is None else {"epochs": epochs}
        check_count("CrestLoader", batch_size=batch_size, **length)
        values = with_preset(CrestSettings, {}, {"preset": preset})
        of_preset = {name[6:]: value for name, value in values.items() if name.startswith("crest.")}
        self.options = load_settings(CrestOptions, None, of_preset | options)
        data = as_dataset(dataset, "CrestLoader")
        n = len(data)  # type: ignore[arg-type]  # shown by as_dataset
        if (world := ranks_here().world) > 1:
            raise UserError(f"CrestLoader is for one process, not {world}: use `effray crest` with --cluster.workers")
        self.pass_steps = steps or -(-n // batch_size)
        total = steps or epochs * self.pass_steps  # type: ignore[operator]  # one of the two is given
        check_kind(model, self.options.choose)
        causal = self.options.choose == "colm"
        self.loop = DatasetLoop(TappedByForm(model), data, n, batch_size, seed, total, collate_fn, causal)
        kind = Colm if self.options.choose == "colm" else CrestAlgorithm
        self.algorithm = kind(self.options, self.loop, torch.arange(n), batch_size)
        self.end: int | None = None  # of the pass that has begun and is not finished, in steps
        self._resumed = False
        self._passes = 0  # begun

    @cached_property
    def _fixed(self) -> dict[str, Any]:
        """Data and settings, equal in a checkpoint."""
        loop = self.loop
        data = {"samples": loop.n, "labels": some_labels(loop.data, loop.collate_fn, causal=loop.causal)}
        return {**data, "batch_size": loop.size, "seed": loop.seed, **self.options.model_dump()}

    def __len__(self) -> int:
        """Return the number of batches of a whole pass."""
        return self.pass_steps

    def __iter__(self) -> Iterator[Any]:
        """Yield a pass's batches, or the rest of one that a checkpoint was taken in.

        Raises:
            UserError: all steps are done; or another pass has begun since, as in ``zip(loader, loader)``.
        """
        algorithm, loop = self.algorithm, self.loop
        if not (self._resumed and self.end is not None):
            if algorithm.step >= loop.steps:
                raise UserError(f"all {loop.steps} steps of this CrestLoader are done: give more epochs or steps")
            self.end = min(algorithm.step + self.pass_steps, loop.steps)
        self._resumed = False
        self._passes += 1
        own = self._passes
        for steps, drawn in algorithm.intervals(self.end):
            shuffled = [
                chosen.shuffled(generator(loop.seed, "crest batch", step)).coreset
                for step, chosen in zip(steps, drawn, strict=True)
            ]
            loaded = loop.load([coreset.indices for coreset in shuffled], "train", backward=True)
            for coreset, (x, y) in zip(shuffled, loaded, strict=True):
                algorithm.trained()  # before the loop's body, which may take a checkpoint
                yield in_form_of(x, y, coreset.weights, coreset.indices)
                if own != self._passes:
                    raise UserError("another pass over this CrestLoader has begun: only one can choose at a time")
        self.end = None

    def finish_epoch(self) -> None:
        """Finish the pass if its last batch was yielded, for trainers that request no batch after the last one."""
        if self.end == self.algorithm.step:
            self.end = None

    def report(self) -> dict[str, Any]:
        """Return progress and cost as plain values.

        "pools" chosen and "checks" made so far, of which "expired" ended a pool; "rho" (ρ) of the latest check, None
        before it; "interval" (T1); "active" samples; "history", a row per check, or per exclusion with τ = 0; "cost",
        samples forward and backward of the steps ("train"), choices ("select"), checks ("check") and fits ("model").
        """
        state, tau = self.algorithm.state, self.options.tau
        rhos = [row["rho"] for row in state.history if "rho" in row]
        return {
            "step": self.algorithm.step,
            "pools": state.pool.update,
            "checks": len(rhos),
            "expired": sum(rho > tau for rho in rhos),
            "rho": rhos[-1] if rhos else None,
            "interval": state.region.interval,
            "active": int(state.samples.active.sum()),
            "history": deepcopy(state.history),
            "cost": deepcopy(self.loop.cost),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint at any moment; batches that were yielded count as trained on."""
        progress = {"step": self.algorithm.step, "end": self.end, "cost": deepcopy(self.loop.cost)}
        return {"settings": self._fixed, **progress, "crest": self.algorithm.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint: the next pass is the rest of the one in which it was taken.

        Raises:
            UserError: it is of other data, batches, seed or options, or of something else.
        """
        check_state("CrestLoader", state, ("settings", "step", "end", "cost", "crest"), self._fixed)
        self.algorithm.load_state_dict(state["crest"])
        self.algorithm.step = state["step"]
        self.loop.cost = deepcopy(state["cost"])
        self.end = state["end"]
        self._resumed = True


@dataclass(eq=False)
class DatasetLoop(Loop):
    """The passes of a model over a data set in this process, counted in samples."""

    model: TappedByForm
    data: Dataset[Any]
    n: int  # samples of the data set
    size: int
    seed: int
    steps: int
    collate_fn: Callable[[list[Any]], Any]
    causal: bool  # labels may be of tokens

    def __post_init__(self):
        self.worker, self.at_once = Worker(), self.size
        self.cost = {part: {"forward": 0, "backward": 0} for part in ("train", "select", "check", "model")}

    def load(self, batches: Sequence[Tensor], part: str, *, backward: bool = False) -> Iterator[tuple[Any, Tensor]]:
        """Yield (x, y) of batches of positions, and count them for a part of the cost."""
        if len(self.data) != self.n:  # type: ignore[arg-type]
            raise UserError(f"the data set has {len(self.data)} samples, CrestLoader was made for {self.n}")  # type: ignore[arg-type]
        seed = derive(self.seed, "crest", part)  # of random augmentation
        loaded = load_batches(self.data, batches, seed=seed, collate_fn=self.collate_fn, causal=self.causal)
        for batch, (x, y, indices) in zip(batches, loaded, strict=True):
            if not indices.equal(batch):
                raise UserError("CrestLoader's collate_fn changed the order of the samples: it must keep it")
            self.cost[part]["forward"] += len(y)
            self.cost[part]["backward"] += len(y) * backward
            yield x, y

    def batches(
        self, subset: Subset, part: str, size: int | None = None, *, backward: bool = False
    ) -> Iterator[tuple[Any, Tensor]]:
        """Yield (x, y) of samples on the model's device."""
        device = next(self.model.parameters()).device
        size = size or (128 if device.type == "cpu" else 512)  # as effray's runs, to the same bits
        return (on_device(batch, device) for batch in self.load(subset.indices.split(size), part, backward=backward))

    def losses_of(self, x: Any, y: Tensor) -> Tensor:
        """Return the losses of a language model of transformers, or of effray, [b]."""
        if isinstance(x, Mapping):
            return sample_losses(self.model.module, {**x, LABELS: y})[0]
        if not isinstance(self.model.module, LanguageModel):
            raise UserError("CrestLoader needs mappings with input_ids and labels for a model of transformers")
        return super().losses_of(x, y)
