"""Losses of single samples of a causal language model, and gradients of single samples of linear layers, as of LoRA.

For z = W x + b at every token t of sample i, with δ_t = ∂ℓ_i/∂z_t,

    ∂ℓ_i/∂W = Σ_t δ_t ⊗ x_t        ∂ℓ_i/∂b = Σ_t δ_t

so the inputs x and the derivatives δ, which hooks record in one pass, hold the gradients of all samples in factors.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.models.classifier import unwrapped

from .batches import IGNORED, INDICES, LABELS, WEIGHTS


def sample_losses(model: nn.Module, batch: Mapping[str, Any], *, everywhere: bool = False) -> tuple[Tensor, Any]:
    """Return the losses of a batch's samples, float32 or more [b], and the output of the model.

    With labels [b], they are cross-entropies. With labels [b, l], as "input_ids", they are those of a causal model,

        ℓ_i = −1/|A_i| Σ_{t ∈ A_i} ln p(x_t | x_1 … x_{t−1}),   A_i the labels of sample i that are not −100,

    and the output's logits are those of the answered tokens only, [1, Σ|A_i|, V], unless the model is compiled.

    Args:
        model: of transformers, also with adapters of peft, compiled, or in ``DistributedDataParallel``.
        batch: as a ``CoresetLoader`` yields it, on the model's device; "weights" and "indices" are not used.
        everywhere: compute the logits of all tokens, as gradients of single samples of an adapted head need it.

    Raises:
        UserError: no labels, or labels [b, l] and a model that is not causal.
    """
    if LABELS not in batch:
        raise UserError(f"a batch has {', '.join(batch)}: losses need {LABELS} as well")
    inputs = {name: value for name, value in batch.items() if name not in (LABELS, WEIGHTS, INDICES)}
    labels: Tensor = batch[LABELS]
    if labels.dim() == 1:
        outputs = model(**inputs)
        return F.cross_entropy(outputs.logits, labels, reduction="none"), outputs
    answered = labels[:, 1:] != IGNORED  # [b, l − 1]
    sample, place = answered.nonzero(as_tuple=True)  # [m]

    def at_answers(rows: Tensor) -> Tensor:
        return rows[:, -labels.shape[1] :][sample, place][None]  # [1, m, ·]; those of a virtual prompt come first

    causal = cast(Any, unwrapped(model))
    if not getattr(causal, "can_generate", bool)() or causal.config.is_encoder_decoder:
        raise UserError(f"labels of tokens need a causal language model of transformers, not {type(causal).__name__}")
    # The head sees the last hidden states at answers only.
    head = causal.get_output_embeddings()
    hook: Any = nullcontext()
    if not everywhere:
        hook = head.register_forward_pre_hook(lambda _, states: (at_answers(states[0]), *states[1:]))
    with hook:
        outputs = model(**inputs)
    logits = outputs.logits
    if logits.shape[:2] != (1, len(sample)):  # ``everywhere``, or a compiled model, which does not call new hooks
        logits = at_answers(logits)
    logits = logits[0]  # [m, V]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.cross_entropy(wide, labels[:, 1:][answered], reduction="none")
    total = each.new_zeros(len(labels)).index_add(0, sample, each)
    return total / answered.sum(dim=1).clamp_min(1), outputs


def trained_linears(model: nn.Module) -> dict[str, tuple[nn.Parameter, list[nn.Linear]]]:
    """Return the trained parameters by name, each with the linear layers whose weight or bias it is.

    Raises:
        UserError: none is trained, or one belongs to another layer than ``nn.Linear``, such as an embedding or a norm.
    """
    owners: dict[nn.Parameter, list[Any]] = defaultdict(list)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter].append(module)
    trained = {name: (w, owners[w]) for name, w in model.named_parameters() if w.requires_grad}
    if not trained:
        raise UserError(f"{type(model).__name__} has no trained parameter to take gradients of")
    for name, (_, layers) in trained.items():
        if not all(isinstance(layer, nn.Linear) for layer in layers):  # also one tied to an embedding
            advice = "train adapters, as with model.options.rank = 8"
            raise UserError(f"gradients of single samples are of linear layers only, and {name} is none: {advice}")
    return trained


def gradient_blocks(model: nn.Module, losses: Callable[[], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield each trained parameter's name and gradients of the samples, float32 or more [b, m], one block at a time.

    Args:
        model: all its trained parameters are weights and biases of ``nn.Linear``; ``.grad`` stays as it is.
        losses: computes the samples' losses by the model, float [b]; the first dimension of all its layers is b.

    Raises:
        UserError: see ``trained_linears``; or a layer's first dimension is not b, so samples cannot be told apart.
    """
    layers = trained_linears(model)
    factors: dict[nn.Module, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # of each call: x [b, …, in], δ [b, …, o]

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
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        gradient = parameter.new_zeros(len(found), parameter.numel(), dtype=dtype)
        for owner in owners:
            for x, delta in factors[owner]:
                if len(delta) != len(found):  # such as a head that sees the answered tokens of all samples
                    raise UserError(f"{name} computes {len(delta)} rows of {len(found)} samples: freeze it")
                samples = delta.reshape(len(found), -1, delta.shape[-1]).to(dtype)  # [b, t, out]
                if parameter is owner.bias:
                    gradient += samples.sum(dim=1)
                else:
                    inputs = x.reshape(len(found), -1, x.shape[-1]).to(dtype)
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
