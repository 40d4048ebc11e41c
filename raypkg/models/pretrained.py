"""Classifiers of other libraries: ``torchvision:NAME``, and ``transformers:NAME`` of the hub or a folder.

A missing checkpoint of Hugging Face is downloaded, which is announced; ``HF_HUB_OFFLINE=1`` forbids it. Nothing of a
checkpoint is run: remote code is refused, and so are weights in pickles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn

from raypkg.core.errors import UserError, unknown
from raypkg.core.registry import announce_download, argument, extra
from raypkg.data.kinds import TEXTS, kind_of
from raypkg.data.tokenizer import vocabulary_of

from . import model
from .classifier import MeanStd, Shape, as_classifier, image_shape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WHAT = "a model of Hugging Face"
NEW = "pooler"  # a layer before the head that checkpoints of pre-training may lack, as they lack the head
AUXILIARY = ("googlenet", "inception_v3")  # with these classifiers, they return more than logits while training
SHIFTED = ("roberta", "xlm-roberta", "camembert", "mpnet")  # their positions count from that of the padding token


@model("torchvision", source="https://docs.pytorch.org/vision/stable/models.html")
def torchvision(shape: Shape, num_classes: int, *, variant: str = "", weights: str = "") -> nn.Module:
    """Network of torchvision by its name, such as torchvision:resnet18; weights=DEFAULT begins with trained ones.

    Args:
        shape: (3, H, W).
        num_classes: C.
        variant: name of the network.
        weights: name of torchvision's, such as DEFAULT or IMAGENET1K_V1, downloaded once into torch's cache; the head
            of C classes is new. Default: all drawn.

    Raises:
        UserError: unknown network or weights, or weights that cannot be downloaded.
    """
    from torchvision import models

    names = models.list_models(module=models)
    if variant not in names:
        raise unknown("torchvision model", variant, names)
    image_shape(shape, least=1)
    if not weights:
        plain = {"aux_logits": False, "init_weights": True} if variant in AUXILIARY else {}
        return models.get_model(variant, weights=None, num_classes=num_classes, **plain)

    known = models.get_model_weights(variant)
    allowed = ["DEFAULT", *(each.name for each in known)]
    if weights not in allowed:
        raise unknown(f"weights of torchvision:{variant}", weights, allowed)
    chosen = known[weights]
    try:
        network = models.get_model(variant, weights=chosen)
    except (OSError, RuntimeError) as error:  # no network, or an interrupted download
        what = f"weights {weights} of torchvision:{variant}"
        raise UserError(f"{what} cannot be had from {chosen.url}: {error}") from None
    if hasattr(network, "AuxLogits"):  # of inception_v3, which computes it in training as long as it exists
        network.aux_logits = False
        network.AuxLogits = None
    pixels = chosen.transforms()
    split = as_classifier(network)
    split.trained_with = (tuple(pixels.mean), tuple(pixels.std))
    split.head = nn.Linear(split.head.in_features, num_classes)
    return split


@model("transformers", source="arXiv:1910.03771")
def hugging_face(
    shape: Shape,
    num_classes: int,
    *,
    variant: str = "",
    weights: bool = True,
    dropout: Annotated[float | None, Field(ge=0, lt=1)] = None,
) -> nn.Module:
    """Classifier of Hugging Face, transformers:NAME of the hub or transformers:FOLDER, for texts or images.

    Its linear head is new unless the checkpoint has one for as many classes. Needs `pip install 'effray[text]'`.

    Args:
        shape: (L, V) of texts, (C, H, W) of images.
        num_classes: C.
        variant: name or folder.
        weights: begin with those of the checkpoint; false = draw all of them, and read its configuration alone.
        dropout: wherever the configuration has one; default: the configuration's.

    Raises:
        UserError: no such checkpoint, an incomplete one, one without weights in safetensors, one of another vocabulary,
            or one that does not take samples of this shape.
    """
    name = f"transformers:{variant}"
    config = config_of(name)
    texts = kind_of(shape) is TEXTS
    config.num_labels = num_classes
    if dropout is not None:
        for field, value in config.to_dict().items():
            if "drop" in field and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(config, field, dropout)
    if texts:
        check_texts(config, name, shape)
        if config.pad_token_id is None:  # such as GPT-2's: the token that marks the end pads as well
            end = config.eos_token_id
            config.pad_token_id = end[0] if isinstance(end, list) else end
    with quiet() as package:
        kind = package.AutoModelForSequenceClassification if texts else package.AutoModelForImageClassification
        if weights:
            network = loaded(name, config, kind)
        else:
            try:
                network = kind.from_config(config)
            except ValueError as error:  # there is no such classifier
                raise _unreadable(name, error) from None
    file = _beside(variant, "1_Pooling/config.json" if texts else "preprocessor_config.json") if weights else None
    stated: Any = None
    if file is not None:
        try:
            stated = (Pooling if texts else ImageProcessor).model_validate_json(Path(file).read_bytes())
        except ValidationError as error:
            raise _unreadable(name, error) from None
    if texts:
        return OfTexts(network, stated is not None and stated.pooling_mode_mean_tokens)
    is_normalised = stated is not None and stated.do_normalize
    return OfImages(network, (stated.image_mean, stated.image_std) if is_normalised else None)


hugging_face.has_tokenizer = True  # type: ignore[attr-defined]  # see ``raypkg.models.tokenizer_of``


class OfTexts(nn.Module):
    """A classifier of texts: int64 [b, 2, l] → logits [b, C]."""

    def __init__(self, network: PreTrainedModel, has_means: bool):
        super().__init__()
        self.network = network
        self.has_means = has_means  # its checkpoint is of a sentence transformer that takes means
        config = network.config
        self.padding = config.pad_token_id or 0
        self.takes_segments = getattr(config, "type_vocab_size", 0) > 1

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        """Return the network's inputs."""
        tokens, segments = x.unbind(1)
        there = tokens >= 0
        inputs = {"input_ids": tokens.masked_fill(~there, self.padding), "attention_mask": there.long()}
        return inputs | ({"token_type_ids": segments.clamp_min(0)} if self.takes_segments else {})

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.network(**self.inputs(x)).logits
        return logits

    @property
    def frozen_features(self) -> tuple[nn.Module, int] | None:
        """The features of a frozen model and their width, where they are not the input of the head."""
        return (Means(self), self.network.config.hidden_size) if self.has_means else None


