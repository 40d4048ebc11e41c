"""Texts: columns and labels in every format, tokens, batches, splits and errors."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gloo import on_workers
from raypkg.core.errors import UserError
from raypkg.data import load_data
from raypkg.data.kinds import TEXTS
from raypkg.data.tokenizer import encode, trained
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.engine.worker import Worker
from raypkg.models import build_model

pytest.importorskip("tokenizers")
WORDS = "the a cat dog sat ran on under mat house red blue big small who where".split()
NAMES = ("animal", "place", "colour")


def sentences(count, seed=0):
    draws = np.random.default_rng(seed)
    return [" ".join(draws.choice(WORDS, draws.integers(2, 12))) for _ in range(count)]


TRAIN, TEST = sentences(30), sentences(9, seed=1)
LABELS = {"train": np.arange(30) % 3, "test": np.arange(9) % 3}


@pytest.fixture
def load(tmp_path):
    return lambda **options: load_data(f"text:{tmp_path / 'set'}", options, cache=tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()

    def put(split, columns, suffix=".parquet", names=()):
        table = pa.table(columns)
        file = folder / f"{split}-00000-of-00001{suffix}"
        if suffix == ".parquet":
            feature = {"info": {"features": {"label": {"names": list(names)}}}} if names else {}
            pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(feature)}), file)
        elif suffix in (".csv", ".tsv"):
            mark = "," if suffix == ".csv" else "\t"
            rows = zip(*table.to_pydict().values(), strict=True)
            lines = [mark.join(table.column_names), *(mark.join(map(str, row)) for row in rows)]
            file.write_text("\n".join(lines) + "\n")
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        return file

    return put


@pytest.fixture
def written(write):
    def put(**more):
        for split, texts in (("train", TRAIN), ("test", TEST)):
            write(split, {"text": texts, "label": LABELS[split]}, **more)

    return put


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".jsonl"])
def test_every_form_gives_the_same_samples(written, load, suffix):
    written(suffix=suffix)
    data = load(length=16)
    x, y = data.train.batch(range(30))
    tokenizer = trained(TRAIN, 8192)
    assert data.train.kind is TEXTS and data.train.shape == (16, tokenizer.get_vocab_size())
    assert y.tolist() == LABELS["train"].tolist() and data.train.classes == ("0", "1", "2")
    for row, text in zip(x, TRAIN, strict=True):
        assert row[0][row[0] >= 0].tolist() == tokenizer.encode(text).ids
    assert len(data.test) == 9


def test_a_batch_is_as_long_as_its_longest_text_and_padded_in_both_rows(written, load):
    written()
    split = load().train
    lengths = [int((split.batch([i])[0][0, 0] >= 0).sum()) for i in range(30)]
    x, _ = split.batch([3, 7, 1])
    assert x.dtype == torch.int64 and x.shape == (3, 2, max(lengths[i] for i in (3, 7, 1)))
    assert [(row[0] >= 0).sum().item() for row in x] == [lengths[i] for i in (3, 7, 1)]
    assert torch.equal(x[:, 0] < 0, x[:, 1] < 0)
    assert split.batch([])[0].shape == (0, 2, 0)


def test_of_a_pair_the_second_text_is_in_segment_one(write, load):
    for split, texts in (("train", TRAIN), ("test", TEST)):
        write(split, {"premise": texts, "hypothesis": texts[::-1], "label": LABELS[split]})
    x, _ = load().train.batch([0])
    tokenizer = trained([text for pair in zip(TRAIN, TRAIN[::-1], strict=True) for text in pair], 8192)
    expected = tokenizer.encode(TRAIN[0], TRAIN[-1])
    assert x[0].tolist() == [expected.ids, expected.type_ids]
    assert {0, 1} == set(expected.type_ids)


def test_the_tokenizer_is_a_function_of_the_train_texts(tmp_path):
    first, again, other = trained(TRAIN, 8192), trained(iter(TRAIN), 8192), trained(TEST, 8192)
    assert first.to_str() == again.to_str() != other.to_str()
    assert first.decode(first.encode("the BIG cat").ids).strip() == "the big cat"
    assert trained(TRAIN, 300).get_vocab_size() == 300


def test_longer_texts_are_cut_with_a_warning(written, load, caplog):
    written()
    split = load(length=6).train
    whole = load().train
    longer = [i for i in range(30) if (whole.batch([i])[0][0, 0] >= 0).sum() > 6]
    assert f"{len(longer)} of 30 train texts are cut at 6 tokens" in caplog.text
    x, _ = split.batch(longer)
    assert x.shape[2] == 6 and (x >= 0).all()
    end = trained(TRAIN, 8192).token_to_id("[SEP]")
    assert (x[:, 0, -1] == end).all()  # what marks the end stays


@pytest.mark.parametrize("names", [(), NAMES])
def test_labels_may_be_texts_or_have_names(write, load, names):
    for split, texts in (("train", TRAIN), ("test", TEST)):
        labels = LABELS[split] if names else [NAMES[c] for c in LABELS[split]]
        write(split, {"sentence": texts, "label": labels}, names=names)
    data = load()
    assert data.train.classes == data.test.classes == (names or tuple(sorted(NAMES)))
    assert [data.test.classes[c] for c in data.test.y] == [NAMES[c] for c in LABELS["test"]]


def test_one_file_is_split_by_its_length_alone(write, tmp_path):
    file = write("everything", {"text": TRAIN, "label": LABELS["train"]}, suffix=".csv")
    data = load_data(f"text:{file}", {"test": 0.2}, cache=tmp_path / "cache")
    assert (len(data.train), len(data.test)) == (24, 6)
    assert data.train.shape == data.test.shape


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("names", [NAMES, ()])
@pytest.mark.parametrize("missing", [-1, None])
def test_rows_without_a_label_can_be_dropped(write, load, suffix, names, missing):
    labels = [int(c) if names else NAMES[c] for c in LABELS["train"]]
    write("test", {"text": TEST, "label": labels[:9]}, suffix=suffix, names=names)
    labels[4] = missing if names or missing is None else "-1"
    write("train", {"text": TRAIN, "label": labels}, suffix=suffix, names=names)
    with pytest.raises(UserError, match=r"sample 4 \(from 0\) of .* has no label.*unlabelled=true"):
        load()
    data = load(unlabelled=True)
    assert len(data.train) == 29 and data.train.num_classes == 3


BLANK = [*TRAIN[:5], "  ", *TRAIN[6:]]
GOOD = {"text": TRAIN, "label": LABELS["train"]}


@pytest.mark.parametrize(
    ("train", "options", "match"),
    [
        ({"text": BLANK, "label": LABELS["train"]}, {}, r"sample 5 \(from 0\) of .*train.* has no text in 'text'"),
        ({"words": TRAIN, "label": LABELS["train"]}, {}, r"none of the usual columns of texts among words, label: set"),
        ({"text": TRAIN, "kind": LABELS["train"]}, {}, r"unknown label column of .* 'label'.*Allowed: kind, text"),
        (GOOD | {"label": LABELS["train"] / 2}, {}, r"label column 'label' of .* is double, needed are integers"),
        (GOOD | {"label": ["a" * 1001] * 30}, {}, r"sample 0 .* has a label longer than 1,000 bytes"),
        ({"text": TRAIN[:0], "label": LABELS["train"][:0]}, {}, r"holds no samples"),
        (GOOD, {"tokenizer": "./nowhere"}, r"tokenizer = './nowhere': no tokenizer"),
    ],
)
def test_errors_are_one_line(write, load, train, options, match, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write("train", train)
    write("test", {"text": TEST, "label": LABELS["test"]})
    with pytest.raises(UserError, match=match) as error:
        load(**options)
    assert "\n" not in str(error.value)


NUMBERS = {word: number for number, word in enumerate(WORDS)}
ENDLESS = '"normalizer": {"type": "Replace", "pattern": {"Regex": "([a-z ]+)+!"}, "content": ""}'
LONGER = '{"type": "Replace", "pattern": {"String": "e"}, "content": "' + "e" * 2000 + '"}'
GROWING = f'"normalizer": {{"type": "Sequence", "normalizers": [{LONGER}, {LONGER}]}}'
PAIR = '"pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]'
TEMPLATE = f'"post_processor":{{"type": "TemplateProcessing", {PAIR}, "single": [PIECES]'
ONE = '{"Sequence": {"id": "A", "type_id": TYPE}}'
MARK = '{"SpecialToken": {"id": "the", "type_id": 0}}'
MARKS = '"special_tokens": {"the": {"id": "the", "ids": [0], "tokens": ["the"]}}}'
ADDING = TEMPLATE.replace("PIECES", ", ".join([MARK] * 200 + [ONE.replace("TYPE", "0")])) + f", {MARKS}"
FAR = TEMPLATE.replace("PIECES", ONE.replace("TYPE", str(2**31))) + ', "special_tokens": {}}'


@pytest.mark.parametrize(
    ("numbers", "edit", "match"),
    [
        (NUMBERS | {"where": 99}, ("", ""), None),  # V = 100, of which many numbers name no token
        (NUMBERS, ('"type": "WordLevel"', '"type": "Word"'), "cut': no tokenizer can be read there"),
        ({"the": 0, "a": 1}, ("", ""), r"the tokenizer cannot encode the texts: .*Missing \[UNK\] token"),
        (NUMBERS, ('"normalizer": null', ENDLESS), r"the tokenizer cannot encode the texts: .*retry-limit"),
        (NUMBERS, (f'"where": {NUMBERS["where"]}', f'"where": {2**31}'), "cannot encode the texts: .*2147483648"),
        (NUMBERS, ('"normalizer": null', GROWING), "normaliser may lengthen a text 4,000,000 times"),
    ],
)
def test_tokenizers_of_others_are_checked(written, load, tmp_path, numbers, edit, match):
    transformers = pytest.importorskip("transformers")
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut/tokenizer.json"
    file.write_text(file.read_text().replace(*edit))
    written()
    if match is None:
        train = load(tokenizer=str(tmp_path / "cut")).train
        assert train.shape[1] == 100 and TEXTS.fits(train.batch(range(30))[0], train.shape)
        return
    with pytest.raises(UserError, match=match) as error:
        load(tokenizer=str(tmp_path / "cut"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("edit", "match"), [(ADDING, "adds 200 tokens to a text, option length = 128"), (FAR, "cannot encode the texts")]
)
def test_marks_of_others_are_checked(edit, match):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(NUMBERS, unk_token="[UNK]"))
    marked = tokenizers.Tokenizer.from_str(words.to_str().replace('"post_processor":null', edit))
    with pytest.raises(UserError, match=match):
        encode(marked, ["the"], 128)


def trained_on(worker, folder):
    train = load_data(f"text:{folder}/set", cache=Path(folder) / "cache").train
    model = build_model("transformer", train.shape, 3, seed=0, options={"width": 16, "dropout": 0.0})
    options = {"epochs": 2, "batch_size": 8, "optimizer": "adamw", "lr": 1e-3, "precision": "float64"}
    run = fit(Run.simple(model, train, worker=worker, **options))
    return [weight.detach().numpy() for weight in run.model.parameters()]


def test_two_workers_train_as_one_though_each_pads_its_own_texts(written, tmp_path):
    written()
    alone = trained_on(Worker(), tmp_path)
    for weights in on_workers(2, trained_on, tmp_path):
        for a, b in zip(alone, weights, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
