"""What transformers compute between their linear layers, on planes: a plane a feature, tokens in the lanes.

Linear layers on such planes are 1x1 convolutions (``Conv2d``). Here is the rest: normalisation and softmax over the
channels of every pixel, and products of two computed arrays. No operator sums over lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from colonnade.workload.base import Array, Workload
from colonnade.workload.dense import Take


@dataclass(frozen=True)
class Reorder(Take):
    """A ``Take`` that is a change of layout: planes of tokens to a dense array in any order of axes, or back."""

    op: ClassVar[str] = "reorder"


@dataclass(frozen=True)
class ChannelNorm(Workload):
    """``(x - mean) / sqrt(variance + epsilon) * scale[c] + shift[c]`` over the channels of every pixel of [N, C, H, W].

    ``centred``: subtract the mean (LayerNorm) or not (RMSNorm).
    """

    op: ClassVar[str] = "channel_norm"
    shape: tuple[int, int, int, int]
    epsilon: float = 1e-5
    centred: bool = True
    dtype: str = "f32"

    def reference(self, x: Array, scale: Array, shift: Array, *_: Any) -> Array:
        """Shape of x."""
        wide = x.astype(np.float64)
        wide = wide - wide.mean(1, keepdims=True) if self.centred else wide
        wide = wide / np.sqrt((wide * wide).mean(1, keepdims=True) + self.epsilon)
        return np.asarray(wide * scale[:, None, None] + shift[:, None, None], np.float32)


@dataclass(frozen=True)
class ChannelSoftmax(Workload):
    """Softmax over each of ``groups`` runs of equally many channels, of every pixel of [N, C, H, W]."""

    op: ClassVar[str] = "channel_softmax"
    shape: tuple[int, int, int, int]
    groups: int
    dtype: str = "f32"

    def reference(self, x: Array, *_: Any) -> Array:
        """Shape of x."""
        n, c, h, w = self.shape
        wide = x.astype(np.float64).reshape(n, self.groups, c // self.groups, h, w)
        e = np.exp(wide - wide.max(2, keepdims=True))
        return np.asarray((e / e.sum(2, keepdims=True)).reshape(self.shape), np.float32)


@dataclass(frozen=True)
class PlaneProduct(Workload):
    """``y[n, (g, r), p] = factor * sum over k of a[n, g, r, k] * x[n, (g, k), p]`` for every image n and group g.

    x [N, groups * inner, 1, pixels], y [N, groups * rows, 1, pixels]. a stands in planes too: ``across`` False, a
    plane for every (g, k) with r in the lanes, [N, groups * inner, 1, rows] (scores of keys for queries); True, a
    plane for every (g, r) with k in the lanes, [N, groups * rows, 1, inner] (values weighted by scores).
    """

    op: ClassVar[str] = "plane_product"
    batch: int
    groups: int
    rows: int
    inner: int
    pixels: int
    across: bool
    factor: float = 1.0
    dtype: str = "f32"

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.batch * self.groups * self.rows * self.inner * self.pixels

    def reference(self, x: Array, a: Array, *_: Any) -> Array:
        """[N, groups * rows, 1, pixels]"""
        n, g = self.batch, self.groups
        wide = a.astype(np.float64)
        wide = wide.reshape(n, g, self.rows, self.inner) if self.across else wide.reshape(n, g, self.inner, self.rows)
        left = wide if self.across else wide.swapaxes(2, 3)
        product = left @ x.astype(np.float64).reshape(n, g, self.inner, self.pixels)
        return np.asarray(product * self.factor, np.float32).reshape(n, g * self.rows, 1, self.pixels)
