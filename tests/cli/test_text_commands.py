"""Texts on the command line: tokens of the model, settings of the paper, and models without texts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import raypkg
from exported import probabilities
from raypkg.core.errors import UserError
from raypkg.data.kinds import TEXTS
from raypkg.data.tokenizer import trained

pytest.importorskip("tokenizers")
SNLI = "--preset snli --set dataset.options.length=128 --set dataset.options.unlabelled=true"
WORDS = "a the cat dog bird sat ran flew under over mat house tree".split()
SMALL = "--model transformer --set model.options.width=16 --train.epochs 2 --train.optimizer adamw --train.lr 1e-3"


def lines(count, seed):
    draws = np.random.default_rng(seed)
    for i in range(count):
        premise, hypothesis = (" ".join(draws.choice(WORDS, 6)) for _ in range(2))
        yield f"{premise},{hypothesis},{('yes', 'no', 'perhaps')[i % 3]}"


@pytest.fixture
def pairs(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split, count in (("train", 90), ("test", 12)):
        text = "\n".join(["premise,hypothesis,label", *lines(count, seed=count)])
        (folder / f"{split}.csv").write_text(text + "\n")
    return f"text:{folder}"


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A folder in the format of Hugging Face: a random network and its own tokenizer."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = trained(WORDS * 3, 300)
    folder = tmp_path / "checkpoint"
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=32, **small)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    wrapped.save_pretrained(folder)
    return folder


def test_a_trained_model_predicts_texts(effray, pairs, tmp_path, monkeypatch):
    text = effray(f"train --name one --dataset {pairs} {SMALL}")
    assert "test accuracy" in text
    model = raypkg.load_model("runs/train/one")
    split = raypkg.load_data(pairs).test
    x, y = split.batch(range(len(split)))
    labels, probabilities, names = model.predict(x)
    assert labels.shape == y.shape and model.classes == ("no", "perhaps", "yes")
    assert names == [model.classes[label] for label in labels] and probabilities.argmax(1).equal(labels)

    place = tmp_path / "elsewhere"
    shutil.copytree("runs/train/one", place / "one")
    monkeypatch.chdir(place)
    told = [line.split(",")[:2] for line in Path(pairs[5:], "test.csv").read_text().splitlines()[1:]]
    moved = raypkg.load_model("one")
    assert torch.equal(moved.predict([tuple(pair) for pair in told]).probabilities, probabilities)
    assert moved.predict(["a cat sat"]).names[0] in moved.classes
    for wrong in ("a cat sat", [1, 2], [[1.0]]):
        with pytest.raises(UserError, match=r"predict takes .* or texts or pairs of them"):
            moved.predict(wrong)
    with pytest.raises(UserError, match=r"predict takes int64 \[b, 2, l\] as they are stored"):
        model.predict(x.float())


def test_texts_are_cut_into_the_tokens_of_the_model_up_to_its_positions_and_exported(
    effray, refusal, pairs, checkpoint
):
    transformers = pytest.importorskip("transformers")
    assert "give --set dataset.options.length=32" in refusal(
        f"train --dataset {pairs} --model transformers:./checkpoint"
    )
    effray(f"train --name one --dataset {pairs} --model transformers:./checkpoint --set dataset.options.length=24 "
           "--train.epochs 1 --train.decay matrices --train.clip 1 --train.schedule linear")  # fmt: skip
    stored = Path("runs/train/one/config.toml").read_text()
    assert f'tokenizer = "{checkpoint}"' in stored and f'name = "transformers:{checkpoint}"' in stored
    split = raypkg.load_data(pairs, {"tokenizer": str(checkpoint), "length": 24}).train
    assert split.shape == (24, 300) and TEXTS.fits(split.batch([0])[0], split.shape)

    effray("export one --to transformers")
    network = transformers.AutoModelForSequenceClassification.from_pretrained("one-transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained("one-transformers")
    firsts, seconds, _ = zip(*(line.split(",") for line in lines(8, 3)), strict=True)
    tokens = tokenizer(list(firsts), list(seconds), padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        found = network(**tokens).logits.softmax(1)
    expected = raypkg.load_model("one").predict([*zip(firsts, seconds, strict=True)])
    torch.testing.assert_close(found, expected.probabilities, rtol=1e-5, atol=1e-5)
    assert [network.config.id2label[label] for label in found.argmax(1).tolist()] == expected.names


def test_the_papers_settings_for_snli_are_settings(effray, pairs):
    text = effray(f"crest {SNLI} --dataset {pairs} {SMALL} --train.epochs 8 --budget 0.5 --crest.subset 0.5 --dry-run")
    assert "tau = 0.05" in text and 'decay = "matrices"' in text and "unlabelled = true" in text
    assert "shape up to 128 tokens out of" in text


def test_every_method_that_takes_texts_takes_them(effray, pairs):
    effray(f"lipt --dataset {pairs} {SMALL} --pretrain.models 2 --pretrain.epochs 1 --select.fraction 0.3")
    effray(f"crest --dataset {pairs} {SMALL} --budget 0.5 --train.batch_size 8")
    effray(f"sparse --dataset {pairs} {SMALL} --density 0.3 --growth gradient --agent --train.batch_size 8")
    effray(f"train --dataset {pairs} {SMALL} --select.rule craig --select.fraction 0.3 --select.warm-epochs 1")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train --model mlp", "takes images and rows"),
        ("deltagrad train --model transformer --set model.options.dropout=0.0", "holds texts: DeltaGrad takes images"),
        (f"train {SMALL} --dataset.augment crop", "no images"),
    ],
)
def test_refused_texts(refusal, pairs, line, told):
    assert told in refusal(f"{line} --dataset {pairs}")


def test_a_model_is_not_given_the_tokens_of_other_texts(effray, refusal, pairs, tmp_path):
    shutil.copytree(tmp_path / "pairs", tmp_path / "others")
    effray(f"train --name one --dataset {pairs} {SMALL}")
    for line in (f"train {SMALL} --train.from one", "embed --model-from one --cluster.workers 0"):
        message = refusal(f"{line} --dataset text:{tmp_path}/others")
        assert "are not cut into the tokens of run 'one'" in message


@pytest.mark.slow
def test_a_graph_of_texts_takes_any_length(effray, pairs):
    pytest.importorskip("onnxruntime")
    effray(f"train --name one --dataset {pairs} {SMALL}")
    effray("export one --to onnx")
    x, _ = raypkg.load_data(pairs).test.batch(range(5))
    for some in (x, x[:2, :, :9]):
        found, _ = probabilities("one-onnx/README.md", some)
        torch.testing.assert_close(found, raypkg.load_model("one").predict(some).probabilities, rtol=1e-5, atol=1e-5)
    assert Path("one-onnx/tokenizer.json").exists()
