"""Transposed convolution (upsampling), the step that puts its phases together, and pixels that are repeated."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

import numpy as np

from colonnade.workload.base import Array, Epilogue, Workload


@dataclass(frozen=True)
class ConvTranspose2d(Workload):
    """``activation(conv_transpose(x, w) + bias)``: input pixel (i, j) adds ``x * w[kh, kw]`` to output pixel
    (i * sy + kh * dy - top, j * sx + kw * dx - left).

    x [N, IC, H, W], w [OC, IC/groups, KH, KW] (ONNX has the channels the other way round), padding (top, left, bottom,
    right) is cut off the output, ``output_padding`` (rows, columns) added below and to the right of it.
    ``tile`` and ``columns`` as in ``Conv2d``.
    """

    op: ClassVar[str] = "conv_transpose2d"
    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    output_padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    epilogue: Epilogue = field(default_factory=Epilogue)
    dtype: str = "f32"
    tile: int = 0
    columns: int = -1

    def _out(self, axis: int) -> int:
        size, window = (self.height, self.width)[axis], (self.kernel[axis] - 1) * self.dilation[axis] + 1
        cut = self.padding[axis] + self.padding[axis + 2] - self.output_padding[axis]
        return (size - 1) * self.stride[axis] + window - cut

    @property
    def out_height(self) -> int:
        """Rows of the output."""
        return self._out(0)

    @property
    def out_width(self) -> int:
        """Columns of the output."""
        return self._out(1)

    @property
    def macs(self) -> int:
        """Multiply-adds when dense, those that padding cuts off included."""
        window = self.kernel[0] * self.kernel[1] * self.in_channels // self.groups
        return self.batch * self.height * self.width * self.out_channels * window

    @property
    def kept_macs(self) -> int:
        """Multiply-adds on kept weights."""
        return self.macs if self.columns < 0 else self.batch * self.height * self.width * self.columns

    def taps(self, axis: int) -> dict[int, list[tuple[int, int]]]:
        """By phase of the output along an axis: (tap k, shift). Output ``o = s * j + phase`` takes tap k from input
        ``j + shift``: ``s * shift = phase + pad - k * d``, for the taps where that comes out even."""
        stride, found = self.stride[axis], {}
        for phase in range(stride):
            shifts = [(k, phase + self.padding[axis] - k * self.dilation[axis]) for k in range(self.kernel[axis])]
            found[phase] = [(k, q // stride) for k, q in shifts if q % stride == 0]
        return found

    def reach(self, axis: int) -> tuple[int, int]:
        """How far a phase reads (before, behind) a pixel of the input along an axis."""
        shifts = [shift for taps in self.taps(axis).values() for _, shift in taps] or [0]
        return max(0, -min(shifts)), max(0, max(shifts))

    def reference(self, x: Array, weight: Array, bias: Array | None = None, *_: Any) -> Array:
        """[N, OC, OH, OW]; sums in float64."""
        (n, g), (sy, sx), (dy, dx) = (self.batch, self.groups), self.stride, self.dilation
        top, left, bottom, right = self.padding
        oh, ow = self.out_height, self.out_width
        full = np.zeros((n, self.out_channels, oh + top + max(bottom, 0), ow + left + max(right, 0)))
        pixels = x.reshape(n, g, self.in_channels // g, self.height, self.width).astype(np.float64)
        rows = weight.reshape(g, self.out_channels // g, self.in_channels // g, *self.kernel)
        for kh, kw in product(range(self.kernel[0]), range(self.kernel[1])):
            part = np.einsum("ngihw,goi->ngohw", pixels, rows[..., kh, kw].astype(np.float64))
            part = part.reshape(n, self.out_channels, self.height, self.width)
            target = full[:, :, kh * dy : kh * dy + self.height * sy : sy, kw * dx : kw * dx + self.width * sx : sx]
            target += part[:, :, : target.shape[2], : target.shape[3]]
        y = full[:, :, top : top + oh, left : left + ow]
        if bias is not None:
            y = y + bias[:, None, None]
        return self.epilogue.activation(y.astype(np.float32))


@dataclass(frozen=True)
class Interleave(Workload):
    """Planes in phases → plain planes [N, C, H, W]: pixel (y, x) stands in phase (y % sy, x % sx)."""

    op: ClassVar[str] = "interleave"
    shape: tuple[int, ...]
    phases: tuple[int, int]
    dtype: str = "f32"

    def reference(self, x: Array, *_: Any) -> Array:
        """The same values."""
        return np.ascontiguousarray(x, np.float32)


@dataclass(frozen=True)
class Repeat(Workload):
    """Every pixel as often as its axis's factor: the nearest one, where a map grows by whole factors. ``shape`` is the
    output's [N, C, H, W]; rows and columns beyond it are left out. It is what one plane makes as all phases."""

    op: ClassVar[str] = "repeat"
    shape: tuple[int, ...]
    factors: tuple[int, int]
    dtype: str = "f32"

    def reference(self, x: Array, *_: Any) -> Array:
        """[N, C, H, W]"""
        height, width = self.shape[2:]
        whole = x.repeat(self.factors[0], 2).repeat(self.factors[1], 3)
        return np.ascontiguousarray(whole[:, :, :height, :width], np.float32)
