"""Classifiers of Hugging Face's transformers, as ``transformers:NAME``: by their name on the hub, or of a folder.

A checkpoint that is not in the hub's cache is downloaded, which is said; ``HF_HUB_OFFLINE=1`` forbids it. Nothing of a
checkpoint is run: remote code is refused, and so are weights in pickles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.imports import announce_download, extra
from raypkg.data.kinds import TEXTS, kind_of

from . import model
from .classifier import MeanStd
from .layers import Shape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WHAT = "a model of Hugging Face"
NEW = "pooler"  # a layer before the head that checkpoints of pre-training may lack, as they lack the head
SHIFTED = ("roberta", "xlm-roberta", "camembert", "mpnet")  # whose positions count from that of the padding token


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

    Its linear head is drawn anew where the checkpoint has none for as many classes. Needs `pip install 'effray[text]'`.

    Args:
        shape: (L, V) of texts, (C, H, W) of images.
        num_classes: C.
        variant: name or folder.
        weights: begin with those of the checkpoint; false = draw all of them, and read its configuration alone.
        dropout: in all places where the configuration has one; left out = the configuration's.

    Raises:
        UserError: no such checkpoint, an incomplete one, one without weights in safetensors, one of another vocabulary,
            or one that does not take samples of this shape.
    """
    if not variant:
        raise UserError("model 'transformers' needs a name on the hub or a folder: transformers:NAME")
    announce_download(variant, "config.json", WHAT)
    with _quiet():
        config = _config(variant)
    config.num_labels = num_classes
    if dropout is not None:
        _set_dropout(config, dropout)
    texts = kind_of(shape) is TEXTS
    if texts:
        _check_texts(config, variant, shape)
        if config.pad_token_id is None:  # as of GPT-2: what marks the end stands behind it as well
            config.pad_token_id = _first(config.eos_token_id)
    with _quiet():
        network = _loaded(variant, config, texts) if weights else _drawn(variant, config, texts)
    if texts:
        return OfTexts(network)
    return OfImages(network, _pixels(variant) if weights else None)


hugging_face.has_tokenizer = True  # type: ignore[attr-defined]  # see ``raypkg.models.tokenizer_of``


class ImageProcessor(BaseModel):
    """What a checkpoint's preprocessor_config.json says of the values of pixels, as far as it is used."""

    do_normalize: bool = True
    image_mean: tuple[float, ...]
    image_std: tuple[Annotated[float, Field(gt=0)], ...]


class OfTexts(nn.Module):
    """A classifier of texts that is given int64 [b, 2, l] and returns its logits [b, C]."""

    def __init__(self, network: PreTrainedModel):
        super().__init__()
        self.network = network
        config = network.config
        self.padding = config.pad_token_id or 0
        self.takes_segments = getattr(config, "type_vocab_size", 0) > 1

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        tokens, segments = x.unbind(1)
        there = tokens >= 0
        inputs = {
            "input_ids": tokens.masked_fill(~there, self.padding),
            "attention_mask": there.long(),
        }
        if self.takes_segments:
            inputs["token_type_ids"] = segments.clamp_min(0)
        logits: Tensor = self.network(**inputs).logits
        return logits


class OfImages(nn.Module):
    """A classifier of images that is given float [b, C, H, W] and returns its logits [b, C]."""

    def __init__(self, network: PreTrainedModel, trained_with: MeanStd | None):
        super().__init__()
        self.network = network
        self.trained_with = trained_with

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.network(pixel_values=x).logits
        return logits


def _first(tokens: int | list[int] | None) -> int | None:
    """Return the token, or the first of several."""
    return tokens[0] if isinstance(tokens, list) else tokens


def _transformers() -> Any:
    return extra("transformers", "text", WHAT)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the package's reports of what it loads to itself: what matters of them is checked here."""
    logging_of = _transformers().utils.logging
    verbosity = logging_of.get_verbosity()
    bars = logging_of.is_progress_bar_enabled()
    logging_of.set_verbosity_error()
    logging_of.disable_progress_bar()
    try:
        yield
    finally:
        logging_of.set_verbosity(verbosity)
        if bars:
            logging_of.enable_progress_bar()


