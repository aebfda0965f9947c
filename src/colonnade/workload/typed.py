"""Operators on numbers that float32 does not hold exactly: float64 and whole numbers of 32 and 64 bits.

An array of such a type stands in memory in its own bytes, as ``Rows`` of float32 lanes: one or two an element. What
only moves elements moves lanes; these workloads see the lanes as what they are. Truths stay float32, 0 and 1, as
everywhere. Whole numbers wrap around as C's unsigned ones do; what C leaves undefined (a division by zero, a float that
fits no whole number) gives 0 and the nearest one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from colonnade.workload import small
from colonnade.workload.base import Array, Workload
from colonnade.workload.function import FUNCTIONS

WIDE = ("float64", "int32", "uint32", "int64", "uint64")
F32 = "float32"


def lanes(dtype: str) -> int:
    """Float32 lanes that an element takes in memory."""
    return np.dtype(dtype).itemsize // 4 if dtype in WIDE else 1


def as_typed(x: Array, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Lanes seen as what they hold."""
    flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    seen: npt.NDArray[Any] = np.ndarray(shape, dtype if dtype in WIDE else F32, flat)
    return seen


def as_lanes(y: npt.NDArray[Any], dtype: str) -> Array:
    """float32 [lanes]: an array of ``dtype`` as it stands in memory."""
    held = np.ascontiguousarray(y).astype(dtype if dtype in WIDE else np.float32).reshape(-1)
    return held.view(np.float32)


