"""Two-dimensional convolution, dense or column-pruned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from colonnade.workload.base import PLAIN, Activation, Array, Epilogue, Workload


@dataclass(frozen=True)
class Conv2d(Workload):
    """``activation(conv(x, w) + bias + residual)``.

    x [N, IC, H, W], w [OC, IC/groups, KH, KW], padding (top, left, bottom, right) in pixels.
    ``prologue``: x is ``prologue(x * before_scale[c] + before_shift[c])`` first, padded with zeros afterwards: a
    BatchNorm and activation in front of the convolution.
    ``tile`` and ``columns`` describe the sparsity: rows in the largest tile, and kept columns summed over
    tiles weighted by their rows (``OC * K`` when dense): kept multiply-adds are ``columns * pixels``.
    """

    op: ClassVar[str] = "conv2d"
    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    epilogue: Epilogue = PLAIN
    dtype: str = "f32"
    tile: int = 0
    columns: int = -1
    prologue: Activation | None = None

    @property
    def out_height(self) -> int:
        """Rows of the output."""
        return out_size(self.height, self.kernel[0], self.stride[0], self.padding[0], self.padding[2], self.dilation[0])

    @property
    def out_width(self) -> int:
        """Columns of the output."""
        return out_size(self.width, self.kernel[1], self.stride[1], self.padding[1], self.padding[3], self.dilation[1])

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[OC, IC / groups, KH, KW]"""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def k(self) -> int:
        """Columns of one row of the weight matrix: KH * KW * IC / groups."""
        return self.kernel[0] * self.kernel[1] * self.in_channels // self.groups

    @property
    def macs(self) -> int:
        """Multiply-adds when dense."""
        return self.batch * self.out_channels * self.out_height * self.out_width * self.k

    @property
    def kept_macs(self) -> int:
        """Multiply-adds on kept weights."""
        if self.columns < 0:
            return self.macs
        return self.batch * self.out_height * self.out_width * self.columns

    def reference(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        residual: Array | None = None,
        *_: Any,
        before_scale: Array | None = None,
        before_shift: Array | None = None,
    ) -> Array:
        """[N, OC, OH, OW]; sums in float64 where the problem is small enough to afford it."""
        if self.prologue is not None:
            assert before_scale is not None and before_shift is not None
            x = self.prologue((x * before_scale[:, None, None] + before_shift[:, None, None]).astype(np.float32))
        columns = im2col(x, self)
        n, g = self.batch, self.groups
        w = matrix(weight).reshape(g, self.out_channels // g, self.k)
        wide = np.float64 if self.macs <= 50_000_000 else np.float32
        y = np.einsum("gok,ngkp->ngop", w.astype(wide), columns.astype(wide), optimize=True)
        y = y.reshape(n, self.out_channels, self.out_height, self.out_width)
        return self.ended(y, bias, residual)

    def ended(self, y: npt.NDArray[Any], bias: Array | None, residual: Array | None) -> Array:
        """What becomes of the sums [N, OC, OH, OW]: bias, residual and activation."""
        if bias is not None:
            y = y + bias[:, None, None]
        if self.epilogue.residual:
            assert residual is not None
            y = y + residual
        return self.epilogue.activation(y.astype(np.float32))


@dataclass(frozen=True)
class Reach:
    """How a convolution that reads its input in place looks at it along one axis, in rows or columns of planes stored
    in as many ``phases`` as the stride: the phases it needs, and how far it reads before and behind a pixel. Of planes
    that are ``shifted`` (see ``layout.Planes``), along the columns: one for every column that a tap begins at."""

    phases: tuple[int, ...]
    before: int
    after: int

    @staticmethod
    def of(conv: Conv2d, axis: int, shifted: bool = False) -> Reach:
        """Tap ``t`` of output ``o`` reads input ``o*s + t*d - pad``: row ``o + q // s`` of phase ``q % s``."""
        stride = conv.stride[axis]
        taps = [t * conv.dilation[axis] - conv.padding[axis] for t in range(conv.kernel[axis])]
        if shifted:
            return Reach(tuple(sorted(set(taps))), 0, 0)
        shifts = [q // stride for q in taps]
        return Reach(tuple(sorted({q % stride for q in taps})), max(0, -min(shifts)), max(0, max(shifts)))

    @staticmethod
    def plain(conv: Conv2d, axis: int) -> tuple[Reach, int]:
        """Of planes that are in no phases, whatever the stride; and the pixels from the first output's place to the
        last one's, both counted."""
        out = (conv.out_height, conv.out_width)[axis]
        return Reach.of(replace(conv, stride=(1, 1)), axis), (out - 1) * conv.stride[axis] + 1


def is_depthwise(workload: object) -> bool:
    """One input channel a group, also with several outputs a channel: such convolutions have kernels of their own,
    which read planes in place only."""
    return isinstance(workload, Conv2d) and 1 < workload.groups == workload.in_channels


def takes_every_second(conv: Conv2d) -> bool:
    """Has it kernels that take every second pixel of planes as they stand? A depthwise convolution reads a pixel once a
    tap: a copy into phases would cost more than that."""
    return is_depthwise(conv) and conv.stride == (2, 2)


def out_size(size: int, kernel: int, stride: int, before: int, after: int, dilation: int) -> int:
    """Output pixels along one axis."""
    return (size + before + after - (kernel - 1) * dilation - 1) // stride + 1


def matrix(weight: Array) -> Array:
    """[OC, IC, KH, KW] → [OC, K] with K running over (kh, kw, ic)."""
    return np.ascontiguousarray(weight.transpose(0, 2, 3, 1).reshape(weight.shape[0], -1))


def unmatrix(rows: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of ``matrix``: [OC, K] → ``shape`` = [OC, IC, KH, KW]."""
    oc, ic, kh, kw = shape
    return np.ascontiguousarray(rows.reshape(oc, kh, kw, ic).transpose(0, 3, 1, 2))


def im2col(x: Array, conv: Conv2d) -> Array:
    """[N, groups, K, P]: the matrix that DESIGN's offsets stand for, K over (kh, kw, ic)."""
    top, left, bottom, right = conv.padding
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    (kh, kw), (sy, sx), (dy, dx) = conv.kernel, conv.stride, conv.dilation
    oh, ow, g = conv.out_height, conv.out_width, conv.groups
    taps = [
        x[:, :, i * dy : i * dy + (oh - 1) * sy + 1 : sy, j * dx : j * dx + (ow - 1) * sx + 1 : sx]
        for i in range(kh)
        for j in range(kw)
    ]
    ic = conv.in_channels // g
    stacked = np.stack(taps).reshape(kh * kw, conv.batch, g, ic, oh * ow)
    return stacked.transpose(1, 2, 0, 3, 4).reshape(conv.batch, g, kh * kw * ic, oh * ow)
