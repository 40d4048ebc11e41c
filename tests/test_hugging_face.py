"""Models of Hugging Face: logits of the package itself, heads, first weights, padding, and damaged checkpoints."""

import json
import shutil

import pytest
import torch

from raypkg.core.errors import UserError
from raypkg.core.settings import Model
from raypkg.data import Data
from raypkg.data.augment import compose
from raypkg.data.kinds import IMAGES, TEXTS
from raypkg.data.split import Split
from raypkg.experiments.embedding import named_backbone
from raypkg.models import build_model

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

TEXT, CLASSES = (20, 60), 3
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
OF_TEXTS = {"vocab_size": 60, "max_position_embeddings": 24}
CONFIGS = {
    "bert": transformers.BertConfig(**OF_TEXTS, **SMALL, num_labels=CLASSES),
    "roberta": transformers.RobertaConfig(**OF_TEXTS, **SMALL, type_vocab_size=1, num_labels=CLASSES),
    "distilbert": transformers.DistilBertConfig(
        **OF_TEXTS, dim=16, n_layers=2, n_heads=2, hidden_dim=32, num_labels=CLASSES
    ),
    "vit": transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=CLASSES),
    "dinov2": transformers.Dinov2Config(**SMALL, image_size=8, patch_size=4, num_labels=CLASSES),
}
OF_IMAGES = {"vit", "dinov2"}
IMAGE, HALF = (3, 8, 8), [0.5] * 3


def family(kind):
    if kind in OF_IMAGES:
        return transformers.AutoModelForImageClassification
    return transformers.AutoModelForSequenceClassification


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder of a random checkpoint of three classes, as the package itself writes it."""

    def folder(kind):
        place = tmp_path_factory.getbasetemp() / f"checkpoint-{kind}"
        if not place.exists():
            torch.manual_seed(0)
            family(kind).from_config(CONFIGS[kind]).save_pretrained(place)
        return place

    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def build(place, shape=TEXT, classes=CLASSES, seed=0, **options):
    return build_model(f"transformers:{place}", shape, classes, seed=seed, options=options)


def plain_logits(network, x):
    """Return the logits as the package's own users ask for them."""
    if x.dim() == 4:
        return network(pixel_values=x).logits
    there = x[:, 0] >= 0
    inputs = {"input_ids": x[:, 0].where(there, network.config.pad_token_id), "attention_mask": there.long()}
    if getattr(network.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = x[:, 1].clamp_min(0)
    return network(**inputs).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_the_package_and_of_head_and_features(saved, kind):
    shape = IMAGE if kind in OF_IMAGES else TEXT
    model = build(saved(kind), shape).eval()
    network = family(kind).from_pretrained(saved(kind)).eval()
    x = (IMAGES if kind in OF_IMAGES else TEXTS).example(6, shape)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain_logits(network, x), rtol=1e-5, atol=1e-5)
        assert torch.equal(model.head(model.features(x)), model(x))
    assert model.head.out_features == CLASSES


@torch.no_grad()
def assert_padding_changes_nothing(model, x):
    x[:, :, 8:] = -1
    torch.testing.assert_close(model(x), model(x[:, :, :8]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2, :, :8]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), model(x.roll(1, 2).where(x >= 0, -1)))  # but where tokens stand does


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "built in"])
def test_what_a_text_is_padded_to_changes_nothing(saved, kind):
    model = build_model("transformer", TEXT, CLASSES, seed=0) if kind == "built in" else build(saved(kind))
    assert_padding_changes_nothing(model.eval(), TEXTS.example(4, TEXT))


def test_a_decoder_without_a_padding_token_gets_that_of_the_end(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=24, bos_token_id=58, eos_token_id=59
    )
    torch.manual_seed(0)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    model = build(tmp_path).eval()
    x = TEXTS.example(4, TEXT)
    x[x == 59] = 0
    assert_padding_changes_nothing(model, x)
    assert torch.equal(model.head(model.features(x)), model(x))


def test_a_head_of_other_classes_is_drawn_by_the_seed_and_the_body_is_kept_unless_it_is_drawn_as_well(saved):
    model, again, other = (build(saved("bert"), classes=5, seed=seed) for seed in (0, 0, 1))
    assert model.head.out_features == 5
    assert torch.equal(model.head.weight, again.head.weight)
    assert not torch.equal(model.head.weight, other.head.weight)
    stored = load_file(saved("bert") / "model.safetensors")
    body = {name: value for name, value in model.state_dict().items() if not name.startswith("head")}
    assert len(body) == len(stored) - 2
    for name, value in body.items():
        assert torch.equal(value, stored[name.removeprefix("features.network.")]), name
    word = "bert.embeddings.word_embeddings.weight"
    drawn, other = (
        build(saved("bert"), weights=False, seed=s).get_parameter(f"features.network.{word}") for s in (0, 1)
    )
    assert drawn.shape == stored[word].shape and not torch.equal(drawn, stored[word]) and not torch.equal(drawn, other)


def test_dropout_is_set_in_all_its_places(saved):
    layers = [layer for layer in build(saved("roberta"), dropout=0.0).modules() if isinstance(layer, torch.nn.Dropout)]
    assert layers and all(layer.p == 0 for layer in layers)
    assert any(layer.p == 0.1 for layer in build(saved("roberta")).modules() if isinstance(layer, torch.nn.Dropout))


