"""What every model of the registry keeps, and the user's own modules too; published sizes; errors."""

import copy
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from raypkg.core.errors import UserError
from raypkg.data.kinds import TEXTS
from raypkg.models import build_model, model, outline
from raypkg.models.classifier import Classifier
from raypkg.models.operations import forward_flops
from raypkg.models.resnet import Padded

SHAPE, CLASSES = (3, 8, 8), 5
LARGER_SHAPE = {"lenet5-caffe": (3, 16, 16)}
TEXT = (12, 50)  # at most 12 tokens out of 50
ROWS_TOO = {"mlp", "lenet300-100", "linear"}
TEXTS_ONLY = {"transformer"}


def own_network(shape, num_classes, *, width: int = 8):
    """A user's own module: knows nothing of Classifier, its head sits inside another module."""
    body = nn.Sequential(nn.Conv2d(shape[0], width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(body, nn.Flatten(), nn.Sequential(nn.Dropout(0.1), nn.Linear(width, num_classes)))


def with_softmax(shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes), nn.Softmax(dim=1))


def without_linear(shape, num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 8), nn.Flatten())


def three_classes(shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


def per_pixel(shape, num_classes):
    return nn.Sequential(nn.Linear(8, num_classes), nn.Flatten(2), nn.AdaptiveMaxPool2d((1, num_classes)), nn.Flatten())


def without_parameters(shape, num_classes):
    return nn.Flatten()


def broken(shape, num_classes):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))
    nn.init.constant_(network[1].bias, torch.nan)
    return network


def tied(shape, num_classes):
    hidden = nn.Linear(192, 192)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), hidden, nn.Linear(192, num_classes))


def own(function):
    return f"{__name__}:{function.__name__}"


LIBRARIES = {"torchvision", "transformers", "transformers-lm"}  # which need a name after a colon
LARGER = {  # forms of a network that is here in a smaller one
    "alexnet-b", "resnet32", "resnet34", "resnet56", "vgg-d", "wrn-16-10", "wrn-16-8", "wrn-22-8", "wrn-28-10",
}  # fmt: skip
NAMES = [*sorted(set(model.entries) - LIBRARIES - LARGER), "torchvision:resnet18", own(own_network)]


def build(name, seed=0, shape=None, classes=CLASSES, **options):
    if shape is None:
        shape = TEXT if name in TEXTS_ONLY else LARGER_SHAPE.get(name, SHAPE)
    return build_model(name, shape, classes, seed=seed, options=options)


def samples(name, count=4):
    if name in TEXTS_ONLY:
        return TEXTS.example(count, TEXT)
    return torch.randn(count, *LARGER_SHAPE.get(name, SHAPE), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=NAMES)
def built(request):
    return request.param, build(request.param)


@pytest.mark.parametrize("name", [*NAMES, *sorted(LARGER)])
def test_is_head_of_features(name):
    net, x = build(name).eval(), samples(name)
    with torch.no_grad():
        features = net.features(x)
        assert features.shape == (4, net.head.in_features) and net.head.out_features == CLASSES
        assert torch.equal(net.head(features), net(x)) and net(x).shape == (4, CLASSES)


def test_an_outline_has_the_operations_of_the_model(built):
    name, net = built
    if name in model:
        shape = tuple(samples(name, 1).shape[1:]) if name not in TEXTS_ONLY else TEXT
        counted = forward_flops(outline(name, shape, CLASSES), shape)
        assert sum(counted.values()) == sum(forward_flops(net, shape).values()) > 0


def test_weights_are_a_function_of_the_seed_alone(built):
    name, net = built
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again, other = build(name), build(name, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.training and isinstance(again, Classifier)
    for key, value in again.named_parameters():
        assert torch.equal(value, net.get_parameter(key)), key
    assert not torch.equal(again.head.weight, other.head.weight)


def test_channels_last_changes_nothing_but_the_layout(built):
    name, net = built[0], copy.deepcopy(built[1]).eval()
    x = samples(name)
    laid_out = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    with torch.no_grad():
        expected = net(x)
        laid_out = net.to(memory_format=torch.channels_last)(laid_out)
    torch.testing.assert_close(laid_out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_finite_and_reach_every_weight(built, bf16):
    name, net = built
    if bf16 and name.startswith("torchvision"):  # maps of 1 × 1, which are padding but for one pixel
        pytest.skip("PyTorch's bfloat16 convolution was seen to read NaN from beside a 1 × 1 map, once in hundreds")
    net.train()
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = net(samples(name))
    F.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 3])).backward()
    for key, weight in net.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), key
    assert net.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(set(NAMES) - {own(own_network)}))
