"""The published feed-forward nets, one module per layer, to be cut anywhere.

Source: Jaderberg et al. 2017, arXiv:1608.05343, §A.1; Czarnecki et al. 2017, arXiv:1706.04859.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def fcn(features: int, outputs: int, layers: int, width: int) -> nn.Sequential:
    """A fully connected net: `layers` − 1 times Linear-BN-ReLU, then a Linear. One module per layer.

    Shapes: (B, ...) with `features` elements a row -> (B, outputs).

    Source: Jaderberg et al. 2017, §A.1. Their layer counts include the last one: their results without any
    gradient (9.3 % at 3 to 21.4 % at 6 layers) are those of 2 to 5 random hidden layers.
    """
    sizes = [features, *[width] * (layers - 1)]
    blocks: list[nn.Module] = [
        nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(sizes)
    ]
    blocks.append(nn.Linear(sizes[-1], outputs))
    blocks[0] = nn.Sequential(nn.Flatten(), blocks[0])
    return nn.Sequential(*blocks)


def sigmoid_net(features: int, outputs: int, layers: int, width: int) -> nn.Sequential:
    """As `fcn`, Linear-Sigmoid: the net of the tutorials."""
    sizes = [features, *[width] * (layers - 1)]
    blocks = [nn.Sequential(nn.Linear(a, b), nn.Sigmoid()) for a, b in pairwise(sizes)]
    return nn.Sequential(*blocks, nn.Linear(sizes[-1], outputs))


def cnn(shape: Sequence[int], outputs: int, layers: int, channels: int) -> nn.Sequential:
    """A convolutional net: `layers` − 1 times 5×5 convolution-BN-ReLU-pooling, then a Linear.

    Convolutions keep the resolution; pooling is 3×3 with stride 2, the maximum in the first layer and the
    mean in the others.

    Args:
      shape: (channels, height, width) of a row.

    Source: Jaderberg et al. 2017, §A.1.
    """
    blocks: list[nn.Module] = []
    depth, height, width = shape
    for number in range(layers - 1):
        pool = nn.AvgPool2d(3, 2, padding=1) if number else nn.MaxPool2d(3, 2, padding=1)
        convolution = nn.Conv2d(depth, channels, 5, padding=2)
        blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(), pool))
        depth, height, width = channels, (height + 1) // 2, (width + 1) // 2
    blocks.append(nn.Sequential(nn.Flatten(), nn.Linear(depth * height * width, outputs)))
    return nn.Sequential(*blocks)


def vgg(shape: Sequence[int], outputs: int, channels: int = 64) -> nn.Sequential:
    """11 convolutions of 3×3, each BN-ReLU, then the mean over the map and a Linear; 12 modules.

    Widths in units of `channels`: 1 1 2/2 2 2 4/2 4 4 8/2 8 8, where /2 is a stride of 2.

    Source: Czarnecki et al. 2017, arXiv:1706.04859, the CIFAR-10 net of the synthetic-gradient experiment.
    """
    blocks: list[nn.Module] = []
    depth = shape[0]
    for number, factor in enumerate((1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8)):
        stride = 2 if number in (2, 5, 8) else 1
        convolution = nn.Conv2d(depth, factor * channels, 3, stride, padding=1, bias=False)
        depth = factor * channels
        blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(depth), nn.ReLU()))
    blocks.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(depth, outputs)))
    return nn.Sequential(*blocks)
