"""The demonstration's data and network: scikit-learn's 1,797 handwritten digits and a small ResNet."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE = 32  # pixels a side that the network sees
TEST = 360  # images held out
MEAN, STD = 0.305, 0.323  # of the scaled images, on a scale of 0 to 1


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((images, labels) to train on, (images, labels) held out): float32 [N, 1, 32, 32], normalized, and int64 [N].

    The data set is real scans from NIST forms, 8x8 with 17 grey levels, installed with scikit-learn. The split is by
    order, and so by writer: the held-out digits are of hands that the network has not seen.
    """
    from sklearn.datasets import load_digits

    bunch = cast(Any, load_digits())
    small = torch.from_numpy(np.asarray(bunch.images, np.float32) / 16).unsqueeze(1)
    images = functional.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    images = (images - MEAN) / STD
    labels = torch.from_numpy(np.asarray(bunch.target, np.int64))
    return (images[:-TEST], labels[:-TEST]), (images[-TEST:], labels[-TEST:])


class Shifted(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Images, each moved by up to 3 pixels a side at random whenever it is read."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = functional.pad(images, (3, 3, 3, 3), value=-MEAN / STD), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        y, x = (int(value) for value in torch.randint(0, 7, (2,)))
        return self.images[index, :, y : y + SIZE, x : x + SIZE], self.labels[index]


def convolution(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
    """A convolution with padding to the same size, and its BatchNorm."""
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """The basic block of "Deep Residual Learning for Image Recognition" (arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(inputs, outputs, 3, stride), nn.ReLU(), *convolution(outputs, outputs, 3, 1)
        )
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(*convolution(inputs, outputs, 1, stride)) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


class SmallResNet(nn.Module):
    """[N, 1, 32, 32] -> [N, 10]. ``widths``: channels of the three stages at 16x16, 8x8 and 4x4 pixels."""

    def __init__(self, widths: tuple[int, int, int] = (64, 128, 256)) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = nn.Sequential(*convolution(1, first // 2, 3, 1), nn.ReLU())
        self.stages = nn.Sequential(
            Block(first // 2, first, 2), Block(first, second, 2), Block(second, third, 2), Block(third, third, 1)
        )
        self.classifier = nn.Linear(third, 10)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.stages(self.stem(x)).mean((2, 3))))


def as_input(images: Tensor) -> npt.NDArray[np.float32]:
    """Images as a session takes them."""
    return np.ascontiguousarray(images.numpy())
