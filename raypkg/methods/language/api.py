"""Rows of any causal language model of transformers, in a script of one's own: no run folder, no settings."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raypkg.core.errors import UserError
from raypkg.coresets.batches import IGNORED
from raypkg.models.classifier import in_mode

from .less import BETA1, BETA2, Moments, gradient_rows, moments_of, over_checkpoints
from .pooling import rds_rows
from .projection import Projection

__all__ = ["Moments", "Projection", "language_rows", "less_rows", "moments_of", "over_checkpoints", "state_rows"]
Batch = Any  # a mapping of input_ids, attention_mask and labels, int64 [b, l]; of a `LanguageModel` int64 [b, 2, l]


def state_rows(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Return RDS+'s embeddings (arXiv:2503.01807), Σ_i i h_i / ‖Σ_i i h_i‖ over a sample's tokens, float32 [n, D].

    h_i are the last hidden states. The model computes in evaluation mode, and without gradients.

    Args:
        model: of `transformers`, with or without adapters of `peft`, or a `LanguageModel`.
        batches: mappings with "input_ids" and, where there is padding, "attention_mask"; on the model's device.

    Raises:
        UserError: no batch, or a model without hidden states.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
    >>> rows = state_rows(model, [{"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}])
    >>> list(rows.shape), torch.allclose(rows.norm(dim=1), torch.ones(2))
    ([2, 16], True)
    """
    with in_mode(model, training=False):
        return language_rows(model, batches)


def less_rows(
    model: nn.Module,
    batches: Iterable[Batch],
    projection: Projection,
    moments: Mapping[str, Moments] | None = None,
    *,
    betas: tuple[float, float] = (BETA1, BETA2),
) -> Tensor:
    """Return LESS's rows (arXiv:2402.04333) at the model's present weights, R Γ(g_i) / ‖R Γ(g_i)‖, float32 [n, d].

    g_i is the gradient of sample i's mean loss per answered token with respect to all trained parameters, and
    Γ(g) = (β1 m + (1 − β1) g) / sqrt(β2 v + (1 − β2) g² + ε) for a pool, Γ(g) = g for a target. The model computes in
    evaluation mode; its ``.grad`` stay as they are.

    Args:
        model: as in ``state_rows``; its trained parameters are weights of linear layers, such as LoRA's.
        batches: as in ``state_rows``, with "labels"; −100 marks tokens without loss.
        projection: R, the same for pool and target.
        moments: Adam's, from ``moments_of(model, optimizer)``; None for a target.
        betas: β1 and β2 of Adam.

    Raises:
        UserError: no batch, no "labels", or a trained parameter that is not of a linear layer.
    """
    with in_mode(model, training=False):
        return language_rows(model, batches, projection=projection, moments=moments, betas=betas)


def language_rows(
    model: nn.Module, batches: Iterable[Batch], projection: Projection | None = None, **how: Any
) -> Tensor:
    """Return the rows of a model in its present mode: projected gradients, or embeddings without a projection."""
    rows = []
    for batch in batches:
        if projection:
            rows.append(gradient_rows(model, partial(_losses, model, batch), projection, **how).cpu())
        else:
            with torch.no_grad():
                rows.append(rds_rows(*_hidden(model, batch)).cpu())
    if not rows:
        raise UserError("no batches to compute rows of")
    return torch.cat(rows)


def _losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of each sample's answered tokens [b]."""
    if not isinstance(batch, Mapping):
        return model(batch).losses
    if "labels" not in batch:
        raise UserError(f"a batch has {', '.join(batch)}: gradients need labels as well")
    targets = batch["labels"][:, 1:]  # of the logits before
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    losses = cross_entropy(
        logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )  # [b, l − 1]
    return losses.sum(dim=1) / (targets != IGNORED).sum(dim=1).clamp_min(1)


def _hidden(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the last hidden states [b, l, D] and where tokens are [b, l]."""
    if not isinstance(batch, Mapping):
        return model.hidden(batch)
    if not hasattr(model, "get_decoder"):
        raise UserError(f"{type(model).__name__} is no causal language model of transformers: it has no get_decoder()")
    tokens = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(tokens))
    hidden = model.get_decoder()(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden, mask.bool()