def test_rows_and_small_images(name):
    if name in TEXTS_ONLY:
        with pytest.raises(UserError, match=r"input shape \(6,\): this model takes texts \(L, V\)"):
            build(name, shape=(6,))
        return
    with pytest.raises(UserError, match=r"input shape \(12, 50\): this model takes images.*for texts 'transformer'"):
        build(name, shape=TEXT)
    if name in ROWS_TOO:
        assert build(name, shape=(6,))(torch.ones(2, 6)).shape == (2, CLASSES)
        return
    with pytest.raises(UserError, match=r"input shape \(6,\): this model takes images"):
        build(name, shape=(6,))
    if not name.startswith("torchvision"):
        with pytest.raises(UserError, match=r"input shape \(3, 3, 3\): images for this model need at least"):
            build(name, shape=(3, 3, 3))


@pytest.mark.parametrize(
    ("name", "shape", "classes", "count"),
    [
        # Stem 3·16·9; stage 1: 6·16·16·9; stage 2: 16·32·9 + 5·32·32·9; stage 3: 32·64·9 + 5·64·64·9: 267,696 in all.
        # Batch norms 2·(7·16 + 6·32 + 6·64) = 1,376; head 65·10 = 650. Option A adds none.
        ("resnet20", (3, 32, 32), 10, 267_696 + 1_376 + 650),
        # Stem 432; stages 18·2,304 + (4,608 + 17·9,216) + (18,432 + 17·36,864); norms 2·(19·16 + 18·32 + 18·64).
        ("resnet56", (3, 32, 32), 10, 432 + 41_472 + 161_280 + 645_120 + 4_064 + 650),
        ("resnet18", (3, 32, 32), 10, 11_173_962),
        ("resnet50", (3, 224, 224), 1000, 25_557_032),  # 25.56 M, as quoted for ImageNet
        ("wrn-16-8", (3, 32, 32), 10, 10_961_370),  # 11.0 M in the paper
        # Stem 432; stages 716,800 + 3,276,800 + 13,107,200, shortcuts among them; norms 2·(496 + 1,120 + 2,240 + 640).
        ("wrn-16-10", (3, 32, 32), 10, 432 + 17_100_800 + 8_992 + 6_410),  # 17.1 M in SNIP
        ("wrn-28-10", (3, 32, 32), 10, 36_479_194),  # 36.5 M in the paper
        # 121·3·96 + 25·96·256 + 9·(256·384 + 384·384 + 384·256); their norms 2·1,376; k = 1: 256·1,024 + 1,024²,
        # norms 2·2,048, head 1,025·10; k = 2: 256·2,048 + 2,048², 2·4,096, 2,049·10. 5.1 M and 8.5 M in the paper.
        ("alexnet-s", (3, 32, 32), 10, 3_745_824 + 2_752 + 1_310_720 + 4_096 + 10_250),
        ("alexnet-b", (3, 32, 32), 10, 3_745_824 + 2_752 + 4_718_592 + 8_192 + 20_490),
        # 9·(3·64 + 64² + 64·128 + 128²) = 259,776; stages 3 to 5 of D 9·(128·256 + 2·256², 256·512 + 2·512², 3·512²),
        # a third layer of C has a ninth of its weights; norms 2·4,224. A hidden layer 512² + 2·512, head 513·10.
        ("vgg-c", (3, 32, 32), 10, 259_776 + 950_272 + 3_801_088 + 4_980_736 + 8_448 + 2 * 263_168 + 5_130),  # 10.5 M
        ("vgg-d", (3, 32, 32), 10, 259_776 + 1_474_560 + 5_898_240 + 7_077_888 + 8_448 + 2 * 263_168 + 5_130),  # 15.2 M
        ("vgg-like", (3, 32, 32), 10, 259_776 + 1_474_560 + 5_898_240 + 7_077_888 + 8_448 + 263_168 + 5_130),  # 15.0 M
        # 1·6·25 + 6, 6·16·25 + 16, 16·7·7·120 + 120, 120·84 + 84, 84·10 + 10.
        ("lenet5", (1, 28, 28), 10, 156 + 2_416 + 94_200 + 10_164 + 850),
        # 20·25 + 20, 50·20·25 + 50, 50·4·4·500 + 500, 500·10 + 10: 0.43 M.
        ("lenet5-caffe", (1, 28, 28), 10, 520 + 25_050 + 400_500 + 5_010),
        ("mlp", (1, 28, 28), 10, 784 * 300 + 300 + 300 * 100 + 100 + 1_010),  # LeNet-300-100: 266,610
        ("lenet300-100", (1, 28, 28), 10, 266_610),
        ("linear", (1, 28, 28), 10, 7_850),
        # 9·(24·64 + 64² + 64·256 + 3·256²) = 1,967,616; biases 24 + 2·64 + 4·256; head 257·10. 2.0 M.
        ("airbench", (3, 32, 32), 10, 1_967_616 + 1_176 + 2_570),
    ],
)
def test_parameter_counts(name, shape, classes, count):
    with torch.device("meta"):
        network = model[name](shape, classes, options={})
    assert sum(p.numel() for p in network.parameters()) == count