def halved(place):
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def of_a_pickle(place):
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()


def without_a_layer(place):
    tensors = load_file(place / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "layer.1" not in name}
    save_file(kept, place / "model.safetensors", metadata={"format": "pt"})


def with_another_tokenizer(place):
    from raypkg.data.tokenizer import trained

    trained(["a b c"], 300).save(str(place / "tokenizer.json"))


def stating(**pixels):
    """Say beside a checkpoint of images how the values of pixels were normalised."""
    return lambda place: (place / "preprocessor_config.json").write_text(json.dumps(pixels))


@pytest.mark.parametrize(
    ("kind", "shape", "damage", "match"),
    [
        ("bert", TEXT, halved, "cannot be read: .*"),
        ("bert", TEXT, lambda place: (place / "tokenizer.json").write_text("{}"), "cannot be read: Model missing"),
        ("bert", TEXT, of_a_pickle, "cannot be read: .*no file named model.safetensors"),
        ("bert", TEXT, without_a_layer, r"lacks 16 of the network's tensors, such as bert.encoder.*: it is incomplete"),
        ("bert", TEXT, with_another_tokenizer, "knows 259 tokens, the data set's tokenizer has 60: give --set .*izer="),
        ("vit", IMAGE, stating(image_mean=0.5, image_std=HALF), "cannot be read: .*image_mean"),
        ("vit", IMAGE, stating(image_mean=HALF, image_std=[0.5, 0, 0.5]), "cannot be read: .*image_std"),
        ("vit", IMAGE, stating(image_mean=HALF[1:], image_std=HALF[1:]), "be the means and the stds of 3 channels"),
        ("bert", (20, 61), str, "knows 60 tokens, the data set's tokenizer has 61: give --set .*tokenizer="),
        ("bert", (25, 60), str, "takes 24 tokens at most, a text of the data set has up to 25: give .*length=24"),
        ("roberta", (23, 60), str, "takes 22 tokens at most"),  # the padding's position is not one of a token
        ("bert", IMAGE, str, "cannot be read: Unrecognized configuration class"),
        ("vit", TEXT, str, "is a vit, which takes no texts"),
        ("vit", (3, 9, 9), str, "cannot take inputs of shape"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_told_in_one_line(saved, tmp_path, kind, shape, damage, match):
    place = tmp_path / "checkpoint"
    shutil.copytree(saved(kind), place)
    damage(place)
    with pytest.raises(UserError, match=match) as error:
        build(place, shape)
    assert "\n" not in str(error.value)


def embedded(place, split):
    """Return the backbone at a place and its features of all samples of a split."""
    backbone = named_backbone(Model(name=f"transformers:{place}"), Data(split, split), "float32", seed=0)
    n = len(split)
    return backbone, backbone.embed(split, torch.arange(n), compose(()), torch.zeros(n, 0), torch.device("cpu"))


@pytest.mark.parametrize("normalised", [True, False, None])
def test_a_frozen_checkpoint_sees_images_normalised_as_those_that_it_was_trained_with_if_it_says_so(
    saved, tmp_path, normalised
):
    pixels = torch.randint(256, (4, *IMAGE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = Split.from_tensors(pixels, torch.tensor([0, 1, 2, 0]))
    place, stated = tmp_path / "vit", ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    shutil.copytree(saved("vit"), place)
    if normalised is not None:
        stating(do_normalize=normalised, image_mean=stated[0], image_std=stated[1])(place)
    assert build(place, IMAGE).trained_with == (stated if normalised else None)
    assert build(place, IMAGE, weights=False).trained_with is None
    backbone, found = embedded(place, split)
    mean, std = stated if normalised else (split.mean, split.std)
    assert (backbone.mean, backbone.std) == (mean, std)
    by_hand = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(found, build(place, IMAGE).eval().features(by_hand), rtol=0, atol=1e-5)


def test_a_frozen_sentence_transformer_gives_means_of_its_last_states_if_it_says_so(saved, tmp_path):
    x = TEXTS.example(4, TEXT)
    split = Split(take=lambda rows: x[rows].numpy(), y=torch.arange(4) % 3, classes=("a", "b", "c"), shape=TEXT,
                  mean=(), std=())  # fmt: skip
    for means in (True, False):
        place = tmp_path / str(means)
        shutil.copytree(saved("bert"), place)
        (place / "1_Pooling").mkdir()
        (place / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": means}))
        _, found = embedded(place, split)
        model = build(place).eval()
        expected = model.features(x)
        if means:
            states = model.features.network.bert
            expected = [states(input_ids=t[None, t >= 0], token_type_ids=s[None, t >= 0])[0].mean(1) for t, s in x]
            expected = torch.cat(expected)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (place / "1_Pooling/config.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read"):
        build(place)


@pytest.mark.parametrize("name", ["transformers:", "transformers:/nowhere", "transformers:no-such-model"])
def test_a_checkpoint_that_is_not_there_is_told(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delattr("huggingface_hub.constants")  # as in a process that has imported nothing but the package
    with pytest.raises(UserError, match=r"needs a name|cannot be read"):
        build_model(name, TEXT, CLASSES, seed=0)
