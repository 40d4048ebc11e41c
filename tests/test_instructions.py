"""Instructions: which tokens are answered, by hand; sources as classes; and every wrong input in one line."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypkg.core.errors import UserError
from raypkg.data import load_data
from raypkg.experiments.samples import open_samples
from raypkg.experiments.train import TrainSettings
from tiny_language import CHAT, instructions, tiny_language

transformers = pytest.importorskip("transformers")
TemplateProcessing = pytest.importorskip("tokenizers.processors").TemplateProcessing
PAIR = {"prompt": "cat", "completion": "dog"}
MULTI = [
    {"role": "system", "content": "Be short"},
    {"role": "user", "content": "cat?"},
    {"role": "assistant", "content": "cat"},
    {"role": "user", "content": "and dog?"},
    {"role": "assistant", "content": "dog too"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "chat": tiny_language(folder / "chat"),
        "bare": tiny_language(folder / "bare", template=False),
        "folder": folder,
    }


@pytest.fixture
def load(tmp_path, models):
    def loaded(rows, tokenizer="chat", name="rows.jsonl", test=0.0, **options):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"tokenizer": str(models.get(tokenizer, tokenizer)), "length": 96, "test": test, **options}
        return load_data(f"instructions:{file}", options, cache=tmp_path / "cache")

    return loaded


@pytest.fixture
def train(load):
    """Return the train split alone; half of the rows, drawn by their number, are the test split."""
    return lambda rows, *arguments, **options: load(rows * 2, *arguments, test=0.5, **options).train


def asked_and_answered(split, row, tokenizer):
    tokens, segments = split.batch([row])[0][0]
    text = [tokenizer.decode(tokens[segments == segment].tolist()) for segment in (0, 1)]
    runs = np.split(tokens.numpy(), np.flatnonzero(np.diff(segments.numpy())) + 1)
    return text, [tokenizer.decode(run.tolist()) for run in runs]


def tokenizer_of(models, name="chat"):
    return transformers.AutoTokenizer.from_pretrained(models[name])


def test_each_assistant_message_of_a_chat_is_answered_and_nothing_else(train, models):
    split = train([{"messages": MULTI}])
    _, runs = asked_and_answered(split, 0, tokenizer_of(models))
    assert runs == [
        "<|im_start|>system\nBe short<|im_end|>\n<|im_start|>user\ncat?<|im_end|>\n<|im_start|>assistant\n",
        "cat<|im_end|>\n",
        "<|im_start|>user\nand dog?<|im_end|>\n<|im_start|>assistant\n",
        "dog too<|im_end|>\n",
    ]
    tokens = split.batch([0])[0][0, 0]
    assert tokens.tolist() == tokenizer_of(models).apply_chat_template(MULTI, return_dict=False)


def test_a_prompt_is_the_users_message_and_its_completion_the_assistants(train, models):
    chat = [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "a cat"}]
    pair = train([{"prompt": "cat?", "completion": "a cat"}])
    messages = train([{"messages": chat}], name="messages.jsonl")
    assert pair.batch([0])[0].equal(messages.batch([0])[0])


@pytest.mark.parametrize("begun", [False, True])
def test_without_a_template_the_completions_own_tokens_and_the_end_are_answered(train, models, tmp_path, begun):
    tokenizer = tokenizer_of(models, "bare")
    prompt, completion = (tokenizer.encode(text, add_special_tokens=False) for text in ("What is 1", "one cat"))
    if begun:  # the token of the beginning comes first
        tokenizer.bos_token = "<|im_start|>"
        begin = [("<|im_start|>", tokenizer.bos_token_id)]
        backend = tokenizer.backend_tokenizer
        backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=begin)
        prompt.insert(0, tokenizer.bos_token_id)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    x = train([{"prompt": "What is 1", "completion": "one cat"}], str(tmp_path / "tokenizer")).batch([0])[0][0]
    assert x[0].tolist() == [*prompt, *completion, tokenizer.eos_token_id]
    assert x[1].tolist() == [0] * len(prompt) + [1] * (len(completion) + 1)


def test_a_token_on_the_border_belongs_to_the_answer(train, models, tmp_path):
    place = tmp_path / "merging"
    shutil.copytree(models["chat"], place)  # a prompt ends in "t", an answer begins with "he"
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} t{% else %}{{ m.content }}{% endif %}"
    (place / "chat_template.jinja").write_text(template + "{% endfor %}")
    split = train([{"prompt": "What is", "completion": "he sum"}], str(place))
    (asked, answered), _ = asked_and_answered(split, 0, tokenizer_of(models))
    assert (asked, answered) == ("What is", " the sum")


def test_sources_are_the_classes_and_a_single_one_is_enough(load, tmp_path, models):
    row = {"prompt": "cat", "completion": "dog", "source": "zoo", "origin": "web"}
    rows = [row | {"prompt": f"cat {i}", "origin": "web" if i % 2 else "book"} for i in range(10)]
    assert load(rows, test=0.2).train.classes == ("zoo",)
    data = load(rows, source="origin", test=0.2)
    assert data.train.classes == data.test.classes == ("book", "web")
    assert (len(data.train), len(data.test)) == (8, 2)
    assert load([{key: each[key] for key in PAIR} for each in rows], test=0.2).train.classes == ("all",)


PAIRS = [{"prompt": f"What is {i}", "completion": f"{i}", "source": "01"[i % 2]} for i in range(10)]
CHATS = [{"messages": MULTI[i % 2 :]} for i in range(10)]


@pytest.mark.parametrize(("suffix", "rows"), [("parquet", PAIRS), ("csv", PAIRS), ("tsv", PAIRS), ("parquet", CHATS)])
def test_every_format_gives_the_samples_of_json_lines(suffix, rows, load, tmp_path, models):
    expected = load(rows, test=0.2)
    file = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        mark = "," if suffix == "csv" else "\t"
        file.write_text("\n".join(mark.join(line) for line in [rows[0], *(each.values() for each in rows)]) + "\n")
    options = {"tokenizer": str(models["chat"]), "length": 96}
    data = load_data(f"instructions:{file}", options, cache=tmp_path / "cache")
    for ours, theirs in zip(data, expected, strict=True):
        assert ours.batch(range(len(ours)))[0].equal(theirs.batch(range(len(theirs)))[0])
        assert ours.y.equal(theirs.y) and ours.classes == theirs.classes == (("0", "1") if rows == PAIRS else ("all",))


def test_a_longer_sample_is_cut_with_a_warning_and_keeps_a_part_of_its_answer(train, caplog):
    rows = [{"prompt": "cat", "completion": "dog " * 20}]
    x = train(rows, length=24).batch([0])[0][0]
    assert x.shape == (2, 24) and x[1, -1] == 1
    assert "1 of 1 train texts are cut at 24 tokens (option length)" in caplog.text


def test_held_out_samples_come_from_every_source(tmp_path, models):
    file = instructions(tmp_path, 50)
    dataset = {"name": f"instructions:{file}", "validation": 0.25, "options": {"tokenizer": str(models["chat"])}}
    samples = open_samples(TrainSettings(dataset=dataset))
    assert samples.data.train.y[samples.held_out].bincount().tolist() == [5, 5]


def test_another_template_gives_other_tokens(train, models, tmp_path):
    place = tmp_path / "again"
    shutil.copytree(models["chat"], place)
    rows = [{"prompt": "cat", "completion": "dog"}]
    before = train(rows, str(place)).batch([0])[0]
    (place / "chat_template.jinja").write_text(CHAT.replace("<|im_end|>\n", "<|im_end|>"))
    assert train(rows, str(place)).batch([0])[0].shape[2] < before.shape[2]


ONE = [{"role": "user", "content": "cat?"}]


@pytest.mark.parametrize(
    ("rows", "options", "match"),
    [
        ([PAIR | {"completion": " "}], {}, r"sample 0 \(from 0\) of .*rows.jsonl' has no text in 'completion'"),
        ([{"prompt": "cat"}], {}, r"none of the usual columns .* source, prompt: needed are prompt and completion, or"),
        ([{"messages": ONE}], {}, r"sample 0 .* has no assistant message, so nothing of it would carry loss"),
        ([{"messages": [*ONE, {"role": "assistant", "content": ""}]}], {}, "has an empty assistant message"),
        ([{"messages": [*ONE, {"role": "assistant"}]}], {}, "a message without a text as its role or its content"),
        ([{"messages": "cat"}], {}, r"column 'messages' of .* is large_string, needed are lists of {role, content}"),
        ([{"messages": MULTI}], {"tokenizer": "bare"}, "bare': it has no chat template, which messages need"),
        ([PAIR], {"tokenizer": ""}, "instructions need the tokenizer of a language model: give --model transf"),
        ([PAIR], {"length": 8}, r"sample 0 .* has no answer within the first 8 of its \d+ tokens: raise option length"),
        ([PAIR], {"source": "sorce"}, r"unknown label column of .* 'sorce', did you mean 'source'"),
        ([PAIR | {"source": None}, PAIR | {"source": "a"}], {}, r"sample 0 .* has no source$"),
    ],
)
def test_errors_are_one_line(load, rows, options, match, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    whole = [{"source": "a", **row} for row in rows] if "source" not in rows[0] else rows
    with pytest.raises(UserError, match=match) as error:
        load(whole, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ raise_exception('no chats here') }}", r"sample \d .*: the chat template refuses it: no chats here"),
        ("{{ messages | length }}" + CHAT, "renders the beginning of the chat in another way than the whole"),
        ("", "it has neither a chat template nor an end token"),
    ],
)
def test_templates_of_others_are_checked(train, models, tmp_path, template, match):
    tokenizer = tokenizer_of(models, "chat" if template else "bare")
    tokenizer.chat_template, rows = template or None, [{"messages": MULTI}] if template else [PAIR]
    if not template:
        tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=match) as error:
        train(rows, str(tmp_path / "other"))
    assert "\n" not in str(error.value)