class Means(nn.Module):
    """The mean of the last hidden states over a text's tokens: int64 [b, 2, l] → float32 or more [b, D]."""

    def __init__(self, texts: OfTexts):
        super().__init__()
        self.texts = texts

    def forward(self, x: Tensor) -> Tensor:
        """Return the means."""
        hidden = self.texts.network.base_model(**self.texts.inputs(x)).last_hidden_state
        there = (x[:, 0] >= 0).to(torch.promote_types(hidden.dtype, torch.float32))  # [b, l]
        return torch.einsum("bl,bld->bd", there / there.sum(1, keepdim=True), hidden.to(there))


class OfImages(nn.Module):
    """A classifier of images: float [b, C, H, W] → logits [b, C]."""

    def __init__(self, network: PreTrainedModel, trained_with: MeanStd | None):
        super().__init__()
        self.network = network
        self.trained_with = trained_with

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.network(pixel_values=x).logits
        return logits


class ImageProcessor(BaseModel):
    """The normalisation of pixels in a checkpoint's preprocessor_config.json."""

    do_normalize: bool = True
    image_mean: tuple[float, ...]
    image_std: tuple[Annotated[float, Field(gt=0)], ...]


class Pooling(BaseModel):
    """The pooling of a sentence transformer's hidden states into one embedding, from its 1_Pooling/config.json."""

    pooling_mode_mean_tokens: bool = False


# Also for language models


def config_of(name: str) -> PretrainedConfig:
    """Read the configuration of a checkpoint, ``transformers:NAME``; announce its download."""
    family, _, variant = name.partition(":")
    if not variant:
        raise UserError(f"model {family!r} needs a name on the hub or a folder: {family}:NAME")
    announce_download(variant, "config.json", WHAT)
    with quiet() as package:
        try:
            return package.AutoConfig.from_pretrained(variant, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(name, error) from None


@contextmanager
def quiet() -> Iterator[Any]:
    """Give the package, silent inside the block: the part of its loading reports that matters is checked here."""
    package = extra("transformers", "text", WHAT)
    logging_of = package.utils.logging
    verbosity = logging_of.get_verbosity()
    bars = logging_of.is_progress_bar_enabled()
    logging_of.set_verbosity_error()
    logging_of.disable_progress_bar()
    try:
        yield package
    finally:
        logging_of.set_verbosity(verbosity)
        if bars:
            logging_of.enable_progress_bar()


def _unreadable(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"model {name!r} cannot be read: {reason[:300]}")


def check_texts(config: PretrainedConfig, name: str, shape: Shape) -> None:
    """Refuse tokens of another vocabulary, and texts longer than the model's positions."""
    length, vocabulary = shape
    variant = argument(name)
    known = getattr(config, "vocab_size", None)
    if known is None:
        raise UserError(f"model {name!r} is a {config.model_type}, which takes no texts")
    own = None
    if file := _beside(variant, "tokenizer.json"):
        try:
            own = vocabulary_of(extra("tokenizers", "text", WHAT).Tokenizer.from_file(file))
        except Exception as error:  # the library raises no other
            raise _unreadable(name, error) from None
    if vocabulary > known or vocabulary != (own or vocabulary):
        counts = f"knows {own or known:,} tokens, the data set's tokenizer has {vocabulary:,}"
        raise UserError(f"model {name!r} {counts}: give --set dataset.options.tokenizer={variant}")
    positions = getattr(config, "max_position_embeddings", -1)
    if positions < 0:  # no limit, such as XLNet's
        return
    if config.model_type in SHIFTED:
        positions -= config.pad_token_id + 1
    if length > positions:
        limits = f"takes {positions} tokens at most, a text of the data set has up to {length}"
        raise UserError(f"model {name!r} {limits}: give --set dataset.options.length={positions}")


def _beside(variant: str, name: str) -> str | None:
    """Return the path of a file next to a checkpoint, or None."""
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path: str | None = extra("transformers", "text", WHAT).utils.cached_file(variant, name, **quietly)
    return path


def loaded(
    name: str, config: PretrainedConfig, kind: Any, *, dtype: torch.dtype = torch.float32, complete: bool = False
) -> PreTrainedModel:
    """Read a checkpoint's weights; refuse one that lacks weights, a new head's excepted unless it is ``complete``."""
    try:
        network, report = kind.from_pretrained(
            argument(name),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # damaged files raise anything
        raise _unreadable(name, error) from None
    # A new head is drawn, but a checkpoint that lacks weights of the network's body is refused.
    mismatched = {tensor for tensor, *_ in report["mismatched_keys"]}
    body = f"{network.base_model_prefix}."
    drawn = sorted({*report["missing_keys"], *mismatched})
    lacking = [tensor for tensor in drawn if complete or (tensor.startswith(body) and NEW not in tensor)]
    if lacking:
        gap = f"lacks {len(lacking)} of the network's tensors, such as {lacking[0]}"
        raise UserError(f"model {name!r}: its checkpoint {gap}: it is incomplete, or of another network")
    return network
