"""Layer-wise densities from SNIP saliency (arXiv:1810.02340)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypkg.methods.sparse.masks import Densities, prunable


def snip(model: nn.Module, x: Tensor, y: Tensor, density: float) -> Densities:
    """Return the share of each layer's weights among the network's ``density`` most salient ones.

    The saliency of a weight is |g ⊙ w|, with g the gradient of the mean loss of one batch at the current weights.
    Ratios are kept, not the weights themselves: LiPT draws random masks with them.

    Args:
        model: left as it was, statistics of batch norm included.
        x: one batch, float [b, …].
        y: its labels, int64 [b].
        density: share of all prunable weights to keep, in (0, 1].
    """
    weights = prunable(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    loss = F.cross_entropy(model.train()(x), y)
    gradients = torch.autograd.grad(loss, list(weights.values()))
    model.train(was_training).load_state_dict(buffers, strict=False)
    saliency = {name: (g * w).detach().abs() for (name, w), g in zip(weights.items(), gradients, strict=True)}
    everything = torch.cat([s.flatten() for s in saliency.values()])
    keep = max(1, round(density * everything.numel()))
    threshold = everything.kthvalue(everything.numel() - keep + 1).values
    return {name: (s >= threshold).float().mean().item() for name, s in saliency.items()}
