"""Causal language models of Hugging Face's transformers, ``transformers-lm:NAME``, trained whole or by LoRA adapters.

Samples are those of the source ``instructions``: the tokens in segment 1 are answers, and only they carry loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raypkg.core.errors import UserError, unknown
from raypkg.core.registry import extra
from raypkg.data.kinds import TEXTS

from . import model
from .classifier import Answered, Probability, Shape, text_shape
from .pretrained import check_texts, config_of, loaded, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ANSWER = 1  # segment of the tokens that carry loss
LOGITS_AT_ONCE = 1 << 24  # numbers: of a batch to evaluate, the logits are not all in memory
PROBED = 16  # tokens
SAMPLED = 64  # numbers of each frozen weight in the digest of a base


@model("transformers-lm", source="arXiv:1910.03771, arXiv:2106.09685")
def language_model(
    shape: Shape,
    num_classes: int,
    *,
    variant: str = "",
    rank: Annotated[int, Field(ge=0, le=1 << 14)] = 0,
    alpha: Annotated[float | None, Field(gt=0)] = None,
    dropout: Probability = 0.0,
    targets: tuple[str, ...] = ATTENTION,
    base: Literal["float32", "bfloat16"] = "float32",
) -> nn.Module:
    """Causal language model of Hugging Face, transformers-lm:NAME of the hub or transformers-lm:FOLDER.

    For example `--model transformers-lm:FOLDER --set model.options.rank=8` trains LoRA adapters (arXiv:2106.09685) of
    rank 8 and freezes all else; only the adapters are stored. Needs `pip install 'effray[text]'`, adapters
    `pip install 'effray[lora]'`.

    Args:
        shape: (L, V) of texts.
        num_classes: number of sources of the samples, unused.
        variant: name or folder.
        rank: of the adapters; 0 = none, all weights are trained.
        alpha: the adapters' product is multiplied by alpha / rank (default: 2 rank).
        dropout: of the adapters' inputs.
        targets: names of the linear layers that get adapters.
        base: precision of the frozen weights; the adapters are float32.

    Raises:
        UserError: no such checkpoint, an incomplete one, one of another vocabulary or a shorter context, an unknown
            target, or options that would do nothing without adapters.
    """
    name = f"transformers-lm:{variant}"
    idle = {"alpha": alpha is not None, "dropout": dropout, "targets": targets != ATTENTION, "base": base != "float32"}
    if not rank and (given := [option for option, is_given in idle.items() if is_given]):
        raise UserError(f"model {name!r}: {given[0]} would do nothing without adapters: give rank, such as rank=8")
    text_shape(shape)
    config = config_of(name)
    check_texts(config, name, shape)
    with quiet() as package:
        network = loaded(name, config, package.AutoModelForCausalLM, dtype=getattr(torch, base), complete=True)
    if rank:
        network = with_adapters(network, rank, 2.0 * rank if alpha is None else alpha, dropout, targets)
    return LanguageModel(network)


language_model.has_tokenizer = True  # type: ignore[attr-defined]  # see ``raypkg.models.tokenizer_of``


def with_adapters(network: PreTrainedModel, rank: int, alpha: float, dropout: float, targets: tuple[str, ...]) -> Any:
    """Return a frozen network with LoRA adapters: W x + alpha/rank · B A x with A [rank, in] drawn and B = 0."""
    peft = extra("peft", "lora", "LoRA")
    head = network.get_output_embeddings()
    allowed = {  # GPT-2's Conv1D is a linear layer transposed
        path.rpartition(".")[2]
        for path, layer in network.named_modules()
        if (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D") and layer is not head
    }
    for target in targets:
        if target not in allowed:
            raise unknown("target of LoRA", target, allowed)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=[*targets], task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():  # names that transformers 5.0 has alone are deprecated in later versions
        warnings.simplefilter("ignore")
        return peft.get_peft_model(network, config)


class LanguageModel(nn.Module):
    """A causal language model that computes its own losses: int64 [b, 2, l] → ``Answered``.

    ℓ_i = −1/|A_i| Σ_{t ∈ A_i} ln p(x_t | x_1 … x_{t−1}), A_i the tokens of sample i in segment 1 but for the first of
    the sample, which nothing predicts. Its state is what is trained: adapters with a digest of their base, or each
    parameter once.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.network = network  # of transformers, or of peft around one
        network.config.use_cache = False

    @property
    def _causal(self) -> Any:
        """The model of transformers, whose linear layers may have adapters."""
        return self.network.get_base_model() if hasattr(self.network, "peft_config") else self.network

    def forward(self, x: Tensor) -> Answered:
        """Return losses, hits and counts of answered tokens; logits are computed for answered tokens only."""
        h, _ = self.hidden(x)  # [b, l, D]
        is_target = x[:, 1, 1:] == ANSWER  # [b, l − 1]
        sample, place = is_target.nonzero(as_tuple=True)  # of each answered token, [m]
        before = h[sample, place]  # [m, D], the states that predict them
        target = x[sample, 0, place + 1]  # [m]
        head = self._causal.get_output_embeddings()
        losses, hits = [], []
        at_once = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        for states, tokens in zip(before.split(at_once), target.split(at_once), strict=True):
            logits = head(states)  # [·, V]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses.append(F.cross_entropy(wide, tokens, reduction="none"))
            hits.append(logits.argmax(1) == tokens)
        each = torch.cat(losses)  # [m]
        count = is_target.sum(1)  # [b]
        mean = each.new_zeros(len(x)).index_add(0, sample, each) / count.clamp_min(1)
        is_first = (is_target.cumsum(1) == 1)[sample, place]  # [m]
        right = torch.zeros_like(count).index_add(0, sample, (torch.cat(hits) & is_first).long()) > 0
        return Answered(mean, right, count)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last hidden states after the final norm, float [b, l, D], and where tokens are, bool [b, l].

        Padding follows the tokens, and no token depends on later ones, so none is masked.
        """
        h: Tensor = self._causal.base_model(input_ids=x[:, 0].clamp_min(0), use_cache=False).last_hidden_state
        return h, x[:, 0] >= 0

    @cached_property
    def base(self) -> dict[str, Tensor]:
        """A digest of numbers spread over the frozen weights, uint8 [8] by its name in the state; empty without any."""
        frozen = [weight.detach().flatten() for weight in self.parameters() if not weight.requires_grad]
        some = [weight[:: -(-len(weight) // SAMPLED)].double().cpu() for weight in frozen]  # the same in any precision
        digest = blake2b(torch.cat(some).numpy().tobytes(), digest_size=8).digest() if some else b""
        return {"base": torch.tensor([*digest], dtype=torch.uint8)} if some else {}

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]  # its overloads
        """Return the trained parameters, by the names of ``named_parameters``, and the digest of a frozen base."""
        state = super().state_dict(*args, **options)
        prefix = options.get("prefix", "")
        trained = {f"{prefix}{name}" for name, weight in self.named_parameters() if weight.requires_grad}
        for name in state.keys() - trained:
            del state[name]
        if not prefix:
            state.update(self.base)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Restore what ``state_dict`` returned.

        Raises:
            RuntimeError: other names, if ``strict``, or shapes.
            UserError: the state is of adapters to another base.
        """
        own, base = self.state_dict().keys(), self.base  # which older states lack
        missing, unexpected = sorted(own - state_dict.keys() - base.keys()), sorted(state_dict.keys() - own)
        if strict and (missing or unexpected):
            raise RuntimeError(f"missing are {missing}, unexpected are {unexpected}")
        for name, digest in base.items():
            if not state_dict.get(name, digest).cpu().equal(digest):
                raise UserError("the adapters were trained on a base with other weights than those of this model")
        weights = {name: state_dict[name] for name in (own & state_dict.keys()) - base.keys()}
        found = super().load_state_dict(weights, False, assign)
        return type(found)(missing, unexpected)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageModel:
        """Convert all but weights in bfloat16, which are frozen: ``to(torch.float32)`` leaves such a base as it is."""

        def kept(tensor: Tensor) -> Tensor:
            return fn(tensor).to(tensor.dtype) if tensor.dtype == torch.bfloat16 else fn(tensor)

        return super()._apply(kept, recurse)

    @torch.no_grad()
    def checked(self, name: str, shape: Shape) -> LanguageModel:
        """Return the model after a probe: it must be causal, and its logits linear in its last hidden states."""
        length, vocabulary = shape
        self.eval()
        x = TEXTS.example(2, (min(length, PROBED), vocabulary))[:1].repeat(2, 1, 1)
        x[1, 0, -1] = (x[1, 0, -1] + 1) % vocabulary
        try:
            h, _ = self.hidden(x)
            logits = self._causal(input_ids=x[:1, 0], use_cache=False).logits
            expected = self._causal.get_output_embeddings()(h[:1])
        except Exception as error:  # whatever the network raises
            raise UserError(f"model {name!r} cannot take texts: {type(error).__name__}: {error}") from error
        tolerance = 1e-2 if h.dtype == torch.bfloat16 else 1e-4
        problem = ""
        if not logits.isfinite().all():
            problem = " maps tokens to NaN or infinity"
        elif not torch.allclose(h[0, :-1], h[1, :-1], rtol=tolerance, atol=tolerance):
            problem = " is no causal language model: its states depend on later tokens"
        elif not torch.allclose(logits, expected, rtol=tolerance, atol=tolerance):
            problem = ": its logits are not linear in its last states, as with soft capping"
        if problem:
            raise UserError(f"model {name!r}{problem}")
        return self.train()