def test_the_stem_follows_the_image_size():
    small, large = build("resnet18", shape=(3, 64, 64)), build("resnet18", shape=(3, 96, 96))
    assert small.features[0].kernel_size == (3, 3) and large.features[0].kernel_size == (7, 7)
    assert any(isinstance(layer, nn.MaxPool2d) for layer in large.features)


@pytest.mark.parametrize("name", ["alexnet-s", "vgg-c"])
@pytest.mark.parametrize(("side", "left"), [(4, 1), (8, 1), (17, 1), (28, 1), (32, 1), (63, 2)])
def test_halvings_follow_the_image_size(name, side, left):
    layers = list(build(name, shape=(3, side, side)).features)
    end = next(at for at, layer in enumerate(layers) if isinstance(layer, nn.AdaptiveAvgPool2d))
    x = torch.zeros(2, 3, side, side)
    for layer in layers[:end]:
        assert not isinstance(layer, nn.Conv2d) or x.shape[-1] > 1  # what a 3 × 3 kernel sees is more than padding
        x = layer(x)
    assert x.shape[2:] == (left, left)


def test_convolutions_start_at_he_variance():
    weight = build("resnet18").features[3][0].branch[0].weight  # [64, 64, 3, 3]
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("side", [4, 5])
def test_option_a_shortcut_is_subsampling_and_zeros(side):
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    out = Padded(3, 8, 2)(x)
    assert torch.equal(out[:, :3], x[:, :, ::2, ::2]) and not out[:, 3:].any()
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_options_reach_the_network():
    assert build("resnet8", width=4).head.in_features == 16
    assert build("mlp", hidden=(7,)).head.in_features == 7
    assert build(own(own_network), width=3).head.in_features == 3
    for name in ("wrn-28-2", "alexnet-s", "vgg-like"):
        assert {layer.p for layer in build(name, dropout=0.3).modules() if isinstance(layer, nn.Dropout)} == {0.3}


@pytest.mark.parametrize("norm", ["group", "frozen"])
@pytest.mark.parametrize("width", [16, 6])
def test_with_other_norms_no_sample_depends_on_another(width, norm):
    network = build("resnet8", norm=norm, width=width).train()
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network.prepare(x[2:])
    torch.testing.assert_close(network(x)[:2], network(x[:2]), rtol=1e-4, atol=1e-5)
    plain = dict(build("resnet8", width=width).named_parameters())
    assert all(torch.equal(p, plain[name]) for name, p in network.named_parameters())