def _config(variant: str) -> PretrainedConfig:
    try:
        return _transformers().AutoConfig.from_pretrained(variant, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(variant, error) from None


def _unreadable(variant: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"model 'transformers:{variant}' cannot be read: {reason[:300]}")


def _set_dropout(config: PretrainedConfig, dropout: float) -> None:
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, dropout)


def _check_texts(config: PretrainedConfig, variant: str, shape: Shape) -> None:
    """Refuse tokens that are not the model's, and more of them than it has positions for."""
    length, vocabulary = shape
    known = getattr(config, "vocab_size", None)
    if known is None:
        raise UserError(f"model 'transformers:{variant}' is a {config.model_type}, which takes no texts")
    own = _tokenizer_size(variant)
    if vocabulary > known or vocabulary != (own or vocabulary):
        raise UserError(
            f"model 'transformers:{variant}' knows {own or known:,} tokens, the data set's tokenizer has"
            f" {vocabulary:,}: give --set dataset.options.tokenizer={variant}"
        )
    positions = getattr(config, "max_position_embeddings", -1)
    if positions < 0:  # as many as there are, such as XLNet's
        return
    if config.model_type in SHIFTED:
        positions -= config.pad_token_id + 1
    if length > positions:
        raise UserError(
            f"model 'transformers:{variant}' takes {positions} tokens at most, a text of the data set has up to"
            f" {length}: give --set dataset.options.length={positions}"
        )


def _tokenizer_size(variant: str) -> int | None:
    """Return how many tokens the tokenizer beside a checkpoint has; None where it has none."""
    file = _beside(variant, "tokenizer.json")
    if file is None:
        return None
    return extra("tokenizers", "text", WHAT).Tokenizer.from_file(file).get_vocab_size()


def _pixels(variant: str) -> MeanStd | None:
    """Return mean and std of the images that a checkpoint was trained with; None where none are stored beside it."""
    file = _beside(variant, "preprocessor_config.json")
    if file is None:
        return None
    try:
        stored = ImageProcessor.model_validate_json(Path(file).read_bytes())
    except ValidationError as error:
        raise _unreadable(variant, error) from None
    return (stored.image_mean, stored.image_std) if stored.do_normalize else None


def _beside(variant: str, name: str) -> str | None:
    """Return the path of a file beside a checkpoint; None where it has none."""
    path: str | None = _transformers().utils.cached_file(
        variant,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return path


def _class(texts: bool) -> Any:
    package = _transformers()
    return package.AutoModelForSequenceClassification if texts else package.AutoModelForImageClassification


def _drawn(variant: str, config: PretrainedConfig, texts: bool) -> PreTrainedModel:
    try:
        return _class(texts).from_config(config)
    except ValueError as error:  # there is no such classifier
        raise _unreadable(variant, error) from None


def _loaded(variant: str, config: PretrainedConfig, texts: bool) -> PreTrainedModel:
    try:
        network, report = _class(texts).from_pretrained(
            variant,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever damaged files make it raise
        raise _unreadable(variant, error) from None
    _check_complete(network, report, variant)
    return network


def _check_complete(network: PreTrainedModel, report: Mapping[str, Any], variant: str) -> None:
    """Refuse a checkpoint that gave the body of the network less than all of its weights."""
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    body = f"{network.base_model_prefix}."
    drawn = sorted({*report["missing_keys"], *mismatched})
    lacking = [name for name in drawn if name.startswith(body) and NEW not in name]
    if lacking:
        raise UserError(
            f"model 'transformers:{variant}': its checkpoint lacks {len(lacking)} of the network's tensors, such as"
            f" {lacking[0]}: it is incomplete, or that of another network"
        )