def _whole(x: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Floats as whole numbers: cut, the nearest one that there is, 0 for a NaN."""
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    inside = (x > float(least)) & (x < float(most))  # both round away from zero
    cut = np.where(inside, x, 0).astype(dtype)
    return np.where(
        inside | np.isnan(x), cut, np.where(x <= float(least), np.array(least, dtype), np.array(most, dtype))
    )


def convert(x: npt.NDArray[Any], target: str) -> npt.NDArray[Any]:
    """The numbers ``x`` as numbers of type ``target``; float32 holds those of at most 16 bits."""
    with np.errstate(all="ignore"):
        if target == "bool":
            return np.asarray(x != 0, np.float32)
        if target in small.INTEGERS:
            bits, signed = small.INTEGERS[target], not target.startswith("u")
            if x.dtype.kind == "f":
                return small.to_integer(x.astype(np.float64), bits, signed).astype(np.float32)
            low = x.astype(np.int64) & ((1 << bits) - 1)
            return (low - ((low >> (bits - 1)) << bits) if signed else low).astype(np.float32)
        if target == "float16":
            return x.astype(np.float16).astype(np.float32)
        if target in WIDE and target != "float64" and x.dtype.kind == "f":
            return _whole(x, target)
        return x.astype(target)


@dataclass(frozen=True)
class Cast(Workload):
    """Numbers of type ``source`` as those of ``target``, numpy's names.

    ``import``: the user's array; ``export``: into the user's; ``within``: from one place of the arena to another.
    There float32 holds the types of at most 16 bits, and ``WIDE`` ones stand as they are.
    """

    op: ClassVar[str] = "cast"
    kind: str
    shape: tuple[int, ...]
    source: str
    target: str
    dtype: str = "f32"

    def reference(self, x: Any, *_: Any) -> Any:
        """The same values: lanes, or for ``export`` the user's array."""
        if self.kind == "import":
            return as_lanes(convert(x, self.target), self.target)
        held = as_typed(x, self.source, self.shape)
        if self.kind == "export":
            return held.astype(self.target).reshape(self.shape)
        return as_lanes(convert(held, self.target), self.target)


def _int_divide(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Any:
    none = b == 0
    by = np.where(none, np.ones_like(b), b)
    if a.dtype.kind == "u":
        return np.where(none, 0, a // by).astype(a.dtype)
    floor, rest = a // by, np.fmod(a, by)
    return np.where(none, 0, floor + ((rest != 0) & ((a < 0) != (by < 0)))).astype(a.dtype)


def _remainder(a: npt.NDArray[Any], b: npt.NDArray[Any], floor: bool) -> Any:
    if a.dtype.kind == "f":
        return np.mod(a, b) if floor else np.fmod(a, b)
    by = np.where(b == 0, np.ones_like(b), b)
    return np.where(b == 0, 0, np.mod(a, by) if floor else np.fmod(a, by)).astype(a.dtype)


def _power(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Any:
    """By squaring, so that whole numbers wrap around; one over it, cut, for negative exponents."""
    if a.dtype.kind == "f":
        return np.power(a, b)
    total, base, left = np.ones(np.broadcast_shapes(a.shape, b.shape), a.dtype), a.copy(), np.maximum(b, 0)
    while (left > 0).any():
        total = np.where(left & 1, total * base, total).astype(a.dtype)
        base, left = base * base, left >> 1
    one_over = np.where(a == 1, 1, np.where(a == np.array(-1).astype(a.dtype), np.where(b & 1, -1, 1), 0))
    return np.where(b < 0, one_over, total).astype(a.dtype) if b.dtype.kind == "i" else total


TYPED: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": lambda a, b: np.divide(a, b) if a.dtype.kind == "f" else _int_divide(a, b),
    "max": np.maximum,
    "min": np.minimum,
    "pow": _power,
    "prelu": lambda a, b: np.where(a < 0, a * b, a),
    "fmod": lambda a, b: _remainder(a, b, False),
    "mod": lambda a, b: _remainder(a, b, True),
    "equal": np.equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "where": lambda a, b, c: np.where(a != 0, b, c),
    "abs": np.abs,
    "neg": lambda a: np.subtract(np.zeros_like(a), a),
    "sign": np.sign,
}
TRUTHS = ("equal", "less", "less_equal", "greater", "greater_equal")
DOUBLES = ("ceil", "cos", "erf", "exp", "floor", "log", "reciprocal", "round", "sigmoid", "sin", "sqrt", "tanh")
TYPED.update({name: lambda a, f=FUNCTIONS[name][0]: f(a, 0, 0) for name in DOUBLES})


@dataclass(frozen=True)
class TypedElementwise(Workload):
    """``kind`` of one to three arrays of ``type`` with broadcasting as numpy does it (``where``: the first are truths).

    Comparisons give truths. ``DOUBLES`` are functions of one float64.
    """

    op: ClassVar[str] = "typed_elementwise"
    kind: str
    type: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str = "f32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return np.broadcast_shapes(*self.shapes)

    @property
    def result(self) -> str:
        """Type of the result."""
        return F32 if self.kind in TRUTHS else self.type

    def reference(self, *operands: Array) -> Array:
        """Lanes of ``shape``."""
        kinds = [F32 if self.kind == "where" and i == 0 else self.type for i in range(len(self.shapes))]
        with np.errstate(all="ignore"):
            shaped = [as_typed(x, k, s) for x, k, s in zip(operands, kinds, self.shapes, strict=True)]
            y = np.broadcast_to(np.asarray(TYPED[self.kind](*shaped)), self.shape)
        return as_lanes(y, self.result)


def _log_sum_exp(x: npt.NDArray[Any]) -> Any:
    top = x.max(1, keepdims=True)
    return np.log(np.exp(x - top).sum(1)) + top[:, 0]


REDUCED: dict[str, Callable[[npt.NDArray[Any]], Any]] = {
    "sum": lambda x: x.sum(1, dtype=x.dtype),
    "avg": lambda x: (
        x.mean(1) if x.dtype.kind == "f" else _int_divide(x.sum(1, dtype=x.dtype), np.full(1, x.shape[1], x.dtype))
    ),
    "max": lambda x: x.max(1),
    "min": lambda x: x.min(1),
    "prod": lambda x: x.prod(1, dtype=x.dtype),
    "l1": lambda x: np.abs(x).sum(1, dtype=x.dtype),
    "sumsq": lambda x: (x * x).sum(1, dtype=x.dtype),
    "l2": lambda x: np.sqrt((x * x).sum(1)),
    "logsum": lambda x: np.log(x.sum(1)),
    "logsumexp": _log_sum_exp,
}
FLOATING = ("l2", "logsum", "logsumexp")  # of float64 alone


@dataclass(frozen=True)
class TypedReduce(Workload):
    """``y[o, i] = <kind> over n of x[o, n, i]`` in ``type``; a mean of whole numbers is cut."""

    op: ClassVar[str] = "typed_reduce"
    kind: str
    type: str
    outer: int
    count: int
    inner: int
    dtype: str = "f32"

    def reference(self, x: Array, *_: Any) -> Array:
        """Lanes of [outer, inner]"""
        with np.errstate(all="ignore"):
            wide = as_typed(x, self.type, (self.outer, self.count, self.inner))
            return as_lanes(np.asarray(REDUCED[self.kind](wide)), self.type)


@dataclass(frozen=True)
class TypedMatMul(Workload):
    """``a @ b`` in ``type``: a [*a_batch, M, K], b [*b_batch, K, N], batches broadcast as numpy does it."""

    op: ClassVar[str] = "typed_matmul"
    type: str
    a_batch: tuple[int, ...]
    b_batch: tuple[int, ...]
    rows: int
    inner: int
    columns: int
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
        """Lanes of [*batch, M, N]"""
        left = as_typed(a, self.type, (*self.a_batch, self.rows, self.inner))
        return as_lanes(left @ as_typed(b, self.type, (*self.b_batch, self.inner, self.columns)), self.type)
