"""Derivatives of the loss on a few mini-batch coresets, over all workers: what a local model is fitted to."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.gradients import evaluating
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import dtype_of, plain_batches, slice_of
from raypkg.engine.loop import autocast
from raypkg.engine.run import Run

from .quadratic import MovingMoments, gradient_of, hessian_diagonal
from .settings import CrestOptions

NO_SECOND = "derivative for"  # what PyTorch says where there is no second derivative

Derivative = Callable[[Tensor, Sequence[Tensor]], Tensor]  # of a scalar loss with respect to parameters [p]


def fitted_moments(
    run: Run,
    moments: MovingMoments,
    coresets: Sequence[Coreset],
    options: CrestOptions,
    *,
    update: int,
) -> tuple[MovingMoments, float]:
    """Return the moments with gradient and curvature of the mean of w · loss over the coresets, and that mean.

    Args:
        run: its model at the present weights, in evaluation mode; the work goes on the bill ``model``.
        moments: so far.
        coresets: of the pool.
        options: order, curvature and parameters of the model.
        update: l, names the draws.
    """
    indices = torch.cat([coreset.indices for coreset in coresets])
    weights = torch.cat([coreset.weights for coreset in coresets])
    parameters = covered_parameters(run.model, options)
    gradient, loss = _weighted_derivative(run, parameters, gradient_of, indices, weights)
    diagonal = None
    if options.order == 2:
        # The double backward pass is the most expensive part of CREST, so it sees only a few of the samples.
        rng = generator(run.seed, "crest curvature", update)
        order = torch.randperm(len(indices), generator=rng)
        few = order[: options.curvature or len(indices)]
        indices = indices[few]
        weights = weights[few]
        estimate = partial(_curvature, seed=run.seed, update=update)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
            diagonal, _ = _weighted_derivative(run, parameters, estimate, indices, weights)
    return moments.updated(gradient, diagonal), loss


def covered_parameters(model: nn.Module, options: CrestOptions) -> list[Tensor]:
    """Return the parameters that the local model covers: all that are trained, or those of the last layer."""
    module = model
    if options.parameters == "head":
        module = model.get_submodule("head")
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _curvature(loss: Tensor, parameters: Sequence[Tensor], *, seed: int, update: int) -> Tensor:
    # Every batch draws the same signs z: z ⊙ Hz is linear in H, so the batches' sum is the estimate of their sum.
    rng = generator(seed, "crest signs", update)
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
    indices: Tensor,
    weights: Tensor,
) -> tuple[Tensor, float]:
    """Return a linear derivative of the mean of w · loss over the indices [p], and that mean, over all workers."""
    device = run.worker.device
    size = run.settings.batch_size
    own_indices = slice_of(indices, run.worker)
    own_weights = slice_of(weights, run.worker).to(device)
    entries = sum(parameter.numel() for parameter in parameters)
    total = torch.zeros(1 + entries, device=device)  # the loss, then its derivative: one all-reduce for both
    dtype = dtype_of(run.model)
    batches = plain_batches(run.split, own_indices, device, size, dtype)
    batch_weights = own_weights.split(size)
    with evaluating(run.model):  # dropout and batch norm would make the model noisy, and be moved by it
        for (x, y), w in zip(batches, batch_weights, strict=True):
            with autocast(run.settings.precision, x.device):
                logits = run.model(x)
            losses = F.cross_entropy(logits.float(), y, reduction="none")  # [b]
            loss = losses @ w.float() / len(indices)  # over all, so that the batches' and workers' parts add up
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
