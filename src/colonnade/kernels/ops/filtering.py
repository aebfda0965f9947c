"""Minimal filtering F(m, r): m outputs of an FIR filter of r taps in n = m + r - 1 products, by evaluation at points.

Winograd, "Arithmetic Complexity of Computations" (1980); as used here: y = A [(G w) * (B d)] for inputs d [n] and
weights w [r]. With the points p_0 .. p_(n-2) and infinity, a row of B holds the coefficients of the product of all
(x - p_k) but its own (of all of them, for infinity), a row of G the powers of its point over what that product is at
the point, a column of A the powers again.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import prod

import numpy as np
import numpy.typing as npt

Program = tuple[tuple[str, str, float, str], ...]  # sums that share what they can: name = first + factor * second

OUTPUTS = 4  # m
# Few, small, in pairs of both signs; measured over sums of 42 products of normal numbers, r = 4 leaves an error of
# 5.5e-7 of their spread where sums in order leave 2.4e-7, and any other half or double as the last point the same.
POINTS: dict[int, tuple[Fraction, ...]] = {
    3: tuple(map(Fraction, (0, 1, -1, 2, -2))),
    4: (*map(Fraction, (0, 1, -1, 2, -2)), Fraction(1, 2)),
}  # by r
ONE = 1  # the place of the point 1, whose column of A holds ones alone: what is added there comes out in every output

# A of x0 .. x(n-1), by pairs of points
_PAIRS: Program = (
    ("a", "x1", 1, "x2"), ("b", "x1", -1, "x2"), ("c", "x3", 1, "x4"), ("d", "x3", -1, "x4"), ("e", "x0", 1, "a"),
    ("f", "b", 8, "d"),
)  # fmt: skip
BACK: dict[int, Program] = {
    3: (*_PAIRS, ("y1", "b", 2, "d"), ("y2", "a", 4, "c"), ("y0", "e", 1, "c"), ("y3", "f", 1, "x5")),
    4: (
        *_PAIRS, ("g", "b", 2, "d"), ("h", "a", 4, "c"), ("i", "e", 1, "c"), ("j", "f", 1, "x6"),
        ("y0", "i", 1, "x5"), ("y1", "g", 0.5, "x5"), ("y2", "h", 0.25, "x5"), ("y3", "j", 0.125, "x5"),
    ),
}  # fmt: skip


def size(r: int) -> int:
    """n: products, and inputs of the window."""
    return OUTPUTS + r - 1


def _product(points: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of the product of all (x - p), the constant one first."""
    found = [Fraction(1)]
    for p in points:
        found = [a - p * b for a, b in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found


def inputs(r: int) -> npt.NDArray[np.float64]:
    """B [n, n]"""
    points = POINTS[r]
    rows = [_product([*points[:i], *points[i + 1 :]]) for i in range(len(points))] + [_product(points)]
    return np.array([[float(v) for v in (*row, 0)][: len(points) + 1] for row in rows])


def weights(r: int) -> npt.NDArray[np.float64]:
    """G [n, r]"""
    rows = []
    for i, p in enumerate(POINTS[r]):
        others = prod(p - q for k, q in enumerate(POINTS[r]) if k != i)
        rows.append([float(p**t / others) for t in range(r)])
    return np.array([*rows, [0.0] * (r - 1) + [1.0]])


def outputs(r: int) -> npt.NDArray[np.float64]:
    """A [m, n]"""
    columns = [[float(p**t) for t in range(OUTPUTS)] for p in POINTS[r]] + [[0.0] * (OUTPUTS - 1) + [1.0]]
    return np.array(columns).T


def into(r: int) -> Program:
    """B as sums, a row each: its last coefficient is 1, so no product stands alone."""
    steps: list[tuple[str, str, float, str]] = []
    for i, row in enumerate(inputs(r)):
        *others, last = np.flatnonzero(row)
        assert row[last] == 1 and others
        name = f"x{last}"
        for count, k in enumerate(others):
            result = f"y{i}" if count + 1 == len(others) else f"t{i}_{count}_"
            steps.append((result, name, float(row[k]), f"x{k}"))
            name = result
    return tuple(steps)
