"""Derivatives of the loss on a few mini-batch coresets, over all workers: what a local model is fitted to."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.gradients import evaluating
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.batches import dtype_of, plain_batches, slice_of
from raypkg.engine.loop import autocast
from raypkg.engine.run import Run

from .minibatch import Chosen
from .quadratic import MovingMoments, gradient_of, hessian_diagonal
from .settings import CrestOptions
from .subset import Subset

NO_SECOND = "derivative for"  # what PyTorch says where there is no second derivative

Derivative = Callable[[Tensor, Sequence[Tensor]], Tensor]  # of a scalar loss with respect to parameters [p]


def fitted_moments(
    run: Run,
    moments: MovingMoments,
    coresets: Sequence[Chosen],
    options: CrestOptions,
    *,
    update: int,
    augment: Sequence[str],
    known: Tensor | None = None,
) -> tuple[MovingMoments, float]:
    """Return the moments with gradients and curvatures of the mean of w · loss over the coresets, and that mean.

    Args:
        run: its model at the present weights, in evaluation mode; the work goes on the bill ``model``.
        moments: so far.
        coresets: of the pool.
        options: order, curvature and parameters of the model, and what its averages are updated by.
        update: l, names the draws.
        augment: names of the augmentations by which the coresets were chosen.
        known: the gradient, where there is but one coreset and training has just computed it; the mean returned is then
            that of the choice.
    """
    each_alone = options.smoothing == "coreset"
    parameters = covered_parameters(run.model, options)
    groups = [[coreset] for coreset in coresets] if each_alone else [coresets]
    losses = []
    for number, group in enumerate(groups):
        samples = Subset.concat([chosen.samples for chosen in group])
        weights = torch.cat([chosen.coreset.weights for chosen in group])
        split = samples.split(run.split, augment)
        everything = Coreset(torch.arange(len(samples)), weights)
        gradient, loss = known, sum(chosen.loss for chosen in group) / len(group)
        if gradient is None:
            gradient, loss = _weighted_derivative(run, parameters, gradient_of, split, everything)
        diagonal = None
        if options.order == 2:
            diagonal = _diagonal(run, parameters, split, everything, options, (update, number))
        moments = moments.updated(gradient, diagonal)
        losses.append(loss)
    return moments, sum(losses) / len(losses)


def _diagonal(
    run: Run,
    parameters: Sequence[Tensor],
    split: Split,
    everything: Coreset,
    options: CrestOptions,
    name: tuple[int, int],
) -> Tensor:
    """Estimate the Hessian's diagonal on some of the samples: its double backward pass is the costliest of CREST."""
    rng = generator(run.seed, "crest curvature", *name)
    order = torch.randperm(len(everything), generator=rng)
    few = order[: options.curvature_samples(run.settings.batch_size) or len(everything)]
    some = Coreset(few, everything.weights[few])
    estimate = partial(_curvature, seed=run.seed, name=name)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
        diagonal, _ = _weighted_derivative(run, parameters, estimate, split, some)
    return diagonal


def trains_as_it_evaluates(model: nn.Module) -> bool:
    """Say whether a sample's gradient is the same in both modes: without batch norm and dropout that are active."""
    return not any(module.training and _acts_in_training(module) for module in model.modules())


def _acts_in_training(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    rate = getattr(module, "dropout", 0.0)  # of attention and recurrent layers, a number
    return isinstance(module, _BatchNorm) or (isinstance(rate, float) and rate > 0)


def covered_parameters(model: nn.Module, options: CrestOptions) -> list[Tensor]:
    """Return the parameters that the local model covers: all that are trained, or those of the last layer."""
    module = model
    if options.parameters == "head":
        module = model.get_submodule("head")
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _curvature(loss: Tensor, parameters: Sequence[Tensor], *, seed: int, name: tuple[int, int]) -> Tensor:
    # Every batch draws the same signs z: z ⊙ Hz is linear in H, so the batches' sum is the estimate of their sum.
    rng = generator(seed, "crest signs", *name)
    try:
        return hessian_diagonal(loss, parameters, rng)
    except RuntimeError as error:
        if NO_SECOND not in str(error):
            raise
        raise UserError(f"CREST's curvature cannot be had: {error}; give --crest.order 1") from None


def _weighted_derivative(
    run: Run,
    parameters: Sequence[Tensor],
    derivative: Derivative,
    split: Split,
    coreset: Coreset,
) -> tuple[Tensor, float]:
    """Return a linear derivative of the mean of w · loss over a coreset [p], and that mean, over all workers."""
    device = run.worker.device
    size = run.settings.at_once
    own_indices = slice_of(coreset.indices, run.worker)
    own_weights = slice_of(coreset.weights, run.worker).to(device)
    entries = sum(parameter.numel() for parameter in parameters)
    total = torch.zeros(1 + entries, device=device)  # the loss, then its derivative: one all-reduce for both
    dtype = dtype_of(run.model)
    batches = plain_batches(split, own_indices, device, size, dtype)
    batch_weights = own_weights.split(size)
    with evaluating(run.model):  # dropout and batch norm would make the model noisy, and be moved by it
        for (x, y), w in zip(batches, batch_weights, strict=True):
            with autocast(run.settings.precision, x.device):
                logits = run.model(x)
            losses = F.cross_entropy(logits.float(), y, reduction="none")  # [b]
            loss = losses @ w.float() / len(coreset)  # over all, so that the batches' and workers' parts add up
            slope = derivative(loss, parameters)
            value = loss.detach()[None]
            total += torch.cat([value, slope])
    cost = run.bill("model")
    cost.forward += len(own_indices)
    cost.backward += len(own_indices)
    cost.sent += total.nbytes * (run.worker.world > 1)
    total = run.worker.sum(total)
    if not total.isfinite().all():
        raise UserError(f"step {run.step}: the derivatives of CREST's model are not finite: lower the learning rate")
    loss_in_all = float(total[0])
    return total[1:], loss_in_all