def test_frozen_statistics_are_those_of_the_first_inputs():
    frozen, batch = (build("resnet8", norm=norm).train() for norm in ("frozen", "batch"))
    x = 3 + torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    frozen.prepare(x)
    torch.testing.assert_close(frozen(x), batch(x), rtol=1e-4, atol=1e-5)
    before = {name: buffer.clone() for name, buffer in frozen.named_buffers()}
    frozen(1 + x).sum().backward()
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in frozen.named_buffers())


def test_trained_weights_of_torchvision_come_with_a_new_head(monkeypatch):
    trained = torchvision.models.resnet18(num_classes=1000).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: trained)
    name = "torchvision:resnet18"
    first, other = (build(name, seed=seed, shape=(3, 32, 32), weights="DEFAULT") for seed in (0, 1))
    assert torch.equal(first.features.conv1.weight, trained["conv1.weight"])
    assert first.head.out_features == CLASSES and not torch.equal(first.head.weight, other.head.weight)
    assert first.trained_with == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with pytest.raises(UserError, match=r"unknown weights of torchvision:resnet18 'DEFALT', did you mean 'DEFAULT'"):
        build(name, shape=(3, 32, 32), weights="DEFALT")


def test_weights_that_cannot_be_downloaded_are_told_in_one_line(monkeypatch):
    def fail(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(UserError, match=r"weights DEFAULT of torchvision:resnet18 cannot be had from .*no route"):
        build("torchvision:resnet18", shape=(3, 32, 32), weights="DEFAULT")


@pytest.mark.parametrize("variant", ["googlenet", "densenet121", "inception_v3"])
def test_torchvision_networks_return_logits_while_training_without_auxiliary_classifiers(monkeypatch, variant):
    options, side = {}, 32
    if variant == "inception_v3":
        trained = torchvision.models.inception_v3(num_classes=1000, init_weights=False).state_dict()
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: trained)
        options, side = {"weights": "DEFAULT"}, 80
    net = build(f"torchvision:{variant}", shape=(3, side, side), **options)
    assert net.training and net(torch.randn(2, 3, side, side)).shape == (2, CLASSES)
    assert not any("AuxLogits" in name for name, _ in net.named_parameters())


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("resnet20", {"classes": 1}, "num_classes = 1: a classifier needs at least 2"),
        ("wrn-28-2", {"dropout": 1.0}, "wrn-28-2 option dropout = 1.0"),
        ("torchvision", {}, "unknown torchvision model ''"),
        ("torchvision:resnet18", {"shape": (1, 8, 8)}, "to have 3 channels"),
        ("torchvision:alexnet", {}, r"'torchvision:alexnet' cannot take inputs of shape \(3, 8, 8\)"),
        (own(own_network), {"shape": (3, 2, 2)}, r"own_network' cannot take inputs of shape \(3, 2, 2\): RuntimeError"),
        (own(without_linear), {}, "has no nn.Linear to serve as the head"),
        (own(with_softmax), {}, "its last nn.Linear is not its last operation"),
        (own(per_pixel), {}, "up to its last nn.Linear' maps inputs"),
        (own(three_classes), {}, r"maps inputs \(2, 3, 8, 8\) to \(2, 3\), not to \(2, 5\)"),
        (own(without_parameters), {}, "has no parameter to train"),
        (own(broken), {}, "to NaN or infinity"),
        ("mlp", {"hidden": [10**12]}, "mlp option hidden.0 = 1000000000000: .* less than or equal to 1048576"),
        ("resnet56", {"width": 100_000}, r"'resnet56' of 33,\d{3},.* parameters, with gradients and momentum: needed"),
        ("mlp", {"hidden": [10**6, 10**6]}, "'mlp' of 1,000,199,000,005 parameters, .* needed is 11,178.1 GiB of"),
        ("linear", {"shape": (2**31,)}, "'linear' of 10,737,418,245 parameters, .* has 24.0 GiB; choose a smaller one"),
        (own(tied), {}, r"tied': 1.weight and 3.weight are one parameter, which is stored and masked by name"),
    ],
)
def test_errors_are_one_line(name, arguments, match, monkeypatch):
    monkeypatch.setattr("raypkg.core.memory.machine_memory", lambda: 24 << 30)
    with pytest.raises(UserError, match=match) as error:
        build(name, **arguments)
    assert "\n" not in str(error.value)
