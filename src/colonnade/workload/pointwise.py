"""Operators that touch each element once: add, multiply, scale and shift, activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from colonnade.workload.base import NONE, Activation, Array, Workload
from colonnade.workload.function import Function

BINARY: dict[str, Callable[[Array, Array], Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


@dataclass(frozen=True)
class Binary(Workload):
    """``activation(a <kind> b)``. a is [N, C, H, W] or [N, C]; b has a's shape, or is [N, C] beside planes
    (``broadcast``: one number a channel and image, as squeeze-and-excite scales)."""

    op: ClassVar[str] = "binary"
    kind: str
    shape: tuple[int, ...]
    broadcast: bool = False
    activation: Activation = NONE
    dtype: str = "f32"

    def reference(self, a: Array, b: Array, *_: Any) -> Array:
        """Shape of a."""
        b = b[:, :, None, None] if self.broadcast else b
        return self.activation(BINARY[self.kind](a, b).astype(np.float32))


@dataclass(frozen=True)
class Affine(Workload):
    """``activation(x * scale[c] + shift[c])``: a BatchNorm that no convolution could take, a bare activation, a
    multiplication by constants. x [N, C, H, W] or [N, C]; scale and shift [C]."""

    op: ClassVar[str] = "affine"
    shape: tuple[int, ...]
    activation: Activation = NONE
    dtype: str = "f32"

    def reference(self, x: Array, scale: Array, shift: Array, *_: Any) -> Array:
        """Shape of x."""
        axes = (slice(None),) + (None,) * (len(self.shape) - 2)
        return self.activation((x * scale[axes] + shift[axes]).astype(np.float32))


@dataclass(frozen=True)
class Unary(Workload):
    """``function(x)`` of every element of [N, C, H, W] or [N, C]."""

    op: ClassVar[str] = "unary"
    function: Function
    shape: tuple[int, ...]
    dtype: str = "f32"

    def reference(self, x: Array, *_: Any) -> Array:
        """Shape of x."""
        return self.function(x)


@dataclass(frozen=True)
class Softmax(Workload):
    """Softmax over the last axis of [N, C]."""

    op: ClassVar[str] = "softmax"
    shape: tuple[int, int]
    dtype: str = "f32"

    def reference(self, x: Array, *_: Any) -> Array:
        """[N, C]"""
        e = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
        return np.asarray(e / e.sum(axis=-1, keepdims=True), np.float32)
