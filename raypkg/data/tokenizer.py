"""Texts to tokens: the tokenizer of a model, or one trained on the texts themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypkg.core.errors import UserError
from raypkg.core.registry import announce_download, extra

from .kinds import PADDING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

STORED = np.dtype(np.int32)  # of tokens and segments
BEGIN = "[CLS]"
END = "[SEP]"
SPECIAL = ["[PAD]", BEGIN, END]
FILES = (".json", ".txt", ".model", ".jinja")  # of tokenizers
MOST_GROWTH = 10_000  # of a text by normalisation: rules that replace a letter by thousands multiply one another
RARE = 2  # fewest occurrences of a piece that becomes a token
WHAT = "the data source 'text'"

Text = str | tuple[str, str]  # one, or a pair


def trained(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train byte-pair encoding (arXiv:1508.07909) on the bytes of lower-case texts, a function of them alone.

    A text becomes [CLS] … [SEP], a pair [CLS] … [SEP] … [SEP] with its second text in segment 1. ``vocabulary`` is the
    most tokens, including 256 bytes and the special tokens.
    """
    tokenizers = extra("tokenizers", "text", WHAT)
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = byte_level()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    # Not WordPiece: its trainer numbers the alphabet in another order each time, and breaks ties by these numbers.
    alphabet = byte_level.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=RARE,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    marks = [(name, tokenizer.token_to_id(name)) for name in (BEGIN, END)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", pair=f"{BEGIN} $A {END} $B:1 {END}:1", special_tokens=marks
    )
    return tokenizer


def tokenizer_at(name: str) -> Tokenizer:
    """Load the tokenizer of a model by its name on the hub or its folder; it must be one of the "fast" format."""
    return pretrained_at(name).backend_tokenizer


def pretrained_at(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer as transformers has it, with its chat template."""
    transformers = extra("transformers", "text", WHAT)
    announce_download(name, "tokenizer_config.json", "the tokenizer")
    try:
        found = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # invalid files raise anything
        reason = " ".join(str(error).split())
        raise UserError(f"option tokenizer = {name!r}: no tokenizer can be read there: {reason}") from None
    tokenizer = getattr(found, "backend_tokenizer", None)
    if tokenizer is None:
        raise UserError(f"option tokenizer = {name!r}: a {type(found).__name__} has no fast form (tokenizer.json)")
    if tokenizer.get_vocab_size() <= len(tokenizer.get_added_tokens_decoder()):  # created for a folder without one
        raise UserError(f"option tokenizer = {name!r}: no tokenizer is there, or one of special tokens alone")
    rules = tokenizer.normalizer.__getstate__() if tokenizer.normalizer else b""
    factors = re.findall(rb'"(?:content|prepend)":"((?:[^"\\]|\\.)+)"', rules)  # texts put in place of others
    if (growth := prod(map(len, factors))) > MOST_GROWTH:
        raise UserError(f"option tokenizer = {name!r}: its normaliser may lengthen a text {growth:,} times")
    return found


def vocabulary_of(tokenizer: Tokenizer) -> int:
    """Return V: all tokens' numbers are below it; some of 0 to V − 1 may name no token."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def tokenizer_files(name: str) -> list[Path]:
    """Return the files of a folder that determine its tokenizer; none for a name on the hub."""
    return sorted(path for path in Path(name).glob("*") if path.suffix in FILES) if name else []


def encode(tokenizer: Tokenizer, texts: Sequence[Text], length: int) -> tuple[list[np.ndarray], int]:
    """Return the tokens of each text with their segments, int32 [l, 2], and the number of texts that were cut.

    ``length`` limits l, including the tokens for beginning and end; the longer text of a pair is cut first. The library
    uses all processors, unless ``TOKENIZERS_PARALLELISM=false``. A tokenizer without a token for unknown pieces is
    refused if a text has one.
    """
    tokenizer.no_padding()
    if (added := tokenizer.num_special_tokens_to_add(tuple in map(type, texts[:1]))) >= length:
        raise UserError(f"the tokenizer adds {added:,} tokens to a text, option length = {length} is the most in all")
    tokenizer.enable_truncation(length)
    try:
        encodings = tokenizer.encode_batch(list(texts))
        tokens = [np.array([each.ids, each.type_ids], STORED).T for each in encodings]
    except BaseException as error:
        # The library's own are plain exceptions. A rule that panics, as after too long a search, is none at all.
        if type(error) not in (Exception, OverflowError) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"the tokenizer cannot encode the texts: {error}") from None
    cut = sum(bool(each.overflowing) for each in encodings)
    return tokens, cut


def padded(tokens: Sequence[np.ndarray]) -> np.ndarray:
    """Return texts of several lengths as one array, int64 [b, 2, l] with l the length of the longest.

    >>> padded([np.array([[7, 0]], STORED), np.array([[8, 0], [9, 1]], STORED)]).tolist()
    [[[7, -1], [0, -1]], [[8, 9], [0, 1]]]
    """
    if not tokens:
        return np.empty((0, 2, 0), np.int64)
    lengths = np.array([len(each) for each in tokens])
    out = np.full((len(tokens), lengths.max(), 2), PADDING, np.int64)
    there = np.arange(out.shape[1]) < lengths[:, None]  # [b, l]
    out[there] = np.concatenate(tokens)
    return np.ascontiguousarray(out.transpose(0, 2, 1))
