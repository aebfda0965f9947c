"""A 3x3 convolution at stride 1 whose weights stand where Winograd's minimal filtering multiplies them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from colonnade.workload import filtering
from colonnade.workload.base import Array
from colonnade.workload.conv import Conv2d

Size = tuple[int, int]  # m: rows and columns of a tile of output pixels
SIZES: dict[str, Size] = {"2x2": (2, 2), "4x4": (4, 4), "4x1": (4, 1)}  # by the names that users give them
TAPS = 3


@cache
def matrices(m: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """B [m + 2, m + 2] of inputs, G [m + 2, 3] of weights, A [m, m + 2] of outputs, in one direction.

    F(1, 3) is the three taps as they are: B and G are one, A a row of ones. A tile is A ((G w G'ᵀ) * (B d B'ᵀ)) A'ᵀ,
    summed over channels inside, with the matrices of its rows and those of its columns. Lavin and Gray, "Fast
    Algorithms for Convolutional Neural Networks" (arXiv 1509.09308).
    """
    if m == 1:
        return np.eye(TAPS), np.eye(TAPS), np.ones((1, TAPS))
    return filtering.inputs(m, TAPS), filtering.weights(m, TAPS), filtering.outputs(m, TAPS)


def seen(m: Size) -> Size:
    """Rows and columns of inputs that a tile sees: of positions at which weights are multiplied."""
    return m[0] + TAPS - 1, m[1] + TAPS - 1


def transform(weight: Array, m: Size) -> Array:
    """[OC, IC, 3, 3] → [OC, IC, m + 2, m' + 2]: G w G'ᵀ, computed in float64."""
    g = [matrices(one)[1] for one in m]
    out = np.einsum("ia,ocab,jb->ocij", g[0], weight.astype(np.float64), g[1], optimize=True)
    return np.ascontiguousarray(out, np.float32)


@dataclass(frozen=True)
class WinogradConv2d(Conv2d):
    """``activation(winograd(x, u) + bias + residual)``, a tile of m by m' output pixels at a time: with d the m + 2 by
    m' + 2 inputs that it sees, A (Σ_c u[o, c] * (B d[c] B'ᵀ)) A'ᵀ.

    With u = G w G'ᵀ that is the 3x3 convolution by w. Any other u is allowed: there are (m + 2) (m' + 2) / 9 as many
    weights to choose from, and each costs 1 / (m m') of a multiply-add a pixel.

    u [OC, IC, m + 2, m' + 2]; all other fields are those of the 3x3 convolution. ``columns``: OC * K when dense, with
    K = (m + 2) (m' + 2) IC.
    """

    op: ClassVar[str] = "winograd_conv2d"
    m: Size = (2, 2)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[OC, IC, m + 2, m' + 2]"""
        return self.out_channels, self.in_channels, *seen(self.m)

    @property
    def k(self) -> int:
        """Columns of one row of the weight matrix: (m + 2) (m' + 2) IC."""
        return prod(seen(self.m)) * self.in_channels

    @property
    def tiles(self) -> int:
        """Of m by m' pixels, in all images."""
        return self.batch * -(-self.out_height // self.m[0]) * -(-self.out_width // self.m[1])

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense 3x3 convolution, as sums."""
        return self.batch * self.out_channels * self.out_height * self.out_width * TAPS * TAPS * self.in_channels

    @property
    def kept_macs(self) -> int:
        """Multiply-adds on kept weights, those of the transforms not among them."""
        return self.tiles * (self.out_channels * self.k if self.columns < 0 else self.columns)

    def reference(
        self, x: Array, weight: Array, bias: Array | None = None, residual: Array | None = None, *_: Any, **named: Any
    ) -> Array:
        """[N, OC, OH, OW]; sums in float64."""
        assert not any(value is not None for value in named.values()), "no prologue"
        n, c, (my, mx), (ty, tx) = self.batch, self.in_channels, self.m, seen(self.m)
        down, across = matrices(my), matrices(mx)
        rows, columns = -(-self.out_height // my), -(-self.out_width // mx)
        top, left = self.padding[:2]
        wide = np.zeros((n, c, max(rows * my + 2, top + self.height), max(columns * mx + 2, left + self.width)))
        wide[:, :, top : top + self.height, left : left + self.width] = x
        windows = np.lib.stride_tricks.sliding_window_view(wide, (ty, tx), axis=(2, 3))
        d = windows[:, :, : rows * my : my, : columns * mx : mx]
        v = np.einsum("ia,ncrsab,jb->ijcnrs", down[0], d, across[0], optimize=True).reshape(ty * tx, c, -1)
        u = weight.astype(np.float64).transpose(2, 3, 0, 1).reshape(ty * tx, self.out_channels, c)
        products = (u @ v).reshape(ty, tx, self.out_channels, n, rows, columns)
        pixels = np.einsum("ai,ijonrs,bj->norasb", down[2], products, across[2], optimize=True)
        y = pixels.reshape(n, self.out_channels, rows * my, columns * mx)
        return self.ended(y[:, :, : self.out_height, : self.out_width], bias, residual)
