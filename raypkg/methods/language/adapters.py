"""Per-sample gradients of linear layers, such as LoRA's, from one batched backward pass.

For z = W x + b at every token t of sample i, with δ_t = ∂ℓ_i/∂z_t,

    ∂ℓ_i/∂W = Σ_t δ_t ⊗ x_t        ∂ℓ_i/∂b = Σ_t δ_t

so the inputs x and the derivatives δ, which hooks record, hold the gradients of all samples in factored form.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError

Factors = dict[nn.Module, list[tuple[Tensor, Tensor]]]  # of each call of a layer: x [b, …, in] and δ [b, …, out]


def trained_linears(model: nn.Module) -> dict[str, tuple[nn.Parameter, list[nn.Linear]]]:
    """Return the trained parameters by name, each with the linear layers whose weight or bias it is.

    Raises:
        UserError: none is trained, or one belongs to another layer than ``nn.Linear``, such as an embedding or a norm.
    """
    owners: dict[nn.Parameter, list[Any]] = defaultdict(list)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter].append(module)
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    if not trained:
        raise UserError(f"{type(model).__name__} has no trained parameter to take gradients of")
    for name, parameter in trained.items():
        if not all(isinstance(owner, nn.Linear) for owner in owners[parameter]):  # also one tied to an embedding
            advice = "train adapters, as with model.options.rank = 8"
            raise UserError(f"gradients of single samples are of linear layers only, and {name} is none: {advice}")
    return {name: (parameter, owners[parameter]) for name, parameter in trained.items()}


def gradient_blocks(model: nn.Module, losses: Callable[[], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each trained parameter with its gradients of the samples, float [b, m], one block at a time.

    Args:
        model: all its trained parameters are weights and biases of ``nn.Linear``; ``.grad`` stays as it is.
        losses: computes the samples' losses by the model, float [b]; the first dimension of all its layers is b.

    Raises:
        UserError: see ``trained_linears``; or a layer's first dimension is not b, so samples cannot be told apart.
    """
    layers = trained_linears(model)
    factors: Factors = defaultdict(list)

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        def keep(x: Tensor, delta: Tensor) -> None:
            factors[module].append((x, delta))

        if output.requires_grad:  # activation checkpointing computes once without
            output.register_hook(partial(keep, inputs[0].detach()))

    modules = dict.fromkeys(module for _, owners in layers.values() for module in owners)
    handles = [module.register_forward_hook(record) for module in modules]
    try:
        with torch.enable_grad():
            found = losses()
            torch.autograd.grad(found.sum(), [parameter for parameter, _ in layers.values()], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    for name, (parameter, owners) in layers.items():
        gradient = parameter.new_zeros(len(found), parameter.numel())
        for owner in owners:
            for x, delta in factors[owner]:
                if len(delta) != len(found):  # such as a head that sees the answered tokens of all samples
                    raise UserError(f"{name} computes {len(delta)} rows of {len(found)} samples: freeze it")
                samples = delta.reshape(len(found), -1, delta.shape[-1])  # [b, t, out]
                if parameter is owner.bias:
                    gradient += samples.sum(dim=1)
                else:
                    inputs = x.reshape(len(found), -1, x.shape[-1]).to(samples.dtype)
                    gradient += torch.bmm(samples.transpose(1, 2), inputs).flatten(1)
        yield name, gradient


def adapter_gradients(model: nn.Module, losses: Callable[[], Tensor]) -> Tensor:
    """Return the gradients of all trained parameters for each sample, float [b, p], in the order of their names.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> adapter_gradients(layer, lambda: layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))[:, 0])
    tensor([[1., 2.],
            [3., 4.]])
    """
    return torch.cat([block for _, block in gradient_blocks(model, losses)], dim=1)
