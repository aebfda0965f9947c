"""Functions of one number: what an epilogue may end in, and what stands alone as ``Unary``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from colonnade.workload import small

Wide = npt.NDArray[np.float64]


def _erf(x: Wide) -> Wide:
    """Abramowitz and Stegun 7.1.5 (series) below 3, 7.1.14 (continued fraction) above; about 1e-13."""
    a = np.minimum(np.abs(x), 6.0)
    small, term, total = np.minimum(a, 3.0), np.minimum(a, 3.0), np.minimum(a, 3.0)
    for n in range(1, 60):
        term = term * -small * small / n
        total = total + term / (2 * n + 1)
    tail = np.maximum(a, 3.0)
    fraction = tail
    for n in range(60, 0, -1):
        fraction = tail + n / 2 / fraction
    large = 1 - np.exp(-tail * tail) / fraction / math.sqrt(math.pi)
    both = np.where(a < 3.0, total * 2 / math.sqrt(math.pi), large)
    return np.asarray(np.where(np.isnan(x), x, np.copysign(both, x)))


def _sigmoid(x: Wide) -> Wide:
    return np.asarray(1 / (1 + np.exp(-x)))


def _softplus(x: Wide) -> Wide:
    return np.asarray(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))


Definition = Callable[[Wide, float, float], Any]


def _to_float(kind: small.SmallFloat) -> Definition:
    return lambda x, a, b: small.to_float(x, kind, a)


def _to_integer(name: str, bits: int) -> Definition:
    return lambda x, a, b: small.to_integer(x, bits, not name.startswith("u"))


# name: (definition in float64 of x, a and b; a and b when none are given)
FUNCTIONS: dict[str, tuple[Definition, float, float]] = {
    "abs": (lambda x, a, b: np.abs(x), 0, 0),
    "acos": (lambda x, a, b: np.arccos(x), 0, 0),
    "acosh": (lambda x, a, b: np.arccosh(x), 0, 0),
    "asin": (lambda x, a, b: np.arcsin(x), 0, 0),
    "asinh": (lambda x, a, b: np.arcsinh(x), 0, 0),
    "atan": (lambda x, a, b: np.arctan(x), 0, 0),
    "atanh": (lambda x, a, b: np.arctanh(x), 0, 0),
    "ceil": (lambda x, a, b: np.ceil(x), 0, 0),
    "celu": (lambda x, a, b: np.maximum(x, 0) + np.minimum(0, a * np.expm1(np.minimum(x, 0) / a)), 1, 0),
    "cos": (lambda x, a, b: np.cos(x), 0, 0),
    "cosh": (lambda x, a, b: np.cosh(x), 0, 0),
    "elu": (lambda x, a, b: np.where(x > 0, x, a * np.expm1(np.minimum(x, 0))), 1, 0),
    "erf": (lambda x, a, b: _erf(x), 0, 0),
    "exp": (lambda x, a, b: np.exp(x), 0, 0),
    "floor": (lambda x, a, b: np.floor(x), 0, 0),
    "gelu": (lambda x, a, b: 0.5 * x * (1 + _erf(x / math.sqrt(2))), 0, 0),
    "gelu_tanh": (lambda x, a, b: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), 0, 0),
    "half": (lambda x, a, b: x.astype(np.float16), 0, 0),
    "hard_sigmoid": (lambda x, a, b: np.clip(a * x + b, 0, 1), 0.2, 0.5),
    "hard_swish": (lambda x, a, b: x * np.clip(x / 6 + 0.5, 0, 1), 0, 0),
    "leaky_relu": (lambda x, a, b: np.where(x < 0, a * x, x), 0.01, 0),
    "log": (lambda x, a, b: np.log(x), 0, 0),
    "logical_not": (lambda x, a, b: x == 0, 0, 0),
    "mish": (lambda x, a, b: x * np.tanh(_softplus(x)), 0, 0),
    "neg": (lambda x, a, b: -x, 0, 0),
    "pow": (lambda x, a, b: np.power(x, a), 2, 0),
    "reciprocal": (lambda x, a, b: 1 / x, 0, 0),
    "round": (lambda x, a, b: np.rint(x), 0, 0),
    "selu": (lambda x, a, b: b * np.where(x > 0, x, a * np.expm1(np.minimum(x, 0))), 1.6732632, 1.050701),
    "shrink": (lambda x, a, b: np.where(x < -a, x + b, np.where(x > a, x - b, 0)), 0.5, 0),
    "sigmoid": (lambda x, a, b: _sigmoid(x), 0, 0),
    "sign": (lambda x, a, b: np.sign(x), 0, 0),
    "silu": (lambda x, a, b: x * _sigmoid(x), 0, 0),
    "sin": (lambda x, a, b: np.sin(x), 0, 0),
    "sinh": (lambda x, a, b: np.sinh(x), 0, 0),
    "softplus": (lambda x, a, b: _softplus(x), 0, 0),
    "softsign": (lambda x, a, b: x / (1 + np.abs(x)), 0, 0),
    "sqrt": (lambda x, a, b: np.sqrt(x), 0, 0),
    "square": (lambda x, a, b: x * x, 0, 0),
    "tan": (lambda x, a, b: np.tan(x), 0, 0),
    "tanh": (lambda x, a, b: np.tanh(x), 0, 0),
    "thresholded_relu": (lambda x, a, b: np.where(x > a, x, 0), 1, 0),
    "trunc": (lambda x, a, b: np.trunc(x), 0, 0),
    "is_inf": (lambda x, a, b: ((x == np.inf) & (a != 0)) | ((x == -np.inf) & (b != 0)), 1, 1),
    "is_nan": (lambda x, a, b: np.isnan(x), 0, 0),
    # rounding to a type that float32 holds; a: what is too large becomes the largest number
    "to_bool": (lambda x, a, b: x != 0, 0, 0),
    f"to_{small.POWERS}": (small.to_power, 1, 0),
    **{f"to_{name}": (_to_float(kind), 0, 0) for name, kind in small.FLOATS.items()},
    **{f"to_{name}": (_to_integer(name, bits), 0, 0) for name, bits in small.INTEGERS.items()},
}


@dataclass(frozen=True)
class Function:
    """``FUNCTIONS[name]`` with its parameters ``a`` and ``b`` (0 where it has none)."""

    name: str
    a: float = 0.0
    b: float = 0.0

    @staticmethod
    def of(name: str, a: float | None = None, b: float | None = None) -> Function:
        """The function with its usual parameters where none are given."""
        _, first, second = FUNCTIONS[name]
        return Function(name, float(first if a is None else a), float(second if b is None else b))

    def __call__(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The definition, computed in float64."""
        with np.errstate(all="ignore"):
            return np.asarray(FUNCTIONS[self.name][0](x.astype(np.float64), self.a, self.b), np.float32)

    def __str__(self) -> str:
        return f"{self.name}({self.a:g},{self.b:g})" if self.a or self.b else self.name
