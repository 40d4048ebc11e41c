"""`effray export` as typed: what each format writes computes what effray's own model does."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

import raypkg
from exported import names_after, probabilities
from tiny_language import instructions, tiny_language

ORDINARY = "train --name one --model resnet8 --train.epochs 1"


def test_weights_build_the_model_again_beside_a_card(effray, refusal, after):
    after(ORDINARY)
    assert effray("export one").startswith("one-safetensors: safetensors")
    model = names_after("one-safetensors/README.md")["model"]
    trained = raypkg.load_model("one")
    state = trained.state_dict()
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    config = json.loads(Path("one-safetensors/config.json").read_text())
    assert config["mean"] == [*trained.mean] and config["classes"] == [*trained.classes]
    text = Path("one-safetensors/README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    (metric,) = front["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == json.loads(Path("runs/train/one/summary.json").read_text())["test_accuracy"]
    assert front["pipeline_tag"] == "image-classification" and "license" not in front
    assert "samples backward" in text and 'name = "resnet8"' in text

    assert "'one-safetensors' exists: give another --out" in refusal("export one")
    assert "an export is a local folder" in refusal("export one --out s3://bucket/one")
    line = refusal("export one --to transformers")
    assert "model 'resnet8' of run 'one' is none of transformers: give --to safetensors or onnx" in line
    assert sorted(os.listdir()) == ["one-safetensors", "runs"]


def test_a_graph_takes_images_as_they_are_stored(effray, after):
    pytest.importorskip("onnxruntime")
    after(ORDINARY)
    effray("export one --to onnx")
    trained = raypkg.load_model("one")
    for count in (1, 7):
        x, _ = raypkg.load_data("digits").test.batch(range(count))
        assert x.dtype == torch.uint8
        found, classes = probabilities("one-onnx/README.md", x)
        torch.testing.assert_close(found, trained.predict(x).probabilities, rtol=1e-5, atol=1e-5)
    assert (
        classes == [*trained.classes] and "which the graph normalises itself" in Path("one-onnx/README.md").read_text()
    )


def test_adapters_are_merged(effray, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    import transformers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_language(tmp_path / "base")
    file = instructions(tmp_path, 24)
    effray(f"train --name one --dataset instructions:{file} --model transformers-lm:./base --train.epochs 1"
           " --train.lr 0.1 --set model.options.rank=2 --set dataset.options.length=64")  # fmt: skip
    effray("export one --to transformers")
    network = transformers.AutoModelForCausalLM.from_pretrained("one-transformers").eval()
    trained = raypkg.load_model("one")
    x = torch.arange(12)[None]
    with torch.inference_mode():
        expected = trained.network(input_ids=x, use_cache=False).logits
        torch.testing.assert_close(network(input_ids=x).logits, expected, rtol=1e-4, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained("one-transformers").chat_template
