"""Rows of causal language models: the embeddings of RDS+ (arXiv:2503.01807) and the gradients of LESS (2402.04333).

They are of any causal model of transformers, in a script of one's own: no run folder, no settings.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from raypkg.core.errors import UserError
from raypkg.core.seeds import derive
from raypkg.coresets.per_sample import gradient_blocks, sample_losses
from raypkg.models.classifier import in_mode

__all__ = ["Moments", "Projection", "less_rows", "moments_of", "over_checkpoints", "sample_losses", "state_rows"]
BETAS = (0.9, 0.999)  # β1, β2 of Adam
EPSILON = 1e-8
AT_ONCE = 1 << 19  # signs in memory at a time: few enough to stay in a processor's cache
BITS = 256  # of one count of the generator: four words of 64
Batch = Any  # a mapping of input_ids, attention_mask and labels, int64 [b, l]; of a `LanguageModel` int64 [b, 2, l]


# RDS+


def state_rows(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Return RDS+'s embeddings, Σ_i i h_i / ‖Σ_i i h_i‖ over a sample's tokens, float32 [n, D].

    h_i are the last hidden states; weights i are those of SGPT (arXiv:2202.08904). The model computes in evaluation
    mode, and without gradients.

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
    rows = []
    with in_mode(model, training=False), torch.no_grad():
        for batch in batches:
            hidden, mask = _hidden(model, batch)
            places = mask.cumsum(dim=1) * mask  # 1, 2, …; 0 at padding
            weights = places / places.sum(dim=1, keepdim=True)  # [b, l]
            mean = torch.einsum("bl,bld->bd", weights.float(), hidden.float())
            rows.append(normalize(mean, dim=1).cpu())
    return _joined(rows)


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


# LESS


class Moments(NamedTuple):
    """Adam's moments of one parameter, of its shape."""

    m: Tensor  # average gradient
    v: Tensor  # average squared gradient


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Moments]:
    """Return copies of the moments of a model's trained parameters, by name, on the CPU.

    Raises:
        UserError: the optimiser is not of Adam's kind, or has taken no step.
    """
    moments = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" not in state:
                kind = type(optimizer).__name__
                raise UserError(f"{kind} has no moments of {name}: LESS needs Adam or AdamW, after a step")
            moments[name] = Moments(*(state[key].to("cpu", copy=True) for key in ("exp_avg", "exp_avg_sq")))
    return moments


class Projection:
    """The map g → g R / sqrt(d) with R ∈ {−1, 1}^{p × d} (Rademacher), by which E <g R, h R> / d = <g, h>.

    R is generated where it is used. The signs of coordinate i are bits of Philox, whose counter begins at i ⌈d/256⌉:
    they depend on (seed, i) alone.

    >>> projection = Projection(seed=0, width=4096)
    >>> rows = projection(torch.tensor([[3.0, 4.0], [4.0, -3.0]]))
    >>> bool(((rows @ rows.T - 25 * torch.eye(2)).abs() < 2).all())
    True
    """

    def __init__(self, seed: int, width: int, at_once: int = AT_ONCE):
        self.width = width  # d
        self.at_once = at_once
        self._key = derive(seed, "projection")
        self._counts = -(-width // BITS)  # of the generator's counter per coordinate
        # The eight signs of each byte, its lowest bit first [256, 8].
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        self._table = bits.astype(np.float32) * 2 - 1

    def __call__(self, gradients: Tensor, start: int = 0) -> Tensor:
        """Return the projection of coordinates from ``start`` on, float [b, m] → [b, d]; those of parts add up."""
        projected = gradients.new_zeros(len(gradients), self.width)
        size, octets = max(1, self.at_once // self.width), -(-self.width // 8)
        # One buffer for all blocks: allocating memory would take longer than filling it.
        buffer = np.empty((size, octets, 8), np.float32)
        for first in range(0, gradients.shape[1], size):
            part = gradients[:, first : first + size]
            count = part.shape[1]
            philox = np.random.Philox(key=self._key, counter=(start + first) * self._counts)
            words = philox.random_raw(count * self._counts * (BITS // 64))
            signs_of = words.astype("<u8", copy=False).view(np.uint8).reshape(count, -1)[:, :octets]
            np.take(self._table, signs_of, axis=0, out=buffer[:count], mode="clip")
            signs = torch.from_numpy(buffer[:count]).flatten(1)[:, : self.width]  # rows of R
            projected.addmm_(part, signs.to(part))
        return projected / self.width**0.5


def less_rows(
    model: nn.Module,
    batches: Iterable[Batch],
    projection: Projection,
    moments: Mapping[str, Moments] | None = None,
    *,
    betas: tuple[float, float] = BETAS,
) -> Tensor:
    """Return LESS's rows at the model's present weights, R Γ(g_i) / ‖R Γ(g_i)‖, float32 [n, d].

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

    def losses(batch: Batch) -> Tensor:
        if isinstance(batch, Mapping):
            return sample_losses(model, batch, everywhere=True)[0]
        answered: Tensor = model(batch).losses
        return answered

    (beta1, beta2), rows = betas, []
    with in_mode(model, training=False):
        for batch in batches:
            total: Any = 0
            start = 0
            # Parameters are preconditioned and projected one by one: b × p numbers are never in memory.
            for name, g in gradient_blocks(model, partial(losses, batch)):
                if moments is not None:
                    m, v = (each.to(g).flatten() for each in moments[name])
                    mean, square = (1 - beta1) * g + beta1 * m, (1 - beta2) * g.square() + beta2 * v
                    g = mean / (square + EPSILON).sqrt()
                total = total + projection(g.float(), start)
                start += g.shape[1]
            rows.append(normalize(total, dim=1).cpu())
    return _joined(rows)


def over_checkpoints(rows: Sequence[Tensor], rates: Sequence[float]) -> Tensor:
    """Return rows whose inner products are Σ_t η_t <r_t, r'_t>: r_t · sqrt(η_t) side by side, float [n, T·d].

    The rates are normalised to Σ η_t = 1, so rows of length 1 give rows of length 1.
    """
    total = sum(rates)
    return torch.cat([part * (rate / total) ** 0.5 for part, rate in zip(rows, rates, strict=True)], dim=1)


def _joined(rows: list[Tensor]) -> Tensor:
    if not rows:
        raise UserError("no batches to compute rows of")
    return torch.cat(rows)
