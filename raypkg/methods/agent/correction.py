"""Gradient correction in any loop: a snapshot of the model, its gradients, and the correction of a step by them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from raypkg.core.config import validate
from raypkg.core.errors import UserError
from raypkg.core.seeds import seeded
from raypkg.core.settings import Count
from raypkg.coresets.batches import check_state, ranks_here
from raypkg.models.classifier import in_mode, unwrapped

from .control_variate import Weight, coefficient, spread, variance_left
from .settings import AgentOptions

Loss = Callable[[nn.Module, Any], Tensor]
Losses = Tensor | Iterable[Tensor]  # of a batch at the snapshot, whole or in parts that add up


class Arguments(AgentOptions):
    """The arguments of `GradientCorrection` that are checked."""

    epochs: Count | None = None


def weighted_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return mean(w · cross-entropy) of a batch x, y int64 [b] and, if it has weights, w [b]."""
    x, y, *weights = batch
    losses = F.cross_entropy(model(x), y, reduction="none")
    return (losses @ weights[0] if weights else losses.sum()) / len(y)


class GradientCorrection:
    """Corrects gradients by a control variate with an adaptive weight (AGENT, arXiv:2301.03573).

        snapshot(batches), once an epoch:  c ← (1 − α)·c + α·ĉ,   θ̃ ← θ,   g̃ = mean of ∇ℓ_B(θ̃)
        correct(closure), every step:      ∇ℓ_B(θ) − γc·(∇ℓ_B(θ̃) − g̃)

    Published: ĉ = Cov_B(ℓ_B(θ), ℓ_B(θ̃)) / Var_B(ℓ_B(θ̃)) over the batches, with θ̃ the previous snapshot. c starts
    at 0, so the first epoch is plain: its first step only tries the closure. Then a sample costs three gradients and
    two forward passes per epoch.

    ``correct`` comes after all micro-batches and unscaling, before clipping and the optimiser's step. It keeps the raw
    gradient as ``raw_grad`` of each parameter, on which `SparseTraining` grows. Ranks of a process group average.

    Differs from the paper: none of the snapshot's dropout masks are the model's. That adds noise to the correction of
    models with dropout, which effray's own runs avoid.

    Args:
        model: trained elsewhere; wrappers of DDP and `torch.compile` may be around it. A copy of it is the snapshot.
        form: published; measured = c per layer from the gradients of successive steps, 1 at a snapshot; linear = 1 −
            t/T, as in α-SVRG (arXiv:2311.05589).
        gamma: γ, 0 < γ ≤ 1; default: 0.1, measured 1, linear 0.75.
        alpha: α, share of the newest estimate in c.
        epochs: snapshots in the whole training, for the linear form.
        loss: loss(model, batch) → scalar, the mean loss of a batch as in training; default: ``weighted_loss``.
        skips_overflows: leave gradients that are not finite as they are, because a `GradScaler` skips their step.

    Raises:
        UserError: an invalid value, a model without trained parameters, no snapshot before the first step, more
            snapshots than epochs, no batches (published: fewer than two) or such as can be passed once only, a loss
            without the snapshot, a gradient that is not finite. The model and its gradients have not changed then, and
            a failed ``snapshot`` can be called again.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> batches = [(torch.randn(8, 4), torch.arange(8) % 2) for _ in range(3)]
    >>> agent = GradientCorrection(model)
    >>> for _ in range(3):
    ...     agent.snapshot(batches)
    ...     for batch in batches:
    ...         optimizer.zero_grad()
    ...         weighted_loss(model, batch).backward()
    ...         agent.correct(lambda snapshot: weighted_loss(snapshot, batch))
    ...         optimizer.step()
    >>> 0 < agent.c < 1
    True
    """

    def __init__(
        self,
        model: nn.Module,
        form: Literal["published", "measured", "linear"] = "published",
        *,
        gamma: float | None = None,
        alpha: float = 0.3,
        epochs: int | None = None,
        loss: Loss = weighted_loss,
        skips_overflows: bool = False,
    ):
        options = validate(Arguments, {"form": form, "gamma": gamma, "alpha": alpha, "epochs": epochs})
        if (form == "linear") != (epochs is not None):
            raise UserError(f"epochs = {epochs} with form = {form}: the linear form needs it, the others do not")
        self.model = unwrapped(model)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise UserError("all parameters of the model are frozen (requires_grad = False): nothing to correct")
        self.epochs = epochs
        self.loss = loss
        self.skips_overflows = skips_overflows
        self.copy = deepcopy(self.model)  # θ̃; in training, batch norm uses the statistics of its batch
        self.copied = [parameter for parameter in self.copy.parameters() if parameter.requires_grad]
        self.full: list[Tensor] = []  # g̃, one tensor per parameter; empty while nothing is corrected
        self.weight = Weight(options)
        # After and before the correction, summed over steps.
        self.variance = torch.zeros(2, dtype=torch.float64, device=self.parameters[0].device)
        self.before: tuple[int, list[Tensor], list[Tensor]] | None = None  # latest step measured, and its gradients
        self.step = 0  # corrections so far
        self.snapshots = 0
        self.estimated = False  # ĉ, since the last snapshot
        self.tried = False  # a closure

    @property
    def c(self) -> float:
        """The weight over all layers, without γ."""
        return float(self.weight.c)

    @property
    def variance_left(self) -> float | None:
        """The share of the variance of gradients left by corrections since the last snapshot; None if unknown."""
        after, before = self.variance.tolist()
        return after / before if before > 0 else None

    def snapshot(self, batches: Iterable[Any], *, samples: int | None = None) -> None:
        """Update c, take a new snapshot θ̃ ← θ, and compute g̃ over the batches.

        Args:
            batches: those of the coming epoch, or of all samples; a list or a `DataLoader`, passed over twice. They are
                on the device of the model. A pass of `CoresetLoader` is an epoch: give ``list(loader)``.
            samples: of all batches, if known: then rounding is that of effray's own runs.
        """
        if iter(batches) is batches:
            raise UserError("batches are an iterator, which can be passed once only: give a list or a DataLoader")
        if self.epochs is not None and self.snapshots >= self.epochs:
            raise UserError(f"snapshot {self.snapshots + 1} of epochs = {self.epochs}: the linear weight has reached 0")
        if self.snapshots and not self.estimated:
            self.estimate(batches)
        self.take(self.snapshots / self.epochs if self.epochs else 0.0)
        self.estimated = True  # if the rest fails, another call must not average ĉ again
        if self.weight.acts:
            expected = samples or 1
            sizes = []

            def parts() -> Iterator[tuple[list[Tensor], float]]:
                for batch in batches:
                    sizes.append(len(next(iter(batch.values() if isinstance(batch, Mapping) else batch))))
                    yield self.gradient(self.loss(self.copy, batch)), sizes[-1] / expected

            with in_mode(self.model, training=True):
                self._copy_modes()
                self.average(parts())
            if not sizes:
                raise UserError("snapshot: there are no batches, so there is no full gradient")
            if (seen := sum(sizes)) != expected:
                torch._foreach_mul_(self.full, expected / seen)
            if not _finite(self.full):
                self.full = []
                raise UserError(f"snapshot {self.snapshots}: the full gradient is not finite: lower the learning rate")
        self.snapshots += 1
        self.estimated = False

    def correct(self, closure: Callable[[nn.Module], Losses]) -> None:
        """Correct the gradients of a step in place.

        Args:
            closure: closure(model) → loss of the present batch at the given model, which is the snapshot; with
                micro-batches, an iterable of losses whose gradients add up.
        """
        if not self.snapshots or (self.weight.acts and not self.full):
            raise UserError("no snapshot yet: call snapshot(batches) before the first step of an epoch")
        for parameter in self.parameters:
            vars(parameter).pop("raw_grad", None)
        self._copy_modes()
        if not self.weight.acts:
            if not self.tried:  # a wrong closure must not come to light in the second epoch only
                with seeded(0, "trial"):
                    self.gradient(closure(self.copy))
            self.tried = True
            return
        if not _finite([parameter.grad for parameter in self.parameters if parameter.grad is not None]):
            if self.skips_overflows:
                return
            raise UserError(f"correction {self.step}: a gradient is not finite: lower the learning rate")
        gradient = mean_over_ranks(self.gradient(closure(self.copy)))
        if not _finite(gradient):
            raise UserError(f"correction {self.step}: the gradient of the closure's loss is not finite")
        self.step += 1
        self.apply(gradient, step=self.step)
        assert self.before
        for parameter, raw in zip(self.parameters, self.before[1], strict=True):
            parameter.raw_grad = raw  # type: ignore[attr-defined]

    # The parts, between which a run of effray keeps bills

    @torch.no_grad()
    def estimate(self, batches: Iterable[Any]) -> None:
        """Update the published c over batches, with both models frozen; otherwise ``snapshot`` does by its own."""
        if self.weight.form == "published":
            with in_mode(self.model, training=True):
                self._copy_modes()
                found = [torch.stack([self.loss(each, batch) for each in (self.model, self.copy)]) for batch in batches]
            if len(found) < 2:
                raise UserError(f"estimate: {len(found)} batches: c is a covariance over at least 2")
            (losses,) = mean_over_ranks([torch.stack(found)])  # [batches, 2]
            self.weight.average(coefficient(*losses.T))
        self.estimated = True

    @torch.no_grad()
    def take(self, progress: float) -> None:
        """Take a snapshot, θ̃ ← θ, after a share of training; g̃ is unknown then."""
        self.weight.restart(progress)
        for tensors in (nn.Module.parameters, nn.Module.buffers):
            for mine, current in zip(tensors(self.copy), tensors(self.model), strict=True):
                mine.copy_(current)
        self.full = []
        self.variance.zero_()
        self.before = None
        self.estimated = False

    def average(self, parts: Iterable[tuple[list[Tensor], float]]) -> None:
        """Set g̃ to the sum of gradients, each times its share, over all ranks."""
        total = [torch.zeros_like(parameter) for parameter in self.parameters]
        for gradient, share in parts:
            torch._foreach_add_(total, gradient, alpha=share)
        self.full = mean_over_ranks(total)

    def gradient(self, losses: Losses) -> list[Tensor]:
        """Return this rank's ∇ℓ_B(θ̃), one tensor per parameter: 0 for parameters that the forward pass does not use."""
        total: list[Tensor] = []
        for loss in [losses] if isinstance(losses, Tensor) or not isinstance(losses, Iterable) else losses:
            found = torch.autograd.grad(loss, self.copied, allow_unused=True) if loss.requires_grad else ()
            if all(each is None for each in found):
                raise UserError("the loss does not depend on the snapshot: compute it with the model that is passed")
            gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(self.copied, found, strict=True)]
            total = list(torch._foreach_add(total, gradient)) if total else gradient
        return total

    def apply(self, snapshot: list[Tensor], *, step: int, corrects: bool = True) -> tuple[Tensor, Tensor]:
        """Measure the variance that a correction leaves, and correct the gradients by ∇ℓ_B(θ̃) over all ranks.

        Returns c and the share of the variance left, NaN if unknown.
        """
        c = torch.as_tensor(self.weight.c, dtype=torch.float64, device=self.variance.device)
        # A parameter that the forward pass does not use has zeros, which nothing reads.
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        weights = self.weight.weights(len(gradient)).to(self.variance.device)
        left = torch.full_like(c, torch.nan)
        before, self.before = self.before, (step, [tensor.clone() for tensor in gradient], snapshot)
        if before is not None and before[0] + 1 == step:
            moments = spread(gradient, snapshot, *before[1:])
            ranks_here().share([moments])  # other processors may round differently
            self.weight.observe(moments)
            after_and_before = variance_left(moments, weights)
            self.variance += after_and_before
            left = after_and_before[0] / after_and_before[1]
        if corrects:  # subtract a·(∇ℓ_B(θ̃) − g̃), with one weight a per layer
            difference = torch._foreach_sub(self.full, snapshot)
            torch._foreach_mul_(difference, [a.to(g.dtype) for a, g in zip(weights, gradient, strict=True)])
            torch._foreach_add_(gradient, difference)
        return c, left

    def state_dict(self) -> dict[str, Any]:
        """Return snapshot, g̃, c and the latest gradients, at any step of an epoch, as tensors and plain values."""
        return {
            "copy": self.copy.state_dict(),
            "full": list(self.full),
            "form": self.weight.state_dict(),
            "before": self.before and list(self.before),
            "variance": self.variance.clone(),
            "counts": [self.step, self.snapshots, self.estimated],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state.

        Raises:
            UserError: the state is of another object, model or form.
        """
        check_state("GradientCorrection", state, ("copy", "full", "form", "before", "variance", "counts"), {})
        shapes, stored = (
            {name: each.shape for name, each in of.items()} for of in (self.copy.state_dict(), state["copy"])
        )
        if shapes != stored:
            raise UserError(f"the state has a snapshot of {', '.join(stored)}: it is of another model")
        device = self.variance.device
        self.weight.load_state_dict(state["form"], device)
        self.copy.load_state_dict(state["copy"])
        self.full = [gradient.to(device) for gradient in state["full"]]
        self.before = None
        if state["before"]:
            step, *gradients = state["before"]
            current, snapshot = ([gradient.to(device) for gradient in each] for each in gradients)
            self.before = step, current, snapshot
        self.variance = state["variance"].clone().to(device)  # it is added to in place
        self.step, self.snapshots, self.estimated = state["counts"]

    def _copy_modes(self) -> None:
        for mine, current in zip(self.copy.modules(), self.model.modules(), strict=True):
            mine.training = current.training


def mean_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """Return the mean of the tensors over the ranks of the process group, if there is one, by one all-reduce."""
    world = ranks_here().world
    if world == 1:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    pieces = (flat / world).split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


def _finite(tensors: list[Tensor]) -> bool:
    return bool(torch.stack(torch._foreach_norm(tensors)).isfinite().all()) if tensors else True
