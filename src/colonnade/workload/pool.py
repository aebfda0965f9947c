"""Max, average and global pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from colonnade.workload.base import Array, Workload
from colonnade.workload.conv import out_size
from colonnade.workload.typed import as_lanes


@dataclass(frozen=True)
class Pool2d(Workload):
    """``kind`` is ``max`` or ``avg``; padding (top, left, bottom, right).

    Padding never counts in a maximum. In an average it counts as zeros only when ``count_include_pad``;
    pixels beyond the padding (``ceil_mode``) never count.
    """

    op: ClassVar[str] = "pool2d"
    kind: str
    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = False
    dtype: str = "f32"

    @property
    def out_height(self) -> int:
        """Rows of the output."""
        return self._out(self.height, 0)

    @property
    def out_width(self) -> int:
        """Columns of the output."""
        return self._out(self.width, 1)

    def _out(self, size: int, axis: int) -> int:
        kernel, stride, dilation = self.kernel[axis], self.stride[axis], self.dilation[axis]
        before, after = self.padding[axis], self.padding[axis + 2]
        if not self.ceil_mode:
            return out_size(size, kernel, stride, before, after, dilation)
        out = -(-(size + before + after - (kernel - 1) * dilation - 1) // stride) + 1
        # a window that would start beyond the padded input is dropped
        return out - 1 if (out - 1) * stride >= size + before else out

    def reference(self, x: Array, *_: Any) -> Array:
        """[N, C, OH, OW]"""
        oh, ow = self.out_height, self.out_width
        out = np.empty((self.batch, self.channels, oh, ow), np.float32)
        for i in range(oh):
            rows, row_count = self.window(i, 0, self.height)
            for j in range(ow):
                columns, column_count = self.window(j, 1, self.width)
                window = x[:, :, rows][:, :, :, columns]
                if self.kind == "max":
                    out[:, :, i, j] = window.max(axis=(2, 3), initial=-np.inf)
                else:
                    count = row_count * column_count if self.count_include_pad else len(rows) * len(columns)
                    out[:, :, i, j] = window.sum(axis=(2, 3), dtype=np.float64) / max(count, 1)
        return out

    def window(self, index: int, axis: int, size: int) -> tuple[list[int], int]:
        """Positions of one window inside the input, and their number when padding counts."""
        first = index * self.stride[axis] - self.padding[axis]
        taps = [first + t * self.dilation[axis] for t in range(self.kernel[axis])]
        counted = sum(t < size + self.padding[axis + 2] for t in taps)
        return [t for t in taps if 0 <= t < size], counted


@dataclass(frozen=True)
class GlobalPool(Workload):
    """Mean (``avg``), ``sum`` or ``max`` over all pixels: [N, C, H, W] → [N, C]."""

    op: ClassVar[str] = "global_pool"
    kind: str
    batch: int
    channels: int
    height: int
    width: int
    dtype: str = "f32"

    def reference(self, x: Array, *_: Any) -> Array:
        """[N, C]"""
        wide = x.astype(np.float64)
        reduce: np.ufunc = np.maximum if self.kind == "max" else np.add
        y = reduce.reduce(wide, axis=(2, 3)) / (self.height * self.width if self.kind == "avg" else 1)
        return np.asarray(y, np.float32)


@dataclass(frozen=True)
class MaxIndices(Workload):
    """Where in the whole array x [N, C, H, W] the maximum of every window of ``pool`` stands: int64 [N, C, OH, OW].

    The first of equal ones, row by row. ``column_major``: a plane's elements are counted column by column.
    """

    op: ClassVar[str] = "max_indices"
    pool: Pool2d
    column_major: bool = False
    dtype: str = "f32"

    def reference(self, x: Array, *_: Any) -> Array:
        """Lanes of int64 [N, C, OH, OW]"""
        pool = self.pool
        n, c, h, w = pool.batch, pool.channels, pool.height, pool.width
        x = x.reshape(n, c, h, w)
        places = np.arange(h * w).reshape((w, h) if self.column_major else (h, w))
        places = places.T if self.column_major else places
        out = np.empty((n, c, pool.out_height, pool.out_width), np.int64)
        for i in range(pool.out_height):
            rows = pool.window(i, 0, h)[0]
            for j in range(pool.out_width):
                columns = pool.window(j, 1, w)[0]
                best = x[:, :, rows][:, :, :, columns].reshape(n, c, -1).argmax(-1)
                out[:, :, i, j] = places[np.ix_(rows, columns)].reshape(-1)[best]
        out += np.arange(n * c).reshape(n, c, 1, 1) * h * w
        return as_lanes(out, "int64")
