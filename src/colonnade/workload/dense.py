"""Operators on dense arrays: row-major, of any rank, where no convolution runs.

A dense array stands in memory as ``Rows``; its shape is that of the ONNX value. What only moves elements is a ``Take``
(or, of several arrays, a ``Join``), described by one table an axis.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from colonnade.workload.base import Array, Workload

Table = npt.NDArray[np.int64]
FILL = -(1 << 40)  # in a table: this element is the fill value; sums with other axes stay negative


def digest(tables: Sequence[Table]) -> str:
    """Short text that is equal exactly for equal tables."""
    return hashlib.sha256(b"|".join(t.astype(np.int64).tobytes() for t in tables)).hexdigest()[:16]


def spread(tables: Sequence[Table]) -> Table:
    """int64 [counts of all tables]: the sum of one entry of each."""
    total = np.zeros((), np.int64)
    for axis, table in enumerate(tables):
        total = total + table.reshape(-1, *[1] * (len(tables) - 1 - axis))
    return np.asarray(total)


@dataclass(frozen=True)
class Take(Workload):
    """``y[i, j, ...] = x.flat[axis0[i] + axis1[j] + ...]``, or ``fill`` where an entry is ``FILL``.

    Transposes, slices, gathers, pads, expansions and nearest resizing are such moves. Constants ``axis0``, ``axis1``,
    ... int64, one an axis of ``target``; ``maps`` is their digest.
    """

    op: ClassVar[str] = "take"
    source: tuple[int, ...]
    target: tuple[int, ...]
    maps: str
    fill: float = 0.0
    dtype: str = "f32"

    def reference(self, x: Array, *_: Any, **tables: Table) -> Array:
        """``target``"""
        where = spread([tables[f"axis{i}"] for i in range(len(self.target))])
        flat = x.reshape(-1)
        picked = flat[np.clip(where, 0, flat.size - 1)] if flat.size else np.zeros(where.shape, np.float32)
        return np.where(where < 0, np.float32(self.fill), picked).astype(np.float32)


@dataclass(frozen=True)
class Join(Workload):
    """Arrays of ``shapes`` one after the other along ``axis``."""

    op: ClassVar[str] = "join"
    shapes: tuple[tuple[int, ...], ...]
    axis: int
    dtype: str = "f32"

    def reference(self, *parts: Array) -> Array:
        """The joined array."""
        return np.concatenate([p.reshape(s) for p, s in zip(parts, self.shapes, strict=True)], axis=self.axis)


@dataclass(frozen=True)
class Constant(Workload):
    """A constant ``value`` brought into the arena, where an operator wants a computed operand."""

    op: ClassVar[str] = "constant"
    shape: tuple[int, ...]
    dtype: str = "f32"

    def reference(self, *_: Any, value: Array) -> Array:
        """``value``"""
        return value.reshape(self.shape)


def _int_pow(a: Array, b: Array) -> Any:
    with np.errstate(all="ignore"):
        return np.power(a.astype(np.float64), b.astype(np.float64))


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "pow": _int_pow,
    "prelu": lambda a, b: np.where(a < 0, a * b, a),
    "fmod": np.fmod,
    "mod": np.mod,
    "div_or_zero": lambda a, b: np.where(b == 0, 0, a / np.where(b == 0, 1, b)),
    "equal": np.equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "and": lambda a, b: (a != 0) & (b != 0),
    "or": lambda a, b: (a != 0) | (b != 0),
    "xor": lambda a, b: (a != 0) ^ (b != 0),
    "where": lambda a, b, c: np.where(a != 0, b, c),
}


@dataclass(frozen=True)
class Elementwise(Workload):
    """``a <kind> b`` (``where``: a ? b : c) with broadcasting as numpy does it; truths are 0 and 1."""

    op: ClassVar[str] = "elementwise"
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str = "f32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return np.broadcast_shapes(*self.shapes)

    def reference(self, *operands: Array) -> Array:
        """``shape``"""
        with np.errstate(all="ignore"):
            shaped = [x.reshape(s) for x, s in zip(operands, self.shapes, strict=True)]
            return np.broadcast_to(np.asarray(ELEMENTWISE[self.kind](*shaped), np.float32), self.shape)


# before the sum (or maximum, minimum, product), and after it (of the sum and the count)
REDUCE: dict[str, Callable[[npt.NDArray[np.float64]], Any]] = {
    "sum": lambda x: x.sum(1),
    "avg": lambda x: x.mean(1),
    "max": lambda x: x.max(1, initial=-np.inf),
    "min": lambda x: x.min(1, initial=np.inf),
    "prod": lambda x: x.prod(1),
    "l1": lambda x: np.abs(x).sum(1),
    "l2": lambda x: np.sqrt((x * x).sum(1)),
    "sumsq": lambda x: (x * x).sum(1),
    "logsum": lambda x: np.log(x.sum(1)),
    "logsumexp": lambda x: _log_sum_exp(x),
}


def _log_sum_exp(x: npt.NDArray[np.float64]) -> Any:
    top = x.max(1, keepdims=True)
    top[np.isinf(top)] = 0  # what is less than an infinity would be no number
    return np.log(np.exp(x - top).sum(1)) + top[:, 0]


@dataclass(frozen=True)
class Reduce(Workload):
    """``y[o, i] = <kind> over n of x[o, n, i]``."""

    op: ClassVar[str] = "reduce"
    kind: str
    outer: int
    count: int
    inner: int
    dtype: str = "f32"

    def reference(self, x: Array, *_: Any) -> Array:
        """[outer, inner]"""
        with np.errstate(all="ignore"):
            wide = x.reshape(self.outer, self.count, self.inner).astype(np.float64)
            return np.asarray(REDUCE[self.kind](wide), np.float32)


@dataclass(frozen=True)
class MatMul(Workload):
    """``factor * a @ b``: a [*a_batch, M, K], b [*b_batch, K, N], batches broadcast as numpy does it."""

    op: ClassVar[str] = "matmul"
    a_batch: tuple[int, ...]
    b_batch: tuple[int, ...]
    rows: int
    inner: int
    columns: int
    factor: float = 1.0
    dtype: str = "f32"

    @property
    def batch(self) -> tuple[int, ...]:
        """Of the result."""
        return np.broadcast_shapes(self.a_batch, self.b_batch)

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return prod(self.batch) * self.rows * self.inner * self.columns

    def reference(self, a: Array, b: Array, *_: Any) -> Array:
        """[*batch, M, N]"""
        wide = a.reshape(*self.a_batch, self.rows, self.inner).astype(np.float64)
        product = wide @ b.reshape(*self.b_batch, self.inner, self.columns).astype(np.float64)
        return np.asarray(product * self.factor, np.float32)


@dataclass(frozen=True)
class Normalise(Workload):
    """``(x - mean) / sqrt(variance + epsilon) * scale + shift`` over the last axis of [rows, width].

    ``centred``: subtract the mean (LayerNorm) or not (RMSNorm); scale and shift [width].
    """

    op: ClassVar[str] = "normalise"
    rows: int
    width: int
    epsilon: float = 1e-5
    centred: bool = True
    dtype: str = "f32"

    def reference(self, x: Array, scale: Array, shift: Array, *_: Any) -> Array:
        """[rows, width]"""
        wide = x.reshape(self.rows, self.width).astype(np.float64)
        wide = wide - wide.mean(1, keepdims=True) if self.centred else wide
        wide = wide / np.sqrt((wide * wide).mean(1, keepdims=True) + self.epsilon)
        return np.asarray(wide * scale + shift, np.float32)


@dataclass(frozen=True)
class Lookup(Workload):
    """``y[o, j, i] = x[o, index[j], i]``: rows of a table by computed indices; negative ones count from the end.

    x [outer, size, inner], computed, or the constant ``table``; an index that is out of range is clamped.
    """

    op: ClassVar[str] = "lookup"
    outer: int
    size: int
    inner: int
    count: int
    constant: bool
    dtype: str = "f32"

    def reference(self, index: Array, x: Array | None = None, *_: Any, table: Array | None = None) -> Array:
        """[outer, count, inner]"""
        data = table if self.constant else x
        assert data is not None
        picked = index.reshape(-1).astype(np.int64)
        picked = np.clip(np.where(picked < 0, picked + self.size, picked), 0, self.size - 1)
        return np.ascontiguousarray(data.reshape(self.outer, self.size, self.inner)[:, picked])
