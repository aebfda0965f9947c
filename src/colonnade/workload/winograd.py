"""A 3x3 convolution at stride 1 whose weights stand where Winograd's minimal filtering multiplies them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from colonnade.workload import filtering
from colonnade.workload.base import Array
from colonnade.workload.conv import Conv2d

SIZES = (2, 4)  # m of F(m x m, 3 x 3)
TAPS = 3


@cache
def matrices(m: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """B [m + 2, m + 2] of inputs, G [m + 2, 3] of weights, A [m, m + 2] of outputs.

    A tile is A ((G w Gᵀ) * (B d Bᵀ)) Aᵀ, summed over channels inside. Lavin and Gray, "Fast Algorithms for
    Convolutional Neural Networks" (arXiv 1509.09308).
    """
    return filtering.inputs(m, TAPS), filtering.weights(m, TAPS), filtering.outputs(m, TAPS)


def transform(weight: Array, m: int) -> Array:
    """[OC, IC, 3, 3] → [OC, IC, m + 2, m + 2]: G w Gᵀ, computed in float64."""
    g = matrices(m)[1]
    out = np.einsum("ia,ocab,jb->ocij", g, weight.astype(np.float64), g, optimize=True)
    return np.ascontiguousarray(out, np.float32)


@dataclass(frozen=True)
class WinogradConv2d(Conv2d):
    """``activation(winograd(x, u) + bias + residual)``, a tile of m x m output pixels at a time: with d the m + 2 by
    m + 2 inputs that it sees, A (Σ_c u[o, c] * (B d[c] Bᵀ)) Aᵀ.

    With u = G w Gᵀ that is the 3x3 convolution by w. Any other u is allowed: there are (m + 2)² / 9 as many weights to
    choose from, and each costs 1 / m² of a multiply-add a pixel.

    u [OC, IC, m + 2, m + 2]; all other fields are those of the 3x3 convolution. ``columns``: OC * K when dense, with
    K = (m + 2)² * IC.
    """

    op: ClassVar[str] = "winograd_conv2d"
    m: int = 2

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[OC, IC, m + 2, m + 2]"""
        return self.out_channels, self.in_channels, self.m + 2, self.m + 2

    @property
    def k(self) -> int:
        """Columns of one row of the weight matrix: (m + 2)² * IC."""
        return (self.m + 2) ** 2 * self.in_channels

    @property
    def tiles(self) -> int:
        """Of m x m pixels, in all images."""
        return self.batch * -(-self.out_height // self.m) * -(-self.out_width // self.m)

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
        n, c, m, t = self.batch, self.in_channels, self.m, self.m + 2
        into, back = matrices(m)[0], matrices(m)[2]
        rows, columns = -(-self.out_height // m), -(-self.out_width // m)
        top, left = self.padding[:2]
        wide = np.zeros((n, c, max(rows * m + 2, top + self.height), max(columns * m + 2, left + self.width)))
        wide[:, :, top : top + self.height, left : left + self.width] = x
        seen = np.lib.stride_tricks.sliding_window_view(wide, (t, t), axis=(2, 3))
        d = seen[:, :, : rows * m : m, : columns * m : m]
        v = np.einsum("ia,ncrsab,jb->ijcnrs", into, d, into, optimize=True).reshape(t * t, c, -1)
        u = weight.astype(np.float64).transpose(2, 3, 0, 1).reshape(t * t, self.out_channels, c)
        products = (u @ v).reshape(t, t, self.out_channels, n, rows, columns)
        pixels = np.einsum("ai,ijonrs,bj->norasb", back, products, back, optimize=True)
        y = pixels.reshape(n, self.out_channels, rows * m, columns * m)
        return self.ended(y[:, :, : self.out_height, : self.out_width], bias, residual)
