"""Resizing and moving pixels of planes, and normalisation over channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from colonnade.workload.base import Array, Workload


@dataclass(frozen=True)
class Resample(Workload):
    """``y[r, c] = sum over taps of row_weight[r, i] * column_weight[c, j] * x[row[r, i], column[c, j]]``.

    Linear and cubic resizing. Constants: ``row`` int64 [OH, taps], ``row_weight`` float32 likewise, ``column`` and
    ``column_weight`` [OW, taps]; ``maps`` is their digest.
    """

    op: ClassVar[str] = "resample"
    batch: int
    channels: int
    source: tuple[int, int]
    target: tuple[int, int]
    taps: tuple[int, int]
    maps: str
    dtype: str = "f32"

    def reference(self, x: Array, *_: Any, **constants: Any) -> Array:
        """[N, C, OH, OW]"""
        wide = x.astype(np.float64)
        tall = sum(
            wide[:, :, constants["row"][:, i]] * constants["row_weight"][:, i, None] for i in range(self.taps[0])
        )
        assert isinstance(tall, np.ndarray)
        both = sum(
            tall[:, :, :, constants["column"][:, j]] * constants["column_weight"][:, j] for j in range(self.taps[1])
        )
        return np.asarray(both, np.float32)


@dataclass(frozen=True)
class Lrn(Workload):
    """``x / (bias + alpha / size * sum of squares over ``size`` channels around it) ** beta`` on [N, C, H, W]."""

    op: ClassVar[str] = "lrn"
    shape: tuple[int, int, int, int]
    size: int
    alpha: float
    beta: float
    bias: float
    dtype: str = "f32"

    def reference(self, x: Array, *_: Any) -> Array:
        """Shape of x."""
        wide = x.astype(np.float64)
        squares = np.zeros_like(wide)
        before, after = (self.size - 1) // 2, -(-(self.size - 1) // 2)
        for c in range(x.shape[1]):
            squares[:, c] = (wide[:, max(0, c - before) : c + after + 1] ** 2).sum(1)
        return np.asarray(wide / (self.bias + self.alpha / self.size * squares) ** self.beta, np.float32)
