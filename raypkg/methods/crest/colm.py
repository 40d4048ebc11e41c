"""CoLM (arXiv:2407.19580): mini-batch coresets for language models, from the gradients of the last value projection.

Choosing m of r samples needs no memory beyond that of a step on m: forward passes of a few samples at a time, without
activations for a backward pass, and one number per sample in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.budgets import class_budgets
from raypkg.coresets.facility import KnownDistances, facility_location
from raypkg.coresets.per_sample import adapter_gradients
from raypkg.data.coreset import Coreset
from raypkg.models.language import LanguageModel

from .algorithm import CrestAlgorithm, Losses
from .quadratic import MovingMoments
from .selection import Chosen, Pool, Subset

VALUES = "v_proj"  # name of a value projection in transformers' decoders
EPSILON = 1e-3  # ε of the zeroth-order step
KEPT = 2560  # coordinates of a feature
TINY = 1e-8  # of Adam
AT_ONCE = 2**20  # entries of gradients in memory at a time


class LastValues:
    """The last value projection of a decoder that is trained; of an adapted one, its adapter.

    Raises:
        UserError: no value projection is trained, or none is in a list of layers.
    """

    def __init__(self, network: nn.Module):
        trained: dict[str, list[nn.Parameter]] = {}
        for name, module in network.named_modules():
            if name.rpartition(".")[2] == VALUES and (own := [w for w in module.parameters() if w.requires_grad]):
                trained[name] = own
        if not trained:
            raise UserError(
                f"{type(network).__name__} trains no layer called {VALUES}, by whose gradients CoLM chooses: add it to"
                " the adapter's targets, or use a decoder that has one"
            )
        self.network = network
        path, self.parameters = trained.popitem()
        self.size = sum(each.numel() for each in self.parameters)  # p
        lists = {name: each for name, each in network.named_modules() if isinstance(each, nn.ModuleList)}
        around = [name for name in lists if path.startswith(f"{name}.")]
        if not around:
            raise UserError(f"{type(network).__name__}: {path} is in no list of layers, so CoLM cannot find the last")
        number = int(path.removeprefix(f"{around[-1]}.").partition(".")[0])
        self.layer, self.earlier = lists[around[-1]][number], lists[around[-1]][:number]

    @contextmanager
    def moved(self, step: Tensor) -> Iterator[None]:
        """Add a step [p] to the weights inside the block, where no gradients are kept; restore their exact bits."""
        before = [each.clone() for each in self.parameters]
        for each, part in zip(self.parameters, step.split([each.numel() for each in before]), strict=True):
            each.add_(part.view_as(each))
        try:
            yield
        finally:
            for each, value in zip(self.parameters, before, strict=True):
                each.copy_(value)

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Start every pass inside the block but the first at the last layer, with the activations of the first.

        From there on it computes in the precision of the weights: in bfloat16, the losses of two passes would differ by
        rounding alone.
        """
        kept: list[Tensor] = []
        device = self.parameters[0].device.type
        autocasts = torch.is_autocast_enabled(device)

        def keep_or_give(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if kept:
                return kept[0], *inputs[1:]
            kept.append(inputs[0])
            torch.set_autocast_enabled(device, False)
            for layer in self.earlier:
                layer.forward = lambda hidden, *rest, **options: hidden
            return None

        own = [vars(layer).get("forward") for layer in self.earlier]
        hook = self.layer.register_forward_pre_hook(keep_or_give)
        try:
            yield
        finally:
            hook.remove()
            torch.set_autocast_enabled(device, autocasts)
            for layer, forward in zip(self.earlier, own, strict=True):
                vars(layer).pop("forward", None)
                if forward is not None:  # such as a hook of accelerate
                    layer.forward = forward

    @torch.no_grad()
    def slopes(self, losses: Losses, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses [b] and slopes along z [b, 1] from two forward passes; the second is of the last layer alone.

            g_i ≈ (ℓ_i(w + εz) − ℓ_i(w − εz)) / 2ε · z,    z ~ N(0, 1) [p], the same for all samples

        As in the paper, all estimates of a step are multiples of one z, so a single number tells the samples apart.
        """
        step = direction * EPSILON
        with self.resumed():
            with self.moved(step):
                above = losses().float()
            with self.moved(-step):
                below = losses().float()
        return (above + below) / 2, ((above - below) / (2 * EPSILON))[:, None]

    @torch.no_grad()
    def exact(self, losses: Losses) -> tuple[Tensor, Tensor]:
        """Return losses [b] and gradients [b, p], by a backward pass that ends at the projection."""
        found: list[Tensor] = []

        def kept() -> Tensor:
            found.append(losses().float())
            return found[0]

        # With all other parameters frozen, no earlier layer keeps activations.
        others = {each for each in self.network.parameters() if each.requires_grad} - {*self.parameters}
        for each in others:
            each.requires_grad_(False)
        try:
            gradients = adapter_gradients(self.network, kept)
        finally:
            for each in others:
                each.requires_grad_(True)
        return found[0].detach(), gradients


def check_kind(model: Any, choice: str) -> None:
    """Refuse a language model without CoLM's choice, and any other model with it."""
    is_language = isinstance(model, LanguageModel) or getattr(model, "can_generate", bool)()
    if is_language and choice != "colm":
        raise UserError("CREST chooses by the logits of a classifier: for a language model give preset colm")
    if not is_language and choice == "colm":
        kind = type(model).__name__
        raise UserError(f"CoLM chooses for language models, such as transformers-lm:NAME, not for a {kind}")


def scaled(moments: MovingMoments, gradients: Tensor) -> Tensor:
    """Return gradients [b, p] as Adam would use each of them at step t, after the moments m and v of t − 1 steps.

        m_i = (β1 m + (1 − β1) g_i) / (1 − β1^t)    v_i = (β2 v + (1 − β2) g_i²) / (1 − β2^t)    m_i / (√v_i + 1e-8)

    At the first step, these are signs.

    >>> scaled(MovingMoments(torch.zeros(2), torch.zeros(2)), torch.tensor([[4.0, -9.0]])).round(decimals=3)
    tensor([[ 1., -1.]])
    """
    (beta1, beta2), t = moments.betas, moments.updates + 1
    m, v = moments.first.to(gradients), moments.second
    assert v is not None
    first = (beta1 * m + (1 - beta1) * gradients) / (1 - beta1**t)
    second = (beta2 * v.to(gradients) + (1 - beta2) * gradients.square()) / (1 - beta2**t)
    return first / (second.sqrt() + TINY)


def quotas(counts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return each source's number of the m = ``size`` samples, and a mask of the large sources; counts are int64 [Q].

    A source with fewer than m/Q of the r samples is small and kept whole. Large ones share the rest in proportion.
    Q counts the sources that have samples.

    >>> quotas(torch.tensor([2, 10, 20, 0]), 16)
    (tensor([2, 5, 9, 0]), tensor([False,  True,  True, False]))
    """
    large = counts * counts.count_nonzero() >= size
    kept = counts.where(~large, 0)
    rest = class_budgets(counts.where(large, 0), size - int(kept.sum()))
    return kept + rest, large


def choose(
    factors: Tensor, direction: Tensor | None, sources: Tensor, size: int, moments: MovingMoments
) -> tuple[Tensor, MovingMoments]:
    """Choose m = ``size`` of r samples; return their positions, int64 [m] ascending, and the averages after the step.

        S_q = argmin Σ_{i∈V_q} min_{j∈S_q} ‖f_i − f_j‖₁,   |S_q| = quota of the large source q

    f_i is the gradient of sample i as Adam would scale it, on the 2,560 coordinates with the largest mean magnitude
    over V_q. The moments then take up the mean gradient of the chosen samples of large sources.

    Args:
        factors: slopes [r, 1] along the ``direction`` [p], or without one the gradients [r, p].
        direction: z, or None.
        sources: of each sample, int64 [r].
        size: m.
        moments: of earlier steps.

    Differs from the paper: it leaves open below which count a source is small, see ``quotas``, and whether averages are
    corrected for their start at zero, as they are here.
    """

    def gradients(positions: Tensor) -> Tensor:
        own = factors[positions.to(factors.device)]
        return own if direction is None else own * direction

    size = min(size, len(sources))
    counts = sources.bincount()
    budgets, large = quotas(counts, size)
    picked, of_large = [], []
    rows = max(1, AT_ONCE // len(moments.first))
    for source, budget in enumerate(budgets.tolist()):
        members = (sources == source).nonzero()[:, 0]
        if budget < len(members):
            # Two passes over the gradients: [r, p] may not fit, and [r, 2560] does.
            parts = members.split(rows)
            total = torch.stack([scaled(moments, gradients(part)).abs().sum(dim=0) for part in parts]).sum(dim=0)
            kept = total.topk(min(KEPT, len(total))).indices
            features = torch.cat([scaled(moments, gradients(part))[:, kept] for part in parts])
            distances = KnownDistances(torch.cdist(features, features, p=1).cpu())
            members = members[facility_location(distances, budget)] if budget else members[:0]
        picked.append(members)
        if large[source]:
            of_large.append(members)
    chosen = torch.cat(of_large)
    total = torch.stack([gradients(part).sum(dim=0) for part in chosen.split(rows)]).sum(dim=0)
    mean = total / len(chosen)
    return torch.cat(picked).sort().values, moments.updated(mean, mean)


class Colm(CrestAlgorithm):
    """CREST's loop at τ = 0 with CoLM's choice: every step draws r samples and keeps m, unweighted."""

    moments: MovingMoments | None = None  # of the chosen samples' gradients; None before the first choice

    @cached_property
    def last(self) -> LastValues:
        """The layer whose gradients choose."""
        last = LastValues(self.loop.model)
        narrow = {weight.dtype for weight in last.layer.parameters() if weight.dtype.itemsize < 4}
        if narrow and self.options.gradient == "estimate":
            raise UserError(
                f"the model is in {str(narrow.pop())[6:]}, in which CoLM's two losses differ by rounding alone: give"
                " crest.gradient = exact, or base = float32 to the model"
            )
        return last

    def _chosen(self, pool: Pool, subsets: Sequence[Subset]) -> list[Chosen]:
        (subset,) = subsets  # every step has a pool of its own
        last, compute, direction = self.last, self.last.exact, None
        if self.options.gradient == "estimate":
            rng = generator(self.loop.seed, "crest direction", pool.update)
            direction = torch.randn(last.size, generator=rng).to(last.parameters[0].device)  # z
            compute = partial(last.slopes, direction=direction)
        losses, factors, sources = self.loop.value_gradients(compute, subset)
        factors = factors.to(last.parameters[0].device)
        zero = factors.new_zeros(last.size)
        moments = self.moments or MovingMoments(zero, zero)
        picked, self.moments = choose(factors, direction, sources, self.size, moments)
        picked = self.loop.worker.first(picked)
        kept, losses = subset[picked], losses.cpu()
        coreset = Coreset.uniform(kept.indices)
        return [Chosen(coreset, kept.draws, float(losses[picked].mean()), losses)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state with the moments, as tensors and plain values."""
        return {**super().state_dict(), "moments": self.moments and asdict(self.moments)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        values = dict(state)
        if moments := values.pop("moments"):
            updates = moments.get("updates", moments.get("steps"))  # its name in earlier versions
            moments = MovingMoments(moments["first"], moments["second"], updates)
        self.moments = moments
        super().load_state_dict(values)
