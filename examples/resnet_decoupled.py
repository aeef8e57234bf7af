"""A ResNet of your own, cut in three: each third trains without waiting for the next.

    python examples/resnet_decoupled.py

The net is written in the style of torchvision and contains nothing about synthetic gradients; `decouple` cuts
it, and the training loop is the usual one. The pictures are synthetic: the class is the colour and the
direction of a stripe.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn import decouple

CLASSES, STEPS, ROWS = 6, 150, 32


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet() -> nn.Sequential:
    """Stem, six blocks in three stages, head: 8 modules."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))
    return nn.Sequential(
        stem, BasicBlock(8, 8), BasicBlock(8, 8), BasicBlock(8, 16, 2), BasicBlock(16, 16),
        BasicBlock(16, 32, 2), BasicBlock(32, 32), head,
    )  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    """Noisy pictures (ROWS, 3, 16, 16) with a stripe, and their classes."""
    labels = torch.randint(CLASSES, (ROWS,))
    pictures = 0.5 * torch.randn(ROWS, 3, 16, 16)
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        place = int(torch.randint(16, ()))
        stripe = picture[label % 3]
        (stripe[place] if label < 3 else stripe[:, place]).add_(2.0)
    return pictures, labels


def main() -> None:
    torch.manual_seed(0)
    pictures, labels = batch()
    model = decouple(resnet(), cuts=[3, 5], example=pictures, classes=CLASSES, method="critic")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(1, STEPS + 1):
        pictures, labels = batch()
        loss = F.cross_entropy(model(pictures, labels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.eval()
    pictures, labels = batch()
    right = (model(pictures).argmax(1) == labels).float().mean()
    print(f"{right:.0%} of new pictures right")


if __name__ == "__main__":
    main()
