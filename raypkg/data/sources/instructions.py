"""Instructions with answers, for language models: only the tokens of the answers carry loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from raypkg.core.errors import UserError
from raypkg.data.files import check_alike
from raypkg.data.split import Split
from raypkg.data.store.cache import Cache
from raypkg.data.tokenizer import STORED, pretrained_at, vocabulary_of

from . import dataset
from .text import Encoder, TextTable, tokenised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAIR = ("prompt", "completion")
MESSAGES = ("messages",)
SOURCE = "source"
ALL = "all"  # the only source, without a column of sources
Chat = list[dict[str, Any]]  # messages, each with role and content


@dataset("instructions")
def load(
    root: str,
    *,
    split: str,
    cache: Cache,
    tokenizer: str = "",
    length: Annotated[int, Field(ge=4, le=1 << 16)] = 512,
    source: str = "",
    test: Annotated[float, Field(ge=0, lt=1)] = 0.2,
) -> Split:
    """Instructions with answers in parquet, CSV, TSV or JSON lines named train* and test* in PATH, or one file.

    Columns are prompt and completion, or messages: lists of {role, content}. A sample becomes text by the tokenizer's
    chat template, a prompt as the user's message and its completion as the assistant's. Every assistant message carries
    loss, from the prompt to generate it up to its end; nothing else does. Without a template, prompt and completion are
    tokenised each by itself, and the end token follows. Samples are never packed: each is one that a rule selects.

    Args:
        root: PATH; of a single file, the share ``test`` is the test split, drawn by its length alone.
        split: "train" or "test".
        cache: folder of the memory-mapped stores.
        tokenizer: name on the hub, or folder; `transformers-lm:NAME` sets it by itself.
        length: most tokens of a sample; longer ones are cut, with a warning.
        source: column of the samples' sources, their classes (default: source if there is one, else all are of one).
        test: share of a single file.

    Raises:
        UserError: missing, unreadable or wrong files or columns; no or an empty answer, or none within ``length``;
            messages without a template, or with one that renders the beginning of a chat in another way than the whole.
    """
    if not tokenizer:
        give = "give --model transformers-lm:NAME or --set dataset.options.tokenizer=NAME"
        raise UserError(f"instructions need the tokenizer of a language model: {give}")

    def encoder(train: InstructionTable, rows: np.ndarray) -> Encoder:
        found = pretrained_at(tokenizer)
        if not found.chat_template and train.columns == MESSAGES:
            raise UserError(f"option tokenizer = {tokenizer!r}: it has no chat template, which messages need")
        if not found.chat_template and found.eos_token_id is None:
            raise UserError(f"option tokenizer = {tokenizer!r}: it has neither a chat template nor an end token")
        return lambda table, rows: table.encoded(found, rows, length), vocabulary_of(found.backend_tokenizer), ""

    table = partial(InstructionTable, columns=(), label=source, unlabelled=False)
    key = dict(source=source, form="instructions 1")
    return tokenised(root, table, encoder, key, split=split, cache=cache, tokenizer=tokenizer, length=length, test=test)


class InstructionTable(TextTable):
    """The files of one split, read as one table of chats; its labels are the sources."""

    usual: ClassVar[Sequence[tuple[str, ...]]] = (MESSAGES, PAIR)
    unusual: ClassVar[str] = "needed are prompt and completion, or messages"
    missing: ClassVar[str] = "source"

    def _labelled(self, tables: list[pa.Table], label: str) -> tuple[list[pa.Table], str, tuple[str, ...]]:
        if label or SOURCE in tables[0].column_names:
            return super()._labelled(tables, label or SOURCE)
        check_alike(self.files, [table.schema for table in tables])
        of_all = [pa.array([ALL] * len(table), pa.large_string()) for table in tables]
        return [table.append_column(SOURCE, of) for table, of in zip(tables, of_all, strict=True)], SOURCE, ()

    def encoded(
        self, tokenizer: PreTrainedTokenizerFast, rows: np.ndarray, length: int
    ) -> tuple[list[np.ndarray], int]:
        """Return each sample's tokens, int32 [l, 2] with 1 for answered ones, and the number of samples cut."""
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        tokens = []
        if tokenizer.chat_template:
            rendered = [self._rendered(tokenizer, chat, row) for chat, row in zip(self.chats(rows), rows, strict=True)]
            encodings = backend.encode_batch([text for text, _ in rendered], add_special_tokens=False)
            for each, (_, answers) in zip(encodings, rendered, strict=True):
                begins, ends = np.array(each.offsets).reshape(-1, 2).T  # in the text, of each token
                # A token on the border of an answer is part of it.
                inside = [(ends > begin) & (begins < end) for begin, end in answers]
                tokens.append(np.stack([each.ids, np.any(inside, 0)], 1).astype(STORED))
        else:
            begin = [token for token in backend.encode("").ids[:1] if token == tokenizer.bos_token_id]
            encodings = backend.encode_batch([*self.everything(rows)], add_special_tokens=False)
            for prompt, completion in zip(encodings[::2], encodings[1::2], strict=True):
                asked, told = [*begin, *prompt.ids], [*completion.ids, tokenizer.eos_token_id]
                tokens.append(np.array([(i, 0) for i in asked] + [(i, 1) for i in told], STORED))
        for sample, row in zip(tokens, rows, strict=True):
            if not sample[1:length, 1].any():  # nothing predicts the first token
                sizes = f"the first {length} of its {len(sample)} tokens"
                raise UserError(f"{self._place(int(row))} has no answer within {sizes}: raise option length")
        return [sample[:length] for sample in tokens], sum(len(sample) > length for sample in tokens)

    def chats(self, rows: np.ndarray) -> list[Chat]:
        """Return the messages of rows; raises UserError if one has no answer, or an empty one."""
        if self.columns == PAIR:
            roles = ("user", "assistant")
            return [[{"role": r, "content": t} for r, t in zip(roles, pair, strict=True)] for pair in self.texts(rows)]
        (name,) = self.columns
        column = self._table[name]
        kind = getattr(column.type, "value_type", column.type)
        if not pa.types.is_struct(kind) or not {"role", "content"} <= {field.name for field in kind}:
            problem = f"{column.type}, needed are lists of {{role, content}}"
            raise UserError(f"column {name!r} of {self._name!r} is {problem}")
        chats = []
        for row, messages in zip(rows, column.take(rows).to_pylist(), strict=True):
            chat = [{key: value for key, value in (each or {}).items() if value is not None} for each in messages or ()]
            problem = ""
            if any(not isinstance(each.get(key), str) for each in chat for key in ("role", "content")):
                problem = "a message without a text as its role or its content"
            elif not (answers := [each["content"] for each in chat if each["role"] == "assistant"]):
                problem = "no assistant message, so nothing of it would carry loss"
            elif not all(map(str.strip, answers)):
                problem = "an empty assistant message"
            if problem:
                raise UserError(f"{self._place(int(row))} has {problem}")
            chats.append(chat)
        return chats

    def _rendered(self, tokenizer: PreTrainedTokenizerFast, chat: Chat, row: int) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a chat, and where in it each assistant message begins and ends."""

        def text_of(count: int, **options: Any) -> str:
            try:
                return str(tokenizer.apply_chat_template(chat[:count], tokenize=False, **options))
            except Exception as error:  # a template raises anything
                raise UserError(f"{self._place(int(row))}: the chat template refuses it: {error}") from None

        whole = text_of(len(chat))
        answers = []
        for number, message in enumerate(chat):
            if message["role"] == "assistant":
                before, after = text_of(number, add_generation_prompt=True), text_of(number + 1)
                if not (whole.startswith(after) and after.startswith(before)):
                    problem = "renders the beginning of the chat in another way than the whole"
                    raise UserError(f"{self._place(int(row))}: the chat template {problem}, so no answer can be found")
                answers.append((len(before), len(after)))
        return whole, answers
